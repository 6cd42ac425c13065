//! The FUSE mount beside libfuse's `passthrough_hp` and the raw disk: the same jobs of fio on each in turn, in one run.
//!
//! `passthrough_hp` is built from Debian's source package into `target/suites`. It is the reference for a FUSE filesystem that
//! does nothing but pass on, in its ordinary way (no kernel passthrough); its files lie on the disk on which our LUN lies.
//!
//! Each figure is the median of three rounds of one second, of three with `--full`, and is printed as soon as it is there. All of
//! it runs in namespaces of its own, so that no mount and no process stays behind.
//!
//! Goals: ahead of `passthrough_hp` in each case; of raw 0.9 for 1 MiB, 0.8 of reads and 0.5 of writes at depth 32; with caches,
//! where nothing changes, not behind it.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod cached;
mod passthrough;

use std::path::PathBuf;
use std::process::ExitCode;

use benchmarks::{Job, Row, median, print_heading, print_row, run_apart};
use cluster_tests::Cluster;
use passthrough::Passthrough;

/// Bytes of the file under test.
const FILE: &str = "512m";
/// Rounds; the median counts.
const ROUNDS: usize = 3;

const WORKLOADS: &[Job] = &[
    Job::of("1 MiB sequential write", "write", "1m", 8, 0.9),
    Job::of("1 MiB sequential read", "read", "1m", 8, 0.9),
    Job::of("4 KiB random read, depth 1", "randread", "4k", 1, 0.0),
    Job::of("4 KiB random write, depth 1", "randwrite", "4k", 1, 0.0),
    Job {
        sync: Some("fdatasync"),
        ..Job::of("4 KiB random write, fdatasync after each", "randwrite", "4k", 1, 0.0)
    },
    Job { sync: Some("fsync"), ..Job::of("4 KiB random write, fsync after each", "randwrite", "4k", 1, 0.0) },
    Job::of("4 KiB random read, depth 32", "randread", "4k", 32, 0.8),
    Job::of("4 KiB random write, depth 32", "randwrite", "4k", 32, 0.5),
];

fn main() -> ExitCode {
    let full = match std::env::args().nth(1).as_deref() {
        None => false,
        Some("--full") => true,
        Some(other) => {
            eprintln!("{other}: not known; use --full, for longer runs");
            return ExitCode::from(2);
        }
    };
    // Before the network is gone.
    if passthrough::program().is_none() {
        eprintln!(
            "passthrough_hp cannot be built here: it needs g++, libfuse3-dev, dpkg-dev and Debian's packages"
        );
        return ExitCode::FAILURE;
    }
    if let Err(error) = run_apart() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    measure_all(if full { "3" } else { "1" });
    ExitCode::SUCCESS
}

fn measure_all(seconds: &str) {
    let cluster = Cluster::with_usual_times("4G");
    let passthrough = Passthrough::start(cluster.dir()).expect("passthrough_hp is mounted, as root");
    let mounts = [passthrough.mount().to_owned(), cluster.mount(1)];
    let raw = cluster.dir().join("raw.img");
    let files: Vec<PathBuf> =
        std::iter::once(raw).chain(mounts.iter().map(|mount| mount.join("bench.img"))).collect();
    // Every block is written once, so that all sides read and overwrite allocated blocks.
    for file in &files {
        let _rate = WORKLOADS[0].run(file, FILE, "libaio", None);
    }
    print_heading("direct (MB/s), beside the raw file, then beside passthrough_hp", "beside", "mount");
    for workload in WORKLOADS {
        let [raw, passthrough, ours] = measure(workload, &files, seconds);
        let row = |name: &str, base, goal| Row { name: name.into(), base, ours, goal };
        print_row(&row(workload.name, raw, workload.goal));
        print_row(&row("    beside passthrough_hp", passthrough, 1.0));
    }
    print_heading("with caches (operations per second), beside passthrough_hp", "beside", "mount");
    cached::measure(&mounts, print_row);
    println!("reproduce: cargo xtask bench fuse_io");
}

fn measure(workload: &Job, files: &[PathBuf], seconds: &str) -> [f64; 3] {
    let mut figures = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (side, file) in files.iter().enumerate() {
            figures[side].push(workload.run(file, FILE, "libaio", Some(seconds)));
        }
    }
    figures.map(|mut side| median(&mut side))
}
