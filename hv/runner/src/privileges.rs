//! What the process may do beyond what any program of its user may: nothing. And who its user is.
//!
//! ```text
//!   csvd is root:  open KVM, tap, lease, control socket -> folder of sockets as root -> a user of its own -> no capabilities
//!   csvd is not:   the same user as csvd                                                               -> no capabilities
//! ```
//! Called while there is one thread: every later one inherits it. What only root can open is open by then; LUNs come from the
//! daemon as open files. **Invariants:** a guest that breaks out of its VM finds a process without capabilities, which no
//! program that it starts can get back; with a user of its own it finds no file but the daemon's sockets for it, and no
//! process that it may touch.
#![expect(unsafe_code, reason = "a thread that leaves what it shares with others has no safe call")]

use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid, chdir, chroot, getpid, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

use crate::config::{OwnUser, VM_GROUP, VM_USER_FIRST};
use crate::failure::Failure;

/// Gives up all capabilities, for good.
pub(crate) fn drop_all() -> Result<(), Failure> {
    set_no_new_privs(true).map_err(failed)?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(failed)
}

/// Becomes a user whom nobody else is, in a folder that holds the daemon's sockets for VMs and nothing else.
pub(crate) fn become_own_user(user: &OwnUser) -> Result<(), Failure> {
    // Of what processes share without descriptors nothing is needed; where a container forbids to leave it, it stays.
    let shared = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
    // SAFETY: these flags take nothing away that memory or descriptors of this process rest on.
    if let Err(error) = unsafe { unshare_unsafe(shared) } {
        tracing::info!(%error, "the process stays in the namespaces of the daemon");
    }
    enter(&user.root).map_err(failed)?;
    let number = u32::try_from(getpid().as_raw_nonzero().get()).expect("a process has a positive number");
    let (uid, gid) = (Uid::from_raw(VM_USER_FIRST + number), Gid::from_raw(VM_GROUP));
    set_thread_groups(&[]).map_err(failed)?;
    set_thread_res_gid(gid, gid, gid).map_err(failed)?;
    set_thread_res_uid(uid, uid, uid).map_err(failed)?;
    // Memory of a guest is nobody's business after a crash either.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(failed)
}

fn enter(root: &Path) -> Result<(), Errno> {
    chroot(root)?;
    chdir("/")
}

fn failed(error: Errno) -> Failure {
    Failure::new(
        format!("this process cannot give up its rights: {error}"),
        "is it run in a sandbox that forbids that? `vm_user = \"daemon\"` in csvd.toml leaves VMs csvd's user",
    )
}
