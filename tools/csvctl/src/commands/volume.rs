//! `csvctl volume`.

mod cache;
mod check;
mod create;
mod extend;
mod give_up_log;
mod io_mode;
mod list;
mod move_;
mod show;
mod state;

use api::Error;
use api::pb::Volume;
use clap::Subcommand;

use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Format a LUN as a shared volume and mount it on every node
    Create(create::Create),
    /// List the volumes
    List(list::List),
    /// Show one volume
    Show(show::Show),
    /// Show how each node reaches each volume, and why
    State(state::State),
    /// Move a volume's coordinator to another node, while it is used
    Move(move_::Move),
    /// Choose by hand how file data goes to the LUN
    IoMode(io_mode::IoMode),
    /// Show or change the memory that nodes have for blocks which their mounts read again
    Cache(cache::Cache),
    /// Check the whole structure of a volume; exit code 4 when there are problems
    Check(check::Check),
    /// End a lost client whose intent log cannot be read, without what the log may say
    GiveUpLog(give_up_log::GiveUpLog),
    /// Use all of a LUN that has grown, while the volume is used
    Extend(extend::Extend),
}

impl VolumeCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Create(command) => command.run(context).await,
            Self::List(command) => command.run(context).await,
            Self::Show(command) => command.run(context).await,
            Self::State(command) => command.run(context).await,
            Self::Move(command) => command.run(context).await,
            Self::IoMode(command) => command.run(context).await,
            Self::Cache(command) => command.run(context).await,
            Self::Check(command) => command.run(context).await,
            Self::Extend(command) => command.run(context).await,
            Self::GiveUpLog(command) => command.run(context).await,
        }
    }
}

fn details(volume: &Volume) -> String {
    ui::fields([
        ("volume", volume.name.clone()),
        ("id", volume.id.clone()),
        ("LUN", volume.lun.clone()),
        ("size", units::size(volume.size_bytes)),
        ("free", units::size(volume.free_bytes)),
        ("block", units::size(volume.block_bytes)),
        ("inodes", volume.inodes.to_string()),
        ("owner", volume.owner.clone()),
        ("term", volume.term.to_string()),
        ("fence", format!("{}: {}", volume.fence, volume.fence_how)),
        ("cache", volume.cache.clone()),
        ("features", volume.features.join(", ")),
        ("state", volume.state.clone()),
        ("mount", volume.mount.clone()),
    ])
}
