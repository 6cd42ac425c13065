//! `csvctl dev`: a whole cluster on this machine.
//!
//! ```text
//!   DIR/dev.toml     what `dev up` was told; `dev.lock` is held by each dev command while it works
//!   DIR/lun.img      the LUN, unless another was named
//!   DIR/ca/          the cluster's certificate authority
//!   DIR/n1 ...       one folder per node: csvd.toml csvd.pid csvd.sock hv/ mnt/ log/ data/ vm/
//! ```
//!
//! The daemons are the same as on real hosts; only the way they are started is special.

mod down;
mod fault;
mod folder;
mod node;
pub(crate) mod process;
mod start;
mod up;

use std::path::PathBuf;

use api::Error;
use clap::{Args, Subcommand};

use crate::context::Context;

#[derive(Debug, Subcommand)]
pub(crate) enum DevCommand {
    /// Start a cluster in a folder, and wait until it is healthy
    Up(up::Up),
    /// Stop the cluster
    Down(down::Down),
    /// Start a killed node again
    Start(start::Start),
    /// Rehearse a fault on one node
    Fault(fault::Fault),
}

impl DevCommand {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        match self {
            Self::Up(command) => command.run(context).await,
            Self::Down(command) => command.run(context).await,
            Self::Start(command) => command.run(context).await,
            Self::Fault(command) => command.run(context).await,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct DevDir {
    /// Folder of the cluster
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
}
