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

use api::pb::{FileRequest, FileUser};
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
    let (_, users) = users_of(path, mount, context).await?;
    match users.iter().find(|user| clashes(user, wanted)) {
        Some(user) => Err(used_by(path, user)),
        None => Ok(()),
    }
}

/// The VMs that have the image, with a connection to the daemon that said so.
async fn users_of(path: &Path, mount: &Path, context: &Context) -> Result<(Client, Vec<FileUser>), Error> {
    let unknown = |error: Error| {
        error.during(format!("asking the cluster whether a VM uses {}", path.display())).hint(
            "name this node's socket with --connect, or copy the image to a place outside of the volume",
        )
    };
    let mut client = daemon_of(mount, context).await.map_err(unknown)?;
    let request = FileRequest { path: full(path).display().to_string() };
    let users = client.file_users(request).await.map_err(|status| unknown(status.into()))?;
    Ok((client, users.into_inner().users))
}

/// The path as the daemon knows it, whether or not the file exists yet.
pub(super) fn full(path: &Path) -> PathBuf {
    if let Ok(full) = std::fs::canonicalize(path) {
        return full;
    }
    match path.file_name() {
        Some(name) => {
            let folder = super::file::folder_of(path);
            std::fs::canonicalize(&folder).unwrap_or(folder).join(name)
        }
        None => path.to_owned(),
    }
}

/// The VMs that have the image, where that is known: on a mount of a cluster volume whose daemon answers.
pub(super) async fn known_users(path: &Path, context: &Context) -> Option<(Client, Vec<FileUser>)> {
    let mount = csvfs_mount(path)?;
    users_of(path, &mount, context).await.ok()
}

/// Whether the VM has the image now, or will go on to have it because its state is saved.
fn is_at_rest(user: &FileUser) -> bool {
    matches!(user.state.as_str(), "stopped" | "failed")
}

fn clashes(user: &FileUser, wanted: Use) -> bool {
    if !user.checkpoint.is_empty() {
        return wanted == Use::Change;
    }
    // Parents, and disks that are only read, change for nobody.
    let is_written = user.depth == 0 && !user.read_only;
    !is_at_rest(user) && (wanted == Use::Change || is_written)
}

fn used_by(path: &Path, user: &FileUser) -> Error {
    let FileUser { vm, state, owner, disk, .. } = user;
    if !user.checkpoint.is_empty() {
        let checkpoint = &user.checkpoint;
        return Error::conflict(format!("{} is kept for checkpoint {checkpoint} of VM {vm}", path.display()))
            .hint(format!("delete the checkpoint first: csvctl vm checkpoint delete {vm} {checkpoint}"));
    }
    let what = match user.depth {
        0 => "a disk".to_owned(),
        _ => format!("below {disk}, a disk"),
    };
    Error::conflict(format!("{} is {what} of VM {vm}, which is {state} on {owner}", path.display()))
        .hint(format!(
            "stop it first (csvctl vm stop {vm}), or make a snapshot and use the image that it keeps (csvctl vhdx snapshot)"
        ))
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
