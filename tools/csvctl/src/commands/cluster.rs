//! `csvctl cluster`.

mod show;

use api::Error;
use clap::Subcommand;

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Show leader, quorum and members
    Show(show::Show),
}

impl ClusterCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Show(command) => command.run(context).await,
        }
    }
}
