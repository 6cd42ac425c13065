//! How long things pause when something dies or moves, on the embedded cluster: `cargo xtask bench failover [ROUNDS]`.
//!
//! ```text
//!   planned.rs   the coordinator moves
//!   lost.rs      the coordinator is killed, and hangs
//!   path.rs      a node loses its path to the LUN, and how fast the detour is
//!   guest.rs     a VM's node dies
//!   probe.rs     the direct I/O of another node during all that, and in the same run without a fault
//! ```
//! Each figure is taken from outside, as an application or an administrator sees it, over at least 20 rounds.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]
#![expect(clippy::disallowed_methods, reason = "measures time")]

mod guest;
mod lost;
mod path;
mod planned;
mod probe;
mod stage;

use std::path::Path;

use benchmarks::percentile;

const ROUNDS: usize = 20;

/// What was measured of one thing.
struct Figure {
    name: &'static str,
    /// Milliseconds, round by round.
    ms: Vec<f64>,
    /// What the middle and the worst of a hundred rounds may be.
    goals: (f64, f64),
}

fn main() {
    let rounds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let stage = stage::Stage::set(rounds);
    let mut figures =
        vec![planned::pause(&stage), lost::killed(&stage), lost::hung(&stage), path::lost(&stage)];
    if Path::new("/dev/kvm").exists() {
        figures.push(guest::restarted(&stage));
    } else {
        println!("skipped: /dev/kvm is missing, no VM was restarted");
    }
    print(&figures);
    stage.probe().print();
    path::throughput(&stage);
}

fn print(figures: &[Figure]) {
    println!("{:44} {:>7} {:>9} {:>9} {:>9}", "milliseconds", "rounds", "p50", "p99", "longest");
    for Figure { name, ms, goals } in figures {
        let at = |part| percentile(&mut ms.clone(), part);
        let (middle, worst) = (at(0.5), at(0.99));
        let verdict = if middle < goals.0 && worst < goals.1 { "reached" } else { "missed" };
        println!(
            "{name:44} {:7} {middle:9.1} {worst:9.1} {:9.1}  goals {:.0} and {:.0}: {verdict}",
            ms.len(),
            at(1.0),
            goals.0,
            goals.1
        );
    }
}
