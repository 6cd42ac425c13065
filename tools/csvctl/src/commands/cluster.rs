//! `csvctl cluster`.

mod create;
mod show;
mod token;
mod wait;

use api::Error;
use clap::Subcommand;

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Found a cluster on this machine, which becomes its first node
    Create(create::Create),
    /// Make a token with which one node may join, once
    Token(token::Token),
    /// Wait until nodes are up and volumes are there
    Wait(wait::Wait),
    /// Show leader, quorum and members
    Show(show::Show),
}

impl ClusterCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Create(command) => command.run(context).await,
            Self::Wait(command) => command.run(context).await,
            Self::Token(command) => command.run(context).await,
            Self::Show(command) => command.run(context).await,
        }
    }
}
