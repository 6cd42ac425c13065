//! The FUSE mount beside the raw device: fio on a file of node 1's mount, and on a raw file of the same disk, in turn.
//!
//! Goals: 1 MiB sequential at least 0.8 of raw; 4 KiB at queue depth 32 at least 0.5 for reads and 0.3 for writes.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

use std::fs;
use std::path::Path;

use benchmarks::{Row, median, print_table};
use cluster_tests::{Cluster, run_tool};
use serde_json::Value;

/// Bytes of the file under test.
const FILE: &str = "1g";
/// Rounds; the median counts.
const ROUNDS: usize = 3;

struct Workload {
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    goal: f64,
}

const WORKLOADS: &[Workload] = &[
    Workload { name: "1 MiB sequential write", rw: "write", block: "1m", depth: 8, goal: 0.8 },
    Workload { name: "1 MiB sequential read", rw: "read", block: "1m", depth: 8, goal: 0.8 },
    Workload { name: "4 KiB random read, depth 32", rw: "randread", block: "4k", depth: 32, goal: 0.5 },
    Workload { name: "4 KiB random write, depth 32", rw: "randwrite", block: "4k", depth: 32, goal: 0.3 },
];

fn main() {
    let cluster = Cluster::start("4G");
    let raw = cluster.dir().join("raw.img");
    let mounted = cluster.mount(1).join("bench.img");
    for file in [&raw, &mounted] {
        // Every block is written once, so that both sides read and overwrite allocated blocks.
        fio(file, &WORKLOADS[0], "io_uring", false);
    }
    let rows: Vec<Row> = WORKLOADS.iter().map(|workload| measure(workload, &raw, &mounted)).collect();
    print_table("FUSE mount against a raw file on the same disk (MB/s)", "raw", "mount", &rows);
    for file in [&raw, &mounted] {
        fs::remove_file(file).expect("the benchmark's file");
    }
    println!("reproduce: cargo xtask bench mount_io");
}

fn measure(workload: &Workload, raw: &Path, mounted: &Path) -> Row {
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        figures[0].push(fio(raw, workload, "io_uring", true));
        figures[1].push(fio(mounted, workload, "libaio", true));
    }
    let [mut base, mut ours] = figures;
    Row { name: workload.name.into(), base: median(&mut base), ours: median(&mut ours), goal: workload.goal }
}

/// Runs fio and gives MB/s.
fn fio(file: &Path, workload: &Workload, engine: &str, timed: bool) -> f64 {
    let mut arguments = vec![
        "--name=bench".to_owned(),
        format!("--filename={}", file.display()),
        format!("--rw={}", workload.rw),
        format!("--bs={}", workload.block),
        format!("--iodepth={}", workload.depth),
        format!("--size={FILE}"),
        format!("--ioengine={engine}"),
        "--direct=1".into(),
        "--output-format=json".into(),
    ];
    if timed {
        arguments.extend(["--time_based=1".into(), "--runtime=5".into()]);
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let report: Value = serde_json::from_str(&run_tool("fio", &arguments)).expect("fio prints JSON");
    let side = if workload.rw.ends_with("read") { "read" } else { "write" };
    report["jobs"][0][side]["bw_bytes"].as_f64().expect("a bandwidth") / 1e6
}
