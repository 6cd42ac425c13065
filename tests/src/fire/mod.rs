//! The cluster under fire: random faults while verified load runs on every node.
//!
//! ```text
//!   rounds.rs    picks a fault and whom it hits, injects it, has it repaired, asks the oracles
//!   load.rs      the programs of one node: they run until the node dies, and again when it is back
//!   register.rs  oracle 1: a file of blocks, each with its writer, the writer's life and a number
//!   counter.rs   oracle 2: a number that all nodes raise under a lock
//!   latest.rs    oracle 3: a name that is replaced by rename again and again
//!   dice.rs      one seed, one run
//!   hands.rs     starts programs for this one, whose open files would hold them up
//!   guard.rs     wakes a frozen node should nobody fence it
//! ```
//! **Invariant:** whatever was acknowledged is found, nothing is found that was not attempted, and a program on a node that
//! has not died never sees an error.

mod counter;
mod dice;
mod guard;
mod hands;
mod latest;
mod load;
mod register;
mod rounds;

use std::time::{Duration, Instant};

pub use dice::Dice;
pub use rounds::{Fault, Outcome, Rounds, Target};

/// Longest wait for the load to go on after a fault; a bound, not a pause.
pub const WITHIN: Duration = Duration::from_secs(60);

/// Returns when `done`, or says what was waited for.
fn until(what: &str, mut done: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let started = Instant::now();
    while !done()? {
        if started.elapsed() > WITHIN {
            return Err(format!("not within {} s: {what}", WITHIN.as_secs()));
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    Ok(())
}

/// Lets a fault last.
fn last(time: Duration) {
    let began = Instant::now();
    while let Some(left) = time.checked_sub(began.elapsed()) {
        std::thread::park_timeout(left);
    }
}
