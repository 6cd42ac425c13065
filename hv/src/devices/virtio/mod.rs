//! virtio 1.x devices. A device model is transport-neutral; [`mmio`] is the transport it is reached by.
//!
//! ```text
//!   guest driver -- registers --> mmio::Transport -- activate, reset, notify --> dyn VirtioDevice (block::Disk)
//!        \--- rings in guest RAM ------------------------------------------------> queue::RequestQueue
//! ```

pub(crate) mod block;
mod flight;
pub(crate) mod mmio;
pub(crate) mod queue;
pub(crate) mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::devices::Interrupt;
use queue::RequestQueue;

/// `VIRTIO_F_VERSION_1`: the driver speaks the standard, not a draft of it.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`: chains may lie in a table of their own.
pub(crate) const FEATURE_INDIRECT: u64 = 1 << 28;

const STATUS_USED: u32 = 1;
const STATUS_CONFIG: u32 = 2;

/// What a transport needs of a device with one queue.
pub(crate) trait VirtioDevice: Send + Sync {
    /// The standard's number of the kind of device.
    fn kind(&self) -> u32;
    /// Features that a driver may accept.
    fn features(&self) -> u64;
    /// The queue.
    fn queue(&self) -> &RequestQueue;
    /// The interrupt and its reasons.
    fn interrupt(&self) -> &DeviceInterrupt;
    /// Reads configuration space; zeros beyond its end.
    fn read_config(&self, offset: u64, into: &mut [u8]);
    /// The driver is ready and has accepted these features.
    fn activate(&self, features: u64);
    /// There may be new requests. Never blocks.
    fn notify(&self);
    /// Back to power-on; returns when nothing is in flight.
    fn reset(&self);
}

/// An interrupt line and why it was raised. Reasons stay until the driver acknowledges them.
#[derive(Debug)]
pub(crate) struct DeviceInterrupt {
    line: Arc<dyn Interrupt>,
    reasons: AtomicU32,
}

impl DeviceInterrupt {
    pub(crate) fn new(line: Arc<dyn Interrupt>) -> Self {
        Self { line, reasons: AtomicU32::new(0) }
    }

    /// A request was completed.
    pub(crate) fn used(&self) {
        self.raise(STATUS_USED);
    }

    /// The configuration, or the device's status, has changed.
    pub(crate) fn config_changed(&self) {
        self.raise(STATUS_CONFIG);
    }

    fn raise(&self, reason: u32) {
        // The reason first: a driver that gets the interrupt must find it.
        self.reasons.fetch_or(reason, Ordering::SeqCst);
        self.line.trigger();
    }

    pub(crate) fn reasons(&self) -> u32 {
        self.reasons.load(Ordering::SeqCst)
    }

    pub(crate) fn acknowledge(&self, reasons: u32) {
        self.reasons.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(crate) fn restore(&self, reasons: u32) {
        self.reasons.store(reasons & (STATUS_USED | STATUS_CONFIG), Ordering::SeqCst);
    }

    /// Raises the line again for reasons that the driver has not acknowledged. A pulse too many is harmless, a lost one
    /// stops the driver for good.
    pub(crate) fn raise_again(&self) {
        if self.reasons() != 0 {
            self.line.trigger();
        }
    }
}
