//! `csvctl vhdx info`.

use std::path::PathBuf;

use api::Error;
use clap::Args;
use hv_runner::report::ImageInfo;

use super::online::{self, Online};
use super::{failed, file};
use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct Info {
    /// The image
    path: PathBuf,
}

impl Info {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let info = match Online::of(&self.path, context).await {
            Some(disk) => disk.work(online::request("info"), "looking", context).await?,
            None => self.closed()?,
        };
        context.ui.show(&ImageInfo { path: self.path, ..info }, text)
    }

    fn closed(&self) -> Result<ImageInfo, Error> {
        let image = file::open(&self.path)?;
        let info = vhdx::info(&image).map_err(|error| failed("info", &self.path, &error))?;
        Ok(ImageInfo::new(self.path.clone(), info))
    }
}

fn text(shown: &ImageInfo) -> String {
    let parent = shown.parent.as_ref();
    let parent =
        parent.and_then(|parent| parent.relative_path.clone().or_else(|| parent.absolute_path.clone()));
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
        ("parent", parent.unwrap_or_default()),
        ("disk id", shown.disk_id.clone()),
        ("creator", shown.creator.clone()),
        ("warnings", shown.warnings.join("; ")),
    ])
}
