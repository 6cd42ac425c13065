//! What an image is, for people and programs.

use std::sync::Arc;

use blockio::ImageFile;
use uuid::Uuid;

use crate::bat::BlockState;
use crate::error::VhdxError;
use crate::findings::Findings;
use crate::load::{Loaded, LogPolicy};
use crate::locator::ParentPaths;
use crate::replay::LogState;

/// The kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// Blocks get their place when they are first written.
    Dynamic,
    /// All blocks have their place.
    Fixed,
    /// Only what differs from a parent.
    Differencing,
}

/// The state of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogInfo {
    /// Nothing to replay.
    Clean,
    /// The last writer did not close: this many entries wait.
    Dirty {
        /// Entries to be replayed.
        entries: usize,
    },
    /// A log id without entries.
    Orphan,
}

/// How many blocks are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// All blocks of the disk.
    pub total: u64,
    /// Lie in the file.
    pub present: u64,
    /// Lie in the file in part (differencing).
    pub partial: u64,
    /// Never written.
    pub not_present: u64,
    /// Known to be zero.
    pub zero: u64,
    /// Discarded.
    pub unmapped: u64,
    /// Undefined.
    pub undefined: u64,
}

/// Which image a child differs from, in the words of its parent locator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentInfo {
    /// The parent's data write id when the child was made.
    pub linkage: Option<Uuid>,
    /// A second one, while a merge changes the parent.
    pub linkage2: Option<Uuid>,
    /// Where it is.
    pub paths: ParentPaths,
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Dynamic, fixed or differencing.
    pub kind: ImageKind,
    /// Size of the virtual disk.
    pub disk_bytes: u64,
    /// Size of a payload block.
    pub block_bytes: u64,
    /// Sector size that the guest sees.
    pub logical_sector: u32,
    /// Physical sector size.
    pub physical_sector: u32,
    /// Identity of the disk (SCSI page 83).
    pub disk_id: Uuid,
    /// Changes with every session that changes the file.
    pub file_write_id: Uuid,
    /// Changes with every session in which the guest changes data; what children refer to.
    pub data_write_id: Uuid,
    /// The program that made the image.
    pub creator: String,
    /// State of the log.
    pub log: LogInfo,
    /// Size of the file.
    pub file_bytes: u64,
    /// Blocks by state, after replay.
    pub blocks: BlockCounts,
    /// What a differencing image differs from.
    pub parent: Option<ParentInfo>,
    /// Oddities that do no harm to reading.
    pub warnings: Vec<String>,
}

/// Reads what the image in `file` is. Changes nothing.
///
/// # Errors
/// By [`VhdxError::kind`].
pub fn info(file: &Arc<dyn ImageFile>) -> Result<Info, VhdxError> {
    let mut findings = Findings::default();
    let loaded = Loaded::read(file, LogPolicy::InMemory, &mut findings)?;
    let findings = findings.into_result()?;
    Ok(describe(&loaded, findings.warnings))
}

pub(crate) fn describe(loaded: &Loaded, warnings: Vec<String>) -> Info {
    let (params, header) = (&loaded.params, &loaded.header.header);
    let kind = match (params.has_parent, params.fixed) {
        (true, _) => ImageKind::Differencing,
        (false, true) => ImageKind::Fixed,
        (false, false) => ImageKind::Dynamic,
    };
    let log = match &loaded.log {
        LogState::Clean => LogInfo::Clean,
        LogState::Orphan(_) => LogInfo::Orphan,
        LogState::Dirty(replay) => LogInfo::Dirty { entries: replay.entries },
    };
    Info {
        kind,
        disk_bytes: params.disk_bytes,
        block_bytes: params.block_bytes,
        logical_sector: params.logical_sector,
        physical_sector: params.physical_sector,
        disk_id: params.disk_id,
        file_write_id: Uuid::from_bytes_le(header.file_write_id),
        data_write_id: Uuid::from_bytes_le(header.data_write_id),
        creator: loaded.creator.clone(),
        log,
        file_bytes: loaded.view.file_bytes,
        blocks: count(loaded),
        parent: loaded.locator.as_ref().map(|locator| ParentInfo {
            linkage: locator.linkage(),
            linkage2: locator.linkage2(),
            paths: locator.paths(),
        }),
        warnings,
    }
}

fn count(loaded: &Loaded) -> BlockCounts {
    let mut counts = BlockCounts { total: loaded.bat.shape.blocks, ..BlockCounts::default() };
    for (at, run, entry) in loaded.bat.runs() {
        let blocks = loaded.bat.shape.blocks_before(at + run) - loaded.bat.shape.blocks_before(at);
        let slot = match entry.state() {
            BlockState::NotPresent => &mut counts.not_present,
            BlockState::Undefined | BlockState::Reserved(_) => &mut counts.undefined,
            BlockState::Zero => &mut counts.zero,
            BlockState::Unmapped => &mut counts.unmapped,
            BlockState::Present => &mut counts.present,
            BlockState::Partial => &mut counts.partial,
        };
        *slot += blocks;
    }
    counts
}
