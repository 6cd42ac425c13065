//! A planned move of the coordinator under load: no I/O error, no wrong byte, a reported pause.

use std::fs::{self, File};
use std::io::Write;
use std::process::{Child, Command, Stdio};

use cluster_tests::Cluster;

use crate::{device_present, text};

/// A fio that writes with checksums and verifies them, on the mount of `node`.
fn verifying_load(cluster: &Cluster, node: usize) -> Child {
    let folder = cluster.mount(node);
    Command::new("fio")
        .args([
            "--name=verify",
            "--rw=randrw",
            "--bs=4k-64k",
            "--size=48m",
            "--io_size=192m",
            "--ioengine=libaio",
            "--iodepth=8",
        ])
        .args([
            "--direct=1",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_backlog=256",
            "--fsync=64",
            "--output-format=json",
        ])
        .arg(format!("--directory={}", text(&folder)))
        .arg(format!("--aux-path={}", text(&folder)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("fio can be started")
}

#[test]
fn a_move_under_a_verifying_load_disturbs_no_application() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let load = verifying_load(&cluster, 3);
    let mut term = 0;
    for to in [2, 1, 2] {
        let moved = cluster.ctl(1).must(&["volume", "move", "vol1", "--to", &cluster.name(to)]);
        assert_eq!(moved["to"], cluster.name(to).as_str(), "{moved}");
        assert!(moved["pause_ms"].is_number() && moved["held_ops"].is_number(), "{moved}");
        let new_term = moved["term"].as_u64().expect("a term");
        assert!(new_term > term, "each move is a new term: {moved}");
        // Whoever was told that the move is done finds a healthy cluster.
        cluster.ctl(1).must(&["health"]);
        term = new_term;
        fs::write(cluster.mount(1).join(format!("after-{new_term}")), b"metadata works").unwrap();
    }
    let done = load.wait_with_output().expect("fio ends");
    let report = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "fio found an error: {report}{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn after_a_move_the_old_coordinator_may_go_and_nothing_is_lost() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let owner =
        cluster.ctl(1).must(&["volume", "show", "vol1"])["owner"].as_str().expect("an owner").to_owned();
    let old = (1..=3).find(|node| cluster.name(*node) == owner).expect("the owner is a node");
    let (new, other) = (old % 3 + 1, (old + 1) % 3 + 1);
    for number in 0..50 {
        let mut file = File::create(cluster.mount(new).join(format!("durable-{number}"))).unwrap();
        file.write_all(format!("content {number}").as_bytes()).unwrap();
        file.sync_all().unwrap();
    }
    cluster.ctl(other).must(&["volume", "move", "vol1", "--to", &cluster.name(new)]);
    cluster.fault(old, "kill");
    for number in 0..50 {
        let path = cluster.mount(other).join(format!("durable-{number}"));
        assert_eq!(fs::read_to_string(path).unwrap(), format!("content {number}"));
    }
    fs::write(cluster.mount(other).join("goes on"), b"yes").unwrap();
    let report = cluster.ctl(other).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}

// Invariant D5: the old coordinator never opens its term again, whatever became of the new one.
#[test]
fn a_move_to_a_node_that_freezes_ends_with_one_coordinator_and_nothing_lost() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let shown = cluster.ctl(1).must(&["volume", "show", "vol1"]);
    let old =
        (1..=3).find(|node| shown["owner"] == cluster.name(*node).as_str()).expect("the owner is a node");
    let (frozen, other) = (old % 3 + 1, (old + 1) % 3 + 1);
    fs::write(cluster.mount(other).join("before"), b"kept").unwrap();
    cluster.fault(frozen, "stop");
    // It may be refused already, or be decided and then fail: what counts is what is left.
    let moved = cluster.ctl(other).run(&["volume", "move", "vol1", "--to", &cluster.name(frozen)]);
    assert!(moved.is_err(), "a frozen node does not serve: {moved:?}");
    // Held, not failed, until somebody serves again.
    fs::write(cluster.mount(other).join("after"), b"works").unwrap();
    assert_eq!(fs::read(cluster.mount(old).join("after")).unwrap(), b"works");
    assert_eq!(fs::read(cluster.mount(old).join("before")).unwrap(), b"kept");
    let report = cluster.ctl(old).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}
