//! The scenarios, one family a file.

mod fences;
mod linux_guest;
mod linux_moves;
mod outages;
mod witness;

use std::path::PathBuf;
use std::time::Instant;

use crate::tool::{Doing, LabError};

type Scenario = fn() -> Result<(), LabError>;

/// All scenarios, with what they do.
const ALL: &[(&str, Scenario)] = &[
    ("linux-guest", linux_guest::run),
    ("linux-moves", linux_moves::run),
    ("reservation-hung", fences::hung),
    ("reservation-stopped", fences::stopped),
    ("reservation-cut", fences::cut),
    ("san-power-cut", outages::san_power_cut),
    ("coordinator-power-cut", outages::coordinator_power_cut),
    ("path-loss", outages::path_loss),
    ("two-node-witness", witness::two_nodes),
    ("cluster-power-cut", outages::cluster_power_cut),
];

/// What can be asked for.
pub(crate) fn names() -> String {
    let names: Vec<_> = ALL.iter().map(|(name, _)| *name).collect();
    names.join("|")
}

/// Runs one scenario, or `all` of them.
pub(crate) fn run(name: &str) -> Result<(), LabError> {
    if name == "all" {
        return run_all();
    }
    match ALL.iter().find(|(known, _)| *known == name) {
        Some((_, scenario)) => scenario(),
        None => Err(LabError::new(format!("no scenario {name}; there are {}", names()))),
    }
}

/// Each by itself; one that fails does not keep the others from running.
fn run_all() -> Result<(), LabError> {
    let mut failed = Vec::new();
    for (name, scenario) in ALL {
        println!("lab: scenario {name}");
        let begun = Instant::now();
        match scenario() {
            Ok(()) => println!("lab: {name} passed in {:.0} s", begun.elapsed().as_secs_f64()),
            Err(error) => {
                eprintln!("lab: {name} failed: {error}");
                failed.push(*name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(LabError::new(format!("failed: {}", failed.join(", ")))) }
}

/// Where unpacked kernels are kept between runs: beside the programs.
pub(crate) fn cache() -> Result<PathBuf, LabError> {
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
