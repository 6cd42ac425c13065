//! `csvctl vhdx compact`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use api::Error;
use clap::Args;
use serde::Serialize;

use super::in_use::{self, Use};
use super::{Roots, failed, file};
use crate::context::Context;
use crate::units;

#[derive(Debug, Args)]
pub(crate) struct Compact {
    /// The image
    path: PathBuf,
    #[command(flatten)]
    roots: Roots,
}

#[derive(Serialize)]
struct Shown {
    path: PathBuf,
    old_file_bytes: u64,
    file_bytes: u64,
    zero_blocks: u64,
    moved_blocks: u64,
}

impl Compact {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let _claim = in_use::claim(&self.path, Use::Change, context).await?;
        let fail = |error| failed("compact", &self.path, &error);
        let disk = file::with_parents(file::open_writable(&self.path)?, &self.path, &self.roots)
            .writable()
            .map_err(fail)?;
        let bar = context.ui.progress(0, "compacting");
        let done = disk.compact(&mut |progress| {
            bar.set_length(progress.total_blocks);
            bar.set_position(progress.scanned_blocks);
            ControlFlow::Continue(())
        });
        bar.finish_and_clear();
        let done = done.map_err(fail)?;
        let closed = disk.close().map_err(fail)?;
        let shown = Shown {
            path: self.path.clone(),
            old_file_bytes: done.old_file_bytes,
            file_bytes: closed.file_bytes,
            zero_blocks: done.zero_blocks,
            moved_blocks: done.moved_blocks,
        };
        context.ui.show(&shown, |shown| {
            format!(
                "{}: file of {} is now {} ({} blocks were zero, {} moved)",
                shown.path.display(),
                units::size(shown.old_file_bytes),
                units::size(shown.file_bytes),
                shown.zero_blocks,
                shown.moved_blocks
            )
        })
    }
}
