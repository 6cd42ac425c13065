//! Restarting what ran on a node that is gone, and a guest that has reset its machine.
//!
//! ```text
//!   node lost --heirs.rs: Failed, restarts_left = 3--> fence confirmed --heirs.rs: another owner--> run() here: start
//!                                                            |                                          | failed
//!                                                            '------ next node, restarts_left - 1 <-----'
//! ```
//! The record carries the wish, so it survives every node: a cluster that lost all its power starts what ran before.
//!
//! **Invariant (H1):** a restart is an ordinary start, by the node that the record names, in a new epoch.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use api::pb;
use lockmgr::NodeId;
use lockmgr::cluster::{ClusterState, Command, VmRecord, VmState};
use prost::Message;
use tokio::time::MissedTickBehavior;

use crate::core::Core;
use crate::volumes::status::State;

/// Nodes that try to start a VM, before it stays failed.
const RESTARTS_MAX: u32 = 3;
/// How often is looked again when nothing has changed: a volume may have become usable.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Who goes first when many VMs start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    Low,
    Medium,
    High,
}

impl Priority {
    /// As its configuration says; medium where that cannot be read.
    pub(crate) fn of(vm: &VmRecord) -> Self {
        let spec = pb::VmSpec::decode(vm.spec.clone()).unwrap_or_default();
        match spec.priority.as_str() {
            "low" => Self::Low,
            "high" => Self::High,
            _ => Self::Medium,
        }
    }
}

/// The record of a VM whose node is gone. What ran, or was about to, shall run again.
pub(crate) fn lost(vm: &VmRecord, reason: String) -> Command {
    let ran =
        matches!(vm.state, VmState::Starting | VmState::Running | VmState::Migrating) || has_arrived(vm);
    let ran = ran || super::is_halted(vm);
    let stays = pb::VmSpec::decode(vm.spec.clone()).is_ok_and(|spec| spec.on_node_loss == "stay");
    vm.update(|record| {
        record.state = VmState::Failed;
        record.peer = None;
        record.reason = reason;
        record.restarts_left = if ran && !stays { RESTARTS_MAX } else { 0 };
    })
}

/// The record of a VM whose guest has reset its machine: it boots again, like one that its user starts, on this node if that can.
pub(super) fn again(vm: &VmRecord, reason: String) -> Command {
    vm.update(|record| {
        record.state = VmState::Failed;
        record.reason = reason;
        record.restarts_left = RESTARTS_MAX;
    })
}

/// It has come by a live move and is about to run: its memory is in a process of its node, and nowhere else.
pub(crate) fn has_arrived(vm: &VmRecord) -> bool {
    vm.state == VmState::Saved && vm.saved.is_none()
}

/// Whether a VM has come to this node, and nothing of it is here: it was committed to a former incarnation, whose processes had
/// its memory, after this one had recorded what was lost, and its source did not live to notice.
fn is_stranded(core: &Core, vm: &VmRecord) -> bool {
    vm.owner == core.me
        && has_arrived(vm)
        && !core.vms.moves.expects(&vm.name)
        && core.vms.get(&vm.name).is_none()
}

/// Records that a VM's memory is lost, unless the record has gone on.
async fn give_up_stranded(core: &Arc<Core>, vm: &VmRecord) {
    // A message of its source may be about to look after it.
    let _decision = core.vms.decide(&vm.name).await;
    if !is_stranded(core, vm) {
        return;
    }
    let reason = format!("its memory was lost when node {} was restarted", core.config.name);
    if let Err(error) = core.propose(lost(vm, reason)).await {
        tracing::info!(vm = vm.name, %error, "lost memory of a VM not recorded yet");
    }
}

/// Starts what waits for this node, one after the other, until the daemon ends.
pub(crate) async fn run(core: Arc<Core>) {
    let (mut records, mut pulse) = (core.cluster.watch(), core.pulse.watch());
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let state = records.borrow_and_update().clone();
        pulse.borrow_and_update();
        if let Some(vm) = next(&core, &state).cloned() {
            restart(&core, &vm).await;
            continue;
        }
        if let Some(vm) = state.vms.values().find(|vm| is_stranded(&core, vm)) {
            give_up_stranded(&core, vm).await;
        }
        tokio::select! {
            () = core.stop.cancelled() => return,
            changed = records.changed() => if changed.is_err() { return },
            changed = pulse.changed() => if changed.is_err() { return },
            _ = ticks.tick() => {}
        }
    }
}

/// The most important VM that waits for this node and whose volumes are usable here.
fn next<'a>(core: &Core, state: &'a ClusterState) -> Option<&'a VmRecord> {
    if state.is_closed(core.me) {
        // Whoever leads gives it to another node.
        return None;
    }
    let mine = state.vms.values().filter(|vm| {
        vm.owner == core.me
            && vm.restarts_left > 0
            && vm.state == VmState::Failed
            && volumes_usable(core, state, vm)
    });
    mine.min_by_key(|vm| (Reverse(Priority::of(vm)), &vm.name))
}

fn volumes_usable(core: &Core, state: &ClusterState, vm: &VmRecord) -> bool {
    let spec = pb::VmSpec::decode(vm.spec.clone()).unwrap_or_default();
    spec.disks.iter().all(|disk| {
        let id = state.volumes.get(&disk.volume).map(|volume| volume.id);
        let volume = id.and_then(|id| core.volumes.get(id));
        volume.is_some_and(|volume| !matches!(volume.status.get().state, State::Paused(_)))
    })
}

async fn restart(core: &Arc<Core>, vm: &VmRecord) {
    core.note("vm.restart", &vm.name, format!("{}; it is started on node {}", vm.reason, core.config.name));
    let Err(error) = super::start(core, &vm.name).await else {
        core.note("vm.restarted", &vm.name, format!("it runs again on node {}", core.config.name));
        return;
    };
    tracing::warn!(vm = vm.name, %error, "not restarted here");
    // Read again: a start that got as far as the record has left its reason there.
    let state = core.state();
    let Some(now) =
        state.vms.get(&vm.name).filter(|now| now.owner == core.me && now.state == VmState::Failed)
    else {
        return;
    };
    let reason = format!("restart on node {} failed: {}", core.config.name, error.message);
    if let Err(error) = core.propose(after_failure(&state, now, vm.restarts_left, reason)).await {
        tracing::warn!(vm = vm.name, %error, "failed restart not recorded");
    }
}

/// The next node shall try, as long as attempts are left.
fn after_failure(state: &ClusterState, now: &VmRecord, tried_with: u32, reason: String) -> Command {
    let left = tried_with.saturating_sub(1);
    let after = |own: NodeId| state.open_members().find(move |member| member.id > own);
    let other = after(now.owner).or_else(|| state.open_members().next());
    now.update(|record| {
        record.restarts_left = left;
        record.reason = reason;
        if let Some(other) = other.filter(|other| left > 0 && other.id != record.owner) {
            record.owner = other.id;
            record.epoch += 1;
        }
    })
}
