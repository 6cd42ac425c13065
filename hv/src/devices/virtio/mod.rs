//! virtio 1.x devices. A device model is transport-neutral; [`mmio`] is the transport it is reached by.
//!
//! ```text
//!   guest driver -- registers --> mmio::Transport -- activate, reset, notify --> dyn VirtioDevice (block, net, rng, balloon)
//!        \--- rings in guest RAM ------------------------------------------------> queue::RequestQueue
//! ```

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod driven;
pub(crate) mod driven_net;
mod flight;
pub(crate) mod limiter;
pub(crate) mod mmio;
pub(crate) mod net;
pub(crate) mod offload;
pub(crate) mod queue;
pub(crate) mod request;
pub(crate) mod rng;
#[cfg(test)]
mod tests;
pub(crate) mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::devices::Interrupt;
use crate::memory::GuestRam;
use crate::state::{self, StateError};
use queue::{DrainTimeout, RequestQueue};

/// What drivers find, by version of the devices. A guest that boots is offered what all nodes of its cluster have, and finds the
/// same wherever it goes; the version is in the VM's configuration as long as it runs.
///
/// | version | brought |
/// |---|---|
/// | 0 | the first release |
/// | 1 | the ring event index; what a network card leaves to its host, and its host to it |
pub const DEVICES_VERSION: u32 = 1;

/// `VIRTIO_F_VERSION_1`: the driver speaks the standard, not a draft of it.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`: chains may lie in a table of their own.
pub(crate) const FEATURE_INDIRECT: u64 = 1 << 28;

/// `VIRTIO_F_EVENT_IDX`: each side says by a place in a ring from where on it wants to hear of the other.
pub(crate) const FEATURE_EVENT_INDEX: u64 = 1 << 29;
/// What every device has.
pub(crate) const FEATURES_OF_ALL: u64 = FEATURE_VERSION_1 | FEATURE_INDIRECT | FEATURE_EVENT_INDEX;

const STATUS_USED: u32 = 1;
const STATUS_CONFIG: u32 = 2;

/// What a transport needs of a device.
pub(crate) trait VirtioDevice: Send + Sync {
    /// The standard's number of the kind of device.
    fn kind(&self) -> u32;
    /// Features that it has. A driver is offered them by its transport.
    fn features(&self) -> u64;
    /// Those that came with a version of the devices after the first.
    fn later_features(&self) -> u64 {
        FEATURE_EVENT_INDEX
    }
    /// The queues, by number.
    fn queues(&self) -> &[RequestQueue];
    /// Where the rings are.
    fn ram(&self) -> &GuestRam;
    /// The interrupt and its reasons.
    fn interrupt(&self) -> &DeviceInterrupt;
    /// Reads configuration space; zeros beyond its end.
    fn read_config(&self, offset: u64, into: &mut [u8]);
    /// The driver writes to configuration space; most devices have nothing there to write.
    fn write_config(&self, _offset: u64, _bytes: &[u8]) {}
    /// The driver is ready and has accepted these features.
    fn activate(&self, features: u64);
    /// There may be new requests in any queue. Never blocks.
    fn notify(&self);
    /// The driver has given its device back: accepted features are none.
    fn forget(&self) {
        self.activate(0);
    }
    /// What must be the same wherever the VM runs, beside the features. Saved, and compared at a restore.
    fn identity(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Adds to a saved state what it has beside its queues and its registers.
    fn save(&self, _into: &mut state::Device) {}
    /// Takes that over, before its queues and registers.
    fn restore(&self, _saved: &state::Device) -> Result<(), StateError> {
        Ok(())
    }

    /// Back to power-on. When something stays in flight, guest memory is still in use: then nothing changes, and the
    /// driver sees a device that failed.
    fn reset(&self) {
        for queue in self.queues() {
            if let Err(error) = queue.hold_and_drain(self.ram()) {
                tracing::error!(kind = self.kind(), %error, "reset of a device refused");
                return;
            }
        }
        for queue in self.queues() {
            queue.reset();
        }
        self.forget();
        for queue in self.queues() {
            queue.release();
        }
    }

    /// Stops taking requests and waits for those in flight.
    fn hold_and_drain(&self) -> Result<(), DrainTimeout> {
        self.queues().iter().try_for_each(|queue| queue.hold_and_drain(self.ram()))
    }

    /// Goes on, with a look at the queues: a notification may have been consumed without being served.
    fn release(&self) {
        self.queues().iter().for_each(RequestQueue::release);
        self.interrupt().raise_again();
        self.notify();
    }
}

/// An interrupt line and why it was raised. Reasons stay until the driver acknowledges them.
#[derive(Debug)]
pub(crate) struct DeviceInterrupt {
    line: Arc<dyn Interrupt>,
    reasons: AtomicU32,
    /// Moves on with each change of the configuration, so that a driver notices one in the middle of its reading.
    generation: AtomicU32,
}

impl DeviceInterrupt {
    pub(crate) fn new(line: Arc<dyn Interrupt>) -> Self {
        Self { line, reasons: AtomicU32::new(0), generation: AtomicU32::new(0) }
    }

    /// A request was completed.
    pub(crate) fn used(&self) {
        self.raise(STATUS_USED);
    }

    /// The configuration, or the device's status, has changed.
    pub(crate) fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
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

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(crate) fn restore_generation(&self, generation: u32) {
        self.generation.store(generation, Ordering::SeqCst);
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
