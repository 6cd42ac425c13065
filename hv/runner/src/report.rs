//! What a person or a program is told of an image, the same whether the image is closed or the disk of a running VM.
//!
//! `csvctl` makes these of closed images; a VM's process makes them of its disks and sends them as JSON. Field names are what
//! `--json` prints, so they stay.

use std::error::Error;
use std::path::PathBuf;

use blockio::IoError;
use serde::{Deserialize, Serialize};
use vhdx::{Defect, Image, ImageKind, Info, LogInfo, Mapped, Report, VhdxError};

/// What an image is.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct ImageInfo {
    pub path: PathBuf,
    pub kind: String,
    pub size_bytes: u64,
    pub block_bytes: u64,
    pub logical_sector_bytes: u32,
    pub physical_sector_bytes: u32,
    pub file_bytes: u64,
    pub disk_id: String,
    pub file_write_id: String,
    pub data_write_id: String,
    pub creator: String,
    pub log: String,
    pub log_entries: usize,
    pub blocks: BlockReport,
    /// How the parent of a child can be found.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub parent: Option<ParentReport>,
    pub warnings: Vec<String>,
}

/// How many blocks are in which state.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field counts the blocks in the state that it is named after")]
pub struct BlockReport {
    pub total: u64,
    pub present: u64,
    pub partial: u64,
    pub not_present: u64,
    pub zero: u64,
    pub unmapped: u64,
    pub undefined: u64,
}

/// The parent of an image, in the words of the image.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says")]
pub struct ParentReport {
    pub data_write_id: Option<String>,
    pub relative_path: Option<String>,
    pub absolute_path: Option<String>,
}

/// What a check has found.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says")]
pub struct ImageCheck {
    pub path: PathBuf,
    pub sound: bool,
    pub errors: Vec<Finding>,
    pub defects: Vec<Finding>,
    pub warnings: Vec<String>,
    pub not_listed: u64,
    pub repaired: Vec<Finding>,
}

/// One thing that is not as it should be.
#[derive(Debug, Serialize, Deserialize)]
pub struct Finding {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
}

/// Which ranges of a disk an image says something about.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct ImageMap {
    pub path: PathBuf,
    pub since: Option<PathBuf>,
    pub size_bytes: u64,
    pub extents: Vec<Extent>,
}

/// A range of a disk.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct Extent {
    pub offset_bytes: u64,
    pub length_bytes: u64,
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub file_offset_bytes: Option<u64>,
}

/// A new child.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct ImageCreated {
    pub path: PathBuf,
    pub size_bytes: u64,
    pub block_bytes: u64,
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub parent: Option<PathBuf>,
}

/// What a merge has done.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct ImageMerged {
    pub child: PathBuf,
    pub parent: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub top: Option<PathBuf>,
    pub data_bytes: u64,
    pub child_removed: bool,
    pub dry_run: bool,
}

/// What a compaction has done.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct ImageCompacted {
    pub path: PathBuf,
    pub old_file_bytes: u64,
    pub file_bytes: u64,
    pub zero_blocks: u64,
    pub moved_blocks: u64,
}

/// What a resize has done.
#[derive(Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "each field is what its name says; units are in the names")]
pub struct ImageResized {
    pub path: PathBuf,
    pub old_size_bytes: u64,
    pub size_bytes: u64,
    pub minimum_safe_size_bytes: u64,
    pub table_moved: bool,
    pub dry_run: bool,
}

impl ImageInfo {
    /// Of the image at `path`.
    #[must_use]
    pub fn new(path: PathBuf, info: Info) -> Self {
        let (log, log_entries) = match info.log {
            LogInfo::Clean => ("clean", 0),
            LogInfo::Dirty { entries } => ("dirty", entries),
            LogInfo::Orphan => ("orphan", 0),
        };
        let kind = match info.kind {
            ImageKind::Dynamic => "dynamic",
            ImageKind::Fixed => "fixed",
            ImageKind::Differencing => "differencing",
        };
        let parent = info.parent.map(|parent| ParentReport {
            data_write_id: parent.linkage.map(|id| id.to_string()),
            relative_path: parent.paths.relative,
            absolute_path: parent.paths.absolute,
        });
        Self {
            path,
            kind: kind.to_owned(),
            size_bytes: info.disk_bytes,
            block_bytes: info.block_bytes,
            logical_sector_bytes: info.logical_sector,
            physical_sector_bytes: info.physical_sector,
            file_bytes: info.file_bytes,
            disk_id: info.disk_id.to_string(),
            file_write_id: info.file_write_id.to_string(),
            data_write_id: info.data_write_id.to_string(),
            creator: info.creator,
            log: log.to_owned(),
            log_entries,
            blocks: BlockReport {
                total: info.blocks.total,
                present: info.blocks.present,
                partial: info.blocks.partial,
                not_present: info.blocks.not_present,
                zero: info.blocks.zero,
                unmapped: info.blocks.unmapped,
                undefined: info.blocks.undefined,
            },
            parent,
            warnings: info.warnings,
        }
    }
}

impl ImageCheck {
    /// Of the image at `path`, after these defects were put right.
    #[must_use]
    pub fn new(path: PathBuf, report: Report, repaired: &[Defect]) -> Self {
        let error = |error: &VhdxError| Finding { code: code(error), message: message(error) };
        Self {
            path,
            sound: report.is_sound(),
            errors: report.errors.iter().map(error).collect(),
            defects: report.defects.iter().map(finding).collect(),
            warnings: report.warnings,
            not_listed: report.more,
            repaired: repaired.iter().map(finding).collect(),
        }
    }
}

fn finding(defect: &Defect) -> Finding {
    Finding { code: defect.code().to_owned(), message: defect.to_string() }
}

/// `OrphanLogId` as `orphan_log_id`.
fn code(error: &VhdxError) -> String {
    let mut code = String::new();
    for char in format!("{:?}", error.kind()).chars() {
        if char.is_ascii_uppercase() && !code.is_empty() {
            code.push('_');
        }
        code.push(char.to_ascii_lowercase());
    }
    code
}

/// The text of an error with its causes.
#[must_use]
pub fn message(error: &VhdxError) -> String {
    let mut message = error.to_string();
    let mut cause = Error::source(error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    message
}

/// What an image says about the ranges of its disk.
///
/// # Errors
/// When the file cannot be read.
pub fn extents(image: &Image) -> Result<Vec<Extent>, IoError> {
    let mut extents = Vec::new();
    image.map(&mut |extent| {
        let (kind, file_offset_bytes) = match extent.mapped {
            Mapped::Data { file_offset } => ("data", Some(file_offset)),
            Mapped::Zero => ("zero", None),
            Mapped::Parent => ("parent", None),
        };
        let (offset_bytes, length_bytes) = (extent.offset, extent.len);
        extents.push(Extent { offset_bytes, length_bytes, kind: kind.to_owned(), file_offset_bytes });
    })?;
    Ok(extents)
}

/// What the images above the one in the file `since` say. `None`: that is no parent of this image.
///
/// # Errors
/// When a file cannot be read.
pub fn changed(image: &Image, since: &str) -> Result<Option<Vec<Extent>>, IoError> {
    let mut above = 1;
    let mut next = image.parent();
    loop {
        let Some(parent) = next else { return Ok(None) };
        if parent.identity() == since {
            break;
        }
        above += 1;
        next = parent.parent();
    }
    let mut extents = Vec::new();
    image.changed_above(above, &mut |range| {
        let (offset_bytes, length_bytes) = (range.start, range.end - range.start);
        extents.push(Extent {
            offset_bytes,
            length_bytes,
            kind: "changed".to_owned(),
            file_offset_bytes: None,
        });
    })?;
    Ok(Some(extents))
}
