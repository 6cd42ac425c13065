//! The registers and the life cycle behind them.

use std::sync::Arc;

use blockio::MemoryDevice;

use crate::devices::virtio::VirtioDevice;

use super::driver::{DESCRIPTORS, DISK_BYTES, Driver, FLUSH, QUEUE_SIZE, VERSION_1};

const NEEDS_RESET: u32 = 64;
const FEATURES_OK: u32 = 8;

fn fresh() -> Driver {
    Driver::new(Arc::new(MemoryDevice::new(DISK_BYTES)), false)
}

#[test]
fn the_device_says_what_it_is() {
    let driver = fresh();
    assert_eq!(driver.register(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((driver.register(4), driver.register(8)), (2, 2));
    let mut capacity = [0; 8];
    driver.transport.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), DISK_BYTES / 512);
    let mut beyond = [9; 8];
    driver.transport.read(0xff8, &mut beyond);
    assert_eq!(beyond, [0; 8]);
    let mut narrow = [9; 2];
    driver.transport.read(0, &mut narrow);
    assert_eq!(narrow, [0; 2], "registers are read in 32 bits");
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    for features in [VERSION_1 | 1 << 40, FLUSH, 0, VERSION_1 | 1 << 63] {
        let mut driver = fresh();
        driver.start(features);
        assert_eq!(driver.register(0x70) & FEATURES_OK, 0, "{features:#x}");
        assert_ne!(driver.register(0x70) & NEEDS_RESET, 0);
    }
}

#[test]
fn rings_outside_of_ram_need_a_reset() {
    for (register, address) in [(0x80, 0xffff_fff0), (0x90, 0xd000_0000), (0xa0, 0x0040_0000), (0x84, 1)] {
        let mut driver = fresh();
        driver.start(VERSION_1);
        driver.set(0x70, 0);
        driver.set(0x70, 3);
        driver.set(0x24, 1);
        driver.set(0x20, 1);
        driver.set(0x70, 11);
        driver.set(0x38, QUEUE_SIZE.into());
        driver.set(0x80, u32::try_from(DESCRIPTORS).unwrap());
        driver.set(register, address);
        driver.set(0x44, 1);
        driver.set(0x70, 15);
        assert_ne!(driver.register(0x70) & NEEDS_RESET, 0, "{address:#x} in {register:#x}");
    }
}

#[test]
fn a_reset_brings_back_the_beginning() {
    let (mut driver, _device) = Driver::on_memory();
    assert_eq!(driver.request(0, 0, 512, true).0, 0);
    driver.set(0x70, 0);
    assert_eq!((driver.register(0x70), driver.register(0x44), driver.register(0x60)), (0, 0, 0));
}

#[test]
fn a_save_is_restored_exactly() {
    let (mut driver, device) = Driver::on_memory();
    assert_eq!(driver.request(0, 0, 512, true).0, 0);
    driver.disk.hold_and_drain().unwrap();
    let (disk, transport) = (driver.disk.save(), driver.transport.save());
    let other = Driver::new(device, false);
    other.disk.restore(&disk).unwrap();
    other.transport.restore(&transport).unwrap();
    assert_eq!((other.disk.save(), other.transport.save()), (disk, transport));
}

#[test]
fn any_write_to_any_register_does_no_harm() {
    let driver = fresh();
    let mut noise = 88_172_645_463_325_252_u64;
    for _ in 0..20_000 {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        let bytes = noise.to_le_bytes();
        let offset = noise >> 40 & 0xfff;
        let offset = if noise & 1 == 0 { offset & 0xfc } else { offset };
        driver.transport.write(offset, &bytes[..1 << (noise >> 60 & 3)]);
        let mut into = [0; 8];
        driver.transport.read(offset, &mut into[..1 << (noise >> 62)]);
        driver.disk.take_requests();
    }
}
