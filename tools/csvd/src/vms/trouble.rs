//! VMs whose disks cannot be written or reached: they are halted until that is over, instead of being given I/O errors.
//!
//! ```text
//!   a request found no space (its hv says so)   --.                      .-- retried every second, in the guest's order
//!   no way leads to the LUN (this node's paths) --+--> halted, "paused" --+-- gone on with as soon as nothing stands against it
//! ```
//! What the guest has asked for waits unanswered in its process. There is no limit of time but the end of the node's lease,
//! with which its VMs end. The record says why, so that `vm show`, `vm list`, `events` and `health` do, and a VM whose node
//! is lost meanwhile is started again like one that ran.
//!
//! **Invariant:** a VM that its user has paused stays paused, whatever comes and goes.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use api::Error;
use hv::control::{StatusReply, VmRunState};
use lockmgr::cluster::{ClusterState, VmRecord, VmState};

use super::runner::Runner;
use super::spec_of;
use crate::core::Core;

/// Whether a VM is halted by its node and will go on by itself. A user who pauses a VM gives no reason.
pub(crate) fn is_halted(vm: &VmRecord) -> bool {
    vm.state == VmState::Paused && !vm.reason.is_empty()
}

/// Halts the VM or lets it go on, as its disks demand. Called again and again while its process lives.
pub(super) async fn look(core: &Arc<Core>, runner: &Arc<Runner>, status: &StatusReply) {
    if !status.stalled.is_empty()
        && let Err(error) = runner.control().retry().await
    {
        tracing::warn!(vm = runner.name, %error, "requests that wait were not tried again");
    }
    let state = core.state();
    let Some(record) = ours(core, &state, runner) else { return };
    let trouble = trouble(core, &state, record, status);
    if trouble.is_none() && !runner.halted.load(Ordering::Acquire) && !is_halted(record) {
        return;
    }
    // One that is being moved is not touched: its move does not get through, and then it is looked at again.
    let Some(_moving) = runner.begin_move() else { return };
    if let Err(error) = follow(core, runner, record, status, trouble).await {
        tracing::warn!(vm = runner.name, %error, "the VM is not halted, or not let go on, yet");
    }
}

fn ours<'a>(core: &Core, state: &'a ClusterState, runner: &Runner) -> Option<&'a VmRecord> {
    let record = state.vms.get(&runner.name)?;
    (record.owner == core.me && record.epoch == runner.epoch()).then_some(record)
}

/// What stands against the VM's I/O, in words.
fn trouble(core: &Core, state: &ClusterState, record: &VmRecord, status: &StatusReply) -> Option<String> {
    if !status.stalled.is_empty() {
        return Some(status.stalled.clone());
    }
    let spec = spec_of(record).ok()?;
    spec.disks.iter().find_map(|disk| {
        let volume = state.volumes.get(&disk.volume)?;
        let why = core.volumes.get(volume.id)?.no_way()?;
        Some(format!("no way leads to the LUN of volume {}: {why}", volume.name))
    })
}

async fn follow(
    core: &Arc<Core>,
    runner: &Runner,
    record: &VmRecord,
    status: &StatusReply,
    trouble: Option<String>,
) -> Result<(), Error> {
    let halted = runner.halted.load(Ordering::Acquire);
    match (&trouble, record.state) {
        (Some(_), VmState::Running) if !halted && status.state() == VmRunState::Running => {
            runner.control().pause().await?;
            runner.halted.store(true, Ordering::Release);
        }
        (None, _) if halted => {
            runner.control().resume().await?;
            runner.halted.store(false, Ordering::Release);
        }
        _ => {}
    }
    record_it(core, record, runner.halted.load(Ordering::Acquire), trouble).await
}

/// Brings the record in line with what was done, also when that could not be recorded before.
async fn record_it(
    core: &Arc<Core>,
    record: &VmRecord,
    halted: bool,
    trouble: Option<String>,
) -> Result<(), Error> {
    let to = match (halted, record.state) {
        (true, VmState::Running) => VmState::Paused,
        (false, VmState::Paused) if is_halted(record) => VmState::Running,
        _ => return Ok(()),
    };
    let command = record.update(|record| {
        record.state = to;
        record.reason = trouble.unwrap_or_default();
    });
    core.propose(command).await.map(drop)
}
