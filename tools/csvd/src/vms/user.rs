//! Whether VM processes get a user of their own, and the LUNs that they cannot open by themselves then.
//!
//! **Invariant:** a process is given the LUNs of the volumes that it was started with, and no others.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use api::Error;
use api::config::{NodeConfig, VmUser};
use blockio::{FileDevice, OpenOptions, file_of_uri};
use hv_runner::config::{OwnUser, VM_GROUP, VM_USER_FIRST, VolumeSpec, luns_socket};
use hv_runner::{LunQuestion, OpenLun, answer_lun_question};
use lockmgr::VolumeId;
use rustix::thread::{CapabilitySet, capabilities};

use crate::core::Core;
use crate::view;

/// Questions for LUNs that are answered at a time: a process that asks without end gets none for that.
const QUESTIONS_MAX: usize = 64;
/// Numbers of processes are below this on every system.
const PIDS_MAX: u32 = 1 << 22;

/// What the daemon needs to start such processes, to read the memory of those that move, and to end them.
const NEEDED: CapabilitySet = CapabilitySet::SETUID
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE);

/// Whether VM processes of this node get a user of their own.
pub(crate) fn is_own(config: &NodeConfig) -> bool {
    if config.vm_user == VmUser::Daemon {
        return false;
    }
    let possible = is_possible();
    if let Err(why) = &possible {
        tracing::warn!(why, "VM processes run as the daemon's user");
    }
    possible.is_ok()
}

fn is_possible() -> Result<(), String> {
    if !rustix::process::geteuid().is_root() {
        return Err("the daemon is not root".to_owned());
    }
    let has =
        capabilities(None).map_err(|error| format!("its capabilities are not known: {error}"))?.effective;
    if !has.contains(NEEDED) {
        return Err(format!("the daemon lacks capabilities: {:?}", NEEDED.difference(has)));
    }
    // In a container not every user exists.
    let map = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}")).unwrap_or_default();
    if !maps(&map("uid_map"), VM_USER_FIRST, PIDS_MAX) || !maps(&map("gid_map"), VM_GROUP, 1) {
        return Err(format!("there are no users from {VM_USER_FIRST} on here"));
    }
    Ok(())
}

/// Whether one line of a map of users covers `count` of them from `first` on.
fn maps(map: &str, first: u32, count: u32) -> bool {
    let covers = |line: &str| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(start)), Some(_), Some(Ok(length))) = (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        start <= u64::from(first) && u64::from(first) + u64::from(count) <= start + length
    };
    map.lines().any(covers)
}

/// The user of a VM with these volumes. LUNs behind a network are reached by the process itself, which needs the network and
/// the host's files for it.
pub(super) fn of_vm(core: &Core, volumes: &[VolumeSpec]) -> Option<OwnUser> {
    let root = core.config.vm_root();
    let apart = core.vms.own_user && volumes.iter().all(|volume| file_of_uri(&volume.lun_uri).is_some());
    apart.then_some(OwnUser { root })
}

/// Lets the processes of VMs use a socket, and nobody else beside root.
pub(crate) fn open_to_processes(core: &Core, socket: &Path) -> Result<(), Error> {
    if !core.vms.own_user {
        return Ok(());
    }
    let group = std::os::unix::fs::chown(socket, None, Some(VM_GROUP));
    let mode = || std::fs::set_permissions(socket, std::os::unix::fs::PermissionsExt::from_mode(0o660));
    group.and_then(|()| mode()).map_err(|error| {
        Error::failed(format!("open {} to VM processes: {error}", socket.display()))
            .hint("`vm_user = \"daemon\"` in csvd.toml leaves them the daemon's user")
    })
}

/// Listens for processes that need a LUN. It lives as long as the daemon.
pub(crate) fn serve_luns(core: &Arc<Core>) -> Result<(), Error> {
    let path = luns_socket(&core.config.node_socket());
    let listener = crate::node_socket::listen(&path, 0o600)?;
    open_to_processes(core, &path)?;
    let listener =
        listener.into_std().and_then(|listener| listener.set_nonblocking(false).map(|()| listener));
    let listener =
        listener.map_err(|error| Error::failed(format!("listen on {}: {error}", path.display())))?;
    let core = Arc::clone(core);
    let thread = std::thread::Builder::new().name("luns".to_owned()).stack_size(256 << 10);
    let accepting = thread.spawn(move || accept_all(&core, &listener));
    accepting.map(drop).map_err(|error| Error::failed(format!("start of a thread: {error}")))
}

fn accept_all(core: &Arc<Core>, listener: &UnixListener) {
    // One for the thread here, and one for each that answers.
    let answering = Arc::new(());
    while let Ok((stream, _)) = listener.accept() {
        if Arc::strong_count(&answering) > QUESTIONS_MAX {
            tracing::warn!(pid = pid_of(&stream), "a process gets no LUN now: too many ask");
            continue;
        }
        let (core, answering) = (Arc::clone(core), Arc::clone(&answering));
        // A LUN that hangs when it is opened holds nobody else up.
        let thread = std::thread::Builder::new().name("luns".to_owned()).stack_size(256 << 10);
        let serving = thread.spawn(move || {
            let _answering = answering;
            let pid = pid_of(&stream);
            let answered = answer_lun_question(stream, |question| open(&core, question, pid));
            if let Err(error) = answered {
                tracing::info!(%error, pid, "a process has not taken its LUN");
            }
        });
        if let Err(error) = serving {
            tracing::error!(%error, "a process gets no LUN: no thread can be started");
        }
    }
}

/// 0 when it is not known, which is nobody's.
pub(crate) fn pid_of(stream: &UnixStream) -> u32 {
    let peer = rustix::net::sockopt::socket_peercred(stream);
    peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get().unsigned_abs())
}

fn open(core: &Core, question: LunQuestion, pid: u32) -> Result<OpenLun, String> {
    let volume = VolumeId(question.volume);
    if !core.vms.may_use(question.serial, pid, volume) {
        return Err("this process was not started with that volume".to_owned());
    }
    let state = core.state();
    let record = view::volume_by_id(&state, volume).ok_or("there is no such volume")?;
    let path = file_of_uri(&record.lun_uri).ok_or("its LUN is no file of this node")?;
    let file = FileDevice::open_file(path, OpenOptions::default()).map_err(|error| error.to_string())?;
    let can_discard = FileDevice::takes_discards(&file).map_err(|error| error.to_string())?;
    Ok(OpenLun { file, can_discard })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_with_few_users_is_told_from_a_whole_system() {
        assert!(maps("         0          0 4294967295\n", VM_USER_FIRST, PIDS_MAX));
        assert!(!maps("         0     100000      65536\n", VM_USER_FIRST, PIDS_MAX));
        assert!(maps("0 5 10\n1879048192 7 4194304\n", VM_USER_FIRST, PIDS_MAX));
        assert!(!maps("", VM_USER_FIRST, 1) && !maps("garbage", VM_USER_FIRST, 1));
    }
}
