//! What a LUN already holds, told by the signatures that formats leave at known places.
//!
//! Used before anything is formatted. **Invariant:** it only reads, and at most the first [`HEAD_BYTES`].

use blockio::{BlockDevice, IoError};
use lockmgr::VolumeId;

use crate::format::{Damaged, layout, superblock::SUPERBLOCK_BYTES, superblock::Superblock};

/// How much of the start of a LUN is looked at.
pub const HEAD_BYTES: usize = (2 << 20) + 4096;

/// What was found on a LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A csvfs volume.
    Volume(Box<Superblock>),
    /// A csvfs volume of which no superblock copy is whole.
    TornVolume,
    /// Something else, by its name.
    Foreign(&'static str),
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Volume(block) => {
                let VolumeId(id) = block.volume;
                write!(f, "csvfs volume '{}' ({id}) of cluster {}", block.name, block.cluster)
            }
            Self::TornVolume => f.write_str("a csvfs volume whose superblocks are both damaged"),
            Self::Foreign(what) => f.write_str(what),
        }
    }
}

/// Names what `device` holds, if a known signature is there.
///
/// # Errors
/// Those of reading the device.
pub fn probe(device: &dyn BlockDevice) -> Result<Option<Found>, IoError> {
    let size = device.geometry().size_bytes;
    let len = usize::try_from(size).unwrap_or(usize::MAX).min(HEAD_BYTES);
    let unit = usize::try_from(device.geometry().block_bytes.max(1)).unwrap_or(1);
    let mut head = vec![0; len - len % unit];
    device.read_at(0, &mut head)?;
    Ok(probe_csvfs(&head).or_else(|| foreign(&head).map(Found::Foreign)))
}

fn probe_csvfs(head: &[u8]) -> Option<Found> {
    let mut torn = false;
    let mut newest: Option<Superblock> = None;
    for offset in layout::SUPERBLOCK_OFFSETS {
        let at = usize::try_from(offset).ok()?;
        let Some(bytes) = head.get(at..at + SUPERBLOCK_BYTES) else { continue };
        match Superblock::decode(bytes, offset) {
            Ok(block) if newest.as_ref().is_none_or(|n| n.generation < block.generation) => {
                newest = Some(block);
            }
            Ok(_) | Err(Damaged::Absent { .. }) => {}
            Err(_) => torn = true,
        }
    }
    newest.map(|block| Found::Volume(Box::new(block))).or(torn.then_some(Found::TornVolume))
}

/// A signature: these bytes at this offset.
struct Magic {
    at: usize,
    bytes: &'static [u8],
    name: &'static str,
}

const fn magic(at: usize, bytes: &'static [u8], name: &'static str) -> Magic {
    Magic { at, bytes, name }
}

// Specific formats first, containers and boot sectors last.
const MAGICS: &[Magic] = &[
    magic(0, b"XFSB", "an XFS filesystem"),
    magic(0x1_0040, b"_BHRfS_M", "a btrfs filesystem"),
    magic(0, b"LUKS\xba\xbe", "a LUKS encrypted volume"),
    magic(0, b"vhdxfile", "a VHDX disk image"),
    magic(0, b"conectix", "a VHD disk image"),
    magic(0, b"QFI\xfb", "a QCOW disk image"),
    magic(0, b"KDMV", "a VMDK disk image"),
    magic(0, b"redb\x1a\x0a\xa9\x0d\x0a", "a redb database"),
    magic(4086, b"SWAPSPACE2", "Linux swap space"),
    magic(4086, b"SWAP-SPACE", "Linux swap space"),
    magic(0, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    magic(4096, b"\xfc\x4e\x2b\xa9", "a Linux RAID member"),
    magic(4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "a bcache device"),
    magic(1024, b"\x10\x20\xf5\xf2", "an F2FS filesystem"),
    magic(0x1_0000, b"\x01\x16\x19\x70\x00\x00\x00\x01", "a GFS2 filesystem"),
    magic(1024, b"OCFSV2", "an OCFS2 filesystem"),
    magic(2048, b"OCFSV2", "an OCFS2 filesystem"),
    magic(4096, b"OCFSV2", "an OCFS2 filesystem"),
    magic(8192, b"OCFSV2", "an OCFS2 filesystem"),
    magic(0x10_0000, b"\x0d\xd0\x01\xc0", "a VMFS volume"),
    magic(1024, b"H+\x00\x04", "an HFS+ filesystem"),
    magic(1024, b"HX\x00\x05", "an HFS+ filesystem"),
    magic(32, b"NXSB", "an APFS container"),
    magic(0x8001, b"CD001", "an ISO 9660 image"),
    magic(0, b"hsqs", "a SquashFS image"),
    magic(3, b"NTFS    ", "an NTFS filesystem"),
    magic(3, b"ReFS\0\0\0\0", "a ReFS filesystem"),
    magic(3, b"-FVE-FS-", "a BitLocker volume"),
    magic(3, b"EXFAT   ", "an exFAT filesystem"),
    magic(82, b"FAT32   ", "a FAT filesystem"),
    magic(54, b"FAT16   ", "a FAT filesystem"),
    magic(54, b"FAT12   ", "a FAT filesystem"),
    magic(512, b"EFI PART", "a GPT partition table"),
    magic(4096, b"EFI PART", "a GPT partition table"),
];

fn foreign(head: &[u8]) -> Option<&'static str> {
    extfs(head)
        .or_else(|| lvm(head))
        .or_else(|| zfs(head))
        .or_else(|| MAGICS.iter().find(|m| has(head, m.at, m.bytes)).map(|m| m.name))
        .or_else(|| mbr(head))
}

fn has(head: &[u8], at: usize, bytes: &[u8]) -> bool {
    head.get(at..).is_some_and(|rest| rest.starts_with(bytes))
}

fn u32_at(head: &[u8], at: usize) -> u32 {
    head.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
}

/// The ext family has one magic number; features tell the members apart.
fn extfs(head: &[u8]) -> Option<&'static str> {
    const HAS_JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    const EXT4_ONLY: u32 = 0x40 | 0x80 | 0x200; // extents, 64bit, flex_bg
    if !has(head, 0x438, b"\x53\xef") {
        return None;
    }
    let (compat, incompat) = (u32_at(head, 0x45c), u32_at(head, 0x460));
    Some(if incompat & JOURNAL_DEVICE != 0 {
        "an ext journal device"
    } else if incompat & EXT4_ONLY != 0 {
        "an ext4 filesystem"
    } else if compat & HAS_JOURNAL != 0 {
        "an ext3 filesystem"
    } else {
        "an ext2 filesystem"
    })
}

/// The label may be in any of the first four sectors.
fn lvm(head: &[u8]) -> Option<&'static str> {
    let label =
        |sector: usize| has(head, sector * 512, b"LABELONE") && has(head, sector * 512 + 24, b"LVM2 001");
    (0..4).any(label).then_some("an LVM physical volume")
}

/// The array of uberblocks starts at 128 KiB of a label, one each KiB or more, in the writer's byte order.
fn zfs(head: &[u8]) -> Option<&'static str> {
    let uber = |i: usize| {
        let at = (128 + i) << 10;
        has(head, at, b"\x0c\xb1\xba\0\0\0\0\0") || has(head, at, b"\0\0\0\0\0\xba\xb1\x0c")
    };
    (0..128).any(uber).then_some("a ZFS pool member")
}

/// A boot signature alone is no partition table: at least one entry must be in use.
fn mbr(head: &[u8]) -> Option<&'static str> {
    let used = |i: usize| {
        let at = 446 + i * 16;
        head.get(at + 4).is_some_and(|kind| *kind != 0) && u32_at(head, at + 12) != 0
    };
    (has(head, 510, b"\x55\xaa") && (0..4).any(used)).then_some("an MBR partition table")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(at: usize, bytes: &[u8]) -> Option<&'static str> {
        let mut head = vec![0; HEAD_BYTES];
        head[at..at + bytes.len()].copy_from_slice(bytes);
        foreign(&head)
    }

    #[test]
    fn every_signature_is_named() {
        for m in MAGICS {
            assert_eq!(named(m.at, m.bytes), Some(m.name));
        }
        assert_eq!(named(0x438, b"\x53\xef"), Some("an ext2 filesystem"));
        assert_eq!(named(128 << 10, b"\x0c\xb1\xba\0\0\0\0\0"), Some("a ZFS pool member"));
    }

    #[test]
    fn lvm_and_partition_tables_are_named() {
        let mut label = [0; 32];
        label[..8].copy_from_slice(b"LABELONE");
        label[24..].copy_from_slice(b"LVM2 001");
        assert_eq!(named(512, &label), Some("an LVM physical volume"));
        let mut table = [0; 66];
        table[4] = 0x83;
        table[12] = 1;
        table[64..].copy_from_slice(b"\x55\xaa");
        assert_eq!(named(446, &table), Some("an MBR partition table"));
    }

    #[test]
    fn zeros_and_short_devices_hold_nothing() {
        assert_eq!(foreign(&vec![0; HEAD_BYTES]), None);
        assert_eq!(foreign(&[0; 100]), None);
        assert_eq!(foreign(&[]), None);
    }
}
