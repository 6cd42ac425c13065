//! Sets up the machine, builds, and runs the main job or the tests. It has no dependencies, so that it starts at once.
//!
//! ```text
//! cargo xtask demo    set up, build, run the embedded three-node demo
//! cargo xtask test    set up, build, run every check and test
//! cargo xtask bench   set up, build, run the benchmarks beside the raw device
//! cargo xtask faults  build, run rounds of random faults under verified load: 100, or as many as are given
//! cargo xtask moves   build, move VMs under load again and again: 200 moves, or twice the number that is given
//! cargo xtask lab     set up, build, run a scenario on emulated machines with a stock kernel
//! ```
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod bench;
mod packages;
mod run;
mod suites;
mod test;

use std::process::ExitCode;

use run::{Failure, cargo, root};

const USAGE: &str = "usage: cargo xtask demo [DEMO OPTIONS] | test [--quick] | bench [NAME [ITS OPTIONS]] | faults [--rounds N] [--seed N] | moves [ROUNDS] | lab SCENARIO | setup";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let outcome = match command.as_str() {
        "demo" => demo(&rest),
        "test" => test::run(&rest),
        "bench" => bench::run(&rest),
        "faults" => faults(&rest),
        "moves" => moves(&rest),
        "lab" => lab(&rest),
        "setup" => packages::ensure(packages::TEST),
        _ => Err(Failure::usage(USAGE)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::from(failure.code)
        }
    }
}

/// Builds the binaries in release mode and runs the main job on them.
fn demo(options: &[String]) -> Result<(), Failure> {
    packages::ensure(packages::DEMO)?;
    cargo(&[
        "build",
        "--release",
        "--locked",
        "-p",
        "csvd",
        "-p",
        "csvctl",
        "-p",
        "hv-runner",
        "-p",
        "cluster-tests",
        "--bins",
    ])?;
    let target = run::target_dir();
    run::command(target.join("release/demo").as_os_str(), options, &root())
}

/// Builds the binaries in release mode and does things to nodes under load.
fn faults(options: &[String]) -> Result<(), Failure> {
    packages::ensure(packages::TEST)?;
    cargo(&["build", "--release", "--locked", "--workspace", "--bins"])?;
    run::command(run::target_dir().join("release/faults").as_os_str(), options, &root())
}

/// Builds the binaries in release mode and moves VMs under load.
fn moves(options: &[String]) -> Result<(), Failure> {
    packages::ensure(packages::TEST)?;
    cargo(&["build", "--release", "--locked", "--workspace", "--bins"])?;
    run::command(run::target_dir().join("release/moves").as_os_str(), options, &root())
}

/// Builds the binaries in release mode (emulation is slow enough) and runs a scenario on them.
fn lab(options: &[String]) -> Result<(), Failure> {
    packages::ensure(packages::LAB)?;
    cargo(&[
        "build",
        "--release",
        "--locked",
        "-p",
        "csvd",
        "-p",
        "csvctl",
        "-p",
        "hv-runner",
        "-p",
        "cluster-tests",
        "--bins",
    ])?;
    run::command(run::target_dir().join("release/lab").as_os_str(), options, &root())
}
