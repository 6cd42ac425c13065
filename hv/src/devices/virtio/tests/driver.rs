//! A driver that can follow the rules, and break each of them.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use blockio::{BlockDevice, Geometry, IoRequest, MemoryDevice};

use crate::devices::Interrupt;
use crate::devices::virtio::block::{Disk, shape_of};
use crate::devices::virtio::mmio::Transport;
use crate::devices::virtio::{DEVICES_VERSION, VirtioDevice};
use crate::memory::GuestRam;

pub(super) const RAM_BYTES: u64 = 4 << 20;
pub(super) const DISK_BYTES: u64 = 1 << 20;
pub(super) const QUEUE_SIZE: u16 = 16;
pub(super) const DESCRIPTORS: u64 = 0x1000;
pub(super) const AVAIL: u64 = 0x2000;
pub(super) const USED: u64 = 0x3000;
pub(super) const HEADER: u64 = 0x4000;
pub(super) const STATUS: u64 = 0x5000;
pub(super) const DATA: u64 = 0x1_0000;
pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;
pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const FLUSH: u64 = 1 << 9;
pub(super) const EVENT_INDEX: u64 = 1 << 29;

/// Address, length, flags, next.
pub(super) type Descriptor = (u64, u32, u16, u16);

#[derive(Debug, Default)]
pub(super) struct Line(AtomicU32);

impl Line {
    pub(super) fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interrupt for Line {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Keeps requests until the test lets them go.
#[derive(Default)]
pub(super) struct Stuck {
    pub(super) waiting: Mutex<Vec<IoRequest>>,
}

impl BlockDevice for Stuck {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: DISK_BYTES, block_bytes: 512, can_discard: false }
    }
    fn submit(&self, request: IoRequest) {
        self.waiting.lock().unwrap().push(request);
    }
}

pub(super) struct Driver {
    pub(super) ram: GuestRam,
    pub(super) disk: Arc<Disk>,
    pub(super) transport: Transport,
    line: Arc<Line>,
    posted: u16,
}

impl Driver {
    /// A driver with its device up and running.
    pub(super) fn started(backend: Arc<dyn BlockDevice>, read_only: bool) -> Self {
        let mut driver = Self::new(backend, read_only);
        driver.start(VERSION_1 | FLUSH);
        assert_eq!(driver.register(0x70), 15);
        driver
    }

    pub(super) fn on_memory() -> (Self, Arc<MemoryDevice>) {
        let device = Arc::new(MemoryDevice::new(DISK_BYTES));
        (Self::started(device.clone(), false), device)
    }

    pub(super) fn new(backend: Arc<dyn BlockDevice>, read_only: bool) -> Self {
        Self::offered(backend, read_only, DEVICES_VERSION)
    }

    /// On devices of that version.
    pub(super) fn offered(backend: Arc<dyn BlockDevice>, read_only: bool, version: u32) -> Self {
        let ram = GuestRam::new(RAM_BYTES).unwrap();
        let line = Arc::new(Line::default());
        let shape = shape_of(&backend.geometry(), read_only);
        let disk = Disk::new(0, "serial-7".into(), shape, ram.clone(), line.clone()).unwrap();
        disk.attach(backend).unwrap();
        disk.release();
        let disk = Arc::new(disk);
        let device: Arc<dyn VirtioDevice> = disk.clone();
        Self { transport: Transport::new(device, ram.clone(), version), ram, disk, line, posted: 0 }
    }

    pub(super) fn start(&mut self, features: u64) {
        self.start_with(features, QUEUE_SIZE);
    }

    pub(super) fn start_with(&mut self, features: u64, queue_size: u16) {
        self.set(0x70, 0);
        self.posted = 0;
        self.ram.write(AVAIL, &[0; 4]).unwrap();
        self.ram.write(USED, &[0; 4]).unwrap();
        self.set(0x70, 1);
        self.set(0x70, 3);
        for (half, value) in (0..).zip([features & 0xffff_ffff, features >> 32]) {
            self.set(0x24, half);
            self.set(0x20, u32::try_from(value).unwrap());
        }
        self.set(0x70, 11);
        self.set(0x38, queue_size.into());
        for (register, address) in [(0x80, DESCRIPTORS), (0x90, AVAIL), (0xa0, USED)] {
            self.set(register, u32::try_from(address).unwrap());
            self.set(register + 4, 0);
        }
        self.set(0x44, 1);
        self.set(0x70, 15);
    }

    pub(super) fn set(&self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    pub(super) fn register(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn interrupts(&self) -> u32 {
        self.line.count()
    }

    pub(super) fn describe(&self, table: u64, descriptors: &[Descriptor]) {
        for (at, (address, len, flags, next)) in (0..).zip(descriptors) {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.ram.write(table + at * 16, &bytes).unwrap();
        }
    }

    pub(super) fn header(&self, kind: u32, sector: u64) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.ram.write(HEADER, &bytes).unwrap();
        self.ram.write(STATUS, &[0xee]).unwrap();
    }

    /// Makes a chain available and lets the device look.
    pub(super) fn post(&mut self, head: u16) {
        self.make_available(head);
        self.disk.take_requests();
    }

    /// Makes a chain available; the device does not hear of it.
    pub(super) fn make_available(&mut self, head: u16) {
        let slot = u64::from(self.posted % QUEUE_SIZE);
        self.ram.write(AVAIL + 4 + slot * 2, &head.to_le_bytes()).unwrap();
        self.posted = self.posted.wrapping_add(1);
        self.ram.write(AVAIL + 2, &self.posted.to_le_bytes()).unwrap();
    }

    /// Posts and waits; gives the length in the used ring.
    pub(super) fn run(&mut self, descriptors: &[Descriptor]) -> u32 {
        self.describe(DESCRIPTORS, descriptors);
        let before = self.used_index();
        self.post(0);
        self.disk.hold_and_drain().unwrap();
        self.disk.release();
        assert_eq!(self.used_index(), before.wrapping_add(1), "the request came back");
        let mut entry = [0; 8];
        self.ram.read(USED + 4 + u64::from(before % QUEUE_SIZE) * 8, &mut entry).unwrap();
        u32::from_le_bytes(entry[4..].try_into().unwrap())
    }

    /// One request with one data part; gives status and used length.
    pub(super) fn request(&mut self, kind: u32, sector: u64, len: u32, to_guest: bool) -> (u8, u32) {
        self.header(kind, sector);
        let data_flags = if to_guest { WRITE } else { 0 };
        let used =
            self.run(&[(HEADER, 16, NEXT, 1), (DATA, len, NEXT | data_flags, 2), (STATUS, 1, WRITE, 0)]);
        (self.status(), used)
    }

    pub(super) fn status(&self) -> u8 {
        self.bytes::<1>(STATUS)[0]
    }

    pub(super) fn used_index(&self) -> u16 {
        u16::from_le_bytes(self.bytes(USED + 2))
    }

    pub(super) fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(at, &mut bytes).unwrap();
        bytes
    }
}
