//! Each call is made by this program once more, in a process of its own that has locked itself in.
#![expect(unsafe_code, reason = "makes calls that no library here would")]

use std::fs::File;
use std::net::ToSocketAddrs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::thread::Builder;

use ::threads::Kind;
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Pid, Signal, getppid, kill_process};

use super::*;

/// Which call is made, and by what kind of thread, when this is the process of its own.
const CALL: &str = "HV_TEST_CALL";
const KIND: &str = "HV_TEST_KIND";
const SIGSYS: i32 = 31;

/// What a library does on any thread.
const EVERYDAY: &str = "everyday calls";

/// Runs this program again, with one test that locks itself in and makes a call.
fn locked_in(kind: Option<Kind>, call: &str) -> Output {
    let mut again = Command::new(std::env::current_exe().expect("a test has a program"));
    again.args(["--exact", "sandbox::tests::what_is_called_locked_in", "--ignored", "--nocapture"]);
    again.env(CALL, call).env(KIND, kind.map_or(String::new(), |kind| format!("{kind:?}")));
    again.output().expect("it can be run")
}

fn is_ended(kind: Option<Kind>, call: &str) -> bool {
    let output = locked_in(kind, call);
    assert!(output.status.success() || output.status.signal() == Some(SIGSYS), "{kind:?} {call}: {output:?}");
    !output.status.success()
}

#[test]
#[ignore = "run by the tests below, in a process of its own"]
fn what_is_called_locked_in() {
    let (Ok(call), Ok(named)) = (std::env::var(CALL), std::env::var(KIND)) else { return };
    enter().expect("the kernel can filter");
    let kind = Kind::ALL.into_iter().find(|kind| format!("{kind:?}") == named);
    let Some(kind) = kind else { return make(&call) };
    let work = move || make(&call);
    ::threads::spawn(kind, Builder::new(), work).expect("a thread").join().expect("it does not panic");
}

fn make(call: &str) {
    match call {
        "a program" => drop(Command::new("/bin/true").status()),
        "a signal to another" => drop(kill_process(getppid().expect("a parent"), Signal::CONT)),
        "a signal to pid 1" => drop(kill_process(Pid::INIT, Signal::CONT)),
        "a packet socket" => drop(socket(AddressFamily::PACKET, SocketType::RAW, None)),
        "a mount" => drop(rustix::mount::unmount("/nowhere", rustix::mount::UnmountFlags::empty())),
        "a socket" => drop(socket(AddressFamily::UNIX, SocketType::STREAM, None)),
        "a listener" => drop(std::net::TcpListener::bind("127.0.0.1:0")),
        "an open file" => drop(File::open("/dev/null").expect("it is allowed")),
        "a refused file" => {
            let refused = File::open("/dev/null").expect_err("it is not allowed");
            assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        }
        "names" => drop("localhost:1".to_socket_addrs().map(Iterator::count)),
        "a ring" => number(libc::SYS_io_uring_setup, &[8, 0]),
        "a call of a ring" => number(libc::SYS_io_uring_enter, &[u64::MAX, 0, 0, 0, 0]),
        "a request to KVM" => number(libc::SYS_ioctl, &[u64::MAX, hv::calls::VCPU[0].into(), 0]),
        "a request to a machine" => {
            number(libc::SYS_ioctl, &[u64::MAX, hv::calls::MACHINE[0].into(), 0]);
        }
        "a request of faults" => number(libc::SYS_ioctl, &[u64::MAX, hv::fault_calls()[0], 0]),
        "a request to a terminal" => number(libc::SYS_ioctl, &[0, libc::TIOCSTI, 0]),
        "a word to a tap" => number(libc::SYS_ioctl, &[u64::MAX, libc::TUNSETOFFLOAD, 0]),
        "a change of a tap" => number(libc::SYS_ioctl, &[u64::MAX, libc::TUNSETIFF, 0]),
        "memory to execute" => {
            let (use_of, how) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let numbers = [use_of, how].map(|flags| u64::from(flags.cast_unsigned()));
            number(libc::SYS_mmap, &[0, 4096, numbers[0], numbers[1], u64::MAX, 0]);
        }
        "a thread of its own" => {
            let refused = Builder::new().spawn(|| ()).expect_err("it is not allowed");
            assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
        }
        "nothing that is forbidden" => {
            let sum = std::thread::spawn(|| 1 + 1).join().expect("threads are made as before");
            assert_eq!(sum, 2);
            drop(std::net::TcpListener::bind("127.0.0.1:0").expect("LUNs are reached over IP"));
            drop(std::os::unix::net::UnixStream::pair().expect("the daemon over Unix sockets"));
            make("names");
        }
        EVERYDAY => everyday(),
        other => panic!("there is no call `{other}`"),
    }
}

/// A system call on numbers, which fails or does no harm.
fn number(call: libc::c_long, arguments: &[u64]) {
    let at = |index: usize| arguments.get(index).copied().unwrap_or(0);
    // SAFETY: no number is an address of this process.
    unsafe { libc::syscall(call, at(0), at(1), at(2), at(3), at(4), at(5)) };
}

/// What the language and the C library do on any thread: memory of all sizes, locks, clocks, random numbers, a panic, an end.
fn everyday() {
    let mut large = vec![1_u8; 1 << 20];
    large.resize(64 << 20, 2);
    large.shrink_to(1 << 10);
    let small: Vec<Box<[u8]>> = (0..10_000_u16).map(|size| vec![3; size.into()].into_boxed_slice()).collect();
    drop((large, small));
    let table: std::collections::HashMap<u32, u32> = (0..100).map(|key| (key, key)).collect();
    assert_eq!(table.len(), 100);
    let pair = (std::sync::Mutex::new(()), std::sync::Condvar::new());
    let guard = pair.0.lock().expect("nobody panics");
    let moment = std::time::Duration::from_millis(1);
    drop(pair.1.wait_timeout(guard, moment).expect("nobody panics"));
    std::thread::park_timeout(moment);
    std::thread::yield_now();
    for clock in [libc::SYS_clock_gettime, libc::SYS_clock_getres] {
        // As where the clock cannot be read without a call. It has no place to write to, and fails.
        number(clock, &[1, 0]);
    }
    // What comes after the program was stopped and goes on.
    number(libc::SYS_restart_syscall, &[]);
    let caught = std::panic::catch_unwind(|| panic!("as a bug would"));
    caught.expect_err("it panics, looks for its lines, and says so");
    let again = ::threads::spawn(Kind::Vcpu, Builder::new(), || ()).expect("a further thread");
    again.join().expect("it ends");
}

#[test]
fn a_forbidden_call_ends_the_process_and_says_by_which_signal() {
    for call in ["a program", "a signal to another", "a signal to pid 1", "a packet socket", "a mount"] {
        assert!(is_ended(None, call), "{call}");
    }
}

#[test]
fn what_a_vm_needs_goes_on() {
    assert!(!is_ended(None, "nothing that is forbidden"));
}

#[test]
fn what_is_called_on_any_thread_goes_on_everywhere() {
    for kind in Kind::ALL {
        let output = locked_in(Some(kind), EVERYDAY);
        assert!(output.status.success(), "{kind:?}: {output:?}");
    }
}

/// Calls, and the kinds of thread that may make them. To all others they are forbidden.
const CALLS: &[(&str, &[Kind])] = &[
    ("a request to KVM", &[Kind::Vcpu]),
    ("a request to a machine", &[Kind::Control]),
    ("a request of faults", &[Kind::Memory]),
    ("a word to a tap", &[Kind::Device]),
    ("a change of a tap", &[]),
    ("a call of a ring", &[Kind::Ring]),
    ("a ring", &[]),
    ("a socket", &[Kind::Ways, Kind::Network, Kind::Link]),
    ("a listener", &[]),
    ("names", &[Kind::Ways, Kind::Network]),
    ("memory to execute", &[Kind::Ways, Kind::Network]),
    ("a request to a terminal", &[]),
    ("a program", &[]),
];

#[test]
fn each_kind_of_thread_may_call_what_it_needs_and_nothing_else() {
    for kind in Kind::ALL {
        for (call, may) in CALLS {
            assert_eq!(is_ended(Some(kind), call), !may.contains(&kind), "{kind:?} and {call}");
        }
    }
}

#[test]
fn a_file_is_refused_to_threads_that_need_none_and_they_go_on() {
    for kind in Kind::ALL {
        let needs = [Kind::Ways, Kind::Network].contains(&kind);
        let call = if needs { "an open file" } else { "a refused file" };
        assert!(!is_ended(Some(kind), call), "{kind:?}");
    }
}

#[test]
fn a_confined_thread_starts_no_other_by_itself_and_goes_on() {
    for kind in Kind::ALL {
        assert!(!is_ended(Some(kind), "a thread of its own"), "{kind:?}");
    }
}

#[test]
fn the_log_says_which_call_and_which_thread_ended_the_process() {
    let said = locked_in(Some(Kind::Vcpu), "a socket").stderr;
    let said = String::from_utf8_lossy(&said);
    let wanted = format!("a forbidden system call, number {}, of a thread of kind vcpu", libc::SYS_socket);
    assert!(said.contains(&wanted), "{said}");
}
