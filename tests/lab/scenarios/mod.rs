//! The scenarios, one file each.

mod linux_guest;

use std::path::PathBuf;

use crate::tool::{Doing, LabError};

/// What can be asked for.
pub(crate) const NAMES: &[&str] = &["linux-guest"];

/// Runs one scenario.
pub(crate) fn run(name: &str) -> Result<(), LabError> {
    match name {
        "linux-guest" => linux_guest::run(),
        _ => Err(LabError::new(format!("no scenario {name}; there are {}", NAMES.join(", ")))),
    }
}

/// Where unpacked kernels are kept between runs: beside the programs.
fn cache() -> Result<PathBuf, LabError> {
    let me = std::env::current_exe().doing("finding this program")?;
    Ok(me.ancestors().nth(2).expect("programs lie two levels below the target folder").join("lab"))
}

/// Machines' files. After a failure the logs are kept, and the folder is named.
fn in_folder(scenario: impl FnOnce(&std::path::Path) -> Result<(), LabError>) -> Result<(), LabError> {
    let mut folder = tempfile::TempDir::with_prefix("lab-").doing("making a temporary folder")?;
    let outcome = scenario(folder.path());
    if outcome.is_err() && std::env::var_os("KEEP_LAB").is_some() {
        folder.disable_cleanup(true);
        eprintln!("lab: the machines' logs are in {}", folder.path().display());
    }
    outcome
}
