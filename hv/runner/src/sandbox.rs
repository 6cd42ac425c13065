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
//! **Invariant:** after this no program is run and no process made by whatever runs in here. It is a list of what is forbidden:
//! files are opened and LUNs reached after it. What `io_uring` does is not a system call and not filtered.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

use crate::failure::Failure;

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

/// Forbids them to this thread and all that it starts, for good.
pub(crate) fn enter() -> Result<(), Failure> {
    let failed = |error: String| {
        Failure::new(
            format!("this process cannot forbid itself system calls: {error}"),
            "the kernel needs CONFIG_SECCOMP_FILTER",
        )
    };
    for program in programs().map_err(|error| failed(error.to_string()))? {
        apply_filter(&program).map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}

fn programs() -> Result<[BpfProgram; 2], seccompiler::BackendError> {
    let always = |call: &libc::c_long| (*call, Vec::new());
    let mut forbidden: BTreeMap<_, _> = FORBIDDEN.iter().map(always).collect();
    forbidden.extend(FORBIDDEN.iter().map(|call| (call | X32, Vec::new())));
    forbidden.extend(X32_OWN.map(|call| (call | X32, Vec::new())));
    // A process of its own is what is no thread of this one.
    let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
    forbidden.insert(libc::SYS_clone, vec![rule(0, SeccompCmpOp::MaskedEq(thread), &[0])?]);
    let own = u64::from(std::process::id());
    forbidden.insert(libc::SYS_tgkill, vec![rule(0, SeccompCmpOp::Ne, &[own])?]);
    let domains =
        [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(|domain| u64::from(domain.cast_unsigned()));
    forbidden.insert(libc::SYS_socket, vec![rule(0, SeccompCmpOp::Ne, &domains)?]);
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    Ok([filter(no_clone3, unknown)?, filter(forbidden, SeccompAction::KillProcess)?])
}

/// All of them must hold.
fn rule(argument: u8, op: SeccompCmpOp, values: &[u64]) -> Result<SeccompRule, seccompiler::BackendError> {
    let condition =
        |value: &u64| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op.clone(), *value);
    SeccompRule::new(values.iter().map(condition).collect::<Result<_, _>>()?)
}

fn filter(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    then: SeccompAction,
) -> Result<BpfProgram, seccompiler::BackendError> {
    SeccompFilter::new(rules, SeccompAction::Allow, then, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus};
    use std::thread;

    use rustix::net::{AddressFamily, SocketType, socket};
    use rustix::process::{Pid, Signal, getppid, kill_process};

    use super::*;

    /// Which call the test below makes, when it is a process of its own.
    const CALL: &str = "HV_TEST_CALL";
    const SIGSYS: i32 = 31;

    /// Runs this program again, with one test that locks itself in and makes a call.
    fn locked_in(call: &str) -> ExitStatus {
        let mut again = Command::new(std::env::current_exe().expect("a test has a program"));
        again.args(["--exact", "sandbox::tests::what_is_called_locked_in", "--ignored"]);
        again.env(CALL, call).output().expect("it can be run").status
    }

    #[test]
    #[ignore = "run by the tests below, in a process of its own"]
    fn what_is_called_locked_in() {
        let Ok(call) = std::env::var(CALL) else { return };
        enter().expect("the kernel can filter");
        match call.as_str() {
            "a program" => drop(Command::new("/bin/true").status()),
            "a signal to another" => drop(kill_process(getppid().expect("a parent"), Signal::CONT)),
            "a signal to pid 1" => drop(kill_process(Pid::INIT, Signal::CONT)),
            "a netlink socket" => {
                drop(socket(AddressFamily::NETLINK, SocketType::RAW, None));
            }
            "a mount" => drop(rustix::mount::unmount("/nowhere", rustix::mount::UnmountFlags::empty())),
            _ => {
                let sum = thread::spawn(|| 1 + 1).join().expect("threads are made as before");
                assert_eq!(sum, 2);
                drop(std::net::TcpListener::bind("127.0.0.1:0").expect("LUNs are reached over IP"));
                drop(std::os::unix::net::UnixStream::pair().expect("the daemon over Unix sockets"));
            }
        }
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_says_by_which_signal() {
        for call in ["a program", "a signal to another", "a signal to pid 1", "a netlink socket", "a mount"] {
            assert_eq!(locked_in(call).signal(), Some(SIGSYS), "{call}");
        }
    }

    #[test]
    fn what_a_vm_needs_goes_on() {
        assert!(locked_in("nothing that is forbidden").success());
    }
}
