//! `csvctl vhdx`: image tools. They work on any path and need no daemon.

mod convert;
mod create;
mod file;
mod info;

use api::Error;
use clap::Subcommand;
use vhdx::{ErrorKind, VhdxError};

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum VhdxCommand {
    /// Make an empty image
    Create(create::Create),
    /// Show what an image is
    Info(info::Info),
    /// Convert an image to raw bytes, or raw bytes to an image
    Convert(convert::Convert),
}

impl VhdxCommand {
    pub(crate) fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Create(command) => command.run(context),
            Self::Info(command) => command.run(context),
            Self::Convert(command) => command.run(context),
        }
    }
}

/// An error of the image library, for the user.
pub(super) fn failed(doing: &str, path: &std::path::Path, error: &VhdxError) -> Error {
    let kind = match error.kind() {
        ErrorKind::InvalidInput => api::Kind::Usage,
        _ => api::Kind::Failed,
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let text = inner.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = inner.source();
    }
    let hint = match error.kind() {
        ErrorKind::NotVhdx => "name a VHDX file; raw bytes become one with `csvctl vhdx convert`",
        ErrorKind::Unsupported => "use the program that made the image, or convert it with qemu-img",
        ErrorKind::Corrupt | ErrorKind::LogUnrecoverable | ErrorKind::OrphanLogId => {
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
        ErrorKind::Limit => "the image lies outside what is supported",
        ErrorKind::InvalidInput => "see --help",
        ErrorKind::Poisoned | ErrorKind::Io => "is there room, and is the file's disk all right?",
    };
    Error::new(kind, message).during(format!("vhdx {doing} {}", path.display())).hint(hint)
}
