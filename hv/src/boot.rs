//! Puts a kernel, its command line and the tables it starts from into guest RAM.
//!
//! ```text
//!   500 GDT   6000 PVH start info   7000 zero page   8ff0 stack   9000-bfff page tables   20000 command line
//!   9fc00 end of low RAM            1 MiB kernel ...                                     initrd at the end of low RAM
//! ```
//! An ELF image with a PVH note is entered by PVH (32 bits, EBX = start info), one without by Linux' 64-bit protocol.

use std::io::Cursor;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Address, GuestAddress};

use crate::devices::bus::{SLOT_LINES, window};
use crate::devices::virtio::mmio::WINDOW_BYTES;
use crate::kvm::processor::Entry;
use crate::memory::{GuestRam, HOLE_END, HOLE_START, MemoryError, PAGE_BYTES};

pub(crate) const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const START_INFO_BYTES: u64 = 56;
const MODULE_LIST: u64 = 0x6080;
const MEMORY_MAP: u64 = 0x6100;
const ZERO_PAGE: u64 = 0x7000;
const STACK: u64 = 0x8ff0;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x20000;
const COMMAND_LINE_BYTES_MAX: usize = 4096;
const LOW_RAM_END: u64 = 0x9fc00;
const HIGH_RAM_START: u64 = 0x10_0000;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Null, 64-bit code, flat data, TSS.
const DESCRIPTORS: [u64; 4] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x008f_8b00_0000_ffff];

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootSource<'a> {
    /// An ELF image: with a PVH note, or a 64-bit Linux kernel.
    pub kernel: &'a [u8],
    /// Initial RAM disk for Linux.
    pub initrd: Option<&'a [u8]>,
    /// Command line; the devices are appended to it.
    pub cmdline: &'a str,
}

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The image is no kernel that this VMM can start, or too large for the VM.
    #[error("the kernel cannot be loaded: {0}; give an ELF image with a PVH note or a 64-bit Linux vmlinux")]
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

/// Loads everything and says where to start.
pub(crate) fn load(ram: &GuestRam, source: &BootSource<'_>, disks: usize) -> Result<Entry, BootError> {
    let mut image = Cursor::new(source.kernel);
    let loaded = Elf::load(ram.map(), None, &mut image, Some(GuestAddress(HIGH_RAM_START)))
        .map_err(|error| BootError::Kernel(error.to_string()))?;
    let initrd = source.initrd.map(|bytes| place_initrd(ram, bytes, loaded.kernel_end)).transpose()?;
    let command_line_bytes = place_command_line(ram, source.cmdline, disks)?;
    put(ram, GDT, &DESCRIPTORS.map(u64::to_le_bytes).concat())?;
    match pvh_entry(&loaded) {
        Some(entry) => {
            place_start_info(ram, initrd)?;
            Ok(Entry::Pvh { entry, start_info: START_INFO })
        }
        None => {
            place_zero_page(ram, initrd, command_line_bytes)?;
            place_page_tables(ram)?;
            let entry = loaded.kernel_load.raw_value();
            Ok(Entry::Linux64 { entry, zero_page: ZERO_PAGE, page_tables: PAGE_TABLES, stack: STACK })
        }
    }
}

fn pvh_entry(loaded: &KernelLoaderResult) -> Option<u64> {
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Some(entry.raw_value()),
        _ => None,
    }
}

/// Address and length of the initrd, at the very end of low RAM.
fn place_initrd(ram: &GuestRam, bytes: &[u8], kernel_end: u64) -> Result<(u64, u64), BootError> {
    let too_large = BootError::Initrd { bytes: bytes.len() };
    let len = bytes.len() as u64;
    let end = ram.bytes().min(HOLE_START);
    let Some(start) = end.checked_sub(len.next_multiple_of(PAGE_BYTES)) else { return Err(too_large) };
    if start < kernel_end.max(HIGH_RAM_START) {
        return Err(too_large);
    }
    ram.write(start, bytes)?;
    Ok((start, len))
}

fn place_command_line(ram: &GuestRam, cmdline: &str, disks: usize) -> Result<u32, BootError> {
    let mut line = cmdline.to_owned();
    for (slot, irq) in (0..).zip(&SLOT_LINES[..disks]) {
        line += &format!(" virtio_mmio.device={}K@{:#x}:{irq}", WINDOW_BYTES / 1024, window(slot));
    }
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

fn place_start_info(ram: &GuestRam, initrd: Option<(u64, u64)>) -> Result<(), MemoryError> {
    let pieces = usable_ram(ram);
    let mut info = Bytes::default();
    info.u32(START_INFO_MAGIC).u32(1).u32(0).u32(initrd.is_some().into());
    info.u64(if initrd.is_some() { MODULE_LIST } else { 0 }).u64(COMMAND_LINE).u64(0).u64(MEMORY_MAP);
    info.u32(u32::try_from(pieces.len()).expect("two or three")).u32(0);
    debug_assert_eq!(info.0.len() as u64, START_INFO_BYTES);
    put(ram, START_INFO, &info.0)?;
    if let Some((start, len)) = initrd {
        let mut module = Bytes::default();
        module.u64(start).u64(len).u64(0).u64(0);
        put(ram, MODULE_LIST, &module.0)?;
    }
    let mut map = Bytes::default();
    for (start, len) in pieces {
        map.u64(start).u64(len).u32(RAM).u32(0);
    }
    put(ram, MEMORY_MAP, &map.0)
}

/// The fields of Linux' zero page that a 64-bit entry needs, at the offsets of its boot protocol.
fn place_zero_page(ram: &GuestRam, initrd: Option<(u64, u64)>, cmdline: u32) -> Result<(), MemoryError> {
    let low = |value: u64| u32::try_from(value).expect("low RAM is below 4 GiB");
    let put32 = |at: u64, value: u32| put(ram, ZERO_PAGE + at, &value.to_le_bytes());
    put(ram, ZERO_PAGE + 0x1fe, &[0x55, 0xaa])?;
    put(ram, ZERO_PAGE + 0x202, b"HdrS")?;
    put(ram, ZERO_PAGE + 0x210, &[0xff, 1])?; // unknown loader, loaded high
    put32(0x228, low(COMMAND_LINE))?;
    put32(0x230, 0x0100_0000)?; // alignment
    put32(0x238, cmdline)?;
    if let Some((start, len)) = initrd {
        put32(0x218, low(start))?;
        put32(0x21c, low(len))?;
    }
    let pieces = usable_ram(ram);
    put(ram, ZERO_PAGE + 0x1e8, &[u8::try_from(pieces.len()).expect("two or three")])?;
    let mut map = Bytes::default();
    for (start, len) in pieces {
        map.u64(start).u64(len).u32(RAM);
    }
    put(ram, ZERO_PAGE + 0x2d0, &map.0)
}

/// The first GiB one to one, in pages of 2 MiB.
fn place_page_tables(ram: &GuestRam) -> Result<(), MemoryError> {
    put(ram, PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes())?;
    put(ram, PAGE_TABLES + 0x1000, &(PAGE_TABLES + 0x2003).to_le_bytes())?;
    let entries: Vec<u8> = (0..512_u64).flat_map(|i| (i << 21 | 0x83).to_le_bytes()).collect();
    put(ram, PAGE_TABLES + 0x2000, &entries)
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
        BootSource { kernel, initrd: None, cmdline: "" }
    }

    #[test]
    fn the_built_in_guest_enters_by_pvh() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let entry = load(&ram, &source(hv_guest::SECTOR_WRITER), 2).unwrap();
        assert_eq!(entry, Entry::Pvh { entry: HIGH_RAM_START, start_info: START_INFO });
        let mut line = [0; 80];
        ram.read(COMMAND_LINE, &mut line).unwrap();
        let wanted = " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:9\0";
        assert!(line.starts_with(wanted.as_bytes()));
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let ram = GuestRam::new(16 << 20).unwrap();
        for image in [&b""[..], b"#!/bin/sh\n", &hv_guest::SECTOR_WRITER[..100]] {
            assert!(matches!(load(&ram, &source(image), 0), Err(BootError::Kernel(_))));
        }
    }

    #[test]
    fn an_initrd_that_does_not_fit_and_a_long_command_line_are_refused() {
        let ram = GuestRam::new(4 << 20).unwrap();
        let initrd = vec![0; 4 << 20];
        let large = BootSource { initrd: Some(&initrd), ..source(hv_guest::SECTOR_WRITER) };
        assert!(matches!(load(&ram, &large, 0), Err(BootError::Initrd { .. })));
        let cmdline = "x".repeat(5000);
        let long = BootSource { cmdline: &cmdline, ..source(hv_guest::SECTOR_WRITER) };
        assert!(matches!(load(&ram, &long, 0), Err(BootError::CommandLine { .. })));
    }
}
