//! The end of a membership: a node that leaves for good gives its vote back before it goes, so that those who stay keep
//! their majority.
//!
//! ```text
//!   drained, for good -> ends in order -> Down --leader: voters.rs--> no vote --this node: RemoveMember--> forgotten
//! ```
//! Until it is forgotten the node answers Raft: two nodes need both votes to become one. A node that dies on the way is
//! forgotten by whoever leads.
//!
//! **Invariant:** nothing of the node can write any more when this begins (volumes/leave.rs).

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use lockmgr::cluster::{ClusterState, Command, DrainPhase, MemberState, ProposeError};
use lockmgr::{Epoch, NodeId};

use crate::core::Core;

/// Longest time for being forgotten; then the others see to it without this node.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(30);

/// Whether this node leaves for good, and nothing is left on it.
fn leaves(core: &Core) -> bool {
    let state = core.state();
    state.drains.get(&core.me).is_some_and(|drain| drain.for_good && drain.phase == DrainPhase::Drained)
}

/// Takes leave of the cluster if this node leaves it for good.
pub(crate) async fn take(core: &Arc<Core>) {
    let Some(epoch) = core.epoch().filter(|_| leaves(core)) else { return };
    match tokio::time::timeout(FORGOTTEN_WITHIN, be_forgotten(core, epoch)).await {
        Ok(()) => {
            tracing::info!("this node is no longer a member");
            shred(core);
        }
        Err(_) => tracing::error!("not forgotten yet: the others forget this node when they can"),
    }
}

async fn be_forgotten(core: &Arc<Core>, epoch: Epoch) {
    let mut records = core.cluster.watch();
    loop {
        let state = records.borrow_and_update().clone();
        let Some(member) = state.members.get(&core.me) else { return };
        let command = if member.state == MemberState::Up {
            Command::MarkNode { node: core.me, epoch, state: MemberState::Down }
        } else if core.cluster.status().voters.contains(&core.me) {
            tokio::select! {
                () = core.cluster.without_vote() => {}
                changed = records.changed() => if changed.is_err() { return },
            }
            continue;
        } else {
            Command::RemoveMember { node: core.me, expect: epoch }
        };
        let removes = matches!(command, Command::RemoveMember { .. });
        match core.cluster.propose(command).await {
            Ok(_) if removes => return,
            // It is so, or somebody else was faster and said so, in the log that still comes here.
            Ok(_) | Err(ProposeError::Conflict { .. }) => {}
            Err(error) => tracing::info!(%error, "not forgotten yet"),
        }
        // Records that do not change tell nothing: then it is asked again.
        let change = records.changed();
        drop(tokio::time::timeout(Duration::from_millis(core.timing.beat_ms), change).await);
    }
}

/// A host that is no member keeps no key of the cluster, and starts no node of it by mistake.
fn shred(core: &Core) {
    let tls = &core.config.tls;
    let secrets = [Some(&tls.key), Some(&tls.cert), tls.ca_key.as_ref(), Some(&tls.ca)];
    let config = core.config.dir.join("csvd.toml");
    for file in secrets.into_iter().flatten().chain([&config]) {
        if let Err(error) = fs::remove_file(file) {
            tracing::warn!(file = %file.display(), %error, "left behind");
        }
    }
}

/// Nodes that have left for good and died on the way: they are to be forgotten by whoever leads. `away` tells whether a node
/// cannot be reached, so that one that is about to say goodbye itself is left alone.
pub(crate) fn forgotten(
    state: &ClusterState,
    voters: &[NodeId],
    away: impl Fn(NodeId) -> bool,
) -> Vec<Command> {
    let gone = state
        .members
        .values()
        .filter(|member| state.is_leaving(member.id) && !voters.contains(&member.id) && away(member.id));
    gone.map(|member| Command::RemoveMember { node: member.id, expect: member.epoch }).collect()
}
