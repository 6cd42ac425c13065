//! Puts a kernel, its command line and the tables it starts from into guest RAM.
//!
//! ```text
//!   500 GDT   6000 PVH start info   7000 zero page   8ff0 stack   9000-bfff page tables   20000 command line
//!   9fc00 end of low RAM   e0000 ACPI tables   1 MiB kernel ...                     initrd at the end of low RAM
//! ```
//! Two ways to tell a kernel of its devices: ACPI tables, or `virtio_mmio.device=` entries on its command line. Never both,
//! because Linux would then find each device twice.

mod acpi;
mod kernel;
mod linux;
mod pvh;

use crate::devices::bus::Place;
use crate::devices::virtio::mmio::WINDOW_BYTES;
use crate::kvm::processor::Entry;
use crate::memory::{GuestRam, HOLE_END, HOLE_START, MemoryError, PAGE_BYTES};
use kernel::Start;

pub(crate) const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x20000;
const COMMAND_LINE_BYTES_MAX: usize = 4096;
const LOW_RAM_END: u64 = 0x9fc00;
const HIGH_RAM_START: u64 = 0x10_0000;
/// Kind of an entry in a map of memory.
const RAM: u32 = 1;
/// An initial RAM disk ends below this: what the oldest kernels that are loaded here can reach.
const INITRD_END_MAX: u64 = 0x8000_0000;
/// Null, 64-bit code, flat data, TSS.
const DESCRIPTORS: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// A kernel: an ELF image with a PVH note, a 64-bit Linux `vmlinux`, or a bzImage.
    pub kernel: &'a [u8],
    /// Initial RAM disk for Linux.
    pub initrd: Option<&'a [u8]>,
    /// Command line.
    pub cmdline: &'a str,
    /// How the kernel learns of its devices.
    pub firmware: Firmware,
}

/// How a kernel learns of its processors and devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Firmware {
    /// By ACPI tables.
    #[default]
    Acpi,
    /// By entries on its command line: for kernels that read no tables. They find one processor only by themselves.
    CommandLine,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is no kernel that this VMM can start, or too large for the VM.
    #[error(
        "the kernel cannot be loaded: {0}; give a bzImage, a 64-bit vmlinux, or an ELF image with a PVH note"
    )]
    Kernel(String),
    /// The initial RAM disk does not fit between the kernel and the end of low RAM.
    #[error("an initrd of {bytes} bytes does not fit into the VM's RAM")]
    Initrd {
        /// Its size.
        bytes: usize,
    },
    /// The command line is too long, or holds a byte that ends it.
    #[error(
        "the command line of {bytes} bytes is too long (limit {COMMAND_LINE_BYTES_MAX}) or holds a zero byte"
    )]
    CommandLine {
        /// Its size, with the devices.
        bytes: usize,
    },
    /// Guest RAM is too small.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What the loader has put into RAM beside the kernel.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    /// Address and length.
    initrd: Option<(u64, u64)>,
    command_line_bytes: u32,
    /// Address of the root pointer of ACPI; 0 without tables.
    rsdp: u64,
}

/// Loads everything and says where to start.
pub(crate) fn load(
    ram: &GuestRam,
    source: &BootSource<'_>,
    cpus: u32,
    devices: &[Place],
) -> Result<Entry, BootError> {
    let kernel = kernel::load(ram, source.kernel)?;
    let initrd = source.initrd.map(|bytes| place_initrd(ram, bytes, kernel.end)).transpose()?;
    let (line, rsdp) = match source.firmware {
        Firmware::Acpi => (source.cmdline.to_owned(), acpi::RSDP),
        Firmware::CommandLine => (named_on_the_line(source.cmdline, devices), 0),
    };
    if rsdp != 0 {
        acpi::place(ram, cpus, devices)?;
    }
    let loaded = Loaded { initrd, command_line_bytes: place_command_line(ram, &line)?, rsdp };
    put(ram, GDT, &DESCRIPTORS.map(u64::to_le_bytes).concat())?;
    match kernel.start {
        Start::Pvh { entry } => {
            pvh::place_start_info(ram, &loaded)?;
            Ok(Entry::Pvh { entry, start_info: START_INFO })
        }
        Start::Linux64 { entry, header } => {
            linux::place_zero_page(ram, &header, &loaded)?;
            linux::place_page_tables(ram)?;
            Ok(Entry::Linux64 { entry, zero_page: ZERO_PAGE, page_tables: PAGE_TABLES, stack: STACK })
        }
    }
}

/// Address and length of the initrd, at the very end of low RAM.
fn place_initrd(ram: &GuestRam, bytes: &[u8], kernel_end: u64) -> Result<(u64, u64), BootError> {
    let too_large = BootError::Initrd { bytes: bytes.len() };
    let len = bytes.len() as u64;
    let end = ram.bytes().min(HOLE_START).min(INITRD_END_MAX);
    let Some(start) = end.checked_sub(len.next_multiple_of(PAGE_BYTES)) else { return Err(too_large) };
    if start < kernel_end.max(HIGH_RAM_START) {
        return Err(too_large);
    }
    ram.write(start, bytes)?;
    Ok((start, len))
}

fn named_on_the_line(cmdline: &str, devices: &[Place]) -> String {
    let mut line = cmdline.to_owned();
    for place in devices {
        line += &format!(" virtio_mmio.device={}K@{:#x}:{}", WINDOW_BYTES / 1024, place.start, place.line);
    }
    line
}

fn place_command_line(ram: &GuestRam, line: &str) -> Result<u32, BootError> {
    if line.len() >= COMMAND_LINE_BYTES_MAX || line.bytes().any(|byte| byte == 0) {
        return Err(BootError::CommandLine { bytes: line.len() });
    }
    ram.write(COMMAND_LINE, line.as_bytes())?;
    ram.write(COMMAND_LINE + line.len() as u64, &[0])?;
    Ok(u32::try_from(line.len()).expect("shorter than a page"))
}

/// Start and length of each piece of RAM that a kernel may use.
fn usable_ram(ram: &GuestRam) -> Vec<(u64, u64)> {
    let low_end = ram.bytes().min(HOLE_START);
    let mut pieces = vec![(0, LOW_RAM_END), (HIGH_RAM_START, low_end - HIGH_RAM_START)];
    if ram.bytes() > HOLE_START {
        pieces.push((HOLE_END, ram.bytes() - HOLE_START));
    }
    pieces
}

fn put(ram: &GuestRam, at: u64, bytes: &[u8]) -> Result<(), MemoryError> {
    ram.write(at, bytes)
}

/// Little-endian fields, one after the other.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(kernel: &[u8]) -> BootSource<'_> {
        BootSource { kernel, initrd: None, cmdline: "", firmware: Firmware::CommandLine }
    }

    #[test]
    fn the_built_in_guest_enters_by_pvh() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let places = [Place::of_slot(0), Place::of_slot(1)];
        let entry = load(&ram, &source(hv_guest::SECTOR_WRITER), 1, &places).unwrap();
        assert_eq!(entry, Entry::Pvh { entry: HIGH_RAM_START, start_info: START_INFO });
        let mut line = [0; 80];
        ram.read(COMMAND_LINE, &mut line).unwrap();
        let wanted = " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:9\0";
        assert!(line.starts_with(wanted.as_bytes()));
    }

    #[test]
    fn with_tables_the_command_line_names_no_device() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let tables = BootSource { firmware: Firmware::Acpi, cmdline: "quiet", ..source(hv_guest::IMAGE) };
        load(&ram, &tables, 2, &[Place::of_slot(0)]).unwrap();
        let mut line = [0; 6];
        ram.read(COMMAND_LINE, &mut line).unwrap();
        assert_eq!(&line, b"quiet\0");
        let mut rsdp = [0; 8];
        ram.read(START_INFO + 32, &mut rsdp).unwrap();
        assert_eq!(u64::from_le_bytes(rsdp), acpi::RSDP);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let ram = GuestRam::new(16 << 20).unwrap();
        for image in [&b""[..], b"#!/bin/sh\n", &hv_guest::SECTOR_WRITER[..100]] {
            assert!(matches!(load(&ram, &source(image), 1, &[]), Err(BootError::Kernel(_))));
        }
    }

    #[test]
    fn an_initrd_that_does_not_fit_and_a_long_command_line_are_refused() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let initrd = vec![0; 4 << 20];
        let large = BootSource { initrd: Some(&initrd), ..source(hv_guest::SECTOR_WRITER) };
        assert!(matches!(load(&ram, &large, 1, &[]), Err(BootError::Initrd { .. })));
        let cmdline = "x".repeat(5000);
        let long = BootSource { cmdline: &cmdline, ..source(hv_guest::SECTOR_WRITER) };
        assert!(matches!(load(&ram, &long, 1, &[]), Err(BootError::CommandLine { .. })));
    }
}
