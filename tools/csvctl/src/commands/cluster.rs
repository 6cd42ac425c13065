//! `csvctl cluster`.

mod create;
mod rotate_certificates;
mod set;
mod settings;
mod show;
mod token;
mod validate;
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
    /// Try out what the cluster promises, while it is in use: quorum, clocks, paths, flushes, fences
    Validate(validate::Validate),
    /// Wait until nodes are up and volumes are there
    Wait(wait::Wait),
    /// Give every member a new certificate, while all goes on
    RotateCertificates(rotate_certificates::RotateCertificates),
    /// Change a setting of the whole cluster
    Set(set::Set),
    /// List the settings of the whole cluster
    Settings(settings::Settings),
    /// Show leader, quorum and members
    Show(show::Show),
}

impl ClusterCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Create(command) => command.run(context).await,
            Self::Wait(command) => command.run(context).await,
            Self::Validate(command) => command.run(context).await,
            Self::Token(command) => command.run(context).await,
            Self::RotateCertificates(command) => command.run(context).await,
            Self::Set(command) => command.run(context).await,
            Self::Settings(command) => command.run(context).await,
            Self::Show(command) => command.run(context).await,
        }
    }
}
