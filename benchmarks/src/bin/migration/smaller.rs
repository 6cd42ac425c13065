//! The goals that need no peer: a quick move, and the start of a process.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

use std::path::Path;

use cluster_tests::Cluster;

use crate::Failure;
use crate::figures::Moves;
use crate::load::LOADS;
use crate::ours;

/// Quick moves of an idle VM with 1 GiB.
pub(crate) fn quick(count: usize, folder: &Path) -> Result<(), Failure> {
    let load = LOADS.iter().find(|load| load.name == "gib").ok_or("the load is listed")?;
    let guest = load.guest(load.rate_kib(0), load.noise(folder)?);
    let cluster = ours::started(&guest)?;
    let mut moves = Vec::new();
    for number in 0..count {
        moves.push(ours::one(&cluster, number, "quick")?);
    }
    ours::end(&cluster, count)?;
    let moves = Moves(moves);
    println!("quick moves, idle, 1 GiB of RAM, {count} moves (goal: p50 under 100 ms)");
    moves.print("ours");
    Ok(())
}

/// From the start of a VM's process to its guest's first instruction.
pub(crate) fn start(count: usize) -> Result<(), Failure> {
    let cluster = Cluster::with_usual_times("1G");
    let ctl = cluster.ctl(1);
    ctl.must(&[
        "vm",
        "create",
        "s",
        "--memory",
        "256M",
        "--kernel",
        "builtin:dirtier",
        "--cmdline",
        "role=dirtier set=1 rate=1",
    ]);
    let mut values = Vec::new();
    for _ in 0..count {
        ctl.must(&["vm", "start", "s"]);
        let shown = ctl.must(&["vm", "show", "s"]);
        values.push(shown["start_ms"].as_f64().ok_or("`vm show` tells how long the start took")?);
        ctl.must(&["vm", "stop", "--force", "s"]);
    }
    let worst = values.iter().copied().fold(0.0, f64::max);
    println!(
        "start of hv to the first guest instruction, 256 MiB: median {:.1} ms, longest {worst:.1} ms (goal: under 30)",
        benchmarks::median(&mut values)
    );
    Ok(())
}
