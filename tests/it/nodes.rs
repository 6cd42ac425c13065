//! Nodes that freeze, are cut off, or take a VM with them.

use std::fs;

use cluster_tests::{Cluster, Ctl, Guest, run_tool, until};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

fn node_state(cluster: &Cluster, asked: usize, node: usize) -> String {
    let nodes = cluster.ctl(asked).must(&["node", "list"]);
    let name = cluster.name(node);
    let found = nodes["nodes"].as_array().expect("nodes").iter().find(|node| node["name"] == name.as_str());
    found.expect("the node is listed")["state"].as_str().expect("a state").to_owned()
}

// Invariants A7, B1 and B3: without a majority a node stops writing by itself, and it can fence nobody.
#[test]
fn a_node_that_is_cut_off_waits_and_goes_on_when_the_network_is_back() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let row = |ctl: &Ctl| {
        let states = ctl.must(&["volume", "state", "vol1", "--node", &cluster.name(3)]);
        states["states"][0].clone()
    };
    cluster.fault(3, "partition");
    until("the end of the lease", || row(&cluster.ctl(3)), |row| row["code"] == "no_lease");
    std::thread::scope(|scope| {
        let file = cluster.mount(3).join("held");
        let write = scope.spawn(move || fs::write(file, b"held, not lost"));
        fs::write(cluster.mount(1).join("others go on"), b"yes").unwrap();
        assert!(!write.is_finished(), "a node without a lease wrote");
        assert_eq!(node_state(&cluster, 1, 3), "unreachable", "it still beats on the LUN: cut off, not dead");
        cluster.fault(3, "heal");
        write.join().unwrap().unwrap();
    });
    assert_eq!(fs::read(cluster.mount(2).join("held")).unwrap(), b"held, not lost");
    assert_eq!(fs::read(cluster.mount(3).join("others go on")).unwrap(), b"yes");
    until("the way back", || node_state(&cluster, 1, 3).into(), |state| state == "up");
}

// Invariants A1 and A3: a frozen node is ended before others act for it, and comes back only with a new epoch.
#[test]
fn a_frozen_node_is_cut_off_and_comes_back_as_a_new_incarnation() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    cluster.ctl(1).must(&["volume", "move", "vol1", "--to", &cluster.name(2)]);
    cluster.fault(2, "stop");
    // Held until the frozen coordinator is certain to be dead and another one serves.
    fs::write(cluster.mount(1).join("after the freeze"), b"works").unwrap();
    assert_eq!(node_state(&cluster, 1, 2), "fenced");
    let dir = text(cluster.dir());
    let refused = Ctl::local().run(&["dev", "fault", &cluster.name(2), "cont", "--dir", dir]).unwrap_err();
    assert_eq!(refused.code, 4, "the frozen process is gone: {refused}");
    cluster.start_node(2);
    assert_eq!(node_state(&cluster, 2, 2), "up");
    assert_eq!(fs::read(cluster.mount(2).join("after the freeze")).unwrap(), b"works");
    assert_eq!(cluster.ctl(3).must(&["health"])["status"], "ok");
}

// Invariant H6: after a fault the VM runs in one place, or is stopped with a reason that the user can read.
#[test]
fn a_vm_of_a_dead_node_is_failed_with_its_reason_and_what_it_wrote_is_there() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    for image in ["dying-system.vhdx", "dying-scratch.vhdx"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image)), "--size", "32M"]);
    }
    let stays = ["--on-node-loss", "stay"];
    let guest = Guest::start_with(&cluster, "dying", "dying-system.vhdx", "dying-scratch.vhdx", 1024, &stays);
    let acked = guest.progress(&cluster, 1, 100);
    cluster.fault(1, "kill");
    let vm =
        until("the verdict", || cluster.ctl(2).must(&["vm", "show", "dying"]), |vm| vm["state"] == "failed");
    assert!(vm["reason"].as_str().expect("a reason").contains(&cluster.name(1)), "{vm}");
    let folder = TempDir::new().unwrap();
    let _ = guest.verify_crashed(&cluster, "dying-scratch.vhdx", acked, folder.path());
    let started = cluster.ctl(2).must(&["vm", "start", "dying"]);
    assert_eq!((&started["state"], &started["owner"]), (&"running".into(), &cluster.name(2).into()));
    cluster.ctl(3).must(&["vm", "stop", "dying"]);
}

// Invariant H1: what ran on a dead node runs again on exactly one other, by itself, from what it had acknowledged.
#[test]
fn a_vm_of_a_dead_node_runs_again_on_another_node_by_itself() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    for image in ["ha-system.vhdx", "ha-scratch.vhdx"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image)), "--size", "32M"]);
    }
    let guest = Guest::start(&cluster, "ha", "ha-system.vhdx", "ha-scratch.vhdx", 1024);
    let _ = guest.progress(&cluster, 1, 100);
    let before = cluster.ctl(2).must(&["vm", "show", "ha"])["epoch"].as_u64().expect("an epoch");
    cluster.fault(1, "kill");
    let elsewhere = |vm: &Value| vm["state"] == "running" && vm["owner"] != cluster.name(1).as_str();
    let vm = until("the restart", || cluster.ctl(2).must(&["vm", "show", "ha"]), elsewhere);
    assert!(vm["epoch"].as_u64() > Some(before), "a restart is a new epoch: {vm}");
    let acked = guest.progress(&cluster, 2, 100);
    let events = cluster.ctl(3).must(&["events"]).to_string();
    assert!(events.contains("vm.restarted"), "{events}");
    cluster.ctl(3).must(&["vm", "stop", "ha"]);
    let folder = TempDir::new().unwrap();
    let _ = guest.verify(&cluster, "ha-scratch.vhdx", acked, folder.path());
}

// Invariant H7: a node with another cluster's certificate is told so at once, and the others do not notice it.
#[test]
fn a_node_with_a_foreign_certificate_says_so_and_disturbs_nobody() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (cluster, other) = (Cluster::start("1G"), Cluster::start("1G"));
    let folder = |cluster: &Cluster| cluster.dir().join(cluster.name(3));
    cluster.fault(3, "kill");
    let kept = TempDir::new().unwrap();
    for file in ["node.crt", "node.key", "ca.key"] {
        fs::copy(folder(&cluster).join(file), kept.path().join(file)).unwrap();
    }
    for file in ["node.crt", "node.key"] {
        fs::copy(folder(&other).join(file), folder(&cluster).join(file)).unwrap();
    }
    // With the authority's key it would make itself a good one.
    fs::remove_file(folder(&cluster).join("ca.key")).unwrap();
    until("the verdict", || node_state(&cluster, 1, 3).into(), |state| state == "fenced");
    let dir = text(cluster.dir());
    let refused = Ctl::local().run(&["dev", "start", &cluster.name(3), "--dir", dir]).unwrap_err();
    assert!(refused.message().contains("certificate") && !refused.hint().is_empty(), "{refused}");
    fs::write(cluster.mount(1).join("undisturbed"), b"yes").unwrap();
    assert_eq!(fs::read(cluster.mount(2).join("undisturbed")).unwrap(), b"yes");
    cluster.fault(3, "kill");
    for file in ["node.crt", "node.key", "ca.key"] {
        fs::copy(kept.path().join(file), folder(&cluster).join(file)).unwrap();
    }
    cluster.start_node(3);
    assert_eq!(fs::read(cluster.mount(3).join("undisturbed")).unwrap(), b"yes");
}

// Invariant G1: a node that ends in order gives its volumes away first; a cluster that ends as a whole leaves nobody waiting.
#[test]
fn nodes_that_leave_hand_over_or_end_together_without_being_killed() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let log = |node: usize| {
        fs::read_to_string(cluster.dir().join(cluster.name(node)).join("log/csvd.log")).unwrap_or_default()
    };
    let pid = |node: usize| cluster.info()["nodes"][node - 1]["pid"].as_i64().expect("a pid");
    cluster.ctl(1).must(&["volume", "move", "vol1", "--to", &cluster.name(2)]);
    run_tool("kill", &["-TERM", &pid(2).to_string()]);
    let owner = || cluster.ctl(1).must(&["volume", "show", "vol1"])["owner"].clone();
    until("the hand-over", owner, |owner| *owner != cluster.name(2).as_str());
    fs::write(cluster.mount(3).join("after"), b"nobody noticed").unwrap();
    let events = cluster.ctl(1).must(&["events"]).to_string();
    assert!(!events.contains("fencing"), "a node that leaves in order is not fenced: {events}");
    until("the end of the node", || log(2).contains("csvd::daemon: ended").into(), |ended| *ended == true);
    cluster.start_node(2);

    for node in 1..=3 {
        fs::write(cluster.mount(node).join(format!("last-{node}")), vec![1; 300_000]).unwrap();
    }
    Ctl::local().must(&["dev", "down", "--dir", text(cluster.dir())]);
    for node in 1..=3 {
        let log = log(node);
        let last = log.rsplit("asked to end").next().expect("split gives one").to_owned();
        assert!(last.contains("unmounted") && last.contains("csvd::daemon: ended"), "node {node}: {last}");
    }
}
