//! `csvctl nbd export`.

use std::path::PathBuf;
use std::sync::Arc;

use api::Error;
use blockio::NbdServer;
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::image::Image;
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// The image, on any path; nothing else may write it meanwhile
    path: PathBuf,
    /// Where clients connect: a Unix socket that only this user may use
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Let clients only read; the file is not touched
    #[arg(long)]
    read_only: bool,
    /// What the file holds; without it, the ending `.vhdx` decides. It is never guessed from the content, which guests write
    #[arg(long, value_enum)]
    format: Option<Format>,
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// A VHDX image
    Vhdx,
    /// The disk's bytes
    Raw,
}

#[derive(Serialize)]
struct Shown {
    path: PathBuf,
    socket: PathBuf,
    uri: String,
    size_bytes: u64,
    read_only: bool,
}

impl Export {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        // Asked for before anything is served, so that no signal comes too early.
        let mut ends = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
        let by_name = self.path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("vhdx"));
        let format = self.format.unwrap_or(if by_name { Format::Vhdx } else { Format::Raw });
        let image = Image::open(&self.path, format, self.read_only)?;
        let export = image.export();
        let size_bytes = export.device.geometry().size_bytes;
        let server = NbdServer::listen(&self.socket, Arc::new(export))
            .map_err(|error| Error::failed(error).during(format!("nbd export {}", self.path.display())))?;
        let uri = format!("nbd+unix:///?socket={}", self.socket.display());
        let shown =
            Shown { path: self.path, socket: self.socket, uri, size_bytes, read_only: self.read_only };
        context.ui.show(&shown, |it| format!("{} ({}), until Ctrl-C", it.uri, units::size(it.size_bytes)))?;
        let [interrupt, terminate] = &mut ends;
        if let (Ok(interrupt), Ok(terminate)) = (interrupt, terminate) {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
        // The clients are cut off and their requests done before the image is put away.
        drop(server);
        image.close(&shown.path)
    }
}
