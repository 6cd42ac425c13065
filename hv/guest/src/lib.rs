//! The bare-metal test guest, and what it takes to judge its disk from outside.
//!
//! ```text
//!   sector-writer/*.c --cc--> ELF with a PVH note  ==  SECTOR_WRITER
//!         | writes records                  | prints "ack gen=G seq=N" after a flush
//!         v                                 v
//!   the scratch disk   --verify_image-->  Report: every acknowledged sector is there, whole
//! ```
//!
//! Its command line is `name=number` pairs:
//!
//! | name | default | meaning |
//! |---|---|---|
//! | `verify` | 0 | number of the disk that is only read: the same sectors must always give the same sum |
//! | `write` | 1 | number of the disk that gets records |
//! | `range` | 4096 | records on that disk; the walk comes back after this many |
//! | `sectors` | 8 | sectors of 512 bytes in a record |
//! | `batch` | 8 | records between two flushes |
//! | `ack` | 4 | an `ack` line every so many flushes |
//! | `reads` | 2 | records read back and compared after each batch |
//! | `pages` | 256 | pages of RAM that are stamped and checked in turn |
//! | `pace` | 5 | hundredths of a second between the starts of two batches |
//! | `span` | 1024 | KiB of the read-only disk that are summed |
//! | `gen` | 1 | generation: which boot of the VM wrote a record |
//! | `seed` | 1 | tells the records of one VM from those of another |
//!
//! A disk number beyond the last disk switches that part off. Devices are found by `virtio_mmio.device=` entries.

mod record;

pub use record::{
    Ack, ImageError, Layout, Problem, RECORD_MAGIC, Report, SECTOR_BYTES, STRIDE, Sector, expected_after_ack,
    last_ack, span_sum, verify_image,
};

/// The guest as an ELF image that boots by PVH at 1 MiB.
pub const SECTOR_WRITER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sector-writer.elf"));
