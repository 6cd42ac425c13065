//! Kernel images: which kind one is, and its bytes at their place.
//!
//! | image | entered by | at |
//! |---|---|---|
//! | ELF with a PVH note | PVH: 32 bits, EBX = start info | the note's address |
//! | ELF without | Linux' 64-bit protocol: RSI = zero page | its entry |
//! | bzImage | the same, with the image's own setup header in the zero page | 1 MiB + 0x200 |
//!
//! **Invariant:** nothing in an image is believed: all of it ends inside of RAM, whatever its headers say (H7).

use std::io::Cursor;

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, GuestAddress};

use super::{BootError, HIGH_RAM_START};
use crate::memory::{GuestRam, HOLE_START};

/// Offsets in a bzImage, which are those in the zero page.
const SETUP_SECTORS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_END: usize = 0x201;
const MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const LOAD_FLAGS: usize = 0x211;
const ADDRESS_FLAGS: usize = 0x236;
const PREFERRED_ADDRESS: usize = 0x258;
const INIT_BYTES: usize = 0x260;
/// The first protocol that says whether there is a 64-bit entry.
const PROTOCOL_MIN: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const ENTRY_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;
const SECTOR_BYTES: usize = 512;

/// A kernel in RAM.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    pub(super) start: Start,
    /// First byte that the kernel does not need for itself.
    pub(super) end: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Start {
    Pvh {
        entry: u64,
    },
    /// With the setup header of the image, for offset 0x1f1 of the zero page; empty for an ELF image.
    Linux64 {
        entry: u64,
        header: Vec<u8>,
    },
}

pub(super) fn load(ram: &GuestRam, image: &[u8]) -> Result<Kernel, BootError> {
    if image.get(MAGIC..MAGIC + 4) == Some(b"HdrS") {
        load_bz_image(ram, image)
    } else {
        load_elf(ram, image)
    }
}

fn load_elf(ram: &GuestRam, image: &[u8]) -> Result<Kernel, BootError> {
    let lowest = Some(GuestAddress(HIGH_RAM_START));
    let loaded = Elf::load(ram.map(), None, &mut Cursor::new(image), lowest)
        .map_err(|error| BootError::Kernel(error.to_string()))?;
    // The loader places what the file has; the room that a segment wants after that is only a number.
    let end = loaded.kernel_end;
    if end > ram.bytes().min(HOLE_START) {
        return Err(BootError::Kernel(format!("it needs {end} bytes of RAM below 3 GiB")));
    }
    let start = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Start::Pvh { entry: entry.raw_value() },
        _ => Start::Linux64 { entry: loaded.kernel_load.raw_value(), header: Vec::new() },
    };
    Ok(Kernel { start, end })
}

fn load_bz_image(ram: &GuestRam, image: &[u8]) -> Result<Kernel, BootError> {
    let refused = |why: &str| BootError::Kernel(format!("this bzImage {why}"));
    let header = image.get(..INIT_BYTES + 4).ok_or_else(|| refused("is cut short"))?;
    let u16_at = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    if u16_at(BOOT_FLAG) != 0xaa55 || u16_at(PROTOCOL) < PROTOCOL_MIN {
        return Err(refused("is older than Linux 3.8"));
    }
    if header[LOAD_FLAGS] & LOADED_HIGH == 0 || u16_at(ADDRESS_FLAGS) & ENTRY_64 == 0 {
        return Err(refused("has no 64-bit entry"));
    }
    // Zero means four, for the oldest of all loaders.
    let sectors = if header[SETUP_SECTORS] == 0 { 4 } else { usize::from(header[SETUP_SECTORS]) };
    let code = image.get((sectors + 1) * SECTOR_BYTES..).filter(|code| !code.is_empty());
    let code = code.ok_or_else(|| refused("ends before its code"))?;
    let preferred =
        u64::from_le_bytes(header[PREFERRED_ADDRESS..PREFERRED_ADDRESS + 8].try_into().expect("eight bytes"));
    let needed = u32::from_le_bytes(header[INIT_BYTES..INIT_BYTES + 4].try_into().expect("four bytes"));
    // It unpacks itself to the address that it prefers, and needs that much room there.
    let end = preferred.max(HIGH_RAM_START).saturating_add(needed.into());
    if end > ram.bytes().min(HOLE_START) {
        return Err(refused(&format!("needs {end} bytes of RAM below 3 GiB")));
    }
    ram.write(HIGH_RAM_START, code)?;
    let header_end = MAGIC + usize::from(header[HEADER_END]);
    let header = image.get(SETUP_SECTORS..header_end).ok_or_else(|| refused("is cut short"))?.to_vec();
    let entry = HIGH_RAM_START + ENTRY_64_OFFSET;
    Ok(Kernel { start: Start::Linux64 { entry, header }, end: end.max(HIGH_RAM_START + code.len() as u64) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{BootSource, Firmware};
    use super::*;

    fn bz_image() -> Vec<u8> {
        let mut image = vec![0; 2 * SECTOR_BYTES];
        image[SETUP_SECTORS] = 1;
        image[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        image[HEADER_END] = 0x6a;
        image[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&[0x0f, 0x02]);
        image[LOAD_FLAGS] = LOADED_HIGH;
        image[ADDRESS_FLAGS] = 1;
        image[INIT_BYTES..INIT_BYTES + 4].copy_from_slice(&(1_u32 << 20).to_le_bytes());
        image.extend([0xf4; 1000]);
        image
    }

    #[test]
    fn a_bz_image_is_entered_in_64_bits_with_its_own_header() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let kernel = load(&ram, &bz_image()).unwrap();
        let Start::Linux64 { entry, header } = kernel.start else { panic!("{kernel:?}") };
        assert_eq!(entry, HIGH_RAM_START + ENTRY_64_OFFSET);
        assert_eq!(&header[MAGIC - SETUP_SECTORS..][..4], b"HdrS");
        assert_eq!(kernel.end, 2 << 20);
        let mut code = [0; 4];
        ram.read(HIGH_RAM_START, &mut code).unwrap();
        assert_eq!(code, [0xf4; 4]);
    }

    type Damage = fn(&mut Vec<u8>);

    // Invariant H7.
    #[test]
    fn a_bz_image_that_lies_is_refused() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let damages: [(&str, Damage); 7] = [
            ("cut in the header", |image| image.truncate(0x210)),
            ("no code", |image| image.truncate(2 * SECTOR_BYTES)),
            ("sectors beyond its end", |image| image[SETUP_SECTORS] = 200),
            ("an old protocol", |image| image[PROTOCOL] = 1),
            ("no 64-bit entry", |image| image[ADDRESS_FLAGS] = 0),
            ("more than there is", |image| image[INIT_BYTES + 3] = 0xff),
            ("an address at the end of all", |image| image[PREFERRED_ADDRESS..][..8].fill(0xff)),
        ];
        for (what, damage) in damages {
            let mut image = bz_image();
            damage(&mut image);
            assert!(matches!(load(&ram, &image), Err(BootError::Kernel(_))), "{what}");
        }
    }

    /// Whatever the image says, a kernel that is taken ends in RAM.
    fn loaded_or_refused(image: &[u8]) {
        let ram = GuestRam::new(16 << 20).unwrap();
        if let Ok(kernel) = load(&ram, image) {
            assert!(kernel.end <= ram.bytes(), "{:#x}", kernel.end);
            let source = BootSource {
                kernel: image,
                initrd: Some(&[7; 5000]),
                cmdline: "x",
                firmware: Firmware::Acpi,
            };
            drop(super::super::load(&ram, &source, 2, &[]));
        }
    }

    /// Numbers at which sums overflow, and ordinary ones.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![any::<u64>(), 0..0x40_0000_u64, Just(u64::MAX), Just(u64::MAX - 4095), Just(1 << 63)]
    }

    proptest! {
        // Invariant H7.
        #[test]
        fn any_damaged_image_is_a_kernel_inside_of_ram_or_refused(
            elf in any::<bool>(),
            damages in proptest::collection::vec((0_usize..0x300, number(), 1_usize..=8), 0..6),
            cut in proptest::option::of(0_usize..0x2000),
        ) {
            let mut image = if elf { hv_guest::IMAGE.to_vec() } else { bz_image() };
            let end = image.len();
            for (at, value, bytes) in damages {
                let at = at % (end - 8);
                image[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
            }
            image.truncate(cut.unwrap_or(end));
            loaded_or_refused(&image);
        }

        // Invariant H7.
        #[test]
        fn any_segment_of_an_elf_image_ends_inside_of_ram_or_is_refused(
            place in number(), in_file in number(), in_memory in number(), offset in number()
        ) {
            let mut image = hv_guest::IMAGE.to_vec();
            let headers = usize::try_from(u64::from_le_bytes(image[32..40].try_into().unwrap())).unwrap();
            let loads = (0..usize::from(image[56])).map(|number| headers + number * 56);
            let first = loads.into_iter().find(|at| image[*at] == 1).expect("a segment that is loaded");
            for (field, value) in [(8, offset), (24, place), (32, in_file), (40, in_memory)] {
                image[first + field..first + field + 8].copy_from_slice(&value.to_le_bytes());
            }
            loaded_or_refused(&image);
        }
    }
}
