//! Our side: an embedded cluster, a VM that goes from node 1 to node 2 and back.

use std::time::Duration;

use cluster_tests::Cluster;
use serde_json::Value;

use crate::Failure;
use crate::figures::{Move, Moves};
use crate::load::Guest;

const VM: &str = "bench";

/// A cluster whose node 1 runs the guest.
pub(crate) fn started(guest: &Guest) -> Result<Cluster, Failure> {
    let cluster = Cluster::with_usual_times("4G");
    let memory = format!("{}M", guest.memory_mib);
    let module = guest.module.to_str().ok_or("a path that is no UTF-8")?;
    let mut create = vec!["vm", "create", VM, "--memory", &memory, "--kernel", "builtin:dirtier"];
    create.extend(["--cmdline", &guest.cmdline, "--initrd", module]);
    cluster.ctl(1).must(&create);
    cluster.ctl(1).must(&["vm", "start", VM]);
    cluster.console(1, VM, Duration::from_secs(120), |console| console.contains("ready"));
    Ok(cluster)
}

/// Moves it so many times, and looks that the guest found nothing wrong.
pub(crate) fn moves(guest: &Guest, count: usize) -> Result<Moves, Failure> {
    let cluster = started(guest)?;
    let mut moves = Vec::new();
    for number in 0..count {
        moves.push(one(&cluster, number, "live")?);
    }
    end(&cluster, count)?;
    Ok(Moves(moves))
}

/// One move to the other node.
pub(crate) fn one(cluster: &Cluster, number: usize, kind: &str) -> Result<Move, Failure> {
    let to = cluster.name(2 - number % 2);
    let report = cluster.ctl(3).run(&["vm", "migrate", VM, "--to", &to, "--type", kind])?;
    let number = |value: &Value| value.as_f64().ok_or_else(|| format!("a figure is missing: {report}"));
    let part = |name: &str| number(&report["blackout"][name]);
    Ok(Move {
        blackout_ms: number(&report["blackout_ms"])?,
        total_ms: number(&report["total_ms"])?,
        sent_bytes: number(&report["memory_bytes_sent"])?,
        parts_ms: Some([part("drain_ms")?, part("memory_ms")?, part("state_ms")?, part("handoff_ms")?]),
    })
}

/// The guest ends, and has found nothing wrong.
pub(crate) fn end(cluster: &Cluster, moves: usize) -> Result<(), Failure> {
    let console = cluster.console(1 + moves % 2, VM, Duration::from_secs(10), |console| !console.is_empty());
    if console.contains("FAIL") {
        return Err(format!("the guest has lost memory: {console}").into());
    }
    cluster.ctl(3).must(&["vm", "stop", "--force", VM]);
    Ok(())
}
