//! Where a scenario runs: what it starts, makes and mounts is gone when it is over, however that comes about.
//!
//! ```text
//!   lab SCENARIO --stdin--> unshare: a PID and a network namespace --> lab --inside SCENARIO --> QEMU, ip, ...
//!     folder, signals, limit of time                                     ends when its stdin does
//! ```
//! The one outside owns the folder in which the one inside makes its files, and removes it at the end. On a signal, and when the
//! time is over, it closes the other's standard input. That is also what happens when it is killed itself; then the folder stays.
//! The one inside is the first process of its namespace: all others end with it, and the network goes.

use std::io::Read;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::scenarios::Scenario;
use crate::tool::{Doing, LabError};

/// How long the one inside may take to end, once it is to.
const END_WITHIN: Duration = Duration::from_secs(20);
/// The word that tells the program that it runs inside.
pub(crate) const INSIDE: &str = "--inside";
/// What makes the namespaces.
pub(crate) const UNSHARE: [&str; 4] = ["--net", "--pid", "--fork", "--kill-child"];

/// Runs a scenario by itself.
pub(crate) fn run(scenario: &Scenario) -> Result<(), LabError> {
    let folder = tempfile::TempDir::with_prefix("lab-").doing("making a temporary folder")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.doing("starting a runtime")?.block_on(enclosed(scenario, folder.path()));
    if std::env::var_os("KEEP_LAB").is_some() {
        // What the scenario has not removed is to be kept.
        let _kept = std::fs::remove_dir(folder.keep());
    }
    outcome
}

async fn enclosed(scenario: &Scenario, folder: &Path) -> Result<(), LabError> {
    let on = |kind| signal(kind).doing("waiting for signals");
    let (mut interrupt, mut terminate, mut hang_up) =
        (on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?);
    let mut inside = start(scenario, folder)?;
    // Taken out, because to wait closes it.
    let way_in = inside.stdin.take();
    let told = tokio::select! {
        status = inside.wait() => return judge(status.doing("waiting for the scenario")?),
        _ = interrupt.recv() => "it was interrupted".to_owned(),
        _ = terminate.recv() => "it was to end".to_owned(),
        _ = hang_up.recv() => "its terminal is gone".to_owned(),
        () = tokio::time::sleep(scenario.within) => format!("it was not over within {:?}", scenario.within),
    };
    drop(way_in);
    if tokio::time::timeout(END_WITHIN, inside.wait()).await.is_err() {
        drop(inside.kill().await);
    }
    Err(LabError::new(format!("{}: {told}", scenario.name)))
}

fn start(scenario: &Scenario, folder: &Path) -> Result<Child, LabError> {
    let me = std::env::current_exe().doing("finding this program")?;
    let mut command = Command::new("unshare");
    command.args(UNSHARE).arg(me).args([INSIDE, scenario.name]).env("TMPDIR", folder);
    // A group of its own: what a terminal sends goes to the one outside alone.
    command.stdin(Stdio::piped()).process_group(0).kill_on_drop(true);
    command.spawn().doing("starting unshare")
}

fn judge(status: ExitStatus) -> Result<(), LabError> {
    if status.success() { Ok(()) } else { Err(LabError::new("the scenario failed; why is above")) }
}

/// For the one inside: ends this process, and with it everything, as soon as the one outside wants that or is gone.
pub(crate) fn end_with_stdin() {
    std::thread::spawn(|| {
        let mut byte = [0];
        while let Ok(1..) = std::io::stdin().read(&mut byte) {}
        std::process::exit(1);
    });
}
