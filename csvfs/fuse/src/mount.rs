//! Putting a volume into the file tree, and taking it out again.
//!
//! ```text
//!   mount:    check the mountpoint -> clear a dead mount of an earlier daemon -> mount(2), handshake -> serve
//!   unmount:  umount(2) -- busy --> detach (no new users; those with open files go on) -> wait -> abort the connection
//! ```

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use csvfs::node::Node;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags};

use crate::known::Known;
use crate::ops::Ops;
use crate::wire::channel::Channel;
use crate::wire::notify::Notifier;
use crate::wire::session;

/// Threads that read requests of one mount.
const READERS: usize = 2;
/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// The volume's name, for `mount` and `df`.
    pub volume: String,
    /// Whether users other than the mounting one may use the mount; their permissions are checked as on any filesystem.
    pub allow_other: bool,
    /// Whether the mount refuses all changes.
    pub read_only: bool,
    /// How long programs may go on with files that they have open when the volume is unmounted.
    pub patience: Duration,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            volume: "volume".to_owned(),
            allow_other: true,
            read_only: false,
            patience: Duration::from_secs(5),
        }
    }
}

/// Why a mount could not be made or ended.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mountpoint cannot be used.
    #[error("cannot mount at {}: {why}", mountpoint.display())]
    Mountpoint {
        /// Where.
        mountpoint: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The kernel refused.
    #[error("cannot mount at {}: {source}{hint}", mountpoint.display())]
    Mount {
        /// Where.
        mountpoint: PathBuf,
        /// What to do.
        hint: &'static str,
        /// The refusal.
        source: io::Error,
    },
    /// The mount could not be taken out of the file tree.
    #[error("cannot unmount {}: {source} (see `fuser -vm` for who uses it)", mountpoint.display())]
    Unmount {
        /// Where.
        mountpoint: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// A mounted volume. Dropping it unmounts.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    /// Names the mount's connection in `/sys/fs/fuse`.
    minor: Option<u32>,
    patience: Duration,
    serving: Option<JoinHandle<()>>,
    ended: mpsc::Receiver<()>,
}

/// Mounts the volume that `node` is attached to.
///
/// # Errors
/// With the mountpoint and what to do about it.
pub fn mount(
    node: Arc<Node>,
    mountpoint: impl AsRef<Path>,
    options: &MountOptions,
) -> Result<Mount, MountError> {
    let mountpoint = usable(mountpoint.as_ref())?;
    let refused =
        |source: io::Error| MountError::Mount { mountpoint: mountpoint.clone(), hint: hint(&source), source };
    let channel = Channel::open().map_err(refused)?;
    attach(&channel, &mountpoint, options).map_err(refused)?;
    let known = Arc::new(Known::default());
    let notifier = Notifier::start(&channel, Arc::clone(&known)).map_err(refused)?;
    let maps = node.set_kernel(Arc::new(notifier));
    let notes_access = !options.read_only;
    let (tell, ended) = mpsc::sync_channel(1);
    let (name, at) = (format!("fuse:{}", options.volume), mountpoint.clone());
    let serve = move || {
        if let Err(error) = session::serve(channel, Ops::new(node, known, maps, notes_access), READERS) {
            tracing::warn!(mountpoint = %at.display(), %error, "the mount ended");
        }
        // Nobody listens when the mount was left to end by itself.
        let _ = tell.send(());
    };
    let serving = Builder::new().name(name.chars().take(15).collect()).spawn(serve).map_err(refused)?;
    let minor = connection(&mountpoint);
    tracing::info!(mountpoint = %mountpoint.display(), volume = options.volume, "mounted");
    Ok(Mount { mountpoint, minor, patience: options.patience, serving: Some(serving), ended })
}

/// Mounts the connection.
fn attach(channel: &Channel, mountpoint: &Path, options: &MountOptions) -> io::Result<()> {
    // A volume is shared by machines: what one root put there must not raise rights on another.
    let mut flags = MountFlags::NODEV | MountFlags::NOSUID;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let fd = channel.as_fd().as_raw_fd();
    let others = if options.allow_other { ",allow_other" } else { "" };
    let data = format!("fd={fd},rootmode=40000,user_id={user},group_id={group},default_permissions{others}");
    let data = CString::new(data).map_err(io::Error::other)?;
    Ok(rustix::mount::mount(options.volume.as_str(), mountpoint, "fuse.csvfs", flags, data.as_c_str())?)
}

/// The mountpoint as an absolute path, after a look at what is there.
fn usable(mountpoint: &Path) -> Result<PathBuf, MountError> {
    let refused = |why: String| MountError::Mountpoint { mountpoint: mountpoint.to_owned(), why };
    let about = match std::fs::metadata(mountpoint) {
        // A daemon that was killed leaves its mount behind, dead: nothing in it can be used by anyone.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            tracing::info!(mountpoint = %mountpoint.display(), "clearing the dead mount of an earlier daemon");
            rustix::mount::unmount(mountpoint, UnmountFlags::DETACH)
                .map_err(|error| refused(format!("a dead mount is there and cannot be cleared: {error}")))?;
            std::fs::metadata(mountpoint)
        }
        other => other,
    };
    match about {
        Ok(about) if !about.is_dir() => Err(refused("it is not a directory".to_owned())),
        Ok(_) => mountpoint.canonicalize().map_err(|error| refused(error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(refused("there is no such directory (create it first)".to_owned()))
        }
        Err(error) => Err(refused(error.to_string())),
    }
}

/// Minor device number of what is mounted, without asking the mount itself: that would wait for the coordinator.
fn connection(mountpoint: &Path) -> Option<u32> {
    let quick = AtFlags::STATX_DONT_SYNC;
    rustix::fs::statx(CWD, mountpoint, quick, StatxFlags::empty()).ok().map(|about| about.stx_dev_minor)
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            " (is there a /dev/fuse? load the kernel module: modprobe fuse)"
        }
        Some(libc::EPERM | libc::EACCES) => {
            " (mounting needs root, or CAP_SYS_ADMIN and access to /dev/fuse)"
        }
        Some(libc::EBUSY) => " (something else is mounted there)",
        _ => "",
    }
}

impl Mount {
    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Takes the volume out of the file tree and waits until its last request is answered. Programs that have files
    /// open there keep them for as long as the options say, and then get errors.
    ///
    /// # Errors
    /// When the kernel refuses even a lazy unmount.
    pub fn unmount(mut self) -> Result<(), MountError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), MountError> {
        let Some(serving) = self.serving.take() else { return Ok(()) };
        let taken_out = if serving.is_finished() { Ok(()) } else { self.take_out() };
        match &taken_out {
            Ok(()) => drop(serving.join()),
            // Joining would wait for ever. The kernel ends the connection with the process.
            Err(error) => tracing::error!(%error, "the mount stays"),
        }
        taken_out
    }

    fn take_out(&self) -> Result<(), MountError> {
        let refused =
            |error: Errno| MountError::Unmount { mountpoint: self.mountpoint.clone(), source: error.into() };
        match rustix::mount::unmount(&self.mountpoint, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            // Nothing is mounted there any more: somebody else has unmounted it.
            Err(Errno::INVAL | Errno::NOENT) => {}
            Err(Errno::BUSY) => {
                tracing::warn!(mountpoint = %self.mountpoint.display(), "in use: detached, open files may be finished");
                rustix::mount::unmount(&self.mountpoint, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .map_err(refused)?;
            }
            Err(error) => return Err(refused(error)),
        }
        if self.ended.recv_timeout(self.patience).is_err() {
            self.abort()?;
        }
        Ok(())
    }

    /// Ends the kernel's side: all calls of programs on this mount fail from now on.
    fn abort(&self) -> Result<(), MountError> {
        let minor = self.minor.ok_or(Errno::NODEV);
        let aborted = minor.and_then(abort_connection);
        aborted.map_err(|error| MountError::Unmount {
            mountpoint: self.mountpoint.clone(),
            source: error.into(),
        })
    }
}

/// Writes to the connection's control file. The control filesystem need not be mounted: it is opened for this alone.
fn abort_connection(minor: u32) -> rustix::io::Result<()> {
    let context = rustix::mount::fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let controls = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let control = format!("{minor}/abort");
    let control = rustix::fs::openat(&controls, control, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&control, b"1").map(drop)
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Errors were logged; there is nobody left to tell.
        drop(self.end());
    }
}
