//! `csvctl nbd`: images for hypervisors and tools of others. It needs no daemon.

mod export;
mod image;

use api::Error;
use clap::Subcommand;

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum NbdCommand {
    /// Serve an image over NBD until told to end
    Export(export::Export),
}

impl NbdCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Export(command) => command.run(context).await,
        }
    }
}
