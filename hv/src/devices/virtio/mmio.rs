//! The virtio-mmio transport, version 2: one page of registers per device.
//!
//! | offset | register | offset | register |
//! |---|---|---|---|
//! | 00 | magic `virt` | 38 | queue size |
//! | 04 | version 2 | 44 | queue ready |
//! | 08 | device kind | 50 | notify |
//! | 0c | vendor | 60, 64 | interrupt reasons, acknowledge |
//! | 10, 14 | device features, half to show | 70 | status |
//! | 20, 24 | driver features, half to set | 80-a4 | descriptor, available, used ring |
//! | 30, 34 | queue number, its largest size | fc, 100 | config generation, config space |
//!
//! **Invariant:** whatever the guest writes, the device is in a state of the standard's life cycle; a driver that breaks
//! it finds `DEVICE_NEEDS_RESET`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::QueueT;

use super::queue::{QUEUE_SIZE_MAX, RequestQueue};
use super::{FEATURE_EVENT_INDEX, FEATURE_VERSION_1, VirtioDevice};
use crate::memory::GuestRam;
use crate::state::{self, StateError};

/// Length of a device's register window.
pub(crate) const WINDOW_BYTES: u64 = 0x1000;
/// The register that a driver writes to when it has posted requests.
pub(crate) const NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"csvf");
const CONFIG_SPACE: u64 = 0x100;

const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_NEEDS_RESET: u32 = 64;
const STATUS_KNOWN: u32 = 1 | 2 | STATUS_DRIVER_OK | STATUS_FEATURES_OK | 128;

#[derive(Debug, Default)]
struct Registers {
    status: u32,
    driver_features: u64,
    features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
}

/// A device behind its registers.
pub(crate) struct Transport {
    device: Arc<dyn VirtioDevice>,
    ram: GuestRam,
    /// Features of the device that are not offered. A driver that comes with its state may have accepted them elsewhere.
    withheld: u64,
    /// Protects the registers. The device's own locks are taken under it, never the other way round.
    registers: Mutex<Registers>,
}

impl Transport {
    /// Of a device as that version of the devices offers it.
    pub(crate) fn new(device: Arc<dyn VirtioDevice>, ram: GuestRam, version: u32) -> Self {
        let withheld = if version < 1 { device.later_features() } else { 0 };
        Self { device, ram, withheld, registers: Mutex::default() }
    }

    /// The guest reads `into.len()` bytes.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) {
        if offset >= CONFIG_SPACE {
            return self.device.read_config(offset - CONFIG_SPACE, into);
        }
        // Registers are 32 bits wide; anything else reads as zero.
        into.fill(0);
        if into.len() == 4 {
            into.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let registers = self.lock();
        let queue = self.selected(&registers);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.kind(),
            0x0c => VENDOR,
            0x10 => half_of(self.offered(), registers.features_select),
            0x34 => queue.map_or(0, |_| QUEUE_SIZE_MAX.into()),
            0x44 => queue.is_some_and(RequestQueue::is_ready).into(),
            0x60 => self.device.interrupt().reasons(),
            0x70 if self.device.queues().iter().any(RequestQueue::is_broken) => {
                registers.status | STATUS_NEEDS_RESET
            }
            0x70 => registers.status,
            0xfc => self.device.interrupt().generation(),
            _ => 0,
        }
    }

    /// The guest writes.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        if offset >= CONFIG_SPACE {
            return self.device.write_config(offset - CONFIG_SPACE, bytes);
        }
        let Ok(value) = bytes.try_into().map(u32::from_le_bytes) else { return };
        let mut registers = self.lock();
        match offset {
            0x14 => registers.features_select = value,
            0x20 => registers.set_driver_features(value),
            0x24 => registers.driver_features_select = value,
            0x30 => registers.queue_select = value,
            NOTIFY => self.device.notify(),
            0x64 => self.device.interrupt().acknowledge(value),
            0x70 => self.set_status(&mut registers, value),
            _ => self.write_queue_register(&registers, offset, value),
        }
    }

    fn selected(&self, registers: &Registers) -> Option<&RequestQueue> {
        self.device.queues().get(usize::try_from(registers.queue_select).ok()?)
    }

    fn write_queue_register(&self, registers: &Registers, offset: u64, value: u32) {
        if registers.status & STATUS_DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.selected(registers) else { return };
        match offset {
            0x38 => queue.configure(|queue| queue.set_size(u16::try_from(value).unwrap_or(0))),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.configure(|queue| queue.set_desc_table_address(Some(value), None)),
            0x84 => queue.configure(|queue| queue.set_desc_table_address(None, Some(value))),
            0x90 => queue.configure(|queue| queue.set_avail_ring_address(Some(value), None)),
            0x94 => queue.configure(|queue| queue.set_avail_ring_address(None, Some(value))),
            0xa0 => queue.configure(|queue| queue.set_used_ring_address(Some(value), None)),
            0xa4 => queue.configure(|queue| queue.set_used_ring_address(None, Some(value))),
            _ => {}
        }
    }

    fn set_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            return self.reset(registers);
        }
        let new = value & STATUS_KNOWN & !registers.status;
        registers.status |= new;
        if new & STATUS_FEATURES_OK != 0 && !fit(registers.driver_features, self.offered()) {
            registers.status &= !STATUS_FEATURES_OK;
        }
        if new & STATUS_DRIVER_OK != 0 {
            self.start(registers);
        }
    }

    fn reset(&self, registers: &mut Registers) {
        self.device.reset();
        self.device.interrupt().restore(0);
        *registers = Registers::default();
    }

    fn start(&self, registers: &mut Registers) {
        if registers.status & STATUS_FEATURES_OK == 0 || !self.queues_are_sound() {
            registers.status |= STATUS_NEEDS_RESET;
            self.device.interrupt().config_changed();
            return;
        }
        self.activate(registers.driver_features);
    }

    /// How the rings are used is known before the device looks at them.
    fn activate(&self, accepted: u64) {
        let by_index = accepted & FEATURE_EVENT_INDEX != 0;
        self.device.queues().iter().for_each(|queue| queue.use_event_index(by_index));
        self.device.activate(accepted);
    }

    /// The first queue is there, and each that is lies where memory is.
    fn queues_are_sound(&self) -> bool {
        let queues = self.device.queues();
        queues.first().is_some_and(RequestQueue::is_ready)
            && queues.iter().filter(|queue| queue.is_ready()).all(|queue| queue.is_valid(&self.ram))
    }

    fn offered(&self) -> u64 {
        self.device.features() & !self.withheld
    }

    pub(crate) fn save(&self) -> state::Transport {
        let registers = self.lock();
        state::Transport {
            status: registers.status,
            driver_features: registers.driver_features,
            features_select: registers.features_select,
            driver_features_select: registers.driver_features_select,
            queue_select: registers.queue_select,
            interrupt_status: self.device.interrupt().reasons(),
            config_generation: self.device.interrupt().generation(),
        }
    }

    /// Takes over saved registers, after the device itself was restored.
    pub(crate) fn restore(&self, saved: &state::Transport) -> Result<(), StateError> {
        if saved.status & !(STATUS_KNOWN | STATUS_NEEDS_RESET) != 0 {
            return Err(StateError::Invalid("a device status has unknown bits"));
        }
        if saved.status & STATUS_FEATURES_OK != 0 && !fit(saved.driver_features, self.device.features()) {
            return Err(StateError::Invalid("a driver uses features that this device does not have"));
        }
        let running = saved.status & STATUS_DRIVER_OK != 0 && saved.status & STATUS_NEEDS_RESET == 0;
        if running && !self.queues_are_sound() {
            return Err(StateError::Invalid("a running device has no valid queue"));
        }
        *self.lock() = Registers {
            status: saved.status,
            driver_features: saved.driver_features,
            features_select: saved.features_select,
            driver_features_select: saved.driver_features_select,
            queue_select: saved.queue_select,
        };
        self.device.interrupt().restore_generation(saved.config_generation);
        self.device.interrupt().restore(saved.interrupt_status);
        if running {
            self.activate(saved.driver_features);
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    fn set_driver_features(&mut self, value: u32) {
        if self.status & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            // Halves beyond the second have no features that this device could accept; note the refusal.
            _ if value != 0 => self.driver_features |= 1 << 63,
            _ => {}
        }
    }
}

fn fit(accepted: u64, features: u64) -> bool {
    accepted & !features == 0 && accepted & FEATURE_VERSION_1 != 0
}

fn half_of(features: u64, select: u32) -> u32 {
    let half = match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(half).expect("half of 64 bits")
}
