//! `csvctl vhdx snapshot`.

use std::path::PathBuf;

use api::Error;
use clap::Args;

use super::Roots;
use super::create::Create;
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
        Create::child_of(self.path, self.child, self.roots).run(context).await
    }
}
