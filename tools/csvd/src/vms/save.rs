//! Saving a VM: its memory and state go to a file on the volume, and it runs nowhere until it is started again.
//!
//! ```text
//!   hv: RAM to the file while the guest runs --> pause, the rest, the state --> CAS Running -> Saved --> the process ends
//! ```
//! **Invariant (H1):** once it is proposed that the record says saved, the guest does not run on here before it is certain that
//! the record does not and never will say so.

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use hv_runner::config::VolumePath;
use lockmgr::cluster::{ProposeError, VmRecord, VmState};

use super::runner::{Runner, state_volume};
use super::{described, migration, running_here, spec_of};
use crate::core::{Core, refused};

/// Pause before the change is proposed again, when it is not known what became of it.
const PROPOSE_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// Saves a VM of this node.
pub(crate) async fn save(core: &Arc<Core>, name: &str) -> Result<pb::Vm, Error> {
    let _decision = core.vms.decide(name).await;
    let during = |error: Error| error.during(format!("vm save {name}"));
    let (record, runner) = running_here(core, name, "save")?;
    if record.state != VmState::Running {
        return Err(Error::conflict(format!("vm save {name}: it is {}", record.state))
            .hint("only a running VM can be saved"));
    }
    let _moving = runner.begin_move().ok_or_else(|| {
        Error::conflict(format!("vm save {name}: it is being moved")).hint("wait until it has arrived")
    })?;
    let volume = state_volume(core, &spec_of(&record)?).map_err(during)?;
    let file = VolumePath { volume, path: format!(".{name}-{}.vmstate", record.epoch) };
    match write(core, &record, &runner, &file).await {
        Ok(()) => {
            runner.release();
            if let Err(error) = runner.stop(true).await {
                tracing::warn!(vm = name, %error, "process of a saved VM: killed");
                runner.kill();
            }
            runner.ended().await;
            described(core, name)
        }
        Err(error) => {
            migration::remove_state(core, file);
            Err(during(error))
        }
    }
}

/// Whether a VM waits for a user who starts it, on whatever node. One that a move has saved goes on by itself.
pub(crate) fn is_put_by(vm: &VmRecord) -> bool {
    vm.state == VmState::Saved && vm.peer == Some(vm.owner)
}

/// Ends with the guest saved and the record saying so, or with the guest running on.
async fn write(
    core: &Arc<Core>,
    record: &VmRecord,
    runner: &Arc<Runner>,
    file: &VolumePath,
) -> Result<(), Error> {
    // Without the copy the save takes longer, and says itself what is wrong.
    if let Err(error) = runner.control().copy_memory(&file.volume, &file.path).await {
        tracing::warn!(vm = record.name, %error, "memory not copied before the pause");
    }
    runner.control().save(&file.volume, &file.path).await?;
    match record_saved(core, record, file).await {
        Ok(()) => Ok(()),
        Err(error) => {
            // The record names this node and epoch still, or nobody: the process ends then by itself.
            runner.control().abandon(Vec::new()).await?;
            Err(error)
        }
    }
}

async fn record_saved(core: &Arc<Core>, record: &VmRecord, file: &VolumePath) -> Result<(), Error> {
    let saved = migration::saved_name(file);
    let command = record.update(|record| {
        record.state = VmState::Saved;
        record.saved = Some(saved.clone());
        record.peer = Some(record.owner);
    });
    loop {
        match core.cluster.propose(command.clone()).await {
            Ok(_) => return Ok(()),
            // Applied by an earlier attempt whose answer was lost, or the record is something else: then it never will be.
            Err(error @ ProposeError::Conflict { .. }) => {
                let state = core.cluster.read().await.map_err(|error| refused(&error))?;
                let now = state.vms.get(&record.name);
                let ours =
                    now.is_some_and(|now| now.epoch == record.epoch && now.saved.as_ref() == Some(&saved));
                return if ours { Ok(()) } else { Err(refused(&error)) };
            }
            Err(ProposeError::OutcomeUnknown { .. } | ProposeError::NoQuorum { .. }) => {
                tokio::time::sleep(PROPOSE_AGAIN_AFTER).await;
            }
            Err(error) => return Err(refused(&error)),
        }
    }
}
