//! What can be typed. The doc comments are the help.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::commands::{
    cluster::ClusterCommand, completions::Completions, dev::DevCommand, events::Events, file::FileCommand,
    health::Health, log::LogCommand, man::Man, nbd::NbdCommand, node::NodeCommand, support::SupportCommand,
    top::Top, vhdx::VhdxCommand, vm::VmCommand, volume::VolumeCommand,
};

/// Work with a cluster of shared volumes and the virtual machines on them
#[derive(Debug, Parser)]
#[command(name = "csvctl", version, max_term_width = 110, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command takes
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Admin socket of the daemon to talk to, or the address of any member
    #[arg(
        long,
        global = true,
        value_name = "SOCKET|HOST:PORT",
        env = "CSVCTL_CONNECT",
        default_value = "/run/csvd/csvd.sock"
    )]
    pub(crate) connect: PathBuf,
    /// Folder of the node whose certificate proves who you are, when you connect to another host
    #[arg(long, global = true, value_name = "DIR", env = "CSVCTL_IDENTITY", default_value = "/var/lib/csvd")]
    pub(crate) identity: PathBuf,
    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Do not ask before destroying something
    #[arg(long, global = true)]
    pub(crate) yes: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine
    #[command(subcommand)]
    Dev(DevCommand),
    /// Found the cluster, let nodes join, show it
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Work with the members
    #[command(subcommand)]
    Node(NodeCommand),
    /// Work with shared volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Look behind a file on a volume
    #[command(subcommand)]
    File(FileCommand),
    /// Work with VHDX images, on any path
    #[command(subcommand)]
    Vhdx(VhdxCommand),
    /// Serve images to the hypervisors and tools of others
    #[command(subcommand)]
    Nbd(NbdCommand),
    /// Work with virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Show what happened, on all nodes
    Events(Events),
    /// Show what is wrong; exit code 6 when something is
    Health(Health),
    /// Show what everything does, again and again
    Top(Top),
    /// Work with the logs of all nodes
    #[command(subcommand)]
    Log(LogCommand),
    /// Gather what is needed to look into a problem
    #[command(subcommand)]
    Support(SupportCommand),
    /// Print a completion script for a shell
    Completions(Completions),
    /// Write the manual pages into a folder
    Man(Man),
}
