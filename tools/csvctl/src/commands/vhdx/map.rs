//! `csvctl vhdx map`.

use std::path::{Path, PathBuf};

use api::Error;
use api::pb::VmImageRequest;
use clap::Args;
use hv_runner::report::{self, ImageMap};

use super::in_use::{self, Use};
use super::online::{self, Online};
use super::{Roots, failed, file};
use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct Map {
    /// The image
    path: PathBuf,
    /// Show what changed since this image of its chain
    #[arg(long, value_name = "PARENT")]
    since: Option<PathBuf>,
    #[command(flatten)]
    roots: Roots,
}

impl Map {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let map = match Online::of(&self.path, context).await {
            Some(disk) => {
                let since = self.since.as_deref().map(online::shown).unwrap_or_default();
                let request = VmImageRequest { other: since, ..online::request("map") };
                disk.work(request, "mapping", context).await?
            }
            None => self.closed(context).await?,
        };
        context.ui.show(&ImageMap { path: self.path, since: self.since, ..map }, text)
    }

    async fn closed(&self, context: &Context) -> Result<ImageMap, Error> {
        let _claim = in_use::claim(&self.path, Use::Read, context).await?;
        let image =
            file::open_image(&self.path, &self.roots).map_err(|error| failed("map", &self.path, &error))?;
        let unreadable = |error| Error::failed(format!("map {}: {error}", self.path.display()));
        let extents = match &self.since {
            None => report::extents(&image).map_err(unreadable)?,
            Some(since) => {
                let found = report::changed(&image, &file::open(since)?.identity()).map_err(unreadable)?;
                found.ok_or_else(|| self.no_parent(since))?
            }
        };
        let size_bytes = blockio::BlockDevice::geometry(&image).size_bytes;
        Ok(ImageMap { path: self.path.clone(), since: self.since.clone(), size_bytes, extents })
    }

    fn no_parent(&self, since: &Path) -> Error {
        Error::usage(format!("{} is no parent of {}", since.display(), self.path.display()))
            .hint("`csvctl vhdx info` shows the parent of an image")
    }
}

fn text(shown: &ImageMap) -> String {
    let rows = shown.extents.iter().map(|extent| {
        [
            extent.offset_bytes.to_string(),
            units::size(extent.length_bytes),
            extent.kind.clone(),
            extent.file_offset_bytes.map_or_else(String::new, |offset| format!("{offset:#x}")),
        ]
    });
    ui::table(["offset", "length", "kind", "in the file"], rows)
}
