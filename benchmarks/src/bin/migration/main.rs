//! Moves of a running VM beside QEMU: the same guest, RAM, dirty rate and link, in one run.
//!
//! ```text
//!   network namespace, loopback shaped to --link     three csvd + hv  <- csvctl vm migrate -> there and back
//!                                                    two qemu (KVM)   <- QMP migrate       -> there and back
//! ```
//! `migration [--moves N] [--link MBIT] [--only idle,ten,half,gib,quick,start,stream] [--alone]`; `--alone` leaves QEMU out. QEMU moves with its default
//! settings, and with those of a list that give the shortest blackout for the load at hand. QEMU's blackout is the time from
//! its STOP event at the source to its RESUME event at the target; ours is what `vm migrate` reports, from the request to halt
//! to the target's answer that the guest runs. Needs root, /dev/kvm, /dev/fuse and qemu-system-x86_64.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

mod figures;
mod link;
mod load;
mod ours;
mod qemu;
mod qmp;
mod smaller;
mod stream;

use std::path::Path;

use figures::Moves;
use load::{LOADS, Load};

type Failure = Box<dyn std::error::Error>;

/// What is measured when nothing else is asked for.
const ALL: &str = "idle,ten,half,gib,quick,start,stream";

struct Arguments {
    moves: usize,
    link_mbit: u64,
    only: Vec<String>,
    /// Without QEMU.
    alone: bool,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let mut parsed = Self { moves: 10, link_mbit: 1000, only: Vec::new(), alone: false };
        let mut only = ALL.to_owned();
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--moves" => parsed.moves = value()?.parse()?,
                "--link" => parsed.link_mbit = value()?.parse()?,
                "--only" => only = value()?,
                "--alone" => parsed.alone = true,
                _ => {
                    return Err(format!(
                        "{word}: not known; use --moves N, --link MBIT, --only {ALL}, --alone"
                    )
                    .into());
                }
            }
        }
        parsed.only = only.split(',').map(ToOwned::to_owned).collect();
        Ok(parsed)
    }

    fn wants(&self, what: &str) -> bool {
        self.only.iter().any(|only| only == what)
    }
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    if arguments.wants("stream") {
        // Not shaped: what the processors can carry.
        stream::measure()?;
    }
    link::enter(arguments.link_mbit)?;
    let folder = tempfile::Builder::new().prefix("csv-migration-").tempdir()?;
    for load in LOADS.iter().filter(|load| arguments.wants(load.name)) {
        beside_qemu(load, &arguments, folder.path())?;
    }
    if arguments.wants("quick") {
        smaller::quick(arguments.moves, folder.path())?;
    }
    if arguments.wants("start") {
        smaller::start(arguments.moves)?;
    }
    println!("reproduce: cargo xtask bench migration");
    Ok(())
}

fn beside_qemu(load: &Load, arguments: &Arguments, folder: &Path) -> Result<(), Failure> {
    let noise = load.noise(folder)?;
    let rate_kib = load.rate_kib(arguments.link_mbit);
    println!(
        "{}: {} MiB of RAM, {} MiB of it filled, {} KiB/s written, link {} Mbit/s, {} moves",
        load.title, load.memory_mib, load.module_mib, rate_kib, arguments.link_mbit, arguments.moves
    );
    let guest = load.guest(rate_kib, noise);
    let ours = ours::moves(&guest, arguments.moves)?;
    ours.print("ours");
    if arguments.alone {
        return Ok(());
    }
    let default = qemu::moves(&guest, &qemu::DEFAULT, arguments.moves, folder)?;
    default.print("QEMU, default settings");
    let (settings, best) = qemu::best(&guest, arguments.moves, folder)?;
    best.print(&format!("QEMU, {}", settings.name));
    for (name, peer) in [("default", &default), ("best", &best)] {
        compare(name, &ours, peer);
    }
    Ok(())
}

fn compare(name: &str, ours: &Moves, peer: &Moves) {
    for (what, ours, peer, goal) in [
        ("blackout p50", ours.blackout_ms(50), peer.blackout_ms(50), 0.5),
        ("blackout p99", ours.blackout_ms(99), peer.blackout_ms(99), 0.5),
        ("total p50", ours.total_ms(50), peer.total_ms(50), 0.8),
        ("MiB sent p50", ours.sent_mib(50), peer.sent_mib(50), 1.0),
    ] {
        let ratio = ours / peer;
        let verdict = if ratio <= goal { "reached" } else { "missed" };
        println!(
            "    against {name:8} {what:14} {ours:9.1} / {peer:9.1} = {ratio:5.2}  goal {goal:.2} {verdict}"
        );
    }
}
