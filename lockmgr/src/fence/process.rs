//! Processes, by handles that cannot come to mean another process: waiting for an end with a time limit.

use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::Millis;
use crate::clock::boottime_ms;

/// The moment `limit` from now.
pub(super) fn deadline_in(limit: Duration) -> Millis {
    boottime_ms().plus(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX))
}

/// What is left until `deadline`, for `poll`.
pub(super) fn left_until(deadline: Millis) -> Timespec {
    let ms = deadline.since(boottime_ms());
    Timespec {
        tv_sec: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ms % 1000 * 1_000_000).expect("below a second"),
    }
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: Pid,
    /// Readable once all its threads have ended, also while it waits to be reaped.
    exit: OwnedFd,
}

impl Process {
    /// A handle to the process that `pid` means now, `None` when there is none.
    pub(super) fn find(pid: Pid) -> Result<Option<Self>, Errno> {
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(exit) => Ok(Some(Self { pid, exit })),
            Err(Errno::SRCH) => Ok(None),
            // The number of a thread, which is no process.
            Err(Errno::INVAL | Errno::NOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn exit_handle(&self) -> &OwnedFd {
        &self.exit
    }

    /// Ends it. One that has ended already is no error.
    pub(super) fn kill(&self) -> Result<(), Errno> {
        match pidfd_send_signal(&self.exit, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until it has ended. `false`: it had not at the deadline.
    pub(super) fn wait_end(&self, deadline: Millis) -> Result<bool, Errno> {
        loop {
            let mut fds = [PollFd::new(&self.exit, PollFlags::IN)];
            match poll(&mut fds, Some(&left_until(deadline))) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether all its threads have ended.
    pub(super) fn has_ended(&self) -> Result<bool, Errno> {
        self.wait_end(Millis(0))
    }

    /// Its process group, as [`group_of`] gives it.
    pub(super) fn group(&self) -> Option<i32> {
        group_of(self.pid)
    }

    /// When it was started, in clock ticks since the machine was.
    pub(super) fn start_ticks(&self) -> Option<u64> {
        start_ticks(self.pid)
    }
}

/// The process group of a process, `None` when it has been reaped. 0 is a group of another pid namespace, or of the kernel:
/// the calling process's own, too, may be one (`getpgrp` of rustix does not allow for it).
///
/// Read from `/proc/PID/status`, not from `stat`: that one waits for a process which is just executing a program, and such
/// a one may itself wait for the node that is to be fenced, because it closes a file on that node's mount.
pub(super) fn group_of(pid: Pid) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    match status.lines().find_map(|line| line.strip_prefix("NSpgid:")) {
        Some(groups) => groups.split_ascii_whitespace().next()?.parse().ok(),
        // A kernel without pid namespaces.
        None => stat_field(pid, 2),
    }
}

/// When a process was started, in clock ticks since the machine was.
pub(super) fn start_ticks(pid: Pid) -> Option<u64> {
    stat_field(pid, 19)
}

/// A field of `/proc/PID/stat`, counted from the one after the name: that may itself hold spaces and parentheses.
fn stat_field<T: FromStr>(pid: Pid, index: usize) -> Option<T> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(index)?.parse().ok()
}
