//! `csvctl volume state`.

use api::Error;
use api::pb::{VolumeStateRequest, VolumeStates};
use clap::Args;

use crate::context::Context;
use crate::{ui, units};

#[derive(Debug, Args)]
pub(crate) struct State {
    /// Only this volume
    name: Option<String>,
    /// Only this node
    #[arg(long)]
    node: Option<String>,
}

impl State {
    pub(crate) async fn run(self, context: &Context) -> Result<(), Error> {
        let request =
            VolumeStateRequest { name: self.name.unwrap_or_default(), node: self.node.unwrap_or_default() };
        let states = context.client().await?.volume_state(request).await?.into_inner();
        context.ui.show(&states, table)
    }
}

/// A row per volume and node.
pub(super) fn table(states: &VolumeStates) -> String {
    let rows = states.states.iter().map(|row| {
        [
            row.volume.clone(),
            row.node.clone(),
            row.state.clone(),
            if row.owner { "owner".to_owned() } else { String::new() },
            if row.since_ms == 0 { String::new() } else { units::moment(row.since_ms) },
            units::size(row.redirected_bytes),
            row.reason.clone(),
        ]
    });
    ui::table(["volume", "node", "state", "role", "since", "redirected", "reason"], rows)
}
