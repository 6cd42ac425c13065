//! `csvctl vhdx compact`.

use std::ops::ControlFlow;
use std::path::PathBuf;

use api::Error;
use clap::Args;
use hv_runner::report::ImageCompacted;

use super::in_use::{self, Use};
use super::online::{self, Online};
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

impl Compact {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let done = match Online::of(&self.path, context).await {
            Some(disk) => disk.work(online::request("compact"), "compacting", context).await?,
            None => self.closed(context).await?,
        };
        context.ui.show(&ImageCompacted { path: self.path, ..done }, text)
    }

    async fn closed(&self, context: &Context) -> Result<ImageCompacted, Error> {
        let _claim = in_use::claim(&self.path, Use::Change, context).await?;
        let fail = |error| failed("compact", &self.path, &error);
        let disk = file::with_parents(file::open_writable(&self.path)?, &self.path, &self.roots)
            .writable()
            .map_err(fail)?;
        let steps = context.ui.progress("compacting");
        let done = disk.compact(&mut |progress| {
            steps.at(progress.scanned_blocks, progress.total_blocks);
            ControlFlow::Continue(())
        });
        let done = done.map_err(fail)?;
        let closed = disk.close().map_err(fail)?;
        Ok(ImageCompacted {
            path: self.path.clone(),
            old_file_bytes: done.old_file_bytes,
            file_bytes: closed.file_bytes,
            zero_blocks: done.zero_blocks,
            moved_blocks: done.moved_blocks,
        })
    }
}

fn text(shown: &ImageCompacted) -> String {
    format!(
        "{}: file of {} is now {} ({} blocks were zero, {} moved)",
        shown.path.display(),
        units::size(shown.old_file_bytes),
        units::size(shown.file_bytes),
        shown.zero_blocks,
        shown.moved_blocks
    )
}
