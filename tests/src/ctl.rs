//! `csvctl` as a script sees it: arguments in, one JSON document and an exit code out.

use std::ffi::OsStr;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::binary;

/// Calls `csvctl` against one node.
#[derive(Clone, Debug)]
pub struct Ctl {
    socket: Option<PathBuf>,
}

/// A call that did not succeed.
#[derive(Clone, Debug)]
pub struct CtlError {
    /// The command line.
    pub command: String,
    /// The exit code, see the manners in README; -1 when a signal ended it.
    pub code: i32,
    /// The document on stderr, or null when there was none.
    pub error: Value,
    /// All of stderr.
    pub stderr: String,
}

impl CtlError {
    /// `error.kind` of the document.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.error["error"]["kind"].as_str().unwrap_or("")
    }

    /// `error.message` of the document.
    #[must_use]
    pub fn message(&self) -> &str {
        self.error["error"]["message"].as_str().unwrap_or("")
    }

    /// `error.hint` of the document.
    #[must_use]
    pub fn hint(&self) -> &str {
        self.error["error"]["hint"].as_str().unwrap_or("")
    }
}

impl fmt::Display for CtlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ended with code {}: {}", self.command, self.code, self.stderr.trim())
    }
}

impl std::error::Error for CtlError {}

impl Ctl {
    /// For commands that need no node.
    #[must_use]
    pub fn local() -> Self {
        Self { socket: None }
    }

    /// For commands to the node behind `socket`.
    #[must_use]
    pub fn to(socket: impl Into<PathBuf>) -> Self {
        Self { socket: Some(socket.into()) }
    }

    /// Runs `csvctl --json ARGUMENTS` to its end.
    ///
    /// # Errors
    /// When it exits with anything but 0.
    ///
    /// # Panics
    /// When it cannot be started, or succeeds without printing one JSON document: both break the contract.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Value, CtlError> {
        self.run_with_input(arguments, &[])
    }

    /// The same with something on its standard input.
    ///
    /// # Errors
    /// As [`Ctl::run`].
    ///
    /// # Panics
    /// As [`Ctl::run`].
    pub fn run_with_input<S: AsRef<OsStr>>(&self, arguments: &[S], input: &[u8]) -> Result<Value, CtlError> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("csvctl can be started");
        // One that fails may not read it.
        drop(process.stdin.take().expect("it is piped").write_all(input));
        let output = process.wait_with_output().expect("it can be waited for");
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            return Ok(serde_json::from_str(&stdout).unwrap_or_else(|error| {
                panic!("{command:?} printed no JSON document ({error}): {stdout}{stderr}")
            }));
        }
        let error =
            stderr.lines().rev().find_map(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
        Err(CtlError {
            command: format!("{command:?}"),
            code: output.status.code().unwrap_or(-1),
            error,
            stderr,
        })
    }

    /// What `volume check` says of a volume, with further options. Problems are no failure of the call.
    ///
    /// # Panics
    /// When the check itself fails, or its exit code is not that of its report.
    #[must_use]
    pub fn check(&self, volume: &str, options: &[&str]) -> Value {
        let mut command = self.command(&[&["volume", "check", volume], options].concat());
        let output = command.output().expect("csvctl can be started");
        let stderr = String::from_utf8_lossy(&output.stderr);
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{command:?} printed no report ({error}): {stderr}"));
        let clean = report["problems"].as_array().is_some_and(Vec::is_empty);
        assert_eq!(output.status.code(), Some(if clean { 0 } else { 4 }), "{report} {stderr}");
        report
    }

    /// `csvctl --json ARGUMENTS`, not started yet.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = self.plain(&["--json", "--yes"]);
        command.args(arguments);
        command
    }

    /// The same with output for people.
    pub(crate) fn plain(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(binary("csvctl"));
        if let Some(socket) = &self.socket {
            command.arg("--connect").arg(socket);
        }
        command.args(arguments);
        command
    }

    /// Runs a command that must succeed.
    ///
    /// # Panics
    /// With the command and its error when it does not.
    pub fn must<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Value {
        self.run(arguments).unwrap_or_else(|error| panic!("{error}"))
    }
}
