//! A process that starts others, for one that has files open on the mounts.
//!
//! A new program begins with closing the files of who starts it, and each close asks a node. Were that node frozen or without
//! its LUN, whoever is to mend it could not even be started. So a shell is started before any file is open, and told what to do.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;
use tempfile::TempDir;

use crate::Ctl;

/// Reads command lines, runs each, and says how it ended. What they print is in two files.
const SCRIPT: &str =
    r#"while IFS= read -r line; do eval "$line" >"$0/out" 2>"$0/err" </dev/null; echo $?; done"#;
/// Seconds for one command.
const LIMIT_S: u32 = 120;

/// The shell. It ends with its input.
#[derive(Debug)]
pub(super) struct Hands {
    shell: Child,
    pipes: Mutex<Option<(ChildStdin, BufReader<ChildStdout>)>>,
    folder: TempDir,
}

impl Hands {
    pub(super) fn begin() -> Result<Self, String> {
        let folder = TempDir::new().map_err(|error| error.to_string())?;
        let mut command = Command::new("sh");
        command.arg("-c").arg(SCRIPT).arg(folder.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut shell = command.spawn().map_err(|error| error.to_string())?;
        let input = shell.stdin.take().ok_or("no input")?;
        let output = BufReader::new(shell.stdout.take().ok_or("no output")?);
        Ok(Self { shell, pipes: Mutex::new(Some((input, output))), folder })
    }

    /// What a `csvctl` prints.
    pub(super) fn run<S: AsRef<OsStr>>(&self, ctl: &Ctl, arguments: &[S]) -> Result<Value, String> {
        let command = ctl.command(arguments);
        let mut line = format!("timeout {LIMIT_S}");
        for word in std::iter::once(command.get_program()).chain(command.get_args()) {
            let word = word.to_str().ok_or("a word that is no UTF-8")?;
            write!(line, " '{}'", word.replace('\'', r"'\''")).map_err(|error| error.to_string())?;
        }
        let code = self.tell(&line).map_err(|error| format!("{line}: {error}"))?;
        let printed = |name: &str| std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default();
        if code != 0 {
            return Err(format!("{line} ended with code {code}: {}", printed("err").trim()));
        }
        serde_json::from_str(&printed("out")).map_err(|error| format!("{line} printed no document: {error}"))
    }

    fn tell(&self, line: &str) -> Result<i32, String> {
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        let (input, output) = pipes.as_mut().ok_or("the shell has ended")?;
        writeln!(input, "{line}").and_then(|()| input.flush()).map_err(|error| error.to_string())?;
        let mut answer = String::new();
        output.read_line(&mut answer).map_err(|error| error.to_string())?;
        answer.trim().parse().map_err(|_| format!("the shell said {answer:?}"))
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        drop(self.pipes.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        drop(self.shell.wait());
    }
}
