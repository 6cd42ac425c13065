//! Threads that others wait for run soon after they are woken.
//!
//! ```text
//!   a guest's processor   |==================== its slice, 3 ms ====|
//!   who was woken                 | waits ..........................|== 0.05 ms of work
//!   the same, prompt              |==|
//! ```
//! A processor that a guest keeps busy is let go of when its slice is over. Linux (6.12 and later) puts a thread with a short
//! slice before that, for no larger share of the processor than it had.
#![expect(unsafe_code, reason = "two system calls that no crate has, with a structure of this thread")]

use std::io;

use libc::{SCHED_FLAG_RESET_ON_FORK, SCHED_OTHER, SYS_sched_getattr, SYS_sched_setattr, sched_attr};

/// The shortest that Linux takes: the work for one message is less.
const SLICE_NS: u64 = 100_000;

/// Makes the calling thread prompt. The threads and processes that it starts are not. Where the kernel has no such thing, or the
/// administrator has chosen another way for the process to be scheduled, nothing changes.
pub fn prompt() {
    let Ok(mut now) = attributes() else { return };
    if now.sched_policy != SCHED_OTHER.cast_unsigned() {
        return;
    }
    now.sched_runtime = SLICE_NS;
    // What this thread starts is as any other again.
    now.sched_flags |= u64::from(SCHED_FLAG_RESET_ON_FORK.cast_unsigned());
    // An improvement; a thread that is not prompt still works.
    // SAFETY: the kernel reads a structure that lives here, as long as its own field says.
    let _kept = unsafe { libc::syscall(SYS_sched_setattr, 0, &raw const now, 0) };
}

/// How the calling thread is scheduled.
fn attributes() -> io::Result<sched_attr> {
    let size = u32::try_from(size_of::<sched_attr>()).expect("a small structure");
    let mut found = sched_attr {
        size,
        sched_policy: 0,
        sched_flags: 0,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel fills a structure that lives here, up to the length that it is told.
    match unsafe { libc::syscall(SYS_sched_getattr, 0, &raw mut found, size, 0) } {
        0 => Ok(found),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_prompt_for_itself_alone_and_as_nice_as_before() {
        let before = attributes().expect("any kernel tells");
        let (made, inner) = std::thread::spawn(|| {
            prompt();
            let made = attributes().expect("as before");
            (made, std::thread::spawn(|| attributes().expect("as before")).join().expect("no panic"))
        })
        .join()
        .expect("no panic");
        assert_eq!((made.sched_policy, made.sched_nice), (before.sched_policy, before.sched_nice));
        if before.sched_runtime == 0 || before.sched_policy != SCHED_OTHER.cast_unsigned() {
            // An older kernel, or this test runs under another policy.
            return;
        }
        assert_eq!(made.sched_runtime, SLICE_NS);
        assert_eq!(inner.sched_runtime, before.sched_runtime, "what it starts is as any other");
    }
}
