//! The scenarios, one family a file.

mod fences;
mod linux_guest;
mod linux_moves;
mod outages;
mod short;
mod witness;

use std::path::PathBuf;
use std::time::Duration;

use crate::tool::{Doing, LabError};

/// What can be done to machines, and must end.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn() -> Result<(), LabError>,
    /// All waits in it are bounded; this bounds their sum.
    pub(crate) within: Duration,
}

const fn scenario(name: &'static str, run: fn() -> Result<(), LabError>) -> Scenario {
    Scenario { name, run, within: Duration::from_mins(30) }
}

/// All scenarios.
pub(crate) const ALL: &[Scenario] = &[
    Scenario { name: "short", run: short::run, within: Duration::from_mins(12) },
    scenario("linux-guest", linux_guest::run),
    scenario("linux-moves", linux_moves::run),
    scenario("reservation-hung", fences::hung),
    scenario("reservation-stopped", fences::stopped),
    scenario("reservation-cut", fences::cut),
    scenario("reservation-san-restarted", fences::san_restarted),
    scenario("reservation-san-forgot", fences::san_forgot),
    scenario("san-power-cut", outages::san_power_cut),
    scenario("coordinator-power-cut", outages::coordinator_power_cut),
    scenario("path-loss", outages::path_loss),
    scenario("two-node-witness", witness::two_nodes),
    scenario("cluster-power-cut", outages::cluster_power_cut),
];

/// What can be asked for.
pub(crate) fn names() -> String {
    let names: Vec<_> = ALL.iter().map(|scenario| scenario.name).collect();
    names.join("|")
}

pub(crate) fn find(name: &str) -> Result<&'static Scenario, LabError> {
    let found = ALL.iter().find(|scenario| scenario.name == name);
    found.ok_or_else(|| LabError::new(format!("no scenario {name}; there are {}, and all", names())))
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
