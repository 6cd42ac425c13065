//! Other people's programs, and why a lab fails.

use std::fmt;
use std::path::Path;
use std::process::Command;

/// What did not work, with all that is known about it.
#[derive(Debug)]
pub(crate) struct LabError(String);

impl LabError {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl fmt::Display for LabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for LabError {}

/// Says what was done when a call of the system fails.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T, LabError>;
}

impl<T, E: fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Result<T, LabError> {
        self.map_err(|error| LabError::new(format!("{what}: {error}")))
    }
}

/// Runs a program in `folder` and gives what it printed.
pub(crate) fn run_in(folder: &Path, program: &str, arguments: &[&str]) -> Result<String, LabError> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let shown = format!("{program} {}", arguments.join(" "));
    let output =
        Command::new(program).args(arguments).env("PATH", path).current_dir(folder).output().doing(&shown)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(LabError::new(format!("{shown} ended with {}: {said}{errors}", output.status)))
}

/// The same where the folder does not matter.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<String, LabError> {
    run_in(Path::new("/"), program, arguments)
}

/// A path as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the lab's own paths are UTF-8")
}
