//! `csvctl volume move`.

use api::Error;
use api::pb::VolumeMoveRequest;
use clap::Args;

use crate::context::Context;

#[derive(Debug, Args)]
pub(crate) struct Move {
    /// Name of the volume
    name: String,
    /// The new owner; without it the node that owns the fewest volumes
    #[arg(long, value_name = "NODE")]
    to: Option<String>,
}

impl Move {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let spinner = context.ui.spinner(&format!("volume {}: moving its coordinator", self.name));
        let request =
            VolumeMoveRequest { name: self.name, to: self.to.unwrap_or_default(), reason: String::new() };
        let moved = context.client().await?.volume_move(request).await?.into_inner();
        drop(spinner);
        context.ui.show(&moved, |moved| {
            format!(
                "{} moved from {} to {} (term {}); metadata paused for {:.1} ms, {} operations held",
                moved.volume, moved.from, moved.to, moved.term, moved.pause_ms, moved.held_ops
            )
        })
    }
}
