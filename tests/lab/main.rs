//! The lab: real Linux machines in emulation, driven over their serial ports.
//!
//! ```text
//!   lab SCENARIO --> kernel (a Debian package, unpacked) + tree (initial RAM disk: busybox, modules, our programs)
//!                        \--> machine: QEMU in the network namespace of the lab --serial--> commands and their output
//! ```
//! **Invariants:** every wait is bounded; whatever happens, no process, namespace or file stays behind (enclosure.rs), but the
//! unpacked kernel, which takes a minute to get, and the folder of a program that was ended by SIGKILL. One lab at a time:
//! machines that share two processors are slow enough.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]
#![expect(clippy::disallowed_methods, reason = "a harness bounds its waits and reports how long things took")]

mod cluster;
mod drive;
mod enclosure;
mod kernel;
mod machine;
mod needs;
mod network;
mod node;
mod san;
mod scenarios;
mod serial;
mod tool;
mod tree;

use std::process::ExitCode;
use std::time::Instant;

use tool::LabError;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        [enclosure::INSIDE, name] => {
            enclosure::end_with_stdin();
            scenarios::find(name).and_then(|scenario| (scenario.run)())
        }
        [name] => run(name),
        _ => Err(LabError::new(format!("usage: cargo xtask lab {}|all", scenarios::names()))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one scenario, or `all` of them, each by itself: one that fails does not keep the others from running.
fn run(name: &str) -> Result<(), LabError> {
    let chosen = match name {
        "all" => scenarios::ALL.iter().collect(),
        name => vec![scenarios::find(name)?],
    };
    if let Err(missing) = needs::check() {
        // `cargo xtask test` looks for this line.
        println!("lab: missing: {missing}");
        return Err(LabError::new("it cannot run here"));
    }
    let mut failed = Vec::new();
    for scenario in chosen {
        println!("lab: scenario {}", scenario.name);
        let begun = Instant::now();
        match enclosure::run(scenario) {
            Ok(()) => println!("lab: {} passed in {:.0} s", scenario.name, begun.elapsed().as_secs_f64()),
            Err(error) => {
                eprintln!("lab: {} failed: {error}", scenario.name);
                failed.push(scenario.name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(LabError::new(format!("failed: {}", failed.join(", ")))) }
}
