//! `csvctl cluster wait`: for scripts, which should not have to guess how long something takes.

use api::Error;
use api::pb::WaitRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// Until so many members are up and see a leader
    #[arg(long, value_name = "N", default_value_t = 1)]
    nodes: u32,
    /// Until this volume is mounted and available on the node; may be given several times
    #[arg(long, value_name = "NAME")]
    volume: Vec<String>,
    /// Longest wait, in seconds
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
}

impl Wait {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request =
            WaitRequest { timeout_ms: self.timeout * 1000, nodes_up: self.nodes, volumes: self.volume };
        let spinner = context.ui.spinner("waiting for the cluster");
        context.client().await?.wait(request).await?;
        drop(spinner);
        context.ui.done("ready")
    }
}
