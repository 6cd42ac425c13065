//! Starting programs and saying clearly when one failed.

use std::ffi::OsStr;
use std::fmt;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Why xtask stops, and with which exit code.
pub(crate) struct Failure {
    message: String,
    pub(crate) code: u8,
}

impl Failure {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }

    pub(crate) fn usage(message: &str) -> Self {
        Self { message: message.into(), code: 2 }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// The workspace's folder.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies inside the workspace").to_owned()
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// Runs cargo in the workspace.
pub(crate) fn cargo<S: AsRef<OsStr>>(arguments: &[S]) -> Result<(), Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    command(&cargo, arguments, &root())
}

/// Runs cargo in the workspace, shows its output and gives each line of it to `see`. Tells whether it ended well.
pub(crate) fn cargo_lines(arguments: &[&str], see: impl FnMut(&str)) -> Result<bool, Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    lines(&cargo, arguments, see)
}

/// The same with any program.
pub(crate) fn lines(program: &OsStr, arguments: &[&str], mut see: impl FnMut(&str)) -> Result<bool, Failure> {
    let name = program.to_string_lossy();
    let started = Command::new(program).args(arguments).current_dir(root()).stdout(Stdio::piped()).spawn();
    let mut child = started.map_err(|error| Failure::new(format!("{name} could not be started: {error}")))?;
    let output = child.stdout.take().expect("the output is piped");
    for line in BufReader::new(output).split(b'\n') {
        let line =
            line.map_err(|error| Failure::new(format!("the output of {name} could not be read: {error}")))?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        see(&line);
    }
    let status =
        child.wait().map_err(|error| Failure::new(format!("{name} could not be waited for: {error}")))?;
    Ok(status.success())
}

/// Runs a program to its end in `folder`.
pub(crate) fn command<S: AsRef<OsStr>>(
    program: &OsStr,
    arguments: &[S],
    folder: &Path,
) -> Result<(), Failure> {
    command_with(program, arguments, folder, &[])
}

/// The same with additional environment variables.
pub(crate) fn command_with<S: AsRef<OsStr>>(
    program: &OsStr,
    arguments: &[S],
    folder: &Path,
    variables: &[(&str, &OsStr)],
) -> Result<(), Failure> {
    let mut command = Command::new(program);
    command.args(arguments).current_dir(folder).envs(variables.iter().copied());
    let shown = || {
        let words: Vec<_> =
            arguments.iter().map(|word| word.as_ref().to_string_lossy().into_owned()).collect();
        format!("{} {}", program.to_string_lossy(), words.join(" "))
    };
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(format!("`{}` ended with {status}", shown()))),
        Err(error) => Err(Failure::new(format!("`{}` could not be started: {error}", shown()))),
    }
}
