//! Returning to a checkpoint: what the VM has done since is given up.
//!
//! **Invariant:** the memory of a checkpoint meets new, empty children over the images that were closed with it, and the record
//! names both, and what the guest was given when it booted, in one change.

use std::sync::Arc;

use api::{Error, pb};
use lockmgr::cluster::{VmRecord, VmState};
use prost::Message;

use super::{find, given, images};
use crate::core::Core;
use crate::view;
use crate::vms::migration::{parse_saved, refuse_guest, remove_state};
use crate::vms::{self, settle, spec_of};

pub(super) async fn restore(
    core: &Arc<Core>,
    name: &str,
    checkpoint: &str,
    dry_run: bool,
) -> Result<(), Error> {
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?;
    let old = spec_of(record)?;
    // Before anything is given up for it.
    back_at(core, &old, find(&old, checkpoint)?).await?;
    if dry_run {
        return Ok(());
    }
    end(core, record).await?;
    if go_back(core, name, checkpoint).await? {
        vms::start(core, name).await?;
    }
    core.note("vm.restored", name, format!("it is as it was at checkpoint {checkpoint}"));
    Ok(())
}

/// Ends the process, if there is one: what it would still write is given up.
async fn end(core: &Arc<Core>, record: &VmRecord) -> Result<(), Error> {
    match record.state {
        VmState::Stopped | VmState::Failed | VmState::Saved => Ok(()),
        VmState::Running | VmState::Paused => vms::stop(core, &record.name, true).await.map(drop),
        other => Err(Error::conflict(format!("it is {other}")).hint("wait until it runs or is stopped")),
    }
}

/// Whether it goes on from a memory.
async fn go_back(core: &Arc<Core>, name: &str, checkpoint: &str) -> Result<bool, Error> {
    let _decision = core.vms.decide(name).await;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?;
    if !matches!(record.state, VmState::Stopped | VmState::Failed | VmState::Saved) {
        return Err(
            Error::conflict(format!("it is {}", record.state)).hint("somebody has started it; try again")
        );
    }
    let old = spec_of(record)?;
    let wanted = find(&old, checkpoint)?.clone();
    let back = back_at(core, &old, &wanted).await?;
    let forks = images::fork(core, &wanted.disks, checkpoint).await?;
    let next = pb::VmSpec { disks: forks.disks(), checkpoint: wanted.name.clone(), ..back };
    let runs = !wanted.state.is_empty();
    let written = settle(core, record, |record| {
        record.spec = next.encode_to_vec().into();
        record.state = if runs { VmState::Saved } else { VmState::Stopped };
        record.saved = runs.then(|| wanted.state.clone());
        record.peer = None;
        record.reason = String::new();
        record.restarts_left = 0;
    });
    if let Err(error) = written.await {
        forks.remove(core).await;
        return Err(error);
    }
    give_up(core, record, &old, &next).await;
    Ok(runs)
}

/// The VM with what the guest of the checkpoint was given; refused where this node cannot go on with such a guest.
async fn back_at(core: &Arc<Core>, old: &pb::VmSpec, wanted: &pb::VmCheckpoint) -> Result<pb::VmSpec, Error> {
    let back = given::put_back(old.clone(), wanted);
    if !wanted.state.is_empty() {
        refuse_guest(core, &back).await?;
    }
    Ok(back)
}

/// What only the state that was given up needed: the images that the VM wrote last, and a saved memory.
async fn give_up(core: &Arc<Core>, record: &VmRecord, old: &pb::VmSpec, next: &pb::VmSpec) {
    let needed = |disk: &pb::VmDisk| {
        let same = |other: &pb::VmDisk| (&other.volume, &other.path) == (&disk.volume, &disk.path);
        next.disks.iter().any(same)
            || next.checkpoints.iter().any(|checkpoint| checkpoint.disks.iter().any(same))
    };
    // An image that the user has named stays.
    let goes = |disk: &&pb::VmDisk| !disk.read_only && images::is_made_here(&disk.path) && !needed(disk);
    for disk in old.disks.iter().filter(goes) {
        images::remove(core, &disk.volume, &disk.path).await;
    }
    if let Some(file) = record.saved.as_deref().and_then(parse_saved) {
        remove_state(core, file);
    }
}
