//! Bytes of the LUN to types and back, and nothing else: no I/O, no decisions.
//!
//! ```text
//! 0        superblock A        2 MiB    owner block A, +4 KiB owner block B
//! 1 MiB    superblock B        3 MiB    heartbeat area, one 4 KiB slot per node
//!                              4 MiB    intent logs, one ring of 256 KiB per node
//!                              20 MiB   metadata slot A, +16 KiB metadata slot B, +64 KiB the store's journal
//!                              21 MiB   first metadata chunk, then the data area
//! ```
//!
//! **Invariant:** every record carries a magic number, a version, its own address, the volume's id and a CRC-32C; what
//! fails one of these is `Damaged`, never half used. All numbers are little-endian. The full description follows.
#![doc = ""]
#![doc = include_str!("../../FORMAT.md")]

pub mod intent;
pub(crate) mod journal;
pub mod layout;
pub mod log_record;
pub(crate) mod meta_slot;
pub mod owner;
mod seal;
pub mod superblock;

/// Why bytes on the LUN are not the record that is expected there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damaged {
    /// There is no such record here.
    #[error("no {what} at {offset}")]
    Absent {
        /// Which record.
        what: &'static str,
        /// Where on the LUN, in bytes.
        offset: u64,
    },
    /// The checksum does not match: a torn or overwritten record.
    #[error("the {what} at {offset} is torn or overwritten: its checksum does not match")]
    Checksum {
        /// Which record.
        what: &'static str,
        /// Where on the LUN, in bytes.
        offset: u64,
    },
    /// The checksum matches, but a field cannot be.
    #[error("the {what} at {offset} is not usable: {why}")]
    Field {
        /// Which record.
        what: &'static str,
        /// Where on the LUN, in bytes.
        offset: u64,
        /// Which field and why.
        why: String,
    },
}
