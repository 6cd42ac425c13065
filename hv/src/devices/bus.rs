//! Where ports and addresses lead to.

use std::sync::Arc;

use super::serial::{COM1, SerialPort};
use super::virtio::block::Disk;
use super::virtio::mmio::{Transport, WINDOW_BYTES};

/// First register window; one page for each slot.
pub(crate) const MMIO_START: u64 = 0xd000_0000;
/// Interrupt line of each slot: those that legacy devices leave free.
pub(crate) const SLOT_LINES: [u32; crate::DISKS_MAX] = [5, 9, 10, 11, 12, 6, 7, 14];
/// A bare-metal guest writes its exit code here.
const EXIT_PORT: u16 = 0xf4;
/// Command port of the keyboard controller, and the command that pulls the processor's reset line.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;

/// What an access means for the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The guest asked for a reset.
    Reset,
    /// The guest ended itself with this code.
    Exit(u32),
}

/// A disk with its transport.
pub(crate) struct Slot {
    pub(crate) disk: Arc<Disk>,
    pub(crate) transport: Transport,
}

/// All devices of a VM outside of the kernel.
pub(crate) struct Bus {
    pub(crate) serial: SerialPort,
    pub(crate) slots: Vec<Slot>,
}

/// First address of a slot's registers.
pub(crate) fn window(slot: u32) -> u64 {
    MMIO_START + u64::from(slot) * WINDOW_BYTES
}

impl Bus {
    pub(crate) fn port_read(&self, port: u16, into: &mut [u8]) {
        into.fill(0xff);
        match (port, into) {
            (COM1..=0x3ff, [byte]) => *byte = self.serial.read(register(port)),
            // Nothing in the keyboard controller's buffers: a driver goes on at once.
            (0x60..=0x64, [byte]) => *byte = 0,
            _ => {}
        }
    }

    pub(crate) fn port_write(&self, port: u16, bytes: &[u8]) -> Effect {
        match (port, bytes) {
            (COM1..=0x3ff, [byte]) => self.serial.write(register(port), *byte),
            (I8042_COMMAND, [I8042_RESET]) => return Effect::Reset,
            (EXIT_PORT, _) => return Effect::Exit(little_endian(bytes)),
            _ => {}
        }
        Effect::None
    }

    pub(crate) fn mmio_read(&self, address: u64, into: &mut [u8]) {
        into.fill(0xff);
        if let Some((transport, offset)) = self.resolve(address) {
            transport.read(offset, into);
        }
    }

    pub(crate) fn mmio_write(&self, address: u64, bytes: &[u8]) {
        if let Some((transport, offset)) = self.resolve(address) {
            transport.write(offset, bytes);
        }
    }

    fn resolve(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let slot = usize::try_from(offset / WINDOW_BYTES).ok()?;
        Some((&self.slots.get(slot)?.transport, offset % WINDOW_BYTES))
    }
}

fn register(port: u16) -> u8 {
    u8::try_from(port - COM1).expect("one of eight ports")
}

fn little_endian(bytes: &[u8]) -> u32 {
    bytes.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.slots.iter().map(|slot| &slot.disk)).finish()
    }
}
