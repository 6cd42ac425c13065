//! What each kind of thread may ask of the kernel: a list of what it needs.
//!
//! | kinds | beside memory, locks, clocks, signals and open descriptors |
//! |---|---|
//! | a virtual processor | KVM's requests of a processor |
//! | completions, frames, waits | reads and writes on what is open, messages |
//! | devices | the same, and telling a tap what its guest takes |
//! | a ring of a disk | the same, and entering the ring, which was restricted when it was made |
//! | the ways to a LUN | opening files, sockets |
//! | control | KVM's requests of a machine |
//!
//! What is not listed ends the process, which says the call's number first. Looks at files are refused instead, where a kind
//! does not need them: a library may try one on a rare path and go on without, as a panic does that looks for line numbers.
//! So are new threads, as by a system that has none left.
//!
//! **Invariants:** no thread but those that resolve names can make memory executable. What is in [`EVERY`] is never missing:
//! it holds what the language, the C library and the kernel call by themselves on any thread, at its end and when it panics too.

use std::io;

use libc::c_long;
use seccompiler::{SeccompAction, apply_filter};
use threads::Kind;

use super::program::{Answer, Case, Policy};
use super::{error, trap};

/// Any thread, at any time.
const EVERY: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    // A debug build asks whether a descriptor that it closes is open.
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_shutdown,
    // The allocator.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_sysinfo,
    libc::SYS_sched_getaffinity,
    libc::SYS_getrandom,
    // Locks and the end of a thread.
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    FUTEX_WAKE,
    FUTEX_WAIT,
    FUTEX_REQUEUE,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_yield,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Clocks: without a clock source that programs can read these are system calls.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_getcpu,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    // The kernel has a wait that was interrupted go on by this.
    libc::SYS_restart_syscall,
    // Signals to this process alone, as for all of it; an abort is one.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_uname,
];
/// Of Linux 6.7.
const FUTEX_WAKE: c_long = 454;
const FUTEX_WAIT: c_long = 455;
const FUTEX_REQUEUE: c_long = 456;

/// Whoever submits requests or completes them. Where the system has no further thread, blocking calls are made by whoever
/// submits, and so are these.
const OPEN_FILES: &[c_long] = &[
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_getsockopt,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
];

const CONNECTIONS: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

/// The resolver of names, beside [`CONNECTIONS`] and [`FILES`].
const NAMES: &[c_long] = &[libc::SYS_bind, libc::SYS_sendmmsg, libc::SYS_recvmmsg];

const FILES: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
];

/// Whoever asks for the limits of the process goes on without them.
const LIMITS: &[c_long] = &[libc::SYS_prlimit64];

/// To whoever tries, the system has no further thread: those of the process are started by one that is not confined.
const THREADS: &[c_long] = &[libc::SYS_clone];
/// Answered for the whole process.
const NEWER_THREADS: &[c_long] = &[libc::SYS_clone3];

/// What a thread may set and ask of itself: its name, the names of its memory, and what the kernel told the program.
const SETTINGS: [libc::c_int; 4] = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA, PR_GET_AUXV];
/// Of Linux 6.4.
const PR_GET_AUXV: libc::c_int = 0x4155_5856;

/// Requests to devices, `linux/fs.h` and `asm-generic/ioctls.h`.
const BLKDISCARD: u32 = 0x1277;
const BLKSSZGET: u32 = 0x1268;
const FIONBIO: u32 = 0x5421;
const FIONREAD: u32 = 0x541b;

/// `linux/if_tun.h`.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

/// What a kind needs beside [`EVERY`].
struct Needs {
    calls: Vec<&'static [c_long]>,
    requests: Vec<u32>,
    files: bool,
}

fn needs(kind: Kind) -> Needs {
    let mut needs = Needs { calls: vec![OPEN_FILES], requests: vec![BLKDISCARD], files: false };
    match kind {
        Kind::Vcpu => needs = Needs { calls: Vec::new(), requests: hv::calls::VCPU.to_vec(), files: false },
        // A network card's tells the tap what its guest takes.
        Kind::Device => needs.requests.push(TUNSETOFFLOAD),
        Kind::Calls | Kind::Tasks | Kind::Frames | Kind::Images | Kind::Watch => {}
        Kind::Memory => needs.requests.extend(fault_requests()),
        Kind::Ring => needs.calls.push(&[libc::SYS_io_uring_enter]),
        Kind::Ways | Kind::Network => {
            needs.calls.extend([CONNECTIONS, NAMES, FILES]);
            needs.requests.extend([BLKSSZGET, FIONBIO, FIONREAD]);
            needs.files = true;
        }
        Kind::Link => {
            needs.calls.push(CONNECTIONS);
            needs.requests.push(FIONBIO);
        }
        Kind::Accept => needs.calls.push(&[libc::SYS_accept4]),
        Kind::Control => {
            // A connection that has been taken gets its limits.
            needs.calls.push(&[libc::SYS_setsockopt]);
            needs.requests.extend(hv::calls::MACHINE);
        }
        // It takes the socket's name away at the end.
        Kind::Main => needs.calls.push(&[libc::SYS_unlink, libc::SYS_unlinkat]),
    }
    needs
}

fn fault_requests() -> impl Iterator<Item = u32> {
    hv::fault_calls().into_iter().map(|call| u32::try_from(call).expect("a request has 32 bits"))
}

/// Confines every thread that is started from here on to its kind.
pub(super) fn confine_all() -> io::Result<()> {
    trap::install()?;
    // The first call of a library's clock looks for the kernel's code for it, in a file where the kernel is older.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    threads::confine_with(confine)
}

fn confine(kind: Kind) -> io::Result<()> {
    trap::this_thread_is(kind);
    if kind == Kind::Control {
        // A guest may stand still until the answer. Afterwards the thread may not change it any more.
        threads::prompt();
    }
    apply_filter(&policy(kind).program()).map_err(io::Error::other)
}

fn policy(kind: Kind) -> Policy {
    let needs = needs(kind);
    let (allowed, forbidden) = (SeccompAction::Allow, SeccompAction::Trap);
    let mut policy = Policy::new(forbidden.clone());
    policy.set_all(EVERY.iter().chain(NEWER_THREADS).chain(needs.calls.into_iter().flatten()), &allowed);
    policy.set_all(LIMITS, &error(libc::EACCES));
    policy.set_all(THREADS, &error(libc::EAGAIN));
    if !needs.files {
        policy.set_all(FILES, &error(libc::EACCES));
        // Of what is open they are asked with an empty name.
        let named = Case::HasNone(libc::AT_EMPTY_PATH.cast_unsigned());
        for (call, argument) in [(libc::SYS_newfstatat, 3), (libc::SYS_statx, 2)] {
            let cases = vec![(named, error(libc::EACCES))];
            policy.set(call, Answer::By { argument, cases, otherwise: allowed.clone() });
        }
    }
    let one_of = |argument, values: &mut dyn Iterator<Item = u32>| Answer::By {
        argument,
        cases: values.map(|value| (Case::Is(value), allowed.clone())).collect(),
        otherwise: forbidden.clone(),
    };
    policy.set(libc::SYS_ioctl, one_of(1, &mut needs.requests.into_iter()));
    policy.set(libc::SYS_prctl, one_of(0, &mut SETTINGS.into_iter().map(libc::c_int::cast_unsigned)));
    // Names may be resolved by libraries that are loaded for it.
    let memory = if needs.files {
        Answer::Always(allowed)
    } else {
        let data = Case::HasNone(libc::PROT_EXEC.cast_unsigned());
        Answer::By { argument: 2, cases: vec![(data, allowed)], otherwise: forbidden }
    };
    policy.set(libc::SYS_mmap, memory.clone());
    policy.set(libc::SYS_mprotect, memory);
    policy
}
