//! What is wrong with a sound image, by name: damage that no reader minds, because the image says everything twice or does
//! not need it.
//!
//! **Invariant:** a defect is something that can be put right without guessing at content. What cannot is an error, and no
//! repair touches an image that has one.

use std::fmt;

use uuid::Uuid;

use crate::error::VhdxError;
use crate::format::{HEADER_OFFSETS, REGION_TABLE_OFFSETS};
use crate::load::Loaded;
use crate::region;
use crate::replay::LogState;

/// One thing that a repair puts right.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Defect {
    /// A copy of the header is damaged; the other serves.
    HeaderCopy {
        /// Where the damaged copy lies.
        file_offset: u64,
    },
    /// A copy of the region table is damaged; the other serves.
    RegionTableCopy {
        /// Where the damaged copy lies.
        file_offset: u64,
    },
    /// Both copies of the region table are whole, but they differ; the first counts.
    RegionTablesDiffer,
    /// The header names a log of which no entry exists.
    OrphanLogId {
        /// The id.
        log_id: Uuid,
    },
    /// The last writer did not close the image: its log waits to be replayed.
    DirtyLog {
        /// Entries to be replayed.
        entries: usize,
    },
    /// Blocks without a place still name one.
    StaleOffsets {
        /// Number of blocks.
        blocks: u64,
    },
    /// The file is longer than what is in use, by space that belongs to nobody.
    LeakedSpace {
        /// Bytes at the end of the file.
        bytes: u64,
    },
}

impl Defect {
    /// A stable name for programs.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::HeaderCopy { .. } => "header_copy",
            Self::RegionTableCopy { .. } => "region_table_copy",
            Self::RegionTablesDiffer => "region_tables_differ",
            Self::OrphanLogId { .. } => "orphan_log_id",
            Self::DirtyLog { .. } => "dirty_log",
            Self::StaleOffsets { .. } => "stale_offsets",
            Self::LeakedSpace { .. } => "leaked_space",
        }
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HeaderCopy { file_offset } => {
                write!(f, "the header at {file_offset:#x} is damaged; the other copy serves")
            }
            Self::RegionTableCopy { file_offset } => {
                write!(f, "the region table at {file_offset:#x} is damaged; the other copy serves")
            }
            Self::RegionTablesDiffer => write!(f, "the two region tables differ; the first counts"),
            Self::OrphanLogId { log_id } => {
                write!(f, "the header names the log {log_id}, of which there is no entry")
            }
            Self::DirtyLog { entries } => {
                write!(f, "the image was not closed: {entries} log entries wait to be replayed")
            }
            Self::StaleOffsets { blocks } => {
                write!(f, "{blocks} blocks that have no place in the file still name one")
            }
            Self::LeakedSpace { bytes } => write!(f, "{bytes} bytes at the end of the file belong to nobody"),
        }
    }
}

/// Everything that a repair would put right, in the order in which it would.
pub(crate) fn find(loaded: &Loaded) -> Result<Vec<Defect>, VhdxError> {
    let mut found = Vec::new();
    match &loaded.log {
        LogState::Clean => (),
        LogState::Orphan(log_id) => found.push(Defect::OrphanLogId { log_id: *log_id }),
        LogState::Dirty(replay) => found.push(Defect::DirtyLog { entries: replay.entries }),
    }
    if !loaded.header.both_valid {
        found.push(Defect::HeaderCopy { file_offset: HEADER_OFFSETS[1 - loaded.header.slot] });
    }
    match region::copies(&loaded.view)? {
        [Some(first), Some(second)] if first != second => found.push(Defect::RegionTablesDiffer),
        [Some(_), None] => found.push(Defect::RegionTableCopy { file_offset: REGION_TABLE_OFFSETS[1] }),
        [None, Some(_)] => found.push(Defect::RegionTableCopy { file_offset: REGION_TABLE_OFFSETS[0] }),
        _ => (),
    }
    match stale_blocks(loaded).count() {
        0 => (),
        blocks => found.push(Defect::StaleOffsets { blocks: crate::format::bytes(blocks) }),
    }
    let surplus = loaded.view.file_bytes.saturating_sub(loaded.used_end());
    if surplus > 0 {
        found.push(Defect::LeakedSpace { bytes: surplus });
    }
    Ok(found)
}

/// Blocks whose entry names a place that its state does not have.
pub(crate) fn stale_blocks(loaded: &Loaded) -> impl Iterator<Item = u64> + '_ {
    (0..loaded.bat.shape.blocks).filter(|block| loaded.bat.get(*block).has_stale_offset())
}
