//! All processes of a node on this machine: one process group, named in a file.
//!
//! The daemon leads a group of its own, its VMs belong to it. Its pid file says `PID START BOOT`: the group's number, when
//! its leader was started (clock ticks since boot), and the boot that both belong to. The last two may be missing; they
//! keep the number from meaning somebody else's processes after the group has ended.
//!
//! **Invariant:** [`ProcessGroup::end`] returns success only after every member has ended with all its threads: nobody is
//! left who could submit a request. A request that the kernel had passed on to the device before (io_uring does not hold up
//! the end of its process) ends within the device's own time.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpid, kill_process_group};

use super::process::{Process, deadline_in, group_of, start_ticks};

/// Why a group is not certain to have ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// It is this process's own.
    #[error("process group {0} is this node's own: a node does not fence itself from outside")]
    Own(i32),
    /// A member is still there at the end of the time limit.
    #[error(
        "process {pid} of group {group} has not ended within {limit_ms} ms of SIGKILL (blocked in the kernel?)"
    )]
    StillThere {
        /// The group.
        group: i32,
        /// The member.
        pid: i32,
        /// The limit.
        limit_ms: u128,
    },
    /// The system refused a call.
    #[error("cannot {action} process group {group}: {errno}")]
    System {
        /// The group.
        group: i32,
        /// What was tried.
        action: &'static str,
        /// Its answer.
        errno: Errno,
    },
    /// The list of processes cannot be read.
    #[error("cannot list the processes of this machine: {0}")]
    Proc(String),
}

/// A process group as a pid file names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessGroup {
    group: Pid,
    leader_start: Option<u64>,
    boot: Option<String>,
}

impl ProcessGroup {
    /// The group that this process leads, to be written into its pid file.
    ///
    /// # Errors
    /// When this process leads no group, or when `/proc` cannot be read.
    pub fn own() -> io::Result<Self> {
        let own = Self { group: getpid(), leader_start: None, boot: None };
        if !own.is_own() {
            return Err(io::Error::other(
                "this process leads no process group; start it in a session of its own",
            ));
        }
        let leader_start = start_ticks(own.group);
        if leader_start.is_none() {
            return Err(io::Error::other("cannot read this process's start time in /proc"));
        }
        Ok(Self { leader_start, boot: Some(boot_id()?), ..own })
    }

    /// The group's number: the pid of its leader.
    #[must_use]
    pub fn id(&self) -> i32 {
        self.group.as_raw_nonzero().get()
    }

    /// Kills every member and waits until each has ended. Gives their number; 0 when there was none left.
    ///
    /// # Errors
    /// When a member may still be alive.
    pub fn end(&self, limit: Duration) -> Result<usize, GroupError> {
        if self.is_own() {
            return Err(GroupError::Own(self.id()));
        }
        let deadline = deadline_in(limit);
        let mut ended = 0;
        // Again until nobody is left: a member may have been starting another one at the time of the signal.
        loop {
            let members = self.members()?;
            if members.is_empty() {
                return Ok(ended);
            }
            self.kill()?;
            members.iter().try_for_each(|member| self.await_end(member, deadline, limit))?;
            ended += members.len();
        }
    }

    fn await_end(
        &self,
        member: &Process,
        deadline: crate::Millis,
        limit: Duration,
    ) -> Result<(), GroupError> {
        if member.wait_end(deadline).map_err(self.failed("wait for"))? {
            return Ok(());
        }
        let pid = member.pid.as_raw_nonzero().get();
        Err(GroupError::StillThere { group: self.id(), pid, limit_ms: limit.as_millis() })
    }

    /// Kills every member but the calling process, which is one, and waits until each has ended. Gives their number.
    ///
    /// # Errors
    /// When a member may still be alive.
    pub fn end_others(&self, limit: Duration) -> Result<usize, GroupError> {
        let deadline = deadline_in(limit);
        let mut ended = 0;
        loop {
            let mut others = self.members()?;
            others.retain(|member| member.pid != getpid());
            if others.is_empty() {
                return Ok(ended);
            }
            for member in &others {
                member.kill().map_err(self.failed("kill a member of"))?;
                self.await_end(member, deadline, limit)?;
            }
            ended += others.len();
        }
    }

    /// Whether the calling process is a member.
    #[must_use]
    pub fn is_own(&self) -> bool {
        group_of(getpid()) == Some(self.id())
    }

    /// The processes of the group that have not ended.
    fn members(&self) -> Result<Vec<Process>, GroupError> {
        let boot = boot_id().map_err(|error| GroupError::Proc(error.to_string()))?;
        if self.boot.as_ref().is_some_and(|then| *then != boot) {
            return Ok(Vec::new());
        }
        let mut members = Vec::new();
        for pid in all_pids()? {
            // The handle first: after it the number cannot come to mean another process unnoticed.
            let Some(process) = Process::find(pid).map_err(self.failed("look into"))? else { continue };
            if process.group() != Some(self.id()) || process.has_ended().map_err(self.failed("look into"))? {
                continue;
            }
            if self.number_was_reused(&process) {
                return Ok(Vec::new());
            }
            members.push(process);
        }
        Ok(members)
    }

    /// A group's number is free again once all its members have ended. Who has it then was started later than our
    /// leader: as a leader itself, under the same number.
    fn number_was_reused(&self, member: &Process) -> bool {
        let Some(leader_start) = self.leader_start else { return false };
        let is_leader = member.pid == self.group;
        member
            .start_ticks()
            .is_some_and(|start| if is_leader { start != leader_start } else { start < leader_start })
    }

    fn kill(&self) -> Result<(), GroupError> {
        match kill_process_group(self.group, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(self.failed("kill")(errno)),
        }
    }

    fn failed(&self, action: &'static str) -> impl Fn(Errno) -> GroupError + use<> {
        let group = self.id();
        move |errno| GroupError::System { group, action, errno }
    }
}

impl fmt::Display for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id())?;
        if let (Some(start), Some(boot)) = (self.leader_start, &self.boot) {
            write!(f, " {start} {boot}")?;
        }
        Ok(())
    }
}

impl FromStr for ProcessGroup {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut words = text.split_ascii_whitespace();
        let first = words.next().ok_or("it is empty")?;
        let group: i32 = first.parse().map_err(|_| "it does not begin with a number")?;
        // To `kill`, 0 would mean our own group, and 1 everybody.
        let group = Some(group).filter(|group| *group > 1).and_then(Pid::from_raw);
        let group = group.ok_or("it names no process group")?;
        let leader_start =
            words.next().map(str::parse).transpose().map_err(|_| "its start time is no number")?;
        let boot = words.next().map(str::to_owned);
        Ok(Self { group, leader_start, boot })
    }
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn all_pids() -> Result<Vec<Pid>, GroupError> {
    let entries = std::fs::read_dir("/proc").map_err(|error| GroupError::Proc(error.to_string()))?;
    let mut pids = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| GroupError::Proc(error.to_string()))?;
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        pids.extend(number.filter(|number| *number > 0).and_then(Pid::from_raw));
    }
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use rustix::process::setpgid;

    use super::*;

    #[test]
    fn what_is_written_is_what_is_read() {
        let group = ProcessGroup {
            group: Pid::from_raw(77).expect("above 0"),
            leader_start: Some(5),
            boot: Some("b".into()),
        };
        assert_eq!(group.to_string(), "77 5 b");
        assert_eq!(group.to_string().parse(), Ok(group));
        assert_eq!("42\n".parse::<ProcessGroup>().expect("a plain pid").id(), 42);
    }

    #[test]
    fn a_file_that_names_no_group_is_refused() {
        for text in ["", "x", "0", "1", "-5", "12 x", "99999999999999999999"] {
            assert!(text.parse::<ProcessGroup>().is_err(), "{text:?}");
        }
    }

    // Invariant A8
    #[test]
    fn a_process_does_not_end_its_own_group() {
        // Refused to one that leads its session: it leads its group already.
        let _ = setpgid(None, None);
        let own = ProcessGroup::own().expect("this process leads a group");
        assert_eq!(own.end(Duration::from_secs(1)), Err(GroupError::Own(own.id())));
    }
}
