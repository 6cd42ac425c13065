//! `csvctl vhdx info`.

use std::path::PathBuf;

use api::Error;
use clap::Args;
use serde::Serialize;
use vhdx::{ImageKind, LogInfo};

use super::{failed, file};
use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct Info {
    /// The image
    path: PathBuf,
}

#[derive(Serialize)]
struct Shown {
    path: PathBuf,
    kind: &'static str,
    size_bytes: u64,
    block_bytes: u64,
    logical_sector_bytes: u32,
    physical_sector_bytes: u32,
    file_bytes: u64,
    disk_id: String,
    file_write_id: String,
    data_write_id: String,
    creator: String,
    log: &'static str,
    log_entries: usize,
    blocks: Blocks,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct Blocks {
    total: u64,
    present: u64,
    partial: u64,
    not_present: u64,
    zero: u64,
    unmapped: u64,
    undefined: u64,
}

impl Info {
    pub(crate) fn run(self, context: &Context) -> Result<(), Error> {
        let image = file::open(&self.path)?;
        let info = vhdx::info(&image).map_err(|error| failed("info", &self.path, &error))?;
        context.ui.show(&shown(self.path, info), text)
    }
}

fn shown(path: PathBuf, info: vhdx::Info) -> Shown {
    let (log, log_entries) = match info.log {
        LogInfo::Clean => ("clean", 0),
        LogInfo::Dirty { entries } => ("dirty", entries),
        LogInfo::Orphan => ("orphan", 0),
    };
    Shown {
        path,
        kind: match info.kind {
            ImageKind::Dynamic => "dynamic",
            ImageKind::Fixed => "fixed",
            ImageKind::Differencing => "differencing",
        },
        size_bytes: info.disk_bytes,
        block_bytes: info.block_bytes,
        logical_sector_bytes: info.logical_sector,
        physical_sector_bytes: info.physical_sector,
        file_bytes: info.file_bytes,
        disk_id: info.disk_id.to_string(),
        file_write_id: info.file_write_id.to_string(),
        data_write_id: info.data_write_id.to_string(),
        creator: info.creator,
        log,
        log_entries,
        blocks: Blocks {
            total: info.blocks.total,
            present: info.blocks.present,
            partial: info.blocks.partial,
            not_present: info.blocks.not_present,
            zero: info.blocks.zero,
            unmapped: info.blocks.unmapped,
            undefined: info.blocks.undefined,
        },
        warnings: info.warnings,
    }
}

fn text(shown: &Shown) -> String {
    let log = match shown.log_entries {
        0 => shown.log.to_owned(),
        entries => format!("{} ({entries} entries to be replayed)", shown.log),
    };
    ui::fields([
        ("image", shown.path.display().to_string()),
        ("kind", shown.kind.to_owned()),
        ("disk", units::size(shown.size_bytes)),
        ("file", units::size(shown.file_bytes)),
        ("block", units::size(shown.block_bytes)),
        ("sector", format!("{} ({} physical)", shown.logical_sector_bytes, shown.physical_sector_bytes)),
        ("blocks", format!("{} of {} present", shown.blocks.present, shown.blocks.total)),
        ("log", log),
        ("disk id", shown.disk_id.clone()),
        ("creator", shown.creator.clone()),
        ("warnings", shown.warnings.join("; ")),
    ])
}
