//! Where ports and addresses lead to.

use std::sync::Arc;

use super::rtc::{RTC_PORT, Rtc};
use super::serial::{COM1, SerialPort};
use super::virtio::VirtioDevice;
use super::virtio::block::Disk;
use super::virtio::mmio::{Transport, WINDOW_BYTES};

/// First register window; one page for each slot.
const MMIO_START: u64 = 0xd000_0000;
/// Interrupt line of each slot: first those that legacy devices leave free of the two 8259, for kernels that know only
/// these; then what only the IOAPIC has.
const SLOT_LINES: [u32; SLOTS_MAX] = [5, 9, 10, 11, 12, 6, 7, 14, 15, 3, 16, 17];
/// Devices with registers in memory: the disks, then the others.
pub(crate) const SLOTS_MAX: usize = crate::DISKS_MAX + 4;

/// Where the registers and the interrupt line of a slot are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) line: u32,
}

impl Place {
    /// The place of slot `slot`, below [`SLOTS_MAX`].
    pub(crate) fn of_slot(slot: usize) -> Self {
        Self { start: MMIO_START + slot as u64 * WINDOW_BYTES, line: SLOT_LINES[slot] }
    }
}

/// A bare-metal guest writes its exit code here.
const EXIT_PORT: u16 = 0xf4;
/// Command port of the keyboard controller, and the command that pulls the processor's reset line.
pub(crate) const RESET_PORT: u16 = 0x64;
pub(crate) const RESET_VALUE: u8 = 0xfe;
/// Sleep registers of ACPI: type and go in one byte; nothing ever wakes up, so the status is zero.
pub(crate) const SLEEP_CONTROL_PORT: u16 = 0x600;
pub(crate) const SLEEP_STATUS_PORT: u16 = 0x601;
pub(crate) const SLEEP_TYPE_OFF: u8 = 5;
const SLEEP_GO: u8 = 1 << 5;
const POWER_OFF: u8 = SLEEP_TYPE_OFF << 2 | SLEEP_GO;

const RTC_DATA_PORT: u16 = RTC_PORT + 1;

/// What an access means for the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest ended itself with this code.
    Exit(u32),
}

/// A disk with its transport.
pub(crate) struct Slot {
    pub(crate) disk: Arc<Disk>,
    pub(crate) transport: Transport,
}

/// Any other virtio device.
pub(crate) struct Other {
    /// In saved states.
    pub(crate) name: &'static str,
    pub(crate) slot: usize,
    pub(crate) device: Arc<dyn VirtioDevice>,
    pub(crate) transport: Transport,
}

/// All devices of a VM outside of the kernel.
pub(crate) struct Bus {
    pub(crate) serial: SerialPort,
    pub(crate) rtc: Rtc,
    /// By number.
    pub(crate) slots: Vec<Slot>,
    pub(crate) others: Vec<Other>,
}

impl Bus {
    pub(crate) fn port_read(&self, port: u16, into: &mut [u8]) {
        into.fill(0xff);
        match (port, into) {
            (COM1..=0x3ff, [byte]) => *byte = self.serial.read(register(port)),
            (RTC_PORT, [byte]) => *byte = self.rtc.selected(),
            (RTC_DATA_PORT, [byte]) => *byte = self.rtc.read(),
            (SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT, [byte]) => *byte = 0,
            // Nothing in the keyboard controller's buffers: a driver goes on at once.
            (0x60..=0x64, [byte]) => *byte = 0,
            _ => {}
        }
    }

    pub(crate) fn port_write(&self, port: u16, bytes: &[u8]) -> Effect {
        match (port, bytes) {
            (COM1..=0x3ff, [byte]) => self.serial.write(register(port), *byte),
            (RTC_PORT, [byte]) => self.rtc.select(*byte),
            (RESET_PORT, [RESET_VALUE]) => return Effect::Reset,
            (SLEEP_CONTROL_PORT, [POWER_OFF]) => return Effect::PowerOff,
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
        let disk = self.slots.get(slot).map(|slot| &slot.transport);
        let other = || self.others.iter().find(|other| other.slot == slot).map(|other| &other.transport);
        Some((disk.or_else(other)?, offset % WINDOW_BYTES))
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
