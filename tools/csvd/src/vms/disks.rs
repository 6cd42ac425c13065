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
use lockmgr::cluster::{ClusterState, VmState};

use super::spec_of;
use crate::core::Core;
use crate::view;

/// A disk as a file.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    volume: VolumeId,
    ino: u64,
    read_only: bool,
    shown: String,
}

impl Disk {
    /// Whether both may not be used at once.
    fn excludes(&self, other: &Self) -> bool {
        (self.volume, self.ino) == (other.volume, other.ino) && !(self.read_only && other.read_only)
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
