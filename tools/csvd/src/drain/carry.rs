//! Moving one thing away from this node, or back to it: the same moves that a user can ask for, with the drain as the reason.

use std::sync::Arc;
use std::time::Duration;

use api::pb::{VmMigrateRequest, VolumeMoveRequest};
use api::{Error, pb};
use lockmgr::NodeId;
use lockmgr::cluster::{ClusterState, VmState};

use crate::core::Core;
use crate::messages::NodeOp;
use crate::{forward, view};

/// Longest time for this node's copy of the records to show a move that is done.
const SHOWN_WITHIN: Duration = Duration::from_secs(3);

pub(super) async fn volume_away(core: &Arc<Core>, name: &str) -> Result<(), Error> {
    let reason = format!("because node {} is drained", core.config.name);
    move_volume(core, core.me, VolumeMoveRequest { name: name.to_owned(), to: String::new(), reason }).await
}

pub(super) async fn volume_back(core: &Arc<Core>, name: &str) -> Result<(), Error> {
    let owner = view::volume(&core.state(), name)?.owner;
    let to = core.config.name.clone();
    let reason = format!("because node {to} takes part again");
    move_volume(core, owner, VolumeMoveRequest { name: name.to_owned(), to, reason }).await
}

async fn move_volume(core: &Arc<Core>, owner: NodeId, request: VolumeMoveRequest) -> Result<(), Error> {
    let name = request.name.clone();
    forward::ask(core, owner, NodeOp::VolumeMove(request)).await?;
    shown(core, |state| state.volumes.get(&name).is_none_or(|volume| volume.owner != owner)).await;
    Ok(())
}

/// Live to whichever node takes it, or quickly if none takes it live.
pub(super) async fn vm_away(core: &Arc<Core>, name: &str) -> Result<(), Error> {
    can_be_moved(core, name)?;
    let reason = format!("because node {} is drained", core.config.name);
    let mut refused = Error::conflict("no other node is up that is not drained");
    for kind in ["live", "quick"] {
        for to in targets(core) {
            match move_vm(core, core.me, request(name, &to, kind, &reason)).await {
                Ok(()) => return Ok(()),
                Err(error) => refused = error,
            }
            // A move that failed half-way may have ended with the VM elsewhere, or stopped.
            if core.state().vms.get(name).is_none_or(|vm| vm.owner != core.me || vm.state != VmState::Running)
            {
                return Ok(());
            }
        }
    }
    Err(refused)
}

pub(super) async fn vm_back(core: &Arc<Core>, name: &str) -> Result<(), Error> {
    let owner = view::vm(&core.state(), name)?.owner;
    let to = &core.config.name;
    let reason = format!("because node {to} takes part again");
    if let Err(error) = move_vm(core, owner, request(name, to, "live", &reason)).await {
        tracing::info!(vm = name, %error, "it does not come back live");
        return move_vm(core, owner, request(name, to, "quick", &reason)).await;
    }
    Ok(())
}

fn request(name: &str, to: &str, kind: &str, reason: &str) -> VmMigrateRequest {
    VmMigrateRequest {
        name: name.to_owned(),
        to: to.to_owned(),
        r#type: kind.to_owned(),
        max_blackout_ms: 0,
        reason: reason.to_owned(),
    }
}

async fn move_vm(core: &Arc<Core>, owner: NodeId, request: VmMigrateRequest) -> Result<(), Error> {
    let name = request.name.clone();
    forward::ask(core, owner, NodeOp::VmMigrate(request)).await?;
    shown(core, |state| state.vms.get(&name).is_none_or(|vm| vm.owner != owner)).await;
    Ok(())
}

/// A VM moves while it runs; what to do with one that does not is its user's to say.
fn can_be_moved(core: &Core, name: &str) -> Result<(), Error> {
    let state = core.state();
    let vm: &lockmgr::cluster::VmRecord = view::vm(&state, name)?;
    if vm.state == VmState::Running {
        return Ok(());
    }
    let why = if vm.reason.is_empty() { String::new() } else { format!(" ({})", vm.reason) };
    Err(Error::conflict(format!("it is {}{why}: let it run or stop it", vm.state)))
}

/// The other nodes that can take a VM, those with the fewest first.
fn targets(core: &Core) -> Vec<String> {
    let state = core.state();
    let vms = |node: NodeId| state.vms.values().filter(|vm| vm.owner == node).count();
    let mut nodes: Vec<_> = state
        .open_members()
        .filter(|member| member.id != core.me && core.membership.can_take(member.id, member.epoch))
        .collect();
    nodes.sort_by_key(|member| (vms(member.id), member.id));
    nodes.into_iter().map(|member| member.name.clone()).collect()
}

/// What was moved is elsewhere in the records of this node too; a node that lags looks again.
async fn shown(core: &Core, moved: impl Fn(&ClusterState) -> bool) {
    let mut records = core.cluster.watch();
    drop(tokio::time::timeout(SHOWN_WITHIN, records.wait_for(|state| moved(state))).await);
}

/// What is left of a drain, for its progress.
pub(super) fn left(state: &ClusterState, node: NodeId, goal_is_away: bool) -> (Vec<String>, Vec<String>) {
    let Some(drain) = state.drains.get(&node) else { return (Vec::new(), Vec::new()) };
    let here = |owner: NodeId| (owner == node) == goal_is_away;
    let volumes =
        drain.volumes.iter().filter(|name| state.volumes.get(*name).is_some_and(|it| here(it.owner)));
    let moves = |vm: &lockmgr::cluster::VmRecord| here(vm.owner) && ClusterState::is_active(vm);
    let vms = drain.vms.iter().filter(|name| state.vms.get(*name).is_some_and(moves));
    (volumes.cloned().collect(), vms.cloned().collect())
}

/// What cannot be moved, as the admin interface shows it.
pub(super) fn stuck(drain: &lockmgr::cluster::Drain) -> Vec<pb::Stuck> {
    drain.stuck.iter().map(|(what, why)| pb::Stuck { what: what.clone(), why: why.clone() }).collect()
}
