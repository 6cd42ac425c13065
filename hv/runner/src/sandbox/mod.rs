//! System calls that this process never makes: the kernel ends it when it makes one.
//!
//! | forbidden | because a guest that has broken out could |
//! |---|---|
//! | other programs, and processes beside this one | leave this process |
//! | signals to others, and looking into them | touch the node's daemon, which runs under the same user |
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

use std::collections::BTreeMap;

use ::threads::Kind;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use crate::failure::Failure;

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

/// Calls of the 32-bit pointer ABI have this bit, and some have numbers of their own.
const X32: libc::c_long = 0x4000_0000;
const X32_OWN: std::ops::Range<libc::c_long> = 512..548;

/// Forbids them to this thread and all that it starts, for good; later threads are confined to what each needs.
pub(crate) fn enter() -> Result<(), Failure> {
    for program in programs().map_err(|error| failed(&error))? {
        apply_filter(&program).map_err(|error| failed(&error))?;
    }
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

fn programs() -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let always = |call: &libc::c_long| (*call, Vec::new());
    let mut forbidden: BTreeMap<_, _> = FORBIDDEN.iter().map(always).collect();
    forbidden.extend(FORBIDDEN.iter().map(|call| (call | X32, Vec::new())));
    forbidden.extend(X32_OWN.map(|call| (call | X32, Vec::new())));
    // A process of its own is what is no thread of this one.
    let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
    forbidden.insert(libc::SYS_clone, vec![rule(0, SeccompCmpOp::MaskedEq(thread), &[0])?]);
    let own = u64::from(std::process::id());
    forbidden.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Ne, &[own])?]);
    let number = |domain: libc::c_int| u64::from(domain.cast_unsigned());
    let domains = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK].map(number);
    forbidden.insert(libc::SYS_socket, vec![rule(0, SeccompCmpOp::Ne, &domains)?]);
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    // Whoever resolves a name asks the kernel for this host's addresses, to order what was found; without them it goes on.
    let netlink = [number(libc::AF_NETLINK)];
    let no_netlink = BTreeMap::from([(libc::SYS_socket, vec![rule(0, SeccompCmpOp::Eq, &netlink)?])]);
    let error = |errno: libc::c_int| SeccompAction::Errno(errno.cast_unsigned());
    Ok([
        filter(no_clone3, SeccompAction::Allow, error(libc::ENOSYS))?,
        filter(no_netlink, SeccompAction::Allow, error(libc::EAFNOSUPPORT))?,
        filter(forbidden, SeccompAction::Allow, SeccompAction::KillProcess)?,
    ])
}

/// All of them must hold.
fn rule(argument: u8, op: SeccompCmpOp, values: &[u64]) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition =
        |value: &u64| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op.clone(), *value);
    SeccompRule::new(values.iter().map(condition).collect::<Result<_, _>>()?)
}

fn filter(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    others: SeccompAction,
    then: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, others, then, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests;
