//! Every check and test, in the order in which a failure is cheapest to find.

use std::path::Path;

use crate::packages;
use crate::run::{Failure, cargo, command_with, root, target_dir};

/// Runs the checks; `--quick` leaves out the documentation and the lints.
pub(crate) fn run(options: &[String]) -> Result<(), Failure> {
    let quick = match options {
        [] => false,
        [only] if only == "--quick" => true,
        _ => return Err(Failure::usage("usage: cargo xtask test [--quick]")),
    };
    packages::ensure(packages::TEST)?;
    if !quick {
        step("format", || cargo(&["fmt", "--all", "--check"]))?;
        step("lints", || {
            cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"])
        })?;
        step("documentation", documentation)?;
    }
    // The scenarios run real processes, so those must be there before the tests start.
    step("build", || cargo(&["build", "--workspace", "--bins", "--locked"]))?;
    step("tests", || cargo(&["test", "--workspace", "--locked"]))?;
    if !quick {
        step("dependencies", dependencies)?;
    }
    report_skipped();
    Ok(())
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

/// Tests leave a line in this file for each thing that they could not try for want of a device.
fn report_skipped() {
    let list = target_dir().join("skipped-tests");
    let devices = ["/dev/fuse", "/dev/kvm", "/dev/net/tun"];
    let missing: Vec<_> = devices.into_iter().filter(|device| !Path::new(device).exists()).collect();
    drop(std::fs::write(&list, missing.join("\n")));
    if missing.is_empty() {
        println!("skipped: 0");
    } else {
        println!("skipped: {} groups, for want of {}", missing.len(), missing.join(" "));
    }
}
