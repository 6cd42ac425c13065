//! Nobody else may use an image while a verb reads or changes it.
//!
//! ```text
//!   any path          flock and a lock of all bytes: other csvctl commands, qemu and whoever else locks its images
//!   on a csvfs mount  the cluster is asked too: a VM opens its disks past the mount and its locks
//! ```
//! **Invariant:** a verb that changes an image holds its claim until the last byte is durable; where it cannot be told whether
//! a VM uses the image, the verb is refused.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use api::pb::{FileRequest, FileStatus, Vm, VmListRequest};
use api::{Client, Error};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use crate::context::Context;

/// What a verb does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// Others may read it too.
    Read,
    /// Nobody else may use it.
    Change,
}

/// The right to use an image, as long as it is held.
#[derive(Debug)]
pub(super) struct Claim {
    _locked: File,
}

/// Claims the image at `path`, or says who uses it.
pub(super) async fn claim(path: &Path, wanted: Use, context: &Context) -> Result<Claim, Error> {
    let locked = lock(path, wanted)?;
    if let Some(mount) = csvfs_mount(path) {
        ask_cluster(path, &mount, wanted, context).await?;
    }
    Ok(Claim { _locked: locked })
}

fn lock(path: &Path, wanted: Use) -> Result<File, Error> {
    let busy = || {
        Error::conflict(format!("{} is in use by another program", path.display()))
            .hint("end the program that has the image open, such as a VM or another csvctl, and try again")
    };
    let file = File::options()
        .read(true)
        .write(wanted == Use::Change)
        .open(path)
        .map_err(|error| super::file::cannot_open(path, &error))?;
    let outcome = match wanted {
        Use::Read => file.try_lock_shared(),
        Use::Change => file.try_lock(),
    };
    match outcome {
        Ok(()) => (),
        Err(TryLockError::WouldBlock) => return Err(busy()),
        // A file system without locks has no other way to tell.
        Err(TryLockError::Error(_)) => return Ok(file),
    }
    let bytes = match wanted {
        Use::Read => FlockOperation::NonBlockingLockShared,
        Use::Change => FlockOperation::NonBlockingLockExclusive,
    };
    match fcntl_lock(&file, bytes) {
        Err(Errno::AGAIN | Errno::ACCESS) => Err(busy()),
        _ => Ok(file),
    }
}

/// The mount of a cluster volume that the path lies on.
fn csvfs_mount(path: &Path) -> Option<PathBuf> {
    let path = std::fs::canonicalize(path).ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let covering = mounts.lines().filter_map(mount_of).filter(|(point, _)| path.starts_with(point));
    // The last of equally long ones lies on top.
    let (point, kind) = covering.max_by_key(|(point, _)| point.len())?;
    (kind == "fuse.csvfs").then(|| point.into())
}

/// The daemon that the user named; where that one does not answer, the daemon of the mount, whose socket lies beside `mnt/`.
async fn daemon_of(mount: &Path, context: &Context) -> Result<Client, Error> {
    let error = match context.client().await {
        Ok(client) => return Ok(client),
        Err(error) => error,
    };
    let Some(home) = mount.parent().and_then(Path::parent) else { return Err(error) };
    api::connect(&home.join("csvd.sock")).await.map_err(|_| error)
}

/// Mount point and type of a line of `mountinfo`.
fn mount_of(line: &str) -> Option<(String, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let point = before.split(' ').nth(4)?;
    let plain = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")];
    let point = plain.iter().fold(point.to_owned(), |point, (escaped, char)| point.replace(escaped, char));
    Some((point, after.split(' ').next()?))
}

async fn ask_cluster(path: &Path, mount: &Path, wanted: Use, context: &Context) -> Result<(), Error> {
    let unknown = |error: Error| {
        error.during(format!("asking the cluster whether a VM uses {}", path.display())).hint(
            "name this node's socket with --connect, or copy the image to a place outside of the volume",
        )
    };
    let mut client = daemon_of(mount, context).await.map_err(unknown)?;
    let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let request = FileRequest { path: full.display().to_string() };
    let image = client.file_stat(request).await.map_err(|status| unknown(status.into()))?.into_inner();
    let vms =
        client.vm_list(VmListRequest {}).await.map_err(|status| unknown(status.into()))?.into_inner().vms;
    for vm in vms.iter().filter(|vm| !matches!(vm.state.as_str(), "stopped" | "failed")) {
        for path in disks_that_clash(vm, wanted) {
            // A name that is gone leads to no file.
            let Ok(disk) = client.file_stat(FileRequest { path }).await else { continue };
            if same(&image, disk.get_ref()) {
                return Err(used_by(path_of(&image), vm));
            }
        }
    }
    Ok(())
}

fn disks_that_clash(vm: &Vm, wanted: Use) -> Vec<String> {
    let disks = vm.spec.iter().flat_map(|spec| &spec.disks);
    let clashing = disks.filter(|disk| wanted == Use::Change || !disk.read_only);
    clashing.map(|disk| format!("{}:/{}", disk.volume, disk.path.trim_start_matches('/'))).collect()
}

fn same(a: &FileStatus, b: &FileStatus) -> bool {
    (&a.volume, a.ino) == (&b.volume, b.ino)
}

fn path_of(image: &FileStatus) -> &str {
    &image.path
}

fn used_by(path: &str, vm: &Vm) -> Error {
    Error::conflict(format!("{path} is a disk of VM {}, which is {} on {}", vm.name, vm.state, vm.owner))
        .hint(format!("stop it first: csvctl vm stop {}", vm.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_odd_characters() {
        let line = r"36 35 0:32 / /srv/a\040b rw,noatime shared:1 - fuse.csvfs vol1 rw,user_id=0";
        assert_eq!(mount_of(line), Some(("/srv/a b".to_owned(), "fuse.csvfs")));
        assert_eq!(mount_of("nonsense"), None);
    }

    #[test]
    fn a_file_that_somebody_changes_is_used_by_nobody_else() {
        let folder = std::env::temp_dir().join(format!("csvctl-claim-{}", std::process::id()));
        std::fs::write(&folder, b"image").expect("the folder is writable");
        let held = lock(&folder, Use::Change).expect("it is free");
        let refused = lock(&folder, Use::Read).expect_err("it is being changed");
        assert_eq!(refused.kind, api::Kind::Conflict);
        drop(held);
        let reading = lock(&folder, Use::Read).expect("it is free again");
        lock(&folder, Use::Read).expect("readers share");
        lock(&folder, Use::Change).expect_err("it is being read");
        drop(reading);
        std::fs::remove_file(&folder).expect("it was just written");
    }
}
