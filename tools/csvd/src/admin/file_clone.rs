//! `file clone`: a file that shares all its blocks with another one.
//!
//! ```text
//!   a VM runs from the file:  its owner -> hv holds the guest still, closes its disks, clones, runs on
//!   otherwise:                the node library here clones; who writes to the file is held up for that moment
//! ```

use std::sync::Arc;

use api::{Error, pb};
use csvfs::node::{Attr, ExtentState, FsError, Node};
use lockmgr::cluster::{ClusterState, VmState};

use super::file::failed;
use super::path::{OnVolume, resolve};
use crate::core::Core;
use crate::messages::NodeOp;
use crate::{forward, vms};

pub(super) async fn clone(core: &Arc<Core>, request: pb::FileCloneRequest) -> Result<pb::FileCloned, Error> {
    let state = core.state();
    let during = |error: Error| error.during(format!("file clone {} {}", request.from, request.to));
    let (from, to) = places(core, &state, &request).map_err(during)?;
    let volume = core.volumes.get(from.volume.id);
    let volume =
        volume.ok_or_else(|| Error::conflict(format!("volume {} is not open yet", from.volume.name)))?;
    let node = volume.node_or_why().map_err(during)?;
    let begun = tokio::time::Instant::now();
    let vm = user(&state, &from);
    match &vm {
        Some(vm) => clone_disk(core, &state, vm, &from, &to).await.map_err(during)?,
        None => {
            let (node, from, to) = (node.clone(), from.path.clone(), to.path.clone());
            let cloned = tokio::task::spawn_blocking(move || {
                let attr = node.resolve(&from)?;
                node.clone_as(&*node.open(attr.ino)?, &to)
            });
            let cloned = cloned.await.map_err(Error::failed)?;
            cloned.map_err(|error| failed("file clone", &request.from, &error))?;
        }
    }
    let took_ms = begun.elapsed().as_secs_f64() * 1000.0;
    let path = to.path.clone();
    let looked = tokio::task::spawn_blocking(move || look(&node, &path)).await.map_err(Error::failed)?;
    let (attr, shared_bytes) = looked.map_err(|error| failed("file clone", &request.to, &error))?;
    Ok(pb::FileCloned {
        from: request.from,
        to: request.to,
        volume: from.volume.name,
        ino: attr.ino,
        size_bytes: attr.size_bytes,
        shared_bytes,
        took_ms,
        vm: vm.unwrap_or_default(),
    })
}

fn places(
    core: &Core,
    state: &ClusterState,
    request: &pb::FileCloneRequest,
) -> Result<(OnVolume, OnVolume), Error> {
    let (from, to) = (resolve(core, state, &request.from)?, resolve(core, state, &request.to)?);
    if from.volume.id != to.volume.id {
        let (one, other) = (from.volume.name, to.volume.name);
        return Err(Error::usage(format!("one path is on volume {one}, the other on {other}"))
            .hint("a clone shares the blocks of its source; copy the file to another volume"));
    }
    if to.path.is_empty() {
        return Err(Error::usage(format!("{} names no file", request.to)));
    }
    Ok((from, to))
}

/// The VM that has the file open as a disk.
fn user(state: &ClusterState, file: &OnVolume) -> Option<String> {
    let open = state.vms.values().filter(|vm| matches!(vm.state, VmState::Running | VmState::Paused));
    let uses = |disk: &pb::VmDisk| {
        disk.volume == file.volume.name && disk.path.trim_matches('/') == file.path && !disk.read_only
    };
    let mut users = open.filter(|vm| vms::spec_of(vm).is_ok_and(|spec| spec.disks.iter().any(uses)));
    users.next().map(|vm| vm.name.clone())
}

async fn clone_disk(
    core: &Arc<Core>,
    state: &ClusterState,
    vm: &str,
    from: &OnVolume,
    to: &OnVolume,
) -> Result<(), Error> {
    let record = crate::view::vm(state, vm)?;
    let spec = vms::spec_of(record)?;
    let disk = spec.disks.into_iter().find(|disk| disk.path.trim_matches('/') == from.path);
    let request = pb::VmDiskRequest {
        name: vm.to_owned(),
        action: "clone".to_owned(),
        disk,
        clone_to: to.path.clone(),
        ..pb::VmDiskRequest::default()
    };
    forward::ask(core, record.owner, NodeOp::VmDisk(request)).await.map(drop)
}

fn look(node: &Arc<Node>, path: &str) -> Result<(Attr, u64), FsError> {
    let attr = node.resolve(path)?;
    let map = node.open(attr.ino)?.map()?;
    let shared = map.iter().filter(|extent| extent.state == ExtentState::Shared);
    Ok((attr, shared.map(|extent| extent.length).sum()))
}
