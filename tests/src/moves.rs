//! Moves in a row under load: a guest that writes its disk and one that writes its memory go from node to node, both at once,
//! and check all the time what they come back to.

use std::thread;

use hv_guest::Ack;
use serde_json::Value;
use tempfile::TempDir;

use crate::{Cluster, Ctl, Guest, PATIENCE};

const WRITER: &str = "writer";
const DIRTIER: &str = "dirtier";
/// One move of so many is a quick one.
const QUICK_EVERY: usize = 10;

/// What came of it.
#[derive(Clone, Debug, Default)]
pub struct MovesUnderLoad {
    /// Moves of both guests.
    pub moves: usize,
    /// The blackouts of the live ones, in milliseconds.
    pub live_ms: Vec<f64>,
    /// The blackouts of the quick ones.
    pub quick_ms: Vec<f64>,
}

/// Moves both guests `rounds` times; `tell` hears of each round.
///
/// # Panics
/// When a move fails, a guest finds anything that is not as it left it, or the disk lacks what was acknowledged.
#[must_use]
pub fn move_under_load(rounds: usize, mut tell: impl FnMut(&MovesUnderLoad)) -> MovesUnderLoad {
    let cluster = Cluster::start("2G");
    let image = |kind: &str| format!("{kind}.vhdx");
    for kind in ["system", "scratch"] {
        let path = cluster.mount(1).join(image(kind));
        Ctl::local().must(&["vhdx", "create", path.to_str().expect("a UTF-8 path"), "--size", "32M"]);
    }
    let writer = Guest::start(&cluster, WRITER, &image("system"), &image("scratch"), 1024);
    start_dirtier(&cluster);
    let mut acked = writer.progress(&cluster, 1, 0);
    let mut outcome = MovesUnderLoad::default();
    for round in 1..=rounds {
        let to = round % 3 + 1;
        let kind = if round % QUICK_EVERY == 0 { "quick" } else { "live" };
        let reports = thread::scope(|scope| {
            let moving = [WRITER, DIRTIER].map(|vm| {
                let cluster = &cluster;
                scope.spawn(move || one(cluster, vm, to, kind))
            });
            moving.map(|one| one.join().expect("a move succeeds"))
        });
        for report in reports {
            outcome.moves += 1;
            let figures = if kind == "quick" { &mut outcome.quick_ms } else { &mut outcome.live_ms };
            figures.push(report["blackout_ms"].as_f64().expect("a blackout"));
        }
        acked = both_work(&cluster, &writer, to, acked);
        tell(&outcome);
    }
    cluster.ctl(1).must(&["vm", "stop", WRITER]);
    cluster.ctl(1).must(&["vm", "stop", "--force", DIRTIER]);
    let folder = TempDir::new().expect("a temporary folder");
    writer.verify(&cluster, &image("scratch"), acked, folder.path());
    outcome
}

fn start_dirtier(cluster: &Cluster) {
    let ctl = cluster.ctl(1);
    let cmdline = "role=dirtier set=8 rate=8192";
    ctl.must(&[
        "vm",
        "create",
        DIRTIER,
        "--memory",
        "64M",
        "--kernel",
        "builtin:dirtier",
        "--cmdline",
        cmdline,
    ]);
    ctl.must(&["vm", "start", DIRTIER]);
}

fn one(cluster: &Cluster, vm: &str, to: usize, kind: &str) -> Value {
    cluster.ctl(2).must(&["vm", "migrate", vm, "--to", &cluster.name(to), "--type", kind])
}

/// Both guests go on where they are now, and have found nothing wrong.
fn both_work(cluster: &Cluster, writer: &Guest, at: usize, acked: Ack) -> Ack {
    let acked = writer.progress(cluster, at, acked.sequence);
    let said = |console: &str| console.lines().filter(|line| line.starts_with("dirtied")).count();
    let console = cluster.console(at, DIRTIER, PATIENCE, |console| !console.is_empty());
    let before = said(&console);
    cluster.console(at, DIRTIER, PATIENCE, |console| {
        assert!(!console.contains("FAIL"), "memory was lost: {console}");
        said(console) > before
    });
    acked
}
