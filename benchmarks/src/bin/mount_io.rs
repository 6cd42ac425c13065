//! The FUSE mount beside the raw device: fio on a file of node 1's mount, and on a raw file of the same disk, in turn.
//!
//! Goals: 1 MiB sequential at least 0.8 of raw; 4 KiB at queue depth 32 at least 0.5 for reads and 0.3 for writes.
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

use std::fs;
use std::path::Path;

use benchmarks::{Job, Row, median, print_table};
use cluster_tests::Cluster;

/// Bytes of the file under test.
const FILE: &str = "1g";
/// Rounds; the median counts.
const ROUNDS: usize = 3;
/// Length of one.
const SECONDS: Option<&str> = Some("5");

const WORKLOADS: &[Job] = &[
    Job::of("1 MiB sequential write", "write", "1m", 8, 0.8),
    Job::of("1 MiB sequential read", "read", "1m", 8, 0.8),
    Job::of("4 KiB random read, depth 32", "randread", "4k", 32, 0.5),
    Job::of("4 KiB random write, depth 32", "randwrite", "4k", 32, 0.3),
];

fn main() {
    let cluster = Cluster::with_usual_times("4G");
    let raw = cluster.dir().join("raw.img");
    let mounted = cluster.mount(1).join("bench.img");
    for file in [&raw, &mounted] {
        // Every block is written once, so that both sides read and overwrite allocated blocks.
        let _rate = WORKLOADS[0].run(file, FILE, "io_uring", None);
    }
    let rows: Vec<Row> = WORKLOADS.iter().map(|workload| measure(workload, &raw, &mounted)).collect();
    print_table("FUSE mount against a raw file on the same disk (MB/s)", "raw", "mount", &rows);
    for file in [&raw, &mounted] {
        fs::remove_file(file).expect("the benchmark's file");
    }
    println!("reproduce: cargo xtask bench mount_io");
}

fn measure(workload: &Job, raw: &Path, mounted: &Path) -> Row {
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        figures[0].push(workload.run(raw, FILE, "io_uring", SECONDS));
        figures[1].push(workload.run(mounted, FILE, "libaio", SECONDS));
    }
    let [mut base, mut ours] = figures;
    Row { name: workload.name.into(), base: median(&mut base), ours: median(&mut ours), goal: workload.goal }
}
