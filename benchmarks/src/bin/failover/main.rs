//! How long things pause when something dies or moves, on the embedded cluster: `cargo xtask bench failover [ROUNDS] [--only redirected]`.
//!
//! ```text
//!   planned.rs   the coordinator moves
//!   lost.rs      the coordinator is killed, and hangs
//!   path.rs      a node loses its path to the LUN
//!   guest.rs     a VM's node dies
//!   redirected.rs, transport.rs   how fast the detour through a peer is
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
mod redirected;
mod stage;
mod transport;

use std::path::Path;

use benchmarks::percentile;

const ROUNDS: usize = 20;
/// Throughputs of which the middle one counts.
const TURNS: usize = 3;

/// What was measured of one thing.
struct Figure {
    name: &'static str,
    /// Milliseconds, round by round.
    ms: Vec<f64>,
    /// What the middle and the worst of a hundred rounds may be.
    goals: (f64, f64),
}

/// What is asked for.
struct Arguments {
    rounds: usize,
    /// Turns of the throughputs.
    turns: usize,
    /// Nothing but the throughput of the detour, and of which LUNs.
    only: Option<String>,
}

impl Arguments {
    fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut parsed = Self { rounds: ROUNDS, turns: TURNS, only: None };
        let mut words = words.peekable();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--only" => parsed.only = Some(value()?),
                "--turns" => parsed.turns = number(&value()?)?,
                text => parsed.rounds = number(text)?,
            }
        }
        let known = ["redirected", "redirected-memory", "redirected-disk"];
        match &parsed.only {
            Some(only) if !known.contains(&only.as_str()) => {
                Err(format!("--only {only}: it is one of {}", known.join(", ")))
            }
            _ => Ok(parsed),
        }
    }

    /// Whether the detour to a LUN in `place` is measured.
    fn wants_lun(&self, place: &str) -> bool {
        let only = self.only.as_deref().and_then(|only| only.strip_prefix("redirected-"));
        only.is_none_or(|only| only == place)
    }
}

fn number(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text}: not known; use [ROUNDS] [--turns N] [--only redirected]"))
}

fn main() -> Result<(), String> {
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    if arguments.only.is_none() {
        pauses(arguments.rounds);
    }
    redirected::throughput(&arguments);
    Ok(())
}

fn pauses(rounds: usize) {
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
