//! Making a checkpoint: of a VM that runs, with its memory; of one that does not, of its disks.
//!
//! **Invariant:** memory, devices and disks are of one moment: the guest stands still from before its disks are closed until
//! the record names the children.

use std::sync::Arc;

use api::{Error, pb};
use hv::control::DiskPlace;
use hv_runner::config::VolumePath;
use lockmgr::cluster::{VmRecord, VmState};
use prost::Message;
use uuid::Uuid;

use super::images::{self, Forks};
use super::{check_new, given, unix_ms};
use crate::core::Core;
use crate::view;
use crate::vms::migration::{remove_state, saved_name};
use crate::vms::runner::{Runner, state_volume};
use crate::vms::{running_here, settle, spec_of};

pub(super) async fn create(core: &Arc<Core>, name: &str, checkpoint: &str) -> Result<(), Error> {
    let _decision = core.vms.decide(name).await;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?.clone();
    check_new(&spec_of(&record)?, checkpoint)?;
    match record.state {
        VmState::Running | VmState::Paused => of_running(core, &record, checkpoint).await,
        VmState::Stopped | VmState::Failed => of_stopped(core, &record, checkpoint).await,
        other => Err(Error::conflict(format!("it is {other}")).hint("wait until it runs or is stopped")),
    }?;
    core.note("vm.checkpoint", name, format!("checkpoint {checkpoint} made"));
    Ok(())
}

async fn of_stopped(core: &Arc<Core>, record: &VmRecord, name: &str) -> Result<(), Error> {
    let spec = spec_of(record)?;
    let forks = images::fork(core, &spec.disks, name).await?;
    write(core, record, &spec, name, &forks, "").await
}

async fn of_running(core: &Arc<Core>, record: &VmRecord, name: &str) -> Result<(), Error> {
    let (_, runner) = running_here(core, &record.name, "checkpoint")?;
    let _moving = runner.begin_move().ok_or_else(|| {
        Error::conflict("it is being moved, or one of its images is being worked on")
            .hint("wait until that is done")
    })?;
    let spec = spec_of(record)?;
    let file = VolumePath {
        volume: state_volume(core, &spec)?,
        path: format!(".{}-{name}-{}.checkpoint", record.name, &Uuid::new_v4().simple().to_string()[..8]),
    };
    // The guest stands still for what it writes last only. Without the copy it does for all of its memory.
    if let Err(error) = runner.control().copy_memory(&file.volume, &file.path).await {
        tracing::warn!(vm = record.name, %error, "memory not copied before the pause");
    }
    runner
        .control()
        .save(&file.volume, &file.path)
        .await
        .inspect_err(|_| remove_state(core, file.clone()))?;
    // The guest stands still, its disks are closed: by their own process, which opens them again.
    let made = fork_and_write(core, record, &spec, name, &file).await;
    if made.is_err() {
        remove_state(core, file);
    }
    go_on(&runner, made.as_ref().map(Forks::places).unwrap_or_default()).await?;
    made.map(drop)
}

async fn fork_and_write(
    core: &Arc<Core>,
    record: &VmRecord,
    spec: &pb::VmSpec,
    name: &str,
    file: &VolumePath,
) -> Result<Forks, Error> {
    let forks = images::fork(core, &spec.disks, name).await?;
    write(core, record, spec, name, &forks, &saved_name(file)).await?;
    Ok(forks)
}

/// The guest goes on in the images that the record names. A process that cannot open them is of no use.
async fn go_on(runner: &Runner, places: Vec<DiskPlace>) -> Result<(), Error> {
    let resumed = runner.control().abandon(places).await;
    if resumed.is_err() {
        runner.kill();
        runner.ended().await;
    }
    resumed.map_err(|error| {
        error.hint("the VM has been ended; `csvctl vm start` starts it on what it had written")
    })
}

/// One change of the record: the checkpoint is there, and the VM writes the children. Without it the children go.
async fn write(
    core: &Arc<Core>,
    record: &VmRecord,
    spec: &pb::VmSpec,
    name: &str,
    forks: &Forks,
    state: &str,
) -> Result<(), Error> {
    let mut next = spec.clone();
    next.checkpoints.push(given::keep(
        pb::VmCheckpoint {
            name: name.to_owned(),
            created_ms: unix_ms(),
            disks: spec.disks.clone(),
            state: state.to_owned(),
            after: spec.checkpoint.clone(),
            ..pb::VmCheckpoint::default()
        },
        spec,
    ));
    name.clone_into(&mut next.checkpoint);
    next.disks = forks.disks();
    let written = settle(core, record, |record| record.spec = next.encode_to_vec().into()).await;
    if written.is_err() {
        forks.remove(core).await;
    }
    written.map(drop)
}
