//! What the firmware of this machine would tell: ACPI tables of the hardware-reduced kind, below 1 MiB.
//!
//! ```text
//!   e0000 RSDP --> XSDT --> FADT: reset and sleep registers --> DSDT: serial port, RTC, virtio-mmio devices, \_S5
//!                      \--> MADT: one local APIC for each processor, the IOAPIC
//! ```
//! Hardware-reduced: no power management timer, no fixed event registers, no SMI. **Invariant:** what is described here is
//! what [`crate::devices::bus`] answers to; both take the numbers from there.

use acpi_tables::Aml;
use acpi_tables::aml::{self, Device, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use zerocopy::IntoBytes;

use crate::devices::bus::{
    Place, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, SLEEP_TYPE_OFF,
};
use crate::devices::rtc::{RTC_LINE, RTC_PORT};
use crate::devices::serial::{COM1, COM1_LINE};
use crate::devices::virtio::mmio::WINDOW_BYTES;
use crate::memory::{GuestRam, MemoryError};

/// Where kernels look for the root pointer, and where it is.
pub(super) const RSDP: u64 = 0xe_0000;
/// The tables lie behind it and end before the next 64 KiB.
const TABLES: u64 = RSDP + 0x100;
const TABLES_END: u64 = 0xf_0000;
const OEM: [u8; 6] = *b"CSVFS ";
const OEM_TABLE: [u8; 8] = *b"HVMACHIN";
const HEADER_BYTES: u32 = 36;

const FADT_BYTES: u32 = 276;
const FADT_BOOT_FLAGS: usize = 109;
/// There is no VGA and no power state of PCI express links to be told of.
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
const FADT_FLAGS: usize = 112;
const RESET_REGISTER: u32 = 1 << 10;
const HARDWARE_REDUCED: u32 = 1 << 20;
const FADT_RESET_REGISTER: usize = 116;
const FADT_RESET_VALUE: usize = 128;
const FADT_MINOR_VERSION: usize = 131;
const FADT_DSDT: usize = 140;
const FADT_SLEEP_CONTROL: usize = 244;
const FADT_SLEEP_STATUS: usize = 256;
const FADT_HYPERVISOR: usize = 268;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
/// There are two 8259 beside the APICs.
const HAS_8259: u32 = 1;

/// Writes all tables.
pub(super) fn place(ram: &GuestRam, cpus: u32, devices: &[Place]) -> Result<(), MemoryError> {
    let mut at = TABLES;
    let mut put = |table: &Sdt| {
        let start = at;
        at = (at + table.len() as u64).next_multiple_of(16);
        assert!(at <= TABLES_END, "the tables of the largest machine fit");
        ram.write(start, table.as_slice()).map(|()| start)
    };
    let dsdt = put(&dsdt(devices))?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(cpus))?;
    let xsdt = put(&xsdt(&[fadt, madt]))?;
    ram.write(RSDP, Rsdp::new(OEM, xsdt).as_bytes())
}

fn table(signature: [u8; 4], bytes: u32, revision: u8) -> Sdt {
    Sdt::new(signature, bytes, revision, OEM, OEM_TABLE, 1)
}

fn xsdt(tables: &[u64]) -> Sdt {
    let mut xsdt = table(*b"XSDT", HEADER_BYTES, 1);
    for address in tables {
        xsdt.append_slice(&address.to_le_bytes());
    }
    xsdt
}

fn fadt(dsdt: u64) -> Sdt {
    let mut fadt = table(*b"FACP", FADT_BYTES, 6);
    fadt.write_bytes(FADT_BOOT_FLAGS, &(NO_VGA | NO_ASPM).to_le_bytes());
    fadt.write_bytes(FADT_FLAGS, &(HARDWARE_REDUCED | RESET_REGISTER).to_le_bytes());
    fadt.write_bytes(FADT_RESET_REGISTER, &port_register(RESET_PORT));
    fadt.write_bytes(FADT_RESET_VALUE, &[RESET_VALUE]);
    fadt.write_bytes(FADT_MINOR_VERSION, &[3]);
    fadt.write_bytes(FADT_DSDT, &dsdt.to_le_bytes());
    fadt.write_bytes(FADT_SLEEP_CONTROL, &port_register(SLEEP_CONTROL_PORT));
    fadt.write_bytes(FADT_SLEEP_STATUS, &port_register(SLEEP_STATUS_PORT));
    fadt.write_bytes(FADT_HYPERVISOR, b"CSVFS HV");
    fadt.update_checksum();
    fadt
}

/// A generic address: a port of 8 bits, read and written in bytes.
fn port_register(port: u16) -> [u8; 12] {
    let [low, high] = port.to_le_bytes();
    [1, 8, 0, 1, low, high, 0, 0, 0, 0, 0, 0]
}

fn madt(cpus: u32) -> Sdt {
    let mut madt = table(*b"APIC", HEADER_BYTES, 5);
    madt.append_slice(&LOCAL_APIC.to_le_bytes());
    madt.append_slice(&HAS_8259.to_le_bytes());
    for cpu in 0..cpus {
        let number = u8::try_from(cpu).expect("a VM has fewer processors than a byte counts");
        // Local APIC: kind, length, processor, APIC, enabled.
        madt.append_slice(&[0, 8, number, number, 1, 0, 0, 0]);
    }
    let mut io_apic = vec![1, 12, 0, 0];
    io_apic.extend(IO_APIC.to_le_bytes());
    io_apic.extend([0; 4]);
    madt.append_slice(&io_apic);
    madt
}

fn dsdt(devices: &[Place]) -> Sdt {
    let mut code = Vec::new();
    let zero = 0_u8;
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_OFF, &zero, &zero, &zero]))
        .to_aml_bytes(&mut code);
    let mut inner: Vec<Vec<u8>> = vec![serial_device(), rtc_device()];
    inner.extend((0..).zip(devices).map(|(number, place)| virtio_device(number, place)));
    let inner: Vec<Raw> = inner.into_iter().map(Raw).collect();
    let inner = inner.iter().map(|device| device as &dyn Aml).collect();
    aml::Scope::new("_SB_".into(), inner).to_aml_bytes(&mut code);
    let mut dsdt = table(*b"DSDT", HEADER_BYTES, 2);
    dsdt.append_slice(&code);
    dsdt
}

/// Code that is already bytes.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn serial_device() -> Vec<u8> {
    let ports = aml::IO::new(COM1, COM1, 1, 8);
    legacy_device("COM1", "PNP0501", &ports, COM1_LINE)
}

fn rtc_device() -> Vec<u8> {
    let ports = aml::IO::new(RTC_PORT, RTC_PORT, 1, 2);
    legacy_device("RTC_", "PNP0B00", &ports, RTC_LINE)
}

fn legacy_device(name: &str, id: &str, ports: &aml::IO, line: u32) -> Vec<u8> {
    let line = edge(line);
    device(name, &aml::EISAName::new(id), 0, vec![ports, &line])
}

fn virtio_device(number: u8, place: &Place) -> Vec<u8> {
    let start = u32::try_from(place.start).expect("device registers lie below 4 GiB");
    let registers = Memory32Fixed::new(true, start, u32::try_from(WINDOW_BYTES).expect("a page"));
    let line = edge(place.line);
    let name = format!("V{number:03}");
    device(&name, &"LNRO0005", number, vec![&registers, &line])
}

fn edge(line: u32) -> Interrupt {
    let (consumer, edge_triggered, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge_triggered, active_low, shared, line)
}

fn device(name: &str, id: &dyn Aml, number: u8, resources: Vec<&dyn Aml>) -> Vec<u8> {
    let id = Name::new("_HID".into(), id);
    let number = Name::new("_UID".into(), &number);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut code = Vec::new();
    Device::new(Path::new(name), vec![&id, &number, &resources]).to_aml_bytes(&mut code);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read(at, &mut bytes).unwrap();
        bytes
    }

    /// A table with a sound checksum.
    fn sound(ram: &GuestRam, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let len = u32::from_le_bytes(bytes(ram, at + 4, 4).try_into().unwrap());
        let table = bytes(ram, at, usize::try_from(len).unwrap());
        assert_eq!(&table[..4], signature);
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        table
    }

    fn pointer(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_found_from_the_root_pointer_and_is_sound() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let devices: Vec<_> = (0..12).map(Place::of_slot).collect();
        place(&ram, 64, &devices).unwrap();
        let root = bytes(&ram, RSDP, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert_eq!(root.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let xsdt = sound(&ram, pointer(&root, 24), b"XSDT");
        let fadt = sound(&ram, pointer(&xsdt, 36), b"FACP");
        let madt = sound(&ram, pointer(&xsdt, 44), b"APIC");
        assert_eq!(madt.len(), 36 + 8 + 64 * 8 + 12);
        let dsdt = sound(&ram, pointer(&fadt, FADT_DSDT), b"DSDT");
        let named = dsdt.windows(8).filter(|name| name == b"LNRO0005").count();
        assert_eq!(named, devices.len());
    }
}
