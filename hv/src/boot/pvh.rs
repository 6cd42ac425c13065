//! The PVH start info: what a kernel that is entered by PVH finds at EBX.

use super::{Bytes, COMMAND_LINE, Loaded, RAM, START_INFO, put, usable_ram};
use crate::memory::{GuestRam, MemoryError};

const MAGIC: u32 = 0x336e_c578;
const INFO_BYTES: usize = 56;
const MODULE_LIST: u64 = START_INFO + 0x80;
const MEMORY_MAP: u64 = START_INFO + 0x100;

pub(super) fn place_start_info(ram: &GuestRam, loaded: &Loaded) -> Result<(), MemoryError> {
    let pieces = usable_ram(ram);
    let modules = if loaded.initrd.is_some() { MODULE_LIST } else { 0 };
    let mut info = Bytes::default();
    info.u32(MAGIC).u32(1).u32(0).u32(loaded.initrd.is_some().into());
    info.u64(modules).u64(COMMAND_LINE).u64(loaded.rsdp).u64(MEMORY_MAP);
    info.u32(u32::try_from(pieces.len()).expect("two or three")).u32(0);
    debug_assert_eq!(info.0.len(), INFO_BYTES);
    put(ram, START_INFO, &info.0)?;
    if let Some((start, len)) = loaded.initrd {
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
