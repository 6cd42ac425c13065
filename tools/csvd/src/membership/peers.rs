//! Whom this node talks to, and who votes, follow from the records.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use lockmgr::NodeId;
use tokio::time::MissedTickBehavior;

use crate::core::Core;

/// How often a leader looks whether a new member can be reached by now.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Keeps a connection to each recorded member, and to no former one, until the daemon ends.
pub(super) async fn follow(core: Arc<Core>) {
    let mut records = core.cluster.watch();
    let mut known = BTreeSet::new();
    loop {
        let state = records.borrow_and_update().clone();
        for member in state.members.values() {
            core.mesh.set_peer(member.id.0, &member.address);
        }
        let recorded: BTreeSet<NodeId> = state.members.keys().copied().collect();
        for gone in known.difference(&recorded) {
            core.mesh.remove_peer(gone.0);
        }
        known = recorded;
        tokio::select! {
            () = core.done.cancelled() => return,
            changed = records.changed() => if changed.is_err() { return },
        }
    }
}

/// While this node leads, brings the voters in line with the recorded members.
pub(super) async fn align_voters(core: Arc<Core>) {
    let mut records = core.cluster.watch();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = core.done.cancelled() => return,
            Ok(()) = records.changed() => {}
            _ = ticks.tick() => {}
        }
        match core.cluster.align_voters(|node| core.mesh.connection(node.0).is_ok()).await {
            Ok(None) => {}
            Ok(Some(step)) => core.note("cluster.voters", &core.config.cluster, step),
            Err(error) => tracing::warn!(error, "the voters do not match the members yet"),
        }
    }
}
