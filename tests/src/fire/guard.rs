//! A frozen node is woken in the end, whatever becomes of the test.
//!
//! A program that has files open on the mount of a frozen node cannot even start another program until the node is fenced:
//! the new process closes those files, and each close asks the node. So the waker is started before the node is frozen.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Seconds after which the node is woken if it is still there: far more than a fence takes.
const AFTER_S: u32 = 45;

/// Wakes a node after a while, unless it is dropped before.
#[derive(Debug)]
pub(super) struct Waker {
    shell: Child,
}

impl Waker {
    /// For the node whose pid file this is.
    pub(super) fn start(pid_file: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(pid_file).map_err(|error| error.to_string())?;
        let group = text.split_ascii_whitespace().next().ok_or("an empty pid file")?;
        let script = format!("sleep {AFTER_S}; kill -CONT -- -{group}");
        let mut command = Command::new("sh");
        command.args(["-c", &script]).process_group(0).stdin(Stdio::null()).stderr(Stdio::null());
        command.spawn().map(|shell| Self { shell }).map_err(|error| error.to_string())
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        let group = format!("-{}", self.shell.id());
        // The shell and its sleep; if they have ended, there is nothing to do.
        drop(Command::new("kill").args(["-KILL", "--", &group]).stderr(Stdio::null()).status());
        drop(self.shell.wait());
    }
}
