//! One file per command.

pub(crate) mod cluster;
pub(crate) mod completions;
pub(crate) mod dev;
pub(crate) mod events;
pub(crate) mod file;
pub(crate) mod health;
pub(crate) mod log;
pub(crate) mod man;
pub(crate) mod nbd;
pub(crate) mod node;
pub(crate) mod support;
pub(crate) mod top;
pub(crate) mod vhdx;
pub(crate) mod vm;
pub(crate) mod volume;

use api::Error;

use crate::cli::Command;
use crate::context::Context;

/// Runs what was typed.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), Error> {
    match command {
        Command::Dev(command) => command.run(context).await,
        Command::Cluster(command) => command.run(context).await,
        Command::Node(command) => command.run(context).await,
        Command::Volume(command) => command.run(context).await,
        Command::File(command) => command.run(context).await,
        Command::Vhdx(command) => command.run(context).await,
        Command::Nbd(command) => command.run(context).await,
        Command::Vm(command) => command.run(context).await,
        Command::Events(command) => command.run(context).await,
        Command::Health(command) => command.run(context).await,
        Command::Top(command) => command.run(context).await,
        Command::Log(command) => command.run(context).await,
        Command::Support(command) => command.run(context).await,
        Command::Completions(command) => command.run(context),
        Command::Man(command) => command.run(context),
    }
}
