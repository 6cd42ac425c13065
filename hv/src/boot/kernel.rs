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
    let start = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Start::Pvh { entry: entry.raw_value() },
        _ => Start::Linux64 { entry: loaded.kernel_load.raw_value(), header: Vec::new() },
    };
    Ok(Kernel { start, end: loaded.kernel_end })
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

    #[test]
    fn an_image_of_noise_does_no_harm() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
        for start in [bz_image(), hv_guest::IMAGE.to_vec()] {
            for _ in 0..400 {
                let mut image = start.clone();
                for _ in 0..4 {
                    noise ^= noise << 13;
                    noise ^= noise >> 7;
                    noise ^= noise << 17;
                    let at = usize::try_from(noise >> 8).unwrap() % image.len().min(0x300);
                    image[at] = noise.to_le_bytes()[0];
                }
                drop(load(&ram, &image));
            }
        }
    }
}
