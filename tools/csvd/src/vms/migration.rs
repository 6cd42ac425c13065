//! Migration: the deciding is in the `migrator` crate, this carries it out.
//!
//! ```text
//!   source.rs   Migration's actions: preflight, records, hv save / halt / abandon, messages to the target
//!   copy.rs     the memory of a live move: passes, the rest; lane.rs: one stream and its thread
//!   target.rs   Incoming's actions: hv started for what comes, records, activation
//!   arrival.rs  the memory of a live move at the target
//!   rehearsal.rs  holding a move at a step, for tests
//!   facts.rs    what this node is and has, for the preflight
//! ```
//! The order of steps, and what follows from each failure, is in the crate's PROTOCOL.md.

mod arrival;
mod copy;
mod facts;
mod lane;
mod progress;
mod rehearsal;
mod source;
mod target;

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use hv_runner::config::VolumePath;
use lockmgr::cluster::{ClusterState, Member, MemberState, ProposeError, VmRecord, VmState};
use migrator::{CasReply, Change, RecordView};

use super::runner::Runner;
use crate::core::Core;
use crate::view;

pub(crate) use arrival::streamed;
pub(crate) use facts::{devices_of_all, refuse_guest};
pub(crate) use progress::Progress;
pub(crate) use rehearsal::Rehearsal;
pub(crate) use source::{migrate, problems};
pub(crate) use target::{Moves, incoming};

/// Longest time until the record says that a VM that was seen running runs.
const RECORDED_WITHIN: Duration = Duration::from_secs(5);
/// Pause before the record is read again, when nobody answered.
const READ_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Whether the records allow this move.
pub(crate) fn check(state: &ClusterState, record: &VmRecord, to: &Member, kind: &str) -> Result<(), Error> {
    let name = &record.name;
    if !matches!(kind, "live" | "quick") {
        return Err(Error::usage(format!("vm migrate {name}: there is no type {kind}"))
            .hint("use --type live or --type quick"));
    }
    if to.id == record.owner {
        return Err(Error::conflict(format!("vm migrate {name}: it is already on {}", to.name))
            .hint("name another node with --to"));
    }
    if state.witnesses.contains(&to.id) {
        return Err(Error::conflict(format!("vm migrate {name}: {} is a witness", to.name))
            .hint("a witness runs no VMs; name another node"));
    }
    if to.state != MemberState::Up {
        return Err(Error::conflict(format!("vm migrate {name}: node {} is {}", to.name, to.state))
            .hint("`csvctl node list` shows which nodes are up"));
    }
    if state.is_closed(to.id) {
        return Err(Error::conflict(format!("vm migrate {name}: node {} is drained", to.name))
            .hint(format!("`csvctl node resume {}` lets it take part again", to.name)));
    }
    if record.state != VmState::Running {
        let on = view::node_name(state, record.owner);
        return Err(Error::conflict(format!("vm migrate {name}: it is {} on {on}", record.state))
            .hint("only a running VM can be moved; a stopped one is started where `vm start` is asked for"));
    }
    Ok(())
}

/// Proposes a change of the VM's record, and says for certain what became of it, or that it is not known.
async fn propose(core: &Arc<Core>, record: &VmRecord, change: &Change) -> CasReply {
    let commits = change.expect.owner != change.to.owner;
    if commits && core.vms.rehearsal.is_lost("commit") {
        return CasReply::Unknown;
    }
    let reply = propose_now(core, record, change).await;
    if commits && core.vms.rehearsal.is_lost("commit-answer") { CasReply::Unknown } else { reply }
}

async fn propose_now(core: &Arc<Core>, record: &VmRecord, change: &Change) -> CasReply {
    match core.cluster.propose(change.command(record)).await {
        Ok(_) => CasReply::Won,
        Err(ProposeError::Conflict { .. }) => CasReply::Lost(read_record(core, &record.name).await),
        Err(ProposeError::OutcomeUnknown { .. } | ProposeError::Stopped { .. }) => CasReply::Unknown,
        Err(error @ (ProposeError::Invalid { .. } | ProposeError::NoQuorum { .. })) => {
            CasReply::Refused(error.to_string())
        }
    }
}

/// The VM's record as the quorum has it now. Asks until there is an answer: guessing is not allowed (H6).
async fn read_record(core: &Arc<Core>, name: &str) -> Option<RecordView> {
    loop {
        match core.cluster.read().await {
            Ok(state) => return state.vms.get(name).map(RecordView::from),
            Err(error) => {
                tracing::warn!(vm = name, %error, "the VM's record cannot be read now");
                tokio::time::sleep(READ_AGAIN_AFTER).await;
            }
        }
    }
}

/// The file that a record's saved state lies in.
pub(super) fn saved_file(record: &VmRecord) -> Option<VolumePath> {
    record.saved.as_deref().and_then(parse_saved)
}

/// The form in which a record names the file.
pub(super) fn saved_name(file: &VolumePath) -> String {
    format!("{}:/{}", file.volume, file.path)
}

pub(super) fn parse_saved(saved: &str) -> Option<VolumePath> {
    let (volume, path) = saved.split_once(":/")?;
    Some(VolumePath { volume: volume.to_owned(), path: path.to_owned() })
}

/// Removes a saved state that is of no use any more, without waiting for it. One that a checkpoint keeps stays.
pub(super) fn remove_state(core: &Arc<Core>, file: VolumePath) {
    if super::checkpoints::keeps(&core.state(), &saved_name(&file)) {
        return;
    }
    let node = core.state().volumes.get(&file.volume).and_then(|record| core.volumes.get(record.id)?.node());
    let Some(node) = node else { return };
    core.runtime.spawn(async move {
        let path = file.path.clone();
        let removed =
            tokio::task::spawn_blocking(move || node.unlink(csvfs::node::ROOT_INO, path.as_bytes())).await;
        if let Ok(Err(error)) = removed
            && error.errno() != libc::ENOENT
        {
            tracing::warn!(volume = file.volume, path = file.path, %error, "saved state not removed");
        }
    });
}

/// The same, when the memory that comes from it is all there.
pub(super) fn remove_when_read(core: &Arc<Core>, runner: &Arc<Runner>, file: VolumePath) {
    let (core, runner) = (Arc::clone(core), Arc::clone(runner));
    let runtime = core.runtime.clone();
    runtime.spawn(async move {
        // A process that is gone reads nothing any more, and its memory is of no use without what the guest did since.
        if let Err(error) = runner.control().await_memory().await {
            tracing::warn!(vm = runner.name, %error, "the memory of a VM did not come");
        }
        remove_state(&core, file);
    });
}

/// A VM that was in `epoch` has moved and runs: whoever is told so and asks this node next shall read so too.
pub(crate) async fn await_arrival(core: &Core, name: &str, epoch: u64) {
    let mut state = core.cluster.watch();
    let recorded = state.wait_for(|state| {
        let record = state.vms.get(name);
        record.is_none_or(|record| record.epoch > epoch && record.state != VmState::Saved)
    });
    drop(tokio::time::timeout(RECORDED_WITHIN, recorded).await);
}

/// How far the move of a VM of this node is.
pub(crate) fn progress(core: &Core, name: &str) -> Result<pb::MigrateProgress, Error> {
    moving(core, name).map(|progress| progress.now())
}

/// Gives up the move of a VM of this node, if it is not committed yet. The move itself reports what becomes of it.
pub(crate) fn cancel(core: &Core, name: &str) -> Result<(), Error> {
    moving(core, name).map(|progress| progress.cancel.cancel())
}

fn moving(core: &Core, name: &str) -> Result<Arc<Progress>, Error> {
    view::vm(&core.state(), name)?;
    core.vms.get(name).and_then(|runner| runner.progress()).ok_or_else(|| {
        Error::conflict(format!("vm {name} is not being moved")).hint("`csvctl vm show` tells where it is")
    })
}

/// Whole microseconds of a duration in milliseconds.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates, and the value is a measured duration"
)]
fn us(ms: f64) -> u64 {
    (ms * 1000.0) as u64
}
