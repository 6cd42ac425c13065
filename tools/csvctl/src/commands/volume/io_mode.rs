//! `csvctl volume io-mode`.

use api::Error;
use api::pb::VolumeIoModeRequest;
use clap::{Args, ValueEnum};

use super::state;
use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct IoMode {
    /// Name of the volume
    name: String,
    /// How file data goes to the LUN
    #[arg(value_enum)]
    mode: Mode,
    /// Only on this node; without it on every node that is up
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// Straight to the LUN
    Direct,
    /// Through another node, which reaches the LUN
    Redirected,
}

impl IoMode {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let mode = match self.mode {
            Mode::Direct => "direct",
            Mode::Redirected => "redirected",
        };
        let request = VolumeIoModeRequest {
            name: self.name,
            node: self.node.unwrap_or_default(),
            mode: mode.to_owned(),
        };
        let states = context.client().await?.volume_io_mode(request).await?.into_inner();
        context.ui.show(&states, state::table)
    }
}
