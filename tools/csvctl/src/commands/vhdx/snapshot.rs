//! `csvctl vhdx snapshot`.

use std::path::PathBuf;

use api::Error;
use api::pb::VmImageRequest;
use clap::Args;
use hv_runner::report::ImageCreated;

use super::Roots;
use super::create::Create;
use super::online::{self, Online};
use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Snapshot {
    /// The image to be kept as it is; it must not be written any more
    path: PathBuf,
    /// The new image that takes what is written from now on
    child: PathBuf,
    #[command(flatten)]
    roots: Roots,
}

impl Snapshot {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        if let Some(disk) = Online::of(&self.path, context).await {
            return self.in_use(disk, context).await;
        }
        Create::child_of(self.path, self.child, self.roots).run(context).await
    }

    /// The guest of the VM goes on in the child without noticing.
    async fn in_use(self, disk: Online, context: &Context) -> Result<(), Error> {
        let vm = disk.vm().to_owned();
        let request = VmImageRequest { other: online::shown(&self.child), ..online::request("snapshot") };
        let created: ImageCreated = disk.work(request, "making a snapshot", context).await?;
        let shown = ImageCreated { path: self.child, parent: Some(self.path), ..created };
        context.ui.show(&shown, |shown| format!("VM {vm} goes on in {}", shown.path.display()))
    }
}
