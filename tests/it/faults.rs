//! Nodes that die and come back.

use std::fs::{self, File};
use std::io::Write;

use cluster_tests::{Cluster, Ctl, Guest};
use tempfile::TempDir;

use crate::{device_present, text};

// Invariants A1 and D5: the dead coordinator is fenced before its volume is served by another node under a new term.
#[test]
fn a_killed_coordinator_loses_nothing_that_was_acknowledged() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let owner =
        cluster.ctl(1).must(&["volume", "show", "vol1"])["owner"].as_str().expect("an owner").to_owned();
    let old = (1..=3).find(|node| cluster.name(*node) == owner).expect("the owner is a node");
    let survivor = old % 3 + 1;
    for number in 0..30 {
        let mut file = File::create(cluster.mount(survivor).join(format!("kept-{number}"))).unwrap();
        file.write_all(&vec![7; 10_000 + number]).unwrap();
        file.sync_all().unwrap();
    }
    cluster.fault(old, "kill");
    // The call is held, not failed, until the volume has a new coordinator.
    fs::write(cluster.mount(survivor).join("after the crash"), b"works").unwrap();
    for number in 0..30 {
        let found = fs::read(cluster.mount(survivor).join(format!("kept-{number}"))).unwrap();
        assert!(found == vec![7; 10_000 + number], "kept-{number} differs");
    }
    let events = cluster.ctl(survivor).must(&["events"]).to_string();
    assert!(events.contains("fence"), "the fence is in the events: {events}");
    cluster.start_node(old);
    assert_eq!(fs::read(cluster.mount(old).join("after the crash")).unwrap(), b"works");
    let report = cluster.ctl(old).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}

#[test]
fn a_whole_cluster_restarts_without_hands() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    fs::write(cluster.mount(2).join("before"), b"kept").unwrap();
    let dir = text(cluster.dir()).to_owned();
    Ctl::local().must(&["dev", "down", "--dir", &dir]);
    assert!(!cluster.mount(2).join("before").exists(), "nothing is mounted after dev down");
    Ctl::local().must(&["dev", "up", "--dir", &dir]);
    assert_eq!(fs::read(cluster.mount(3).join("before")).unwrap(), b"kept");
}

#[test]
fn a_cluster_that_goes_down_stops_its_vms_in_order_and_leaves_nothing() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    for image in ["system.vhdx", "scratch.vhdx"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image)), "--size", "32M"]);
    }
    let guest = Guest::start(&cluster, "evening", "system.vhdx", "scratch.vhdx", 1024);
    let acked = guest.progress(&cluster, 1, 0);
    cluster.ctl(1).must(&["volume", "move", "vol1", "--to", &cluster.name(2)]);
    fs::write(cluster.mount(3).join("last words"), b"kept").unwrap();
    let dir = text(cluster.dir()).to_owned();
    Ctl::local().must(&["dev", "down", "--dir", &dir]);
    for number in 1..=3 {
        let node = cluster.dir().join(cluster.name(number));
        assert!(!node.join("csvd.sock").exists() && !node.join("hv/node.sock").exists(), "node {number}");
        let of_vms = fs::read_dir(node.join("vm")).unwrap().flatten().map(|entry| entry.path());
        let left: Vec<_> = of_vms.filter(|path| path.extension().is_none_or(|kind| kind != "log")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    Ctl::local().must(&["dev", "up", "--dir", &dir]);
    assert_eq!(cluster.ctl(1).must(&["vm", "show", "evening"])["state"], "stopped");
    assert_eq!(fs::read(cluster.mount(1).join("last words")).unwrap(), b"kept");
    let folder = TempDir::new().unwrap();
    let _ = guest.verify(&cluster, "scratch.vhdx", acked, folder.path());
}

#[test]
fn a_cluster_whose_lun_is_gone_says_so_and_starts_again_when_it_is_back() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    fs::write(cluster.mount(1).join("before"), b"kept").unwrap();
    let dir = text(cluster.dir()).to_owned();
    Ctl::local().must(&["dev", "down", "--dir", &dir]);
    let aside = cluster.dir().join("aside.img");
    fs::rename(cluster.lun(), &aside).unwrap();
    let refused = Ctl::local().run(&["dev", "up", "--dir", &dir]).unwrap_err();
    assert_eq!(refused.code, 3, "{refused}");
    assert!(refused.message().contains("lun.img") && !cluster.lun().exists(), "{refused}");
    fs::rename(&aside, cluster.lun()).unwrap();
    Ctl::local().must(&["dev", "up", "--dir", &dir]);
    assert_eq!(fs::read(cluster.mount(3).join("before")).unwrap(), b"kept");
}
