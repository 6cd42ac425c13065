//! Nodes that lose their path to the LUN: they go on through a peer, visibly, and return by themselves.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use cluster_tests::{Cluster, Ctl, Guest, PATIENCE};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

const BLOCK: usize = 64 << 10;
const BLOCKS: u64 = 16;

/// A program that writes a file again and again and checks what it has written.
struct Load {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Result<u64, String>>,
}

impl Load {
    fn start(path: PathBuf) -> Self {
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted, file) = (Arc::clone(&stop), Arc::clone(&rounds), path.clone());
        let thread = std::thread::spawn(move || {
            let work = || -> std::io::Result<u64> {
                let mut file =
                    File::options().read(true).write(true).create(true).truncate(true).open(&file)?;
                let mut round = 0_u64;
                while !stopped.load(Ordering::Acquire) {
                    round += 1;
                    let at = round % BLOCKS * BLOCK as u64;
                    file.seek(SeekFrom::Start(at))?;
                    file.write_all(&block(round))?;
                    file.sync_data()?;
                    file.seek(SeekFrom::Start(at))?;
                    let mut found = vec![0; BLOCK];
                    file.read_exact(&mut found)?;
                    if found != block(round) {
                        return Err(std::io::Error::other(format!("round {round} reads something else")));
                    }
                    counted.store(round, Ordering::Release);
                }
                Ok(round)
            };
            work().map_err(|error| error.to_string())
        });
        Self { path, stop, rounds, thread }
    }

    /// Returns when the load has got so many rounds further.
    fn further(&self, rounds: u64) {
        let (from, started) = (self.rounds.load(Ordering::Acquire), Instant::now());
        while self.rounds.load(Ordering::Acquire) < from + rounds {
            assert!(!self.thread.is_finished(), "the load has met an error");
            assert!(started.elapsed() < PATIENCE, "the load does not get on");
            std::thread::yield_now();
        }
    }

    /// Ends it, and checks the file as `other` shows it.
    fn end(self, other: &Path) {
        self.stop.store(true, Ordering::Release);
        let last = self.thread.join().expect("no panic").expect("the application met no error");
        let bytes = fs::read(other.join(self.path.file_name().expect("a name"))).expect("readable elsewhere");
        for round in last.saturating_sub(BLOCKS - 1).max(1)..=last {
            let at = usize::try_from(round % BLOCKS).expect("small") * BLOCK;
            assert!(
                bytes[at..at + BLOCK] == block(round),
                "round {round} of {last} is not what is on the volume"
            );
        }
    }
}

fn block(round: u64) -> Vec<u8> {
    round.to_le_bytes().repeat(BLOCK / 8)
}

/// The row of a node, once its state is `wanted`.
fn until_state(cluster: &Cluster, node: usize, wanted: &str) -> Value {
    let started = Instant::now();
    loop {
        let rows = cluster.ctl(node).must(&["volume", "state", "vol1", "--node", &cluster.name(node)]);
        let row = rows["states"][0].clone();
        if row["state"] == wanted {
            return row;
        }
        assert!(started.elapsed() < PATIENCE, "not {wanted}: {row}");
    }
}

fn owner(cluster: &Cluster) -> usize {
    let owner =
        cluster.ctl(1).must(&["volume", "show", "vol1"])["owner"].as_str().expect("an owner").to_owned();
    (1..=3).find(|node| cluster.name(*node) == owner).expect("the owner is a node")
}

fn is_clean(cluster: &Cluster, node: usize) {
    let report = cluster.ctl(node).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}

fn lose_and_find(cluster: &Cluster, node: usize) {
    let load = Load::start(cluster.mount(node).join("load"));
    load.further(5);
    cluster.fault(node, "lun-fail");
    let row = until_state(cluster, node, "redirected_block");
    assert_eq!(row["code"], "path_lost", "{row}");
    assert!(row["reason"].as_str().is_some_and(|reason| reason.contains("through n")), "{row}");
    load.further(20);
    let row = until_state(cluster, node, "redirected_block");
    assert!(row["redirected_bytes"].as_u64().is_some_and(|bytes| bytes >= 20 * BLOCK as u64), "{row}");
    let health = cluster.ctl(node % 3 + 1).run(&["health"]).expect_err("degraded");
    assert_eq!(health.code, 6, "{health}");
    cluster.fault(node, "lun-heal");
    until_state(cluster, node, "direct");
    load.further(5);
    load.end(&cluster.mount(node % 3 + 1));
    let events = cluster.ctl(node % 3 + 1).must(&["events"]).to_string();
    assert!(events.contains("volume_redirected") && events.contains("volume_direct"), "{events}");
    is_clean(cluster, node);
}

// Invariant C9, and the promise that no application sees an error.
#[test]
fn a_node_that_loses_its_path_goes_on_through_a_peer_and_returns_by_itself() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let coordinator = owner(&cluster);
    lose_and_find(&cluster, coordinator % 3 + 1);
    // The coordinator's own store goes the same way.
    lose_and_find(&cluster, coordinator);
}

#[test]
fn a_peer_that_dies_is_replaced_by_another_and_a_cluster_without_paths_waits() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let node = owner(&cluster) % 3 + 1;
    let load = Load::start(cluster.mount(node).join("load"));
    load.further(3);
    cluster.fault(node, "lun-fail");
    let row = until_state(&cluster, node, "redirected_block");
    let through = (1..=3).find(|other| {
        row["reason"]
            .as_str()
            .is_some_and(|reason| reason.contains(&format!("through {}", cluster.name(*other))))
    });
    let through = through.expect("it is said through whom");
    cluster.fault(through, "kill");
    load.further(5);
    until_state(&cluster, node, "redirected_block");
    let last = (1..=3).find(|other| *other != node && *other != through).expect("three nodes");
    cluster.fault(last, "lun-fail");
    let row = until_state(&cluster, node, "paused");
    assert_eq!(row["code"], "no_path", "{row}");
    cluster.fault(last, "lun-heal");
    cluster.fault(node, "lun-heal");
    until_state(&cluster, node, "direct");
    load.further(5);
    cluster.start_node(through);
    load.end(&cluster.mount(through));
    is_clean(&cluster, through);
}

#[test]
fn the_way_is_chosen_by_hand_and_shown() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (node, name) = (2, cluster.name(2));
    let load = Load::start(cluster.mount(node).join("load"));
    load.further(3);
    let states = cluster.ctl(1).must(&["volume", "io-mode", "vol1", "redirected", "--node", &name]);
    assert_eq!(states["states"][0]["state"], "redirected_block", "{states}");
    assert_eq!(states["states"][0]["code"], "by_hand", "{states}");
    load.further(5);
    let states = cluster.ctl(3).must(&["volume", "io-mode", "vol1", "direct", "--node", &name]);
    assert_eq!(states["states"][0]["state"], "direct", "{states}");
    load.end(&cluster.mount(3));
    assert_eq!(cluster.ctl(1).run(&["volume", "io-mode", "vol2", "direct"]).unwrap_err().code, 3);
}

#[test]
fn a_vm_whose_node_loses_its_path_goes_on_and_loses_no_acknowledged_sector() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    for image in ["system.vhdx", "scratch.vhdx"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image)), "--size", "32M"]);
    }
    let guest = Guest::start(&cluster, "traveller", "system.vhdx", "scratch.vhdx", 1024);
    let before = guest.progress(&cluster, 1, 0);
    cluster.fault(1, "lun-fail");
    until_state(&cluster, 1, "redirected_block");
    let away = guest.progress(&cluster, 1, before.sequence + 20);
    cluster.fault(1, "lun-heal");
    until_state(&cluster, 1, "direct");
    let back = guest.progress(&cluster, 1, away.sequence + 20);
    cluster.ctl(1).must(&["vm", "stop", "traveller"]);
    let folder = TempDir::new().unwrap();
    guest.verify(&cluster, "scratch.vhdx", back, folder.path());
}
