//! The built-in agent of a cluster on one machine: SIGKILL of a node's process group, confirmed by its end.
//!
//! The members are the node's daemon and its VMs, so whatever could submit a write for the node is gone afterwards. A pid
//! file that is missing or unreadable proves nothing, so it is no confirmation.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::group::ProcessGroup;
use super::{Confirmed, Fence, FenceError, FenceKind};
use crate::{Epoch, NodeId};

/// Longest pid file that is read.
const PID_FILE_BYTES_MAX: u64 = 256;

/// Kills the processes of nodes on this machine.
#[derive(Clone, Debug)]
pub struct LocalKill {
    pid_files: BTreeMap<NodeId, PathBuf>,
    limit: Duration,
}

impl LocalKill {
    /// For the nodes with these pid files; `limit` is the time that killed processes may take to end.
    #[must_use]
    pub fn new(pid_files: BTreeMap<NodeId, PathBuf>, limit: Duration) -> Self {
        Self { pid_files, limit }
    }

    fn group_of(&self, node: NodeId) -> Result<Result<ProcessGroup, String>, FenceError> {
        use std::io::Read;
        let path = self.pid_files.get(&node).ok_or(FenceError::UnknownNode { node })?;
        let mut text = String::new();
        let read = std::fs::File::open(path)
            .and_then(|file| file.take(PID_FILE_BYTES_MAX).read_to_string(&mut text));
        Ok(match read {
            Ok(_) => {
                text.parse().map_err(|why| format!("its pid file {} is not valid: {why}", path.display()))
            }
            Err(error) => Err(format!("its pid file {} cannot be read: {error}", path.display())),
        })
    }
}

impl Fence for LocalKill {
    fn kind(&self) -> FenceKind {
        FenceKind::Agent
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        let not_confirmed = |reason| FenceError::NotConfirmed { node, epoch, reason };
        let group = self.group_of(node)?.map_err(not_confirmed)?;
        let ended = group.end(self.limit).map_err(|error| not_confirmed(error.to_string()))?;
        let how = match ended {
            0 => format!("no process of group {} is left", group.id()),
            1 => format!("process group {}: 1 process killed, its end seen", group.id()),
            _ => format!("process group {}: {ended} processes killed, their ends seen", group.id()),
        };
        Ok(Confirmed::new(node, epoch, how))
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::process::CommandExt;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};

    use rustix::process::{Pid, Signal, kill_process_group, test_kill_process};

    use super::super::process::start_ticks;
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);
    const NODE: NodeId = NodeId(2);

    fn fence_with(path: &Path) -> LocalKill {
        LocalKill::new(BTreeMap::from([(NODE, path.to_owned())]), LIMIT)
    }

    /// A shell that leads a group of its own, with a child in it. Nothing of it is left when the test ends.
    struct Group {
        shell: Child,
        leader: Pid,
        other: Pid,
    }

    impl Drop for Group {
        fn drop(&mut self) {
            let _ = kill_process_group(self.leader, Signal::KILL);
            drop(self.shell.wait());
        }
    }

    /// Starts one that prints the other's pid once both run.
    fn node_of_two(script: &str) -> Group {
        let mut command = Command::new("sh");
        command.args(["-c", script]).process_group(0).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a shell");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("the other pid");
        let leader = Pid::from_child(&child);
        let other = line.trim().parse().ok().and_then(Pid::from_raw).expect("a pid");
        Group { shell: child, leader, other }
    }

    fn ended(pid: Pid) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        let gone = stat.map_or(true, |stat| {
            stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
        });
        gone || test_kill_process(pid).is_err()
    }

    fn pid_file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a folder for the test");
        let path = dir.path().join("csvd.pid");
        std::fs::write(&path, text).expect("written");
        (dir, path)
    }

    // Invariant A1
    #[test]
    fn success_means_that_every_process_of_the_node_has_ended() {
        let node = node_of_two("trap '' TERM INT HUP; sleep 1000 & echo $!; wait");
        let (_dir, path) = pid_file(&node.leader.as_raw_nonzero().to_string());
        let fence = fence_with(&path);
        let proof = fence.fence(NODE, Epoch(3)).expect("killed");
        assert!(ended(node.leader) && ended(node.other), "{proof}");
        assert!(proof.covers(NODE, Epoch(3)));
        // Invariant A4: again is no error.
        assert!(fence.fence(NODE, Epoch(3)).expect("nobody left").how().contains("no process"));
    }

    #[test]
    fn a_stopped_node_is_ended_too() {
        let node = node_of_two("sleep 1000 & echo $!; kill -STOP $! $$; wait");
        let (_dir, path) = pid_file(&node.leader.as_raw_nonzero().to_string());
        fence_with(&path).fence(NODE, Epoch(3)).expect("killed");
        assert!(ended(node.leader) && ended(node.other));
    }

    #[test]
    fn a_vm_that_has_outlived_its_daemon_is_ended_too() {
        let mut node = node_of_two("trap '' HUP; sleep 1000 & echo $!; exit 0");
        node.shell.wait().expect("the leader has ended, its child has not");
        let (_dir, path) = pid_file(&node.leader.as_raw_nonzero().to_string());
        assert!(!ended(node.other));
        fence_with(&path).fence(NODE, Epoch(3)).expect("killed");
        assert!(ended(node.other));
    }

    #[test]
    fn processes_that_only_share_the_number_are_left_alone() {
        let node = node_of_two("sleep 1000 & echo $!; wait");
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("read");
        let start = start_ticks(node.leader).expect("alive");
        let number = node.leader.as_raw_nonzero();
        for text in [format!("{number} {} {boot}", start - 1), format!("{number} {start} another-boot")] {
            let (_dir, path) = pid_file(&text);
            assert!(
                fence_with(&path)
                    .fence(NODE, Epoch(3))
                    .expect("the node's own are gone")
                    .how()
                    .contains("no process")
            );
            assert!(!ended(node.leader) && !ended(node.other));
        }
        let (_dir, path) = pid_file(&format!("{number} {start} {boot}"));
        fence_with(&path).fence(NODE, Epoch(3)).expect("killed");
        assert!(ended(node.leader) && ended(node.other));
    }

    // Invariant A4
    #[test]
    fn a_pid_file_that_says_nothing_confirms_nothing() {
        let (dir, path) = pid_file("no number");
        let error = fence_with(&path).fence(NODE, Epoch(3)).expect_err("not valid").to_string();
        assert!(error.contains("does not begin with a number") && error.contains("stays blocked"), "{error}");
        let missing = fence_with(&dir.path().join("none")).fence(NODE, Epoch(3));
        assert!(matches!(missing, Err(FenceError::NotConfirmed { .. })));
        let stranger = fence_with(&path).fence(NodeId(9), Epoch(1));
        assert_eq!(stranger, Err(FenceError::UnknownNode { node: NodeId(9) }));
    }
}
