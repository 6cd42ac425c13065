//! Leaving in order: the node's mounts end, its coordinators go to nodes that stay, or serve until the last client is gone.
//!
//! ```text
//!   mounts end (their clients detach)  ->  do others stay?  yes: hand over, then tell the cluster that the node is down
//!                                                           no:  serve until the others have detached, then close
//! ```
//! When a whole cluster is stopped, all nodes leave at once. A coordinator that ended first would leave the others with
//! calls that nobody answers; so heartbeats say who is leaving, and whoever serves ends last.
//!
//! **Invariant:** a node calls itself down only when nothing of it can write any more.

use std::sync::Arc;
use std::time::Duration;

use api::pb::VolumeMoveRequest;
use csvfs::coordinator::Coordinator;
use lockmgr::cluster::{Command, MemberState};

use super::{LocalVolume, moves};
use crate::core::Core;

/// Heartbeats that the others need to tell that they leave too.
const BEATS_TO_TELL: u32 = 4;
/// Longest time that a mount may take to end. What is left then is taken away by whoever started the daemon.
const UNMOUNTED_WITHIN: Duration = Duration::from_secs(8);
/// Longest time that the other leaving nodes may take to detach: their VMs have to be stopped first.
const OTHERS_GONE_WITHIN: Duration = Duration::from_secs(10);
/// How often a coordinator is asked whether it still has clients.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Longest time for a record that is only a courtesy.
const RECORDED_WITHIN: Duration = Duration::from_secs(1);

/// Puts everything away. VMs have been stopped before.
pub(crate) async fn leave(core: &Arc<Core>) {
    for volume in core.volumes.all() {
        if tokio::time::timeout(UNMOUNTED_WITHIN, volume.unmount(core)).await.is_err() {
            tracing::warn!(volume = volume.name, "the mount does not end: it goes with the process");
        }
    }
    // A node that has lost its right to write can neither commit nor hand over.
    let in_order = core.membership.lease.is_held();
    let mut others_stay = false;
    if in_order {
        tokio::time::sleep(Duration::from_millis(core.timing.beat_ms) * BEATS_TO_TELL).await;
        others_stay = somebody_stays(core);
    }
    for volume in core.volumes.all() {
        if in_order && let Some(coordinator) = volume.host.serving() {
            if others_stay {
                hand_over(core, &volume).await;
            } else {
                serve_the_last(&volume, coordinator).await;
            }
        }
        volume.host.close("the daemon ends").await;
        give_up_place(&volume).await;
    }
    if others_stay {
        call_down(core).await;
    }
}

/// Nothing of this node uses the LUN any more: its key goes, and so does the right to write there.
async fn give_up_place(volume: &LocalVolume) {
    let Some(road) = volume.road() else { return };
    let giving = move || {
        if let Ok(device) = road.direct_for_peers() {
            road.place().give_up(&*device);
        }
    };
    drop(tokio::task::spawn_blocking(giving).await);
}

fn somebody_stays(core: &Core) -> bool {
    core.state()
        .serving()
        .any(|member| member.id != core.me && core.membership.can_take(member.id, member.epoch))
}

async fn hand_over(core: &Arc<Core>, volume: &Arc<LocalVolume>) {
    let reason = format!("because node {} ends", core.config.name);
    let request = VolumeMoveRequest { name: volume.name.clone(), to: String::new(), reason };
    if let Err(error) = moves::hand_over(core, request).await {
        tracing::warn!(volume = volume.name, %error, "not handed over; the cluster appoints another coordinator");
    }
}

/// Answers the other leaving nodes until they have detached.
async fn serve_the_last(volume: &LocalVolume, coordinator: Arc<Coordinator>) {
    let gone = async {
        while coordinator.stats().clients > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    if tokio::time::timeout(OTHERS_GONE_WITHIN, gone).await.is_err() {
        tracing::warn!(volume = volume.name, "closing, although clients are still attached");
    }
}

/// The others need not wait for this node's silence to become certain.
async fn call_down(core: &Arc<Core>) {
    let Some(epoch) = core.epoch() else { return };
    core.membership.lease.revoke();
    let command = Command::MarkNode { node: core.me, epoch, state: MemberState::Down };
    match tokio::time::timeout(RECORDED_WITHIN, core.propose(command)).await {
        Ok(Ok(_)) => tracing::info!("the cluster knows that this node is down"),
        Ok(Err(error)) => tracing::info!(%error, "the cluster will notice that this node is down"),
        Err(_) => tracing::info!("the cluster will notice that this node is down"),
    }
}
