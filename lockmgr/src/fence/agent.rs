//! Fencing by a program: the administrator's power switch (IPMI, a hypervisor, a PDU).
//!
//! The contract is in PROTOCOL.md: `PROGRAM off --node ID --epoch EPOCH`; exit code 0 means that the node is certainly
//! off, everything else and a time-out means that nobody knows.

use std::io::{self, PipeReader, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};

use super::process::{Process, deadline_in, left_until};
use super::{Confirmed, Fence, FenceError, FenceKind};
use crate::{Epoch, Millis, NodeId};

/// How much of what the program printed is kept for the log, from the end.
const OUTPUT_BYTES_MAX: usize = 2048;

/// Runs a program that powers a node off.
#[derive(Clone, Debug)]
pub struct AgentFence {
    program: PathBuf,
    limit: Duration,
}

impl AgentFence {
    /// `limit` is the longest time that the program may take.
    #[must_use]
    pub fn new(program: PathBuf, limit: Duration) -> Self {
        Self { program, limit }
    }

    fn run(&self, node: NodeId, epoch: Epoch) -> Result<String, String> {
        let name = self.program.display();
        let (mut child, output) =
            self.start(node, epoch).map_err(|error| format!("cannot run {name}: {error}"))?;
        let watched = self.watch(&child, output);
        let (ended, said) = watched.map_err(|error| format!("cannot watch {name}: {error}"))?;
        if !ended {
            // The whole group, because such programs are mostly scripts that wait for another program.
            let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
            reap(child);
            return Err(format!("{name} has not ended within {} ms{said}", self.limit.as_millis()));
        }
        let status = child.wait().map_err(|error| format!("cannot wait for {name}: {error}"))?;
        verdict(status, &said).map_err(|why| format!("{name} {why}"))
    }

    fn start(&self, node: NodeId, epoch: Epoch) -> io::Result<(Child, PipeReader)> {
        let (output, into) = io::pipe()?;
        fcntl_setfl(&output, OFlags::NONBLOCK)?;
        let mut command = Command::new(&self.program);
        command.args(["off", "--node", &node.to_string(), "--epoch", &epoch.to_string()]);
        command.stdin(Stdio::null()).stdout(into.try_clone()?).stderr(into).process_group(0);
        Ok((command.spawn()?, output))
    }

    /// Reads what the program prints until it ends. Whether it did in time, and the end of what it said.
    fn watch(&self, child: &Child, mut output: PipeReader) -> Result<(bool, String), Errno> {
        let deadline = deadline_in(self.limit);
        let process = Process::find(Pid::from_child(child))?.ok_or(Errno::SRCH)?;
        let (mut said, mut open) = (Vec::new(), true);
        while open && !wait_either(&process, &output, deadline)? {
            if process.has_ended()? || left_until(deadline) == left_until(Millis(0)) {
                break;
            }
            open = read_available(&mut output, &mut said);
        }
        let ended = process.wait_end(deadline)?;
        read_available(&mut output, &mut said);
        Ok((ended, quoted(&said)))
    }
}

impl Fence for AgentFence {
    fn kind(&self) -> FenceKind {
        FenceKind::Agent
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        match self.run(node, epoch) {
            Ok(how) => Ok(Confirmed::new(node, epoch, how)),
            Err(reason) => Err(FenceError::NotConfirmed { node, epoch, reason }),
        }
    }
}

fn verdict(status: ExitStatus, said: &str) -> Result<String, String> {
    if status.success() {
        Ok(format!("the agent has confirmed it{said}"))
    } else {
        Err(format!("ended with {status}{said}"))
    }
}

/// Waits for output or for the end of the process. `true`: the deadline came first.
fn wait_either(process: &Process, output: &PipeReader, deadline: Millis) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(process.exit_handle(), PollFlags::IN), PollFd::new(output, PollFlags::IN)];
    match poll(&mut fds, Some(&left_until(deadline))) {
        Ok(ready) => Ok(ready == 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes what is in the pipe and keeps the end of it. `false`: nobody writes any more.
fn read_available(output: &mut PipeReader, said: &mut Vec<u8>) -> bool {
    let mut chunk = [0; 1024];
    loop {
        match output.read(&mut chunk) {
            Ok(0) => return false,
            Ok(count) => said.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
        let surplus = said.len().saturating_sub(OUTPUT_BYTES_MAX);
        said.drain(..surplus);
    }
}

fn quoted(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!(", saying {text:?}") }
}

/// Leaves no zombie behind, and does not wait here for a process that the kernel holds.
fn reap(mut child: Child) {
    let wait = move || drop(child.wait());
    drop(std::thread::Builder::new().name("fence:reap".to_owned()).spawn(wait));
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rustix::process::kill_process;

    use super::*;

    const NODE: NodeId = NodeId(2);

    fn agent(dir: &tempfile::TempDir, script: &str, limit: Duration) -> AgentFence {
        let path = dir.path().join("agent");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("made executable");
        AgentFence::new(path, limit)
    }

    fn run(script: &str, limit: Duration) -> Result<Confirmed, FenceError> {
        let dir = tempfile::tempdir().expect("a folder for the test");
        agent(&dir, script, limit).fence(NODE, Epoch(7))
    }

    const LONG: Duration = Duration::from_secs(120);

    #[test]
    fn exit_code_zero_confirms_and_the_program_is_told_who() {
        let proof = run("echo \"$@\"; exit 0", LONG).expect("confirmed");
        assert!(proof.covers(NODE, Epoch(7)));
        assert!(proof.how().contains("off --node 2 --epoch 7"), "{proof}");
    }

    // Invariant A4
    #[test]
    fn any_other_end_confirms_nothing() {
        for script in ["echo no answer from the BMC >&2; exit 1", "exit 255", "kill -9 $$"] {
            let error = run(script, LONG).expect_err("not confirmed");
            assert!(matches!(error, FenceError::NotConfirmed { node: NODE, epoch: Epoch(7), .. }));
            assert!(
                !script.starts_with("echo") || error.to_string().contains("no answer from the BMC"),
                "{error}"
            );
        }
        let missing = AgentFence::new("/nonexistent/agent".into(), LONG).fence(NODE, Epoch(7));
        assert!(missing.expect_err("no such program").to_string().contains("cannot run /nonexistent/agent"));
    }

    // Invariant A4
    #[test]
    fn a_program_that_takes_too_long_confirms_nothing_and_is_ended_with_its_children() {
        let dir = tempfile::tempdir().expect("a folder for the test");
        let pid_path = dir.path().join("child");
        let script = format!("sleep 1000 & echo $! > {}; wait", pid_path.display());
        let limit = Duration::from_millis(500);
        let error = agent(&dir, &script, limit).fence(NODE, Epoch(7)).expect_err("too long");
        assert!(error.to_string().contains("has not ended within 500 ms"), "{error}");
        // On a slow machine it may not have come as far as to have a child.
        let text = std::fs::read_to_string(&pid_path).unwrap_or_default();
        let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw) else { return };
        let child = Process::find(pid).expect("looked up");
        assert!(child.is_none_or(|child| child.wait_end(deadline_in(LONG)).expect("waited")));
    }

    #[test]
    fn a_program_that_prints_without_end_is_read_and_only_its_last_words_are_kept() {
        let proof =
            run("i=0; while [ $i -lt 3000 ]; do echo line $i of the log; i=$((i+1)); done; echo off", LONG)
                .expect("confirmed");
        assert!(proof.how().ends_with("off\"") && proof.how().len() < 2 * OUTPUT_BYTES_MAX, "{proof}");
    }

    #[test]
    fn a_child_that_keeps_the_output_open_does_not_hold_up_the_verdict() {
        let dir = tempfile::tempdir().expect("a folder for the test");
        let pid_path = dir.path().join("child");
        let script = format!("sleep 1000 & echo $! > {}; exit 0", pid_path.display());
        agent(&dir, &script, LONG).fence(NODE, Epoch(7)).expect("confirmed");
        let pid =
            std::fs::read_to_string(&pid_path).expect("it ran").trim().parse().ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a pid"), Signal::KILL).expect("it was still there");
    }
}
