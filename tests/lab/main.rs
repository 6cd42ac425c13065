//! The lab: real Linux machines in emulation, driven over their serial ports.
//!
//! ```text
//!   lab SCENARIO --> kernel (a Debian package, unpacked) + tree (initial RAM disk: busybox, modules, our programs)
//!                        \--> machine: QEMU in the network namespace of the lab --serial--> commands and their output
//! ```
//! **Invariants:** every wait is bounded; whatever happens, no process, namespace or file stays behind (the unpacked
//! kernel, which takes a minute to get, does). One lab at a time: machines that share two processors are slow enough.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]
#![expect(clippy::disallowed_methods, reason = "a harness bounds its waits and reports how long things took")]

mod cluster;
mod drive;
mod kernel;
mod machine;
mod network;
mod node;
mod san;
mod scenarios;
mod serial;
mod tool;
mod tree;

use std::process::ExitCode;

use tool::LabError;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.as_slice() {
        [name] => scenarios::run(name),
        _ => Err(LabError::new(format!("usage: cargo xtask lab {}|all", scenarios::names()))),
    };
    match outcome {
        Ok(()) => {
            println!("lab: passed");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}
