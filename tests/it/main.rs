//! Scenarios on real processes: three nodes, one LUN, the built programs, driven as an administrator's script would.
#![expect(clippy::print_stderr, reason = "a skipped scenario says so")]
#![expect(clippy::disallowed_methods, reason = "a harness bounds its waits")]

mod bad_input;
mod checkpoints;
mod coherence;
mod cpu;
mod damage;
mod drain;
mod faults;
mod fences;
mod files;
mod images;
mod live;
mod luns;
mod members;
mod moves;
mod nbd;
mod nodes;
mod operations;
mod recovery;
mod redirect;
mod refusals;
mod trouble;
mod vhdx;
mod vm;
mod witness;

use std::path::Path;

/// Whether a device that a scenario needs is really there; says so when not.
fn device_present(device: &str) -> bool {
    let there = Path::new(device).exists();
    if !there {
        eprintln!("skipped: {device} is missing");
    }
    there
}

/// A path as an argument.
fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}
