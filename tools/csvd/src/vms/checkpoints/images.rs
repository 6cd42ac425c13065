//! New children for the disks of a VM, and the removal of images that nobody needs.

use std::sync::Arc;

use api::{Error, pb};
use csvfs::node::Node;
use hv::control::DiskPlace;
use uuid::Uuid;

use crate::core::Core;
use crate::view;

/// Disks with a new child each; those that are only read stay as they are.
#[derive(Debug)]
pub(super) struct Forks {
    /// In the order of the VM's disks, each with its slot; true where it is new.
    disks: Vec<(pb::VmDisk, bool)>,
}

impl Forks {
    /// The disks that the VM has with them.
    pub(super) fn disks(&self) -> Vec<pb::VmDisk> {
        self.disks.iter().map(|(disk, _)| disk.clone()).collect()
    }

    /// Where the new ones lie.
    pub(super) fn places(&self) -> Vec<DiskPlace> {
        let place =
            |disk: &pb::VmDisk| DiskPlace { slot: disk.slot.unwrap_or_default(), path: disk.path.clone() };
        self.made().map(place).collect()
    }

    /// Removes the new ones, to which nothing refers.
    pub(super) async fn remove(&self, core: &Arc<Core>) {
        for disk in self.made() {
            remove(core, &disk.volume, &disk.path).await;
        }
    }

    fn made(&self) -> impl Iterator<Item = &pb::VmDisk> {
        self.disks.iter().filter(|(_, is_new)| *is_new).map(|(disk, _)| disk)
    }
}

/// Makes a child for each disk that is written. Nobody has the disks open for writing; on an error none is left.
pub(super) async fn fork(core: &Arc<Core>, disks: &[pb::VmDisk], checkpoint: &str) -> Result<Forks, Error> {
    let mut forks = Forks { disks: Vec::with_capacity(disks.len()) };
    let tag = tag();
    for (place, disk) in (0..).zip(disks) {
        // From now on each disk has its slot in writing.
        let mut next = pb::VmDisk { slot: Some(disk.slot.unwrap_or(place)), ..disk.clone() };
        if !disk.read_only {
            next.path = child_of(&disk.path, checkpoint, &tag);
            if let Err(error) = make(core, disk, &next.path).await {
                forks.remove(core).await;
                return Err(error);
            }
        }
        forks.disks.push((next, !disk.read_only));
    }
    Ok(forks)
}

/// `dir/web.vhdx` -> `dir/web_CHECKPOINT_TAG.avhdx`, and the same for a child of an earlier checkpoint.
fn child_of(path: &str, checkpoint: &str, tag: &str) -> String {
    let (folder, name) = path.rsplit_once('/').map_or(("", path), |(folder, name)| (folder, name));
    let stem = match name.rsplit_once('.') {
        // What an earlier checkpoint has added goes, or names would grow with each.
        Some((stem, "avhdx")) => first_name(stem).unwrap_or(stem),
        Some((stem, _)) => stem,
        None => name,
    };
    let slash = if folder.is_empty() { "" } else { "/" };
    format!("{folder}{slash}{stem}_{}_{tag}.avhdx", checkpoint.replace('_', "-"))
}

/// A name for the next image of a disk whose image has a name of [`child_of`], or of the user.
pub(super) fn next_of(path: &str) -> String {
    child_of(path, "merge", &tag())
}

fn tag() -> String {
    Uuid::new_v4().simple().to_string()[..8].to_owned()
}

/// The name before what [`child_of`] adds.
fn first_name(stem: &str) -> Option<&str> {
    let mut parts = stem.rsplitn(3, '_');
    let (tag, _checkpoint, first) = (parts.next()?, parts.next()?, parts.next()?);
    (tag.len() == 8 && tag.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(first)
}

/// Whether an image has the name of one that a checkpoint or a restore has made. Others were named by the user.
pub(super) fn is_made_here(path: &str) -> bool {
    path.strip_suffix(".avhdx").is_some_and(|stem| first_name(stem).is_some())
}

async fn make(core: &Arc<Core>, parent: &pb::VmDisk, child: &str) -> Result<(), Error> {
    let node = node(core, &parent.volume)?;
    let (volume, below, above) = (parent.volume.clone(), parent.path.clone(), child.to_owned());
    let made = tokio::task::spawn_blocking(move || {
        let made = hv_runner::chain::fork(&volume, &node, &below, &above);
        // A child that is not whole is of no use.
        made.inspect_err(|_| drop(unlink(&node, &above)))
    });
    made.await.map_err(Error::failed)?.map_err(|error| {
        Error::failed(format!("{}:/{child}: {}", parent.volume, hv_runner::report::message(&error))).hint(
            "look at the image below it with `csvctl vhdx info`, and at the volume with `csvctl volume show`",
        )
    })
}

/// Removes a file to which nothing refers; that it stays does no harm.
pub(super) async fn remove(core: &Arc<Core>, volume: &str, path: &str) {
    let Ok(node) = node(core, volume) else { return };
    let name = path.to_owned();
    let removed = tokio::task::spawn_blocking(move || unlink(&node, &name)).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(volume, path, error, "image that nobody needs not removed");
    }
}

fn unlink(node: &Arc<Node>, path: &str) -> Result<(), String> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let folder = node.resolve(folder).map_err(|error| error.to_string())?;
    node.unlink(folder.ino, name.as_bytes()).map_err(|error| error.to_string())
}

/// The volume as this node reaches it.
pub(super) fn node(core: &Arc<Core>, volume: &str) -> Result<Arc<Node>, Error> {
    let state = core.state();
    let record = view::volume(&state, volume)?;
    let open = core.volumes.get(record.id);
    open.ok_or_else(|| Error::conflict(format!("volume {volume} is not open yet")))?.node_or_why()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_named_after_the_disk_and_names_do_not_grow() {
        let first = child_of("vms/web.vhdx", "before_update", "0123abcd");
        assert_eq!(first, "vms/web_before-update_0123abcd.avhdx");
        assert_eq!(child_of(&first, "b", "ffffffff"), "vms/web_b_ffffffff.avhdx");
        assert_eq!(child_of("my_disk.avhdx", "b", "ffffffff"), "my_disk_b_ffffffff.avhdx");
        assert!(is_made_here(&first) && !is_made_here("vms/web.vhdx") && !is_made_here("vms/a_b_mine.avhdx"));
        assert_eq!(child_of("disk", "b", "ffffffff"), "disk_b_ffffffff.avhdx");
    }
}
