//! Linux' zero page, at the offsets of its x86 boot protocol, and the page tables of a 64-bit entry.

use super::{Bytes, COMMAND_LINE, Loaded, PAGE_TABLES, RAM, ZERO_PAGE, put, usable_ram};
use crate::memory::{GuestRam, MemoryError};

const ACPI_RSDP: u64 = 0x70;
const MAP_ENTRIES: u64 = 0x1e8;
const SETUP_HEADER: u64 = 0x1f1;
const BOOT_FLAG: u64 = 0x1fe;
const MAGIC: u64 = 0x202;
const LOADER: u64 = 0x210;
const INITRD: u64 = 0x218;
const COMMAND_LINE_POINTER: u64 = 0x228;
const ALIGNMENT: u64 = 0x230;
const COMMAND_LINE_BYTES: u64 = 0x238;
const MAP: u64 = 0x2d0;
/// A loader without a number of its own, which has put the kernel above 1 MiB.
const UNKNOWN_LOADER: [u8; 2] = [0xff, 1];
const ALIGNMENT_BYTES: u32 = 16 << 20;

/// Fills the page. A bzImage brings its setup header along; for an ELF image the fields that matter are set here.
pub(super) fn place_zero_page(ram: &GuestRam, header: &[u8], loaded: &Loaded) -> Result<(), MemoryError> {
    let low = |value: u64| u32::try_from(value).expect("low RAM is below 4 GiB");
    let put32 = |at: u64, value: u32| put(ram, ZERO_PAGE + at, &value.to_le_bytes());
    if header.is_empty() {
        put(ram, ZERO_PAGE + BOOT_FLAG, &[0x55, 0xaa])?;
        put(ram, ZERO_PAGE + MAGIC, b"HdrS")?;
        put32(ALIGNMENT, ALIGNMENT_BYTES)?;
        put32(COMMAND_LINE_BYTES, loaded.command_line_bytes)?;
    } else {
        put(ram, ZERO_PAGE + SETUP_HEADER, header)?;
    }
    put(ram, ZERO_PAGE + LOADER, &UNKNOWN_LOADER)?;
    put32(COMMAND_LINE_POINTER, low(COMMAND_LINE))?;
    put(ram, ZERO_PAGE + ACPI_RSDP, &loaded.rsdp.to_le_bytes())?;
    if let Some((start, len)) = loaded.initrd {
        put32(INITRD, low(start))?;
        put32(INITRD + 4, low(len))?;
    }
    let pieces = usable_ram(ram);
    put(ram, ZERO_PAGE + MAP_ENTRIES, &[u8::try_from(pieces.len()).expect("two or three")])?;
    let mut map = Bytes::default();
    for (start, len) in pieces {
        map.u64(start).u64(len).u32(RAM);
    }
    put(ram, ZERO_PAGE + MAP, &map.0)
}

/// The first GiB one to one, in pages of 2 MiB.
pub(super) fn place_page_tables(ram: &GuestRam) -> Result<(), MemoryError> {
    put(ram, PAGE_TABLES, &(PAGE_TABLES + 0x1003).to_le_bytes())?;
    put(ram, PAGE_TABLES + 0x1000, &(PAGE_TABLES + 0x2003).to_le_bytes())?;
    let entries: Vec<u8> = (0..512_u64).flat_map(|i| (i << 21 | 0x83).to_le_bytes()).collect();
    put(ram, PAGE_TABLES + 0x2000, &entries)
}
