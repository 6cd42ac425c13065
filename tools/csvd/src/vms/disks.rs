//! The disks of a VM: which files they are, and that no two VMs write to one.
//!
//! Two VMs are told apart by their disks' inodes, so another name of a file is no way around.
//!
//! **Invariant (E6):** a file is the writable disk of at most one VM that is not stopped, on all nodes together: a VM says in
//! its record that it starts before it looks at the others' records.

use std::sync::Arc;

use api::{Error, pb};
use csvfs::node::FileKind;
use lockmgr::VolumeId;
use lockmgr::cluster::{ClusterState, VmRecord, VmState};

use super::spec_of;
use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::{forward, view};

/// A disk as a file.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    volume: VolumeId,
    ino: u64,
    read_only: bool,
    shown: String,
}

impl Disk {
    /// Whether both are one file.
    fn is(&self, other: &Self) -> bool {
        (self.volume, self.ino) == (other.volume, other.ino)
    }

    /// Whether both may not be used at once.
    fn excludes(&self, other: &Self) -> bool {
        self.is(other) && !(self.read_only && other.read_only)
    }
}

/// A VM's disks: each is a file on a volume of the cluster, and none is there twice.
pub(super) async fn of(core: &Arc<Core>, spec: &pb::VmSpec) -> Result<Vec<Disk>, Error> {
    let mut disks: Vec<Disk> = Vec::with_capacity(spec.disks.len());
    for disk in &spec.disks {
        let disk = resolve(core, disk).await?;
        if disks.iter().any(|other| disk.excludes(other)) {
            return Err(Error::usage(format!("{} is there twice", disk.shown))
                .hint("name each disk once, or all of its uses `,ro`"));
        }
        disks.push(disk);
    }
    Ok(disks)
}

async fn resolve(core: &Arc<Core>, disk: &pb::VmDisk) -> Result<Disk, Error> {
    let shown = format!("disk {}:/{}", disk.volume, disk.path);
    let state = core.state();
    let record = view::volume(&state, &disk.volume)?;
    let volume = core
        .volumes
        .get(record.id)
        .ok_or_else(|| Error::conflict(format!("volume {} is not open yet", record.name)))?;
    let (node, path) = (volume.node_or_why()?, disk.path.clone());
    let looked = tokio::task::spawn_blocking(move || node.resolve(&path)).await.map_err(Error::failed)?;
    let attr = looked.map_err(|error| {
        let kind = if error.errno() == libc::ENOENT { api::Kind::NotFound } else { api::Kind::Failed };
        Error::new(kind, error)
            .during(&shown)
            .hint("make it with `csvctl vhdx create`, or copy an image to the volume")
    })?;
    if attr.kind != FileKind::Regular {
        return Err(Error::usage(format!("{shown} is not a file")).hint("a disk is a VHDX file on a volume"));
    }
    Ok(Disk { volume: record.id, ino: attr.ino, read_only: disk.read_only, shown })
}

/// Refuses disks that another VM uses, on whichever node, or will go on to use because its state is saved.
pub(super) async fn refuse_shared(
    core: &Arc<Core>,
    name: &str,
    wanted: &[Disk],
    state: &ClusterState,
) -> Result<(), Error> {
    let idle = |state| matches!(state, VmState::Stopped | VmState::Failed);
    for other in state.vms.values().filter(|other| other.name != name && !idle(other.state)) {
        for disk in &spec_of(other)?.disks {
            // A name that is gone leads to no file that could be wanted by it.
            let Ok(used) = resolve(core, disk).await else { continue };
            if let Some(wanted) = wanted.iter().find(|wanted| wanted.excludes(&used)) {
                return Err(Error::conflict(format!(
                    "{} is used by VM {}, which is {}",
                    wanted.shown, other.name, other.state
                ))
                .hint(format!("stop VM {} first, or give this one a disk of its own", other.name)));
            }
        }
    }
    Ok(())
}

/// The VMs that have a file as a disk, or as a parent of one, whether they run or not.
pub(crate) async fn users(core: &Arc<Core>, volume: &str, path: &str) -> Result<Vec<pb::FileUser>, Error> {
    let wanted = resolve(core, &of_path(volume, path)).await?;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let mut users = Vec::new();
    for vm in state.vms.values() {
        let spec = spec_of(vm)?;
        for (place, disk) in (0..).zip(&spec.disks).filter(|(_, disk)| disk.volume == volume) {
            // A name that is gone leads to no file that could be used.
            let Ok(found) = resolve(core, disk).await else { continue };
            let depth = match found.is(&wanted) {
                true => Some(0),
                false => depth_of(core, vm, disk.slot.unwrap_or(place), disk, &wanted).await?,
            };
            users.extend(depth.map(|depth| pb::FileUser {
                vm: vm.name.clone(),
                state: vm.state.to_string(),
                owner: view::node_name(&state, vm.owner),
                disk: format!("{}:/{}", disk.volume, disk.path),
                depth,
                read_only: disk.read_only,
                checkpoint: String::new(),
            }));
        }
        users.extend(kept_for(core, &state, vm, &spec, &wanted).await);
    }
    Ok(users)
}

/// The checkpoints of a VM that a file is kept for.
async fn kept_for(
    core: &Arc<Core>,
    state: &ClusterState,
    vm: &VmRecord,
    spec: &pb::VmSpec,
    wanted: &Disk,
) -> Vec<pb::FileUser> {
    let mut users = Vec::new();
    for checkpoint in &spec.checkpoints {
        for disk in &checkpoint.disks {
            if resolve(core, disk).await.is_ok_and(|found| wanted.is(&found)) {
                users.push(pb::FileUser {
                    vm: vm.name.clone(),
                    state: vm.state.to_string(),
                    owner: view::node_name(state, vm.owner),
                    disk: format!("{}:/{}", disk.volume, disk.path),
                    depth: 0,
                    read_only: true,
                    checkpoint: checkpoint.name.clone(),
                });
            }
        }
    }
    users
}

/// Refuses to change images on which disks of other VMs rest, or would rest if they started.
pub(super) async fn refuse_other_children(
    core: &Arc<Core>,
    vm: &str,
    volume: &str,
    paths: &[&str],
) -> Result<(), Error> {
    for path in paths {
        let users = users(core, volume, path).await?;
        if let Some(other) = users.iter().find(|user| user.vm != vm) {
            return Err(Error::conflict(format!(
                "{volume}:/{path} is also needed by VM {}, whose disk is {}",
                other.vm, other.disk
            ))
            .hint("an image that several disks rest on stays as it is; convert one of them to an image of its own"));
        }
    }
    Ok(())
}

/// Refuses to let a VM write an image on which a disk of any VM rests, or that is kept for a checkpoint: whoever writes it
/// destroys what rests on it.
pub(super) async fn refuse_parents(core: &Arc<Core>, disks: &[pb::VmDisk]) -> Result<(), Error> {
    for disk in disks.iter().filter(|disk| !disk.read_only) {
        let users = users(core, &disk.volume, &disk.path).await?;
        let Some(user) = users.iter().find(|user| user.depth > 0 || !user.checkpoint.is_empty()) else {
            continue;
        };
        let why = match user.checkpoint.as_str() {
            "" => format!("{}, a disk of VM {}, rests on it", user.disk, user.vm),
            checkpoint => format!("it is kept for checkpoint {checkpoint} of VM {}", user.vm),
        };
        return Err(Error::conflict(format!(
            "disk {}:/{} must not be written: {why}",
            disk.volume, disk.path
        ))
        .hint("give the VM a child of it, made with `csvctl vhdx snapshot`"));
    }
    Ok(())
}

fn of_path(volume: &str, path: &str) -> pb::VmDisk {
    pb::VmDisk { volume: volume.to_owned(), path: path.to_owned(), ..pb::VmDisk::default() }
}

/// How deep below a disk the wanted file lies, if it is one of its parents.
async fn depth_of(
    core: &Arc<Core>,
    vm: &VmRecord,
    slot: u32,
    disk: &pb::VmDisk,
    wanted: &Disk,
) -> Result<Option<u32>, Error> {
    for (depth, parent) in (1..).zip(parents(core, vm, slot, disk).await?) {
        if resolve(core, &of_path(&disk.volume, &parent)).await.is_ok_and(|found| found.is(wanted)) {
            return Ok(Some(depth));
        }
    }
    Ok(None)
}

/// The parents of a VM's disk, the nearest first, below the root of its volume.
pub(super) async fn parents(
    core: &Arc<Core>,
    vm: &VmRecord,
    slot: u32,
    disk: &pb::VmDisk,
) -> Result<Vec<String>, Error> {
    match vm.state {
        VmState::Running | VmState::Paused => parents_in_use(core, vm, slot).await,
        _ => Ok(parents_at_rest(core, disk).await),
    }
}

/// Only the process that has the disk open can say what it is made of now. Without an answer nothing is known.
async fn parents_in_use(core: &Arc<Core>, vm: &VmRecord, slot: u32) -> Result<Vec<String>, Error> {
    let op = NodeOp::VmShow(pb::VmRequest { name: vm.name.clone() });
    let NodeAnswer::Vm(shown) = forward::ask(core, vm.owner, op).await? else {
        return Err(Error::failed("the owner's answer cannot be read"));
    };
    let disk = shown.disks.into_iter().find(|disk| disk.slot == slot);
    disk.map(|disk| disk.parents).ok_or_else(|| {
        Error::conflict(format!("it cannot be told now which images VM {} uses", vm.name))
            .hint("try again in a moment")
    })
}

/// An image that cannot be read, or is none, rests on nothing.
pub(super) async fn parents_at_rest(core: &Arc<Core>, disk: &pb::VmDisk) -> Vec<String> {
    let state = core.state();
    let node = state.volumes.get(&disk.volume).and_then(|record| core.volumes.get(record.id)?.node());
    let (Some(node), volume, path) = (node, disk.volume.clone(), disk.path.clone()) else {
        return Vec::new();
    };
    let read = tokio::task::spawn_blocking(move || hv_runner::chain::parents_of(&volume, &node, &path)).await;
    match read {
        Ok(Ok(parents)) => parents,
        Ok(Err(error)) => {
            tracing::debug!(path = disk.path, %error, "parents of a disk not found");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}
