//! `csvctl vhdx map`.

use std::path::{Path, PathBuf};

use api::Error;
use clap::Args;
use serde::Serialize;
use vhdx::{Image, Mapped};

use super::in_use::{self, Use};
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

#[derive(Serialize)]
struct Shown {
    path: PathBuf,
    since: Option<PathBuf>,
    size_bytes: u64,
    extents: Vec<Extent>,
}

#[derive(Serialize)]
struct Extent {
    offset_bytes: u64,
    length_bytes: u64,
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_offset_bytes: Option<u64>,
}

impl Map {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let _claim = in_use::claim(&self.path, Use::Read, context).await?;
        let image =
            file::open_image(&self.path, &self.roots).map_err(|error| failed("map", &self.path, &error))?;
        let extents = match &self.since {
            None => extents(&image),
            Some(since) => changed(&image, &self.path, since)?,
        };
        let extents =
            extents.map_err(|error| Error::failed(format!("map {}: {error}", self.path.display())))?;
        let size_bytes = blockio::BlockDevice::geometry(&image).size_bytes;
        context.ui.show(&Shown { path: self.path, since: self.since, size_bytes, extents }, text)
    }
}

fn extents(image: &Image) -> Result<Vec<Extent>, blockio::IoError> {
    let mut extents = Vec::new();
    image.map(&mut |extent| {
        let (kind, file_offset_bytes) = match extent.mapped {
            Mapped::Data { file_offset } => ("data", Some(file_offset)),
            Mapped::Zero => ("zero", None),
            Mapped::Parent => ("parent", None),
        };
        extents.push(Extent {
            offset_bytes: extent.offset,
            length_bytes: extent.len,
            kind,
            file_offset_bytes,
        });
    })?;
    Ok(extents)
}

/// How many images lie above `since` in the chain, and what they say.
fn changed(image: &Image, path: &Path, since: &Path) -> Result<Result<Vec<Extent>, blockio::IoError>, Error> {
    let wanted = file::open(since)?.identity();
    let mut above = 1;
    let mut next = image.parent();
    while let Some(parent) = next.filter(|parent| parent.identity() != wanted) {
        above += 1;
        next = parent.parent();
        if next.is_none() {
            return Err(Error::usage(format!("{} is no parent of {}", since.display(), path.display()))
                .hint("`csvctl vhdx info` shows the parent of an image"));
        }
    }
    let mut extents = Vec::new();
    let outcome = image.changed_above(above, &mut |range| {
        let length_bytes = range.end - range.start;
        extents.push(Extent {
            offset_bytes: range.start,
            length_bytes,
            kind: "changed",
            file_offset_bytes: None,
        });
    });
    Ok(outcome.map(|()| extents))
}

fn text(shown: &Shown) -> String {
    let rows = shown.extents.iter().map(|extent| {
        [
            extent.offset_bytes.to_string(),
            units::size(extent.length_bytes),
            extent.kind.to_owned(),
            extent.file_offset_bytes.map_or_else(String::new, |offset| format!("{offset:#x}")),
        ]
    });
    ui::table(["offset", "length", "kind", "in the file"], rows)
}
