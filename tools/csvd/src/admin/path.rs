//! What a user's path means: a file on a volume.
//!
//! | form | meaning |
//! |---|---|
//! | `VOLUME:/PATH` | below the volume's root |
//! | an absolute path | below a mount of a volume: this node's, or another node's of the same machine |

use std::path::{Component, Path};

use api::Error;
use lockmgr::cluster::{ClusterState, VolumeRecord};

use crate::core::Core;
use crate::view;

/// A file on a volume.
#[derive(Clone, Debug)]
pub(crate) struct OnVolume {
    pub(crate) volume: VolumeRecord,
    /// Below the root, without a slash at its start.
    pub(crate) path: String,
}

/// Finds the volume that `path` lies on.
pub(crate) fn resolve(core: &Core, state: &ClusterState, path: &str) -> Result<OnVolume, Error> {
    if let Some((name, below)) = path.split_once(":/").filter(|(name, _)| !name.contains('/')) {
        return on_volume(view::volume(state, name)?, below, path);
    }
    let absolute = Path::new(path);
    for volume in state.volumes.values() {
        if let Ok(below) = absolute.strip_prefix(core.config.mount_point(&volume.name)) {
            return on_volume(volume, &below.to_string_lossy(), path);
        }
    }
    for (point, name) in other_mounts() {
        if let (Ok(below), Some(volume)) = (absolute.strip_prefix(&point), state.volumes.get(&name)) {
            return on_volume(volume, &below.to_string_lossy(), path);
        }
    }
    let names: Vec<_> = state.volumes.keys().map(String::as_str).collect();
    Err(Error::usage(format!("{path} does not lie on a cluster volume")).hint(format!(
        "name a file below a volume's mount, or VOLUME:/PATH; the volumes are: {}",
        names.join(", ")
    )))
}

fn on_volume(volume: &VolumeRecord, below: &str, path: &str) -> Result<OnVolume, Error> {
    let mut names = Vec::new();
    for component in Path::new(below).components() {
        match component {
            Component::Normal(name) => names.push(name.to_string_lossy()),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Error::usage(format!("{path}: `..` is not allowed below a volume's root")));
            }
        }
    }
    Ok(OnVolume { volume: volume.clone(), path: names.join("/") })
}

/// Mount points of volumes on this machine, with the volume's name.
fn other_mounts() -> Vec<(String, String)> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(volume_mount).collect()
}

/// `36 35 0:52 / /mnt/vol1 rw - fuse.csvfs vol1 rw,...`: the fields after ` - ` are type and source.
fn volume_mount(line: &str) -> Option<(String, String)> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut filesystem = filesystem.split(' ');
    let kind = filesystem.next()?;
    let source = filesystem.next()?;
    let name = source.rsplit(['#', ':', '/']).next()?;
    let point = mount.split(' ').nth(4)?;
    kind.starts_with("fuse").then(|| (point.replace("\\040", " "), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_volumes_are_found_by_type_and_source() {
        let line = "36 35 0:52 / /a\\040b/mnt/vol1 rw,nosuid shared:1 - fuse.csvfs vol1 rw,user_id=0";
        assert_eq!(volume_mount(line), Some(("/a b/mnt/vol1".to_owned(), "vol1".to_owned())));
        assert_eq!(volume_mount("22 1 8:1 / / rw - ext4 /dev/sda1 rw"), None);
    }
}
