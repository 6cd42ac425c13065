//! The bare-metal test guests, and what it takes to judge them from outside.
//!
//! ```text
//!   image/*.c --cc--> one ELF image with a PVH note == IMAGE: boots under hv and under QEMU
//!         | role=sector-writer: writes records, prints "ack gen=G seq=N" after a flush
//!         v
//!   the scratch disk   --verify_image-->  Report: every acknowledged sector is there, whole
//! ```
//!
//! What a guest does is chosen by `role=` on its command line. All check what they come back to, and end with a line
//! `FAIL ...` at the first difference.
//!
//! | role | does | says |
//! |---|---|---|
//! | `sector-writer` | writes self-describing sectors, flushes, reads back | `ack gen=G seq=N` |
//! | `dirtier` | writes to a working set of pages at a set rate | `pass N`, `dirtied KiB=K ms=M` |
//! | `clock` | checks that no clock goes back | `clock tsc=T ns=N ticks=K`, `gap ms=M` |
//! | `reader` | reads ports and registers with known values | `reads N` |
//! | `ping-pong` | two processors take turns by interrupts | `balls N` |
//! | `listener` | tells configuration changes of its disks | `changed index=I from=F sectors=N first=X` |
//! | `balloon` | gives pages back and takes them again, as it is told | `balloon given=G held=H` |
//! | `echo` | says each line that is typed at its console | `heard N TEXT` |
//! | `registers` | holds a pattern in every register | `held N` |
//!
//! The command line has `name=number` pairs. For the dirtier: `set` (8) MiB of the working set, `rate` (0: unbounded)
//! KiB dirtied in a second, one word in a page; `noise` (0) 1 fills the set with what cannot be compressed; `module` (0) 1 takes
//! the initial RAM disk as the set, with what is in it. For the listener: `reset` (0: never) sectors that make it reset the machine
//! when a disk has got them, `off` (0: never) the same to switch it off; `words` (0) lines that it says before either. For the balloon:
//! `pages` (512) that it can give, `report` (0) 1 to report them as free once. For the echo: `deaf` (0)
//! hundredths of a second before it listens. For the sector-writer:
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

/// The guests as one ELF image that boots by PVH at 1 MiB.
pub const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
/// The same: without `role=` it is the sector-writer.
pub const SECTOR_WRITER: &[u8] = IMAGE;
/// What `role=` may name.
pub const ROLES: &[&str] =
    &["sector-writer", "dirtier", "clock", "reader", "ping-pong", "listener", "balloon", "echo", "registers"];
