//! `csvctl vhdx`: image tools. They work on any path, and need a daemon only for images that lie on a volume of the cluster: to be
//! told whether a VM uses them, and, when one that runs does, to have its process do the work.

mod check;
mod compact;
mod convert;
mod create;
mod file;
mod in_use;
mod info;
mod map;
mod merge;
mod online;
mod resize;
mod snapshot;

use std::path::{Path, PathBuf};

use api::Error;
use clap::{Args, Subcommand};
use hv_runner::report::message;
use vhdx::{ErrorKind, VhdxError};

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum VhdxCommand {
    /// Make an empty image
    Create(create::Create),
    /// Show what an image is
    Info(info::Info),
    /// Prove that an image is sound, or name everything that is not
    Check(check::Check),
    /// Convert between raw bytes and images of every kind
    Convert(convert::Convert),
    /// Make the disk in an image larger or smaller
    Resize(resize::Resize),
    /// Give back the space of zero blocks and gaps
    Compact(compact::Compact),
    /// Take a child up into its parent
    Merge(merge::Merge),
    /// Keep an image as it is and go on in a new child
    Snapshot(snapshot::Snapshot),
    /// Show which ranges hold data, or what changed since a parent
    Map(map::Map),
}

/// Where parents of images may lie.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Roots {
    /// Folder below which parents may lie, beside the folder of the image; may be given several times
    #[arg(long = "root", value_name = "FOLDER")]
    roots: Vec<PathBuf>,
}

impl Roots {
    /// The same and the folder of `image`.
    fn with(&self, image: &Path) -> Self {
        let folder = file::folder_of(image);
        Self { roots: self.roots.iter().cloned().chain([folder]).collect() }
    }
}

impl VhdxCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Create(command) => command.run(context).await,
            Self::Info(command) => command.run(context).await,
            Self::Check(command) => command.run(context).await,
            Self::Convert(command) => command.run(context).await,
            Self::Resize(command) => command.run(context).await,
            Self::Compact(command) => command.run(context).await,
            Self::Merge(command) => command.run(context).await,
            Self::Snapshot(command) => command.run(context).await,
            Self::Map(command) => command.run(context).await,
        }
    }
}

/// An error of the image library, for the user.
pub(super) fn failed(doing: &str, path: &Path, error: &VhdxError) -> Error {
    let kind = match error.kind() {
        ErrorKind::InvalidInput => api::Kind::Usage,
        ErrorKind::HasChildren | ErrorKind::ParentLocked => api::Kind::Conflict,
        _ => api::Kind::Failed,
    };
    let hint = match error.kind() {
        ErrorKind::NotVhdx => "name a VHDX file; raw bytes become one with `csvctl vhdx convert`",
        ErrorKind::Unsupported => "use the program that made the image, or convert it with qemu-img",
        ErrorKind::OrphanLogId => "`csvctl vhdx check --repair` clears it; nothing that was durable is lost",
        ErrorKind::Corrupt | ErrorKind::LogUnrecoverable => {
            "keep the image as it is and restore it from a backup"
        }
        ErrorKind::Truncated => "the file was cut off, perhaps while it was copied; copy it again",
        ErrorKind::Incomplete => "make the image again",
        ErrorKind::ParentNotFound | ErrorKind::PathOutsideRoot => {
            "name the folders that hold its parents; `csvctl vhdx info` shows where they were"
        }
        ErrorKind::ParentMismatch | ErrorKind::ChainCycle => {
            "the chain was broken or changed; bring back the right files, from a backup if need be"
        }
        ErrorKind::ParentLocked => "close the parent where it is open, then try again",
        ErrorKind::ChainTooDeep => "merge some of its parents first",
        ErrorKind::HasChildren => "merge the children first; csvctl vhdx info names the parent of each",
        ErrorKind::Limit => "the image lies outside what is supported",
        ErrorKind::InvalidInput => "see --help",
        ErrorKind::Poisoned | ErrorKind::Io => "is there room, and is the file's disk all right?",
    };
    Error::new(kind, message(error)).during(format!("vhdx {doing} {}", path.display())).hint(hint)
}
