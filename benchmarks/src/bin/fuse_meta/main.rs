//! Names and attributes through the mounts, beside GlusterFS with one brick on the same disk: create, stat, rename, unlink by
//! 1, 8 and 64 workers, on one node and on several; then `ls -l` of a large directory, cold and warm.
//!
//! Each worker has a folder of its own. Each change is made durable when it counts: the program flushes the new file, or the
//! directory, on both sides.
//! GlusterFS has two mounts, so that "3 nodes" are two of it.
//!
//! `fuse_meta [--full]`: 4,000 files for each line and 100,000 entries, instead of 500 and 10,000. Figures are printed as soon as
//! they are there. All of it runs in namespaces of its own, so that nothing of GlusterFS stays behind.
//!
//! Goals: 10 times GlusterFS with 8 and more workers, 3 times with one; 10 times for the listing.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for people at a terminal")]

mod gluster;
mod work;

use std::path::PathBuf;
use std::process::ExitCode;

use benchmarks::{Row, print_heading, print_row, run_apart};
use cluster_tests::Cluster;
use gluster::Gluster;
use work::{list, names, with_directory};

const WORKERS: [usize; 3] = [1, 8, 64];

struct Size {
    /// For each line, by all workers together.
    files: usize,
    entries: usize,
}

const SHORT: Size = Size { files: 500, entries: 10_000 };
const FULL: Size = Size { files: 4000, entries: 100_000 };

fn main() -> ExitCode {
    let size = match std::env::args().nth(1).as_deref() {
        None => SHORT,
        Some("--full") => FULL,
        Some(other) => {
            eprintln!("{other}: not known; use --full, for larger numbers");
            return ExitCode::from(2);
        }
    };
    if let Err(error) = run_apart() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let gluster = Gluster::start();
    if gluster.is_none() {
        println!("GlusterFS cannot be measured here: install glusterfs-server");
    }
    let theirs = gluster.as_ref().map(Gluster::mounts);
    let cluster = Cluster::with_usual_times("8G");
    let ours: Vec<PathBuf> = (1..=3).map(|node| cluster.mount(node)).collect();
    print_heading("names and attributes, operations or entries per second", "GlusterFS", "mount");
    for nodes in [1, 3] {
        for workers in WORKERS {
            changes(theirs.as_deref(), &ours, (nodes, workers), size.files);
        }
    }
    listings(theirs.as_deref(), &ours, size.entries);
    println!("reproduce: cargo xtask bench fuse_meta");
    ExitCode::SUCCESS
}

/// The rows of so many nodes and workers.
fn changes(theirs: Option<&[PathBuf]>, ours: &[PathBuf], (nodes, workers): (usize, usize), files: usize) {
    let of = |mounts: &[PathBuf]| names(&mounts[..nodes.min(mounts.len())], workers, files);
    let (theirs, ours) = (theirs.map(of), of(ours));
    let goal = if workers == 1 { 3.0 } else { 10.0 };
    for (at, (what, ours)) in ours.into_iter().enumerate() {
        let base = theirs.map_or(0.0, |theirs| theirs[at].1);
        let name = format!("{what}, workers {workers}, nodes {nodes}");
        print_row(&Row { name, base, ours, goal });
    }
}

/// `ls -l` of a directory that another mount has filled: cold, then warm.
fn listings(theirs: Option<&[PathBuf]>, ours: &[PathBuf], entries: usize) {
    let twice = |mounts: &[PathBuf]| {
        with_directory(&mounts[0], &mounts[1], entries, |folder| [(); 2].map(|()| list(folder, entries)))
    };
    let (theirs, ours) = (theirs.map(twice), twice(ours));
    for (at, what) in ["cold", "warm"].into_iter().enumerate() {
        let (name, base) = (format!("ls -l of {entries}, {what}"), theirs.map_or(0.0, |theirs| theirs[at]));
        print_row(&Row { name, base, ours: ours[at], goal: 10.0 });
    }
}
