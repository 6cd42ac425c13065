//! Locks of programs on two mounts: they exclude each other as on one machine.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::world::{World, can_mount};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

/// A program that takes a `flock` and then ends at once.
fn locker(path: &std::path::Path) -> Child {
    Command::new("flock").arg(path).arg("true").spawn().expect("flock of util-linux runs")
}

/// Returns when the program is inside of flock(2).
fn until_blocked(program: &Child) {
    let call = format!("/proc/{}/syscall", program.id());
    let number = format!("{} ", libc::SYS_flock);
    while !std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&number)) {
        thread::yield_now();
    }
}

#[test]
fn a_flock_on_one_mount_keeps_the_other_out_until_it_is_closed() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let one = File::create(a.join("f")).expect("create");
    let two = File::open(b.join("f")).expect("open");
    one.lock_shared().expect("lock");
    two.lock_shared().expect("readers share");
    assert!(one.try_lock().is_err(), "and keep writers out");
    // As flock(2) says, the try has cost `one` its old lock: `two` has the file for itself now.
    two.try_lock().expect("more");
    let waiting = thread::spawn(move || {
        one.lock().expect("granted when the other closes");
        one
    });
    drop(two);
    drop(waiting.join().expect("no panic"));
    // Waits: close(2) does not wait for the kernel's word to the mount that it was the last one.
    File::open(b.join("f")).expect("open").lock().expect("free again");
    world.end();
}

#[test]
fn a_posix_lock_goes_with_any_close_of_its_process() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let open = |root: &std::path::Path| {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(root.join("f"))
            .expect("open")
    };
    let (one, again, two) = (open(&a), open(&a), open(&b));
    fcntl_lock(&one, FlockOperation::NonBlockingLockExclusive).expect("lock");
    fcntl_lock(&again, FlockOperation::NonBlockingLockExclusive).expect("the same process has it already");
    let busy = fcntl_lock(&two, FlockOperation::NonBlockingLockShared);
    assert_eq!(busy, Err(Errno::AGAIN), "another mount stands for another process");
    drop(again);
    fcntl_lock(&two, FlockOperation::NonBlockingLockExclusive).expect("free");
    fcntl_lock(&two, FlockOperation::Unlock).expect("unlock");
    drop((one, two));
    world.end();
}

#[test]
fn a_program_that_waits_for_a_lock_can_be_killed() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let held = File::create(a.join("f")).expect("create");
    held.lock().expect("lock");
    for _ in 0..5 {
        let mut waits = locker(&b.join("f"));
        until_blocked(&waits);
        waits.kill().expect("kill");
        let status = waits.wait().expect("it ends while the lock is held");
        assert_eq!(status.signal(), Some(libc::SIGKILL));
    }
    let mut waits = locker(&b.join("f"));
    drop(held);
    assert!(waits.wait().expect("it ends").success(), "nobody who was killed has the lock");
    world.end();
}

// Invariant F9. More calls than any queue of the mount has had room for when the first came.
#[test]
fn calls_that_wait_do_not_keep_others_out_however_many_they_are() {
    if !can_mount() {
        return;
    }
    const WAITING: usize = 600;
    let mut world = World::new();
    let a = world.mount();
    let held = File::create(a.join("f")).expect("create");
    held.lock().expect("lock");
    thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel();
        for _ in 0..WAITING {
            let (tell, path) = (tell.clone(), a.join("f"));
            scope.spawn(move || {
                let file = File::open(path).expect("open");
                tell.send(rustix::thread::gettid()).expect("the test listens");
                file.lock().expect("granted in the end");
            });
        }
        let number = format!("{} ", libc::SYS_flock);
        for thread in told.iter().take(WAITING) {
            let call = format!("/proc/self/task/{}/syscall", thread.as_raw_nonzero());
            while !std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&number)) {
                thread::yield_now();
            }
        }
        for round in 0..50 {
            let name = a.join(format!("other{round}"));
            std::fs::write(&name, vec![1; 10_000]).expect("write");
            assert_eq!(std::fs::read(&name).expect("read").len(), 10_000);
        }
        assert_eq!(std::fs::read_dir(&a).expect("a directory").count(), 51);
        drop(held);
    });
    world.end();
}

// Each of three lanes adds under the lock what it has read: a lost lock is a lost addition.
#[test]
fn a_lock_that_is_handed_over_shows_what_the_last_holder_wrote() {
    if !can_mount() {
        return;
    }
    const ROUNDS: u64 = 300;
    let mut world = World::new();
    let mounts = [world.mount(), world.mount(), world.mount()];
    std::fs::write(mounts[0].join("sum"), 0_u64.to_le_bytes()).expect("write");
    thread::scope(|scope| {
        for mount in &mounts {
            scope.spawn(move || {
                use std::os::unix::fs::FileExt;
                let file = File::options().read(true).write(true).open(mount.join("sum")).expect("open");
                for _ in 0..ROUNDS {
                    file.lock().expect("lock");
                    let mut sum = [0; 8];
                    file.read_exact_at(&mut sum, 0).expect("read");
                    let next = u64::from_le_bytes(sum) + 1;
                    file.write_all_at(&next.to_le_bytes(), 0).expect("write");
                    file.unlock().expect("unlock");
                }
            });
        }
    });
    let sum = std::fs::read(mounts[1].join("sum")).expect("read");
    assert_eq!(sum, (3 * ROUNDS).to_le_bytes());
    world.end();
}

// The kernel names the owner of a lock by where it keeps the open file in its memory, and the next file that is opened may get that
// place before the mount has heard of the last one's end.
#[test]
fn a_flock_is_not_given_up_by_the_late_end_of_a_file_that_was_closed_before() {
    const ROUNDS: usize = 300;
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let paths = [world.mount(), world.mount()].map(|mount| mount.join("f"));
    let inside = AtomicUsize::new(0);
    thread::scope(|scope| {
        for path in paths.iter().cycle().take(8) {
            let inside = &inside;
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let file = File::create(path).expect("the file");
                    file.lock().expect("lock");
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two have the lock");
                    thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    if round % 2 == 0 {
                        file.unlock().expect("unlock");
                    }
                }
            });
        }
    });
    world.end();
}

/// Takes and looks at locks of open files (`F_OFD_SETLK`, of ranges) of the same file on two mounts, and ends with an error where one does
/// not behave like one.
const OPEN_FILE_LOCKS: &str = r#"
import errno, fcntl, os, struct, sys, threading

FLOCK = "hhqqi4x"
GETLK, SETLK, SETLKW = 36, 37, 38

def lock(fd, command, kind, start, length):
    asked = struct.pack(FLOCK, kind, os.SEEK_SET, start, length, 0)
    return struct.unpack(FLOCK, fcntl.fcntl(fd, command, asked))

def taken(fd, kind, start, length):
    try:
        lock(fd, SETLK, kind, start, length)
        return True
    except OSError as error:
        assert error.errno == errno.EAGAIN, error
        return False

def opened(mount):
    return os.open(mount + "/f", os.O_RDWR | os.O_CREAT)

here, there = sys.argv[1:]
READ, WRITE, NONE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
one, again, two = opened(here), opened(here), opened(there)
assert taken(one, WRITE, 0, 10)
assert not taken(again, READ, 9, 1), "another open file of the same process is another owner"
assert not taken(two, WRITE, 5, 1), "and so is one on another mount"
assert taken(two, WRITE, 10, 10), "what follows is free"
kind, _, start, length, pid = lock(two, GETLK, WRITE, 0, 100)
assert (kind, start, length, pid) == (WRITE, 0, 10, -1), "of an open file, not of a process"
os.close(again)
copy = os.dup(one)
os.close(one)
assert not taken(two, READ, 0, 1), "it is the open file's, not the descriptor's"
waits = threading.Thread(target=lock, args=(two, SETLKW, WRITE, 0, 10))
waits.start()
os.close(copy)
waits.join()
last = opened(here)
assert not taken(last, READ, 0, 1)
lock(two, SETLK, NONE, 3, 4)
assert taken(last, WRITE, 3, 4), "a hole in the middle"
assert not taken(last, WRITE, 2, 1) and not taken(last, WRITE, 7, 1)
"#;

#[test]
fn a_lock_of_an_open_file_is_not_its_processs_and_goes_with_its_last_descriptor() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let mut program = Command::new("python3");
    let ran = program.args(["-c", OPEN_FILE_LOCKS]).args([a, b]).output().expect("python3 starts");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    world.end();
}
