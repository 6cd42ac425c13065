//! Every check and test, in the order in which a failure is cheapest to find.

use std::path::Path;

use crate::packages;
use crate::run::{Failure, cargo, cargo_lines, command_with, lines, root, target_dir};
use crate::suites;

/// A build of its own: no other test and no program may contain the switch that leaves a step out.
const MUTATIONS: [&str; 9] =
    ["test", "-p", "vhdx", "--locked", "--features", "mutations", "--test", "crash", "mutations::"];

/// Runs the checks; `--quick` leaves out the documentation and the lints.
pub(crate) fn run(options: &[String]) -> Result<(), Failure> {
    let quick = match options {
        [] => false,
        [only] if only == "--quick" => true,
        _ => return Err(Failure::usage("usage: cargo xtask test [--quick]")),
    };
    packages::ensure(packages::TEST)?;
    let no_suites = suites::ensure();
    if !quick {
        step("format", || cargo(&["fmt", "--all", "--check"]))?;
        step("lints", || {
            cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
        })?;
        step("documentation", documentation)?;
    }
    // The scenarios run real processes, so those must be there before the tests start.
    step("build", || cargo(&["build", "--workspace", "--bins", "--locked"]))?;
    println!("xtask: tests");
    let mut tally = Tally::default();
    tally.run(&["test", "--workspace", "--locked", "--no-fail-fast"])?;
    println!("xtask: steps of the VHDX protocol that are left out must be seen");
    tally.run(&MUTATIONS)?;
    if !quick {
        step("dependencies", dependencies)?;
    }
    // Last and alone: emulated machines beside other tests would be slow beyond measure.
    println!("xtask: a reservation on emulated machines");
    tally.run_lab()?;
    tally.report(&no_suites)
}

fn step(name: &str, work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    println!("xtask: {name}");
    work()
}

fn documentation() -> Result<(), Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let arguments = ["doc", "--workspace", "--no-deps", "--locked", "--quiet"];
    command_with(&cargo, &arguments, &root(), &[("RUSTDOCFLAGS", "-D warnings".as_ref())])
}

/// Licences, sources and bans, if cargo-deny is installed. The advisory database is a matter for release day.
fn dependencies() -> Result<(), Failure> {
    let home = std::env::var_os("CARGO_HOME")
        .map(std::path::PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")));
    if home.is_some_and(|home| home.join("bin/cargo-deny").is_file()) {
        return cargo(&["deny", "--all-features", "check", "bans", "licenses", "sources"]);
    }
    println!("xtask: cargo-deny is not installed: licences and bans were not checked");
    Ok(())
}

/// What became of all tests together.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ended_badly: bool,
    /// What the scenario of the lab lacks here, if it was skipped.
    no_lab: Option<String>,
}

impl Tally {
    /// Runs tests, shows what they print, and adds their results.
    fn run(&mut self, arguments: &[&str]) -> Result<(), Failure> {
        let ended_well = cargo_lines(arguments, |line| self.count(line))?;
        self.ended_badly |= !ended_well;
        Ok(())
    }

    /// Runs the lab's shortest scenario with the programs that the tests have used. What it needs is big and comes from elsewhere:
    /// where that cannot be had, the scenario is skipped and the last lines say so.
    fn run_lab(&mut self) -> Result<(), Failure> {
        if let Err(failure) = packages::ensure(packages::LAB) {
            println!("xtask: {failure}");
            self.no_lab = failure.to_string().lines().next().map(str::to_owned);
            return Ok(());
        }
        let mut missing = None;
        let lab = target_dir().join("debug/lab");
        let passed = lines(lab.as_os_str(), &["short"], |line| {
            missing = line.strip_prefix("lab: missing: ").map(str::to_owned).or(missing.take());
        })?;
        self.no_lab = missing;
        match (passed, &self.no_lab) {
            (true, _) => self.passed += 1,
            (false, None) => self.failed += 1,
            (false, Some(_)) => {}
        }
        Ok(())
    }

    /// Takes the figures from a line such as `test result: ok. 12 passed; 0 failed; ...`.
    fn count(&mut self, line: &str) {
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let figure = |word: &str| -> u64 {
            let before = result.split(word).next().unwrap_or_default();
            before.split_whitespace().last().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        self.passed += figure(" passed");
        self.failed += figure(" failed");
    }

    /// The last lines: what was skipped and why, then the sums.
    fn report(&self, no_suites: &[&str]) -> Result<(), Failure> {
        let devices = ["/dev/fuse", "/dev/kvm", "/dev/net/tun"];
        let no_lab = self.no_lab.as_ref().map(|why| format!("the lab ({why})"));
        let missing: Vec<_> = devices
            .into_iter()
            .filter(|device| !Path::new(device).exists())
            .chain(no_suites.iter().copied())
            .chain(no_lab.as_deref())
            .collect();
        match missing.as_slice() {
            [] => println!("skipped groups of tests: none"),
            missing => println!("skipped groups of tests: those that need {}", missing.join(", ")),
        }
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed, missing.len());
        if !self.ended_badly && self.failed == 0 {
            return Ok(());
        }
        Err(Failure::new("tests failed; their output is above"))
    }
}
