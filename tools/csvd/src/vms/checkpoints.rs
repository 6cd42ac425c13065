//! Checkpoints: a VM as it was at one moment, to which it can return.
//!
//! ```text
//!   create    pause, drain, close the disks, memory and devices to a file | a child for each disk | one CAS of the record | go on
//!   restore   end the process | a new child over each disk of the checkpoint | one CAS: these disks, that memory | start
//!   delete    one CAS: it is no checkpoint any more | its memory goes | its images are merged with what rests on them alone
//!
//!      web.vhdx <--- web_a_1.avhdx <--- web_b_2.avhdx     checkpoint a: web.vhdx, b: web_a_1.avhdx; the VM writes web_b_2.avhdx
//! ```
//! A crash before the one change of the record leaves the VM as it was, and files beside it that nobody refers to; a crash after
//! it leaves the VM as the record says. Images that the record names are whole and durable before it names them.
//!
//! **Invariants:** the images of a checkpoint are written by nobody as long as the record has the checkpoint; its memory is used
//! only with new children over exactly these images.

mod create;
mod given;
mod images;
mod restore;
mod tidy;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use api::{Error, pb};
use lockmgr::cluster::{ClusterState, VmRecord};

use super::{check_name, spec_of};
use crate::core::Core;
use crate::view;

/// Checkpoints of one VM: each makes the chain of a disk longer, and a chain has an end.
const CHECKPOINTS_MAX: usize = 32;

/// Makes, lists, restores or deletes checkpoints of a VM of this node.
pub(crate) async fn checkpoint(
    core: &Arc<Core>,
    request: pb::VmCheckpointRequest,
) -> Result<pb::VmCheckpoints, Error> {
    let pb::VmCheckpointRequest { name, action, checkpoint, dry_run } = &request;
    let during = |error: Error| error.during(format!("vm checkpoint {action} {name} {checkpoint}"));
    let kept = match action.as_str() {
        "create" => create::create(core, name, checkpoint).await.map(|()| Vec::new()),
        "list" => Ok(Vec::new()),
        "restore" => restore::restore(core, name, checkpoint, *dry_run).await.map(|()| Vec::new()),
        "delete" => tidy::delete(core, name, checkpoint, *dry_run).await,
        other => Err(Error::usage(format!("`{other}` is nothing that can be done with a checkpoint"))
            .hint("is csvctl newer than csvd?")),
    };
    let kept = kept.map_err(during)?;
    let state = core.cluster.read().await.map_err(|error| during(crate::core::refused(&error)))?;
    let record = view::vm(&state, name)?;
    let spec = spec_of(record)?;
    Ok(pb::VmCheckpoints {
        vm: name.clone(),
        state: record.state.to_string(),
        checkpoint: spec.checkpoint,
        checkpoints: spec.checkpoints,
        kept,
    })
}

/// Whether a checkpoint of any VM has its memory in this file.
pub(super) fn keeps(state: &ClusterState, file: &str) -> bool {
    let of = |vm: &VmRecord| spec_of(vm).map(|spec| spec.checkpoints).unwrap_or_default();
    state.vms.values().any(|vm| of(vm).iter().any(|checkpoint| checkpoint.state == file))
}

fn find<'a>(spec: &'a pb::VmSpec, name: &str) -> Result<&'a pb::VmCheckpoint, Error> {
    spec.checkpoints.iter().find(|checkpoint| checkpoint.name == name).ok_or_else(|| {
        let names: Vec<_> = spec.checkpoints.iter().map(|checkpoint| checkpoint.name.as_str()).collect();
        Error::not_found(format!("there is no checkpoint {name}")).hint(format!(
            "the VM has: {}",
            if names.is_empty() { "none".to_owned() } else { names.join(", ") }
        ))
    })
}

/// A name that the new checkpoint can have.
fn check_new(spec: &pb::VmSpec, name: &str) -> Result<(), Error> {
    check_name(name)?;
    if spec.checkpoints.iter().any(|checkpoint| checkpoint.name == name) {
        return Err(Error::conflict(format!("there is already a checkpoint {name}"))
            .hint("choose another name, or delete the old one"));
    }
    if spec.checkpoints.len() >= CHECKPOINTS_MAX {
        return Err(
            Error::conflict(format!("the VM has {CHECKPOINTS_MAX} checkpoints")).hint("delete some first")
        );
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "people want to know when a checkpoint was made")]
fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}
