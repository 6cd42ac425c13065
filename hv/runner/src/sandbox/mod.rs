//! System calls that this process never makes: the kernel ends it when it makes one.
//!
//! | forbidden | because a guest that has broken out could |
//! |---|---|
//! | other programs, and processes beside this one | leave this process |
//! | signals to others, and looking into them | touch the node's daemon, where that runs under the same user |
//! | mounts, namespaces, modules, the clock, identities | change the machine |
//! | `bpf`, `perf`, keys, debugging | reach what few programs need and many holes were found in |
//! | sockets of other kinds than Unix and IP | talk to the kernel where nothing here does |
//!
//! Called while there is one thread: every later one inherits it. New threads are made by `clone`: `clone3` keeps its flags
//! where a filter cannot look, so it is answered as if the kernel had none, and libraries go back to `clone`.
//!
//! That is a list of what is forbidden to all. Each thread that is started afterwards is held to a list of what it needs
//! ([`threads`](mod@threads)); only the one that starts the others is not. What `io_uring` does is no system call: rings are
//! restricted when they are made, and only those who serve one may enter it.
//!
//! **Invariant:** after this no program is run and no process made by whatever runs in here.

use ::threads::Kind;
use seccompiler::{SeccompAction, apply_filter};

use crate::failure::Failure;
use program::{Answer, Case, Policy};

mod program;
mod threads;
mod trap;

pub use trap::FORBIDDEN_CALL;

const FORBIDDEN: &[libc::c_long] = &[
    // Programs and processes.
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    // Other processes.
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_open_by_handle_at,
    // The machine.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_vhangup,
    libc::SYS_personality,
    // Identities.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // Parts of the kernel with a history.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_userfaultfd,
];

/// Forbids them to this thread and all that it starts, for good; later threads are confined to what each needs.
pub(crate) fn enter() -> Result<(), Failure> {
    apply_filter(&forbidden().program()).map_err(|error| failed(&error))?;
    threads::confine_all().map_err(|error| failed(&error))
}

/// Confines the first thread, once the others are there.
pub(crate) fn leave_to_others() -> Result<(), Failure> {
    ::threads::confine(Kind::Main).map_err(|error| failed(&error))
}

fn failed(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        format!("this process cannot forbid itself system calls: {error}"),
        "the kernel needs CONFIG_SECCOMP_FILTER",
    )
}

fn forbidden() -> Policy {
    let (allowed, deadly) = (SeccompAction::Allow, SeccompAction::KillProcess);
    let mut policy = Policy::new(allowed.clone());
    policy.set_all(FORBIDDEN, &deadly);
    policy.set(libc::SYS_clone3, Answer::Always(error(libc::ENOSYS)));
    // A process of its own is what is no thread of this one.
    let process = Case::HasNone(libc::CLONE_THREAD.cast_unsigned());
    let cases = vec![(process, deadly.clone())];
    policy.set(libc::SYS_clone, Answer::By { argument: 0, cases, otherwise: allowed.clone() });
    let cases = vec![(Case::Is(std::process::id()), allowed.clone())];
    policy.set(libc::SYS_tgkill, Answer::By { argument: 0, cases, otherwise: deadly.clone() });
    let domain = |domain: libc::c_int| Case::Is(domain.cast_unsigned());
    let mut cases =
        [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(|of| (domain(of), allowed.clone())).to_vec();
    // Whoever resolves a name asks the kernel for this host's addresses, to order what was found; without them it goes on.
    cases.push((domain(libc::AF_NETLINK), error(libc::EAFNOSUPPORT)));
    policy.set(libc::SYS_socket, Answer::By { argument: 0, cases, otherwise: deadly });
    policy
}

/// The call is not made, and fails by this.
fn error(number: libc::c_int) -> SeccompAction {
    SeccompAction::Errno(number.cast_unsigned())
}

#[cfg(test)]
mod tests;
