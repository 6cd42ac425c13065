//! Nodes that are emptied for maintenance and get back what they had, under load; nodes that leave for good.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use cluster_tests::{Cluster, Ctl, Guest, Host, binary, until};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

fn node(ctl: &Ctl, name: &str) -> Value {
    let nodes = ctl.must(&["node", "list"]);
    let found = nodes["nodes"].as_array().expect("nodes").iter().find(|node| node["name"] == name);
    found.cloned().unwrap_or(Value::Null)
}

fn images(cluster: &Cluster, name: &str) -> [String; 2] {
    ["system", "scratch"].map(|kind| {
        let image = format!("{name}-{kind}.vhdx");
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(&image)), "--size", "32M"]);
        image
    })
}

fn is_clean(cluster: &Cluster, node: usize) {
    let report = cluster.ctl(node).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}

/// A program that rewrites and checks a file until it is told to stop.
struct Load {
    file: PathBuf,
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<std::io::Result<u64>>,
}

impl Load {
    fn start(file: PathBuf) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (stopped, at) = (std::sync::Arc::clone(&stop), file.clone());
        let thread = std::thread::spawn(move || {
            let mut round = 0_u64;
            while !stopped.load(std::sync::atomic::Ordering::Acquire) {
                round += 1;
                // Metadata and data, each time: a new file, written, renamed over the old one, read back.
                let fresh = at.with_extension("new");
                fs::write(&fresh, round.to_le_bytes().repeat(1000))?;
                fs::rename(&fresh, &at)?;
                let found = fs::read(&at)?;
                if found != round.to_le_bytes().repeat(1000) {
                    return Err(std::io::Error::other(format!("round {round} reads something else")));
                }
            }
            Ok(round)
        });
        Self { file, stop, thread }
    }

    fn end(self) {
        self.stop.store(true, std::sync::atomic::Ordering::Release);
        let rounds = self.thread.join().expect("no panic").expect("the application met no error");
        assert!(rounds > 1, "{} was written", self.file.display());
    }
}

// Invariant G1: what a node had moves away and comes back, and nobody who uses it sees an error.
#[test]
fn a_drained_node_is_empty_until_it_is_resumed_and_nobody_sees_an_error() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (n1, ctl) = (cluster.name(1), cluster.ctl(2));
    ctl.run(&["volume", "move", "vol1", "--to", &n1]).ok();
    let [system, scratch] = images(&cluster, "worker");
    let guest = Guest::start(&cluster, "worker", &system, &scratch, 1024);
    let before = guest.progress(&cluster, 1, 0);
    let loads: Vec<_> = (1..=3).map(|n| Load::start(cluster.mount(n).join(format!("load-{n}")))).collect();

    let rehearsed = ctl.must(&["node", "drain", &n1, "--dry-run"]);
    assert_eq!((&rehearsed["volumes"][0], &rehearsed["vms"][0]), (&"vol1".into(), &"worker".into()));
    assert_eq!(node(&ctl, &n1)["drain"], "", "a dry run changes nothing");

    let drained = ctl.must(&["node", "drain", &n1]);
    assert_eq!((&drained["phase"], &drained["volumes_moved"]), (&"drained".into(), &1.into()), "{drained}");
    assert_eq!(drained["vms_moved"], 1, "{drained}");
    assert_ne!(ctl.must(&["vm", "show", "worker"])["owner"], n1.as_str());
    assert_ne!(ctl.must(&["volume", "show", "vol1"])["owner"], n1.as_str());
    let away = guest.progress(&cluster, 2, before.sequence);
    let refused = [
        ctl.run(&["volume", "move", "vol1", "--to", &n1]).expect_err("drained"),
        ctl.run(&["vm", "migrate", "worker", "--to", &n1]).expect_err("drained"),
    ];
    for refused in refused {
        assert!(refused.code == 4 && refused.hint().contains("node resume"), "{refused}");
    }
    let health = ctl.run(&["health"]).expect_err("degraded");
    assert_eq!(health.code, 6, "{health}");
    let events = ctl.must(&["events"]).to_string();
    assert!(events.contains(&format!("because node {n1} is drained")), "the moves say why: {events}");
    assert!(events.contains("node.drained"), "{events}");

    let resumed = ctl.must(&["node", "resume", &n1]);
    assert_eq!((&resumed["phase"], &resumed["done"]), (&"resumed".into(), &true.into()), "{resumed}");
    assert_eq!(ctl.must(&["vm", "show", "worker"])["owner"], n1.as_str(), "it is back");
    assert_eq!(ctl.must(&["volume", "show", "vol1"])["owner"], n1.as_str(), "it is back");
    let back = guest.progress(&cluster, 1, away.sequence);
    loads.into_iter().for_each(Load::end);
    ctl.must(&["vm", "stop", "worker"]);
    guest.verify(&cluster, &scratch, back, TempDir::new().unwrap().path());
    is_clean(&cluster, 1);
    let again = ctl.run(&["node", "resume", &n1]).expect_err("not drained");
    assert_eq!(again.code, 4, "{again}");
    assert_eq!(ctl.run(&["node", "drain", "n9"]).expect_err("no such node").code, 3);
}

// Invariant G1: a node that dies in the middle of its drain is empty when it comes back, and stays so.
#[test]
fn a_drain_goes_on_after_the_death_of_its_node() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (n1, ctl) = (cluster.name(1), cluster.ctl(2));
    let [system, scratch] = images(&cluster, "worker");
    let guest = Guest::start(&cluster, "worker", &system, &scratch, 1024);
    let _ = guest.progress(&cluster, 1, 0);
    // The move of the VM is held half-way, so that the node dies in the middle of it.
    cluster.hold(1, "copy");
    let draining = Command::new(binary("csvctl"))
        .args(["--connect", text(&cluster.dir().join(cluster.name(2)).join("csvd.sock"))])
        .args(["--json", "node", "drain", &n1])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("csvctl can be started");
    until("the drain", || node(&ctl, &n1), |node| node["drain"] == "draining");
    cluster.fault(1, "kill");
    let done = draining.wait_with_output().expect("it ends").status;
    assert!(done.success(), "a node that is gone is empty when the others have what it had: {done}");
    let elsewhere = |vm: &Value| vm["state"] == "running" && vm["owner"] != n1.as_str();
    until("the restart of the VM", || ctl.must(&["vm", "show", "worker"]), elsewhere);
    cluster.start_node(1);
    assert_eq!(node(&ctl, &n1)["drain"], "drained", "it is not used before it is resumed");
    let refused = cluster.ctl(1).run(&["vm", "migrate", "worker", "--to", &n1]).expect_err("drained");
    assert_eq!(refused.code, 4, "{refused}");
    ctl.must(&["node", "resume", &n1]);
    let acked = guest.progress(&cluster, 1, 0);
    ctl.must(&["vm", "stop", "worker"]);
    guest.verify(&cluster, &scratch, acked, TempDir::new().unwrap().path());
}

// What cannot move is named, and moves when its user has put it right.
#[test]
fn a_vm_that_cannot_move_is_named_and_the_drain_waits_for_it() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (n1, ctl) = (cluster.name(1), cluster.ctl(2));
    let [system, scratch] = images(&cluster, "still");
    let guest = Guest::start(&cluster, "still", &system, &scratch, 1024);
    let before = guest.progress(&cluster, 1, 0);
    ctl.must(&["vm", "pause", "still"]);
    let refused = ctl.run(&["node", "drain", &n1]).expect_err("it is not empty");
    assert!(refused.code == 4 && refused.message().contains("vm still: it is paused"), "{refused}");
    assert_eq!(node(&ctl, &n1)["drain"], "draining");
    ctl.must(&["vm", "resume", "still"]);
    until("the rest of the drain", || node(&ctl, &n1), |node| node["drain"] == "drained");
    let after = guest.progress(&cluster, 2, before.sequence);
    ctl.must(&["vm", "stop", "still"]);
    guest.verify(&cluster, &scratch, after, TempDir::new().unwrap().path());
}

// The others keep their majority: of three nodes one leaves, then of two, and the last one goes on alone.
#[test]
fn nodes_leave_one_by_one_and_keep_no_key() {
    if !device_present("/dev/fuse") {
        return;
    }
    let mut hosts = crate::members::three();
    let lun = TempDir::new().expect("a folder");
    crate::members::with_volume(&hosts, &lun);
    for leaver in [2, 1] {
        let name = ["a", "b", "c"][leaver];
        hosts[0].ctl().run(&["volume", "move", "vol1", "--to", name]).ok();
        let left = hosts[leaver].ctl().must(&["node", "leave"]);
        assert_eq!(left["phase"], "drained", "{left}");
        for secret in ["node.key", "ca.key", "csvd.toml"] {
            assert!(!hosts[leaver].dir().join(secret).exists(), "{secret} is left behind");
        }
        hosts[leaver].kill();
        until("being forgotten", || node(&hosts[0].ctl(), name), Value::is_null);
        fs::write(hosts[0].mount("vol1").join(format!("after-{name}")), b"served").expect("written");
    }
    let refused = hosts[0].ctl().run(&["node", "leave"]).expect_err("the last one");
    assert_eq!(refused.code, 4, "{refused}");
    let token = hosts[0].token();
    let d = Host::join("d", &token);
    d.ctl().must(&["cluster", "wait", "--volume", "vol1"]);
    assert_eq!(fs::read(d.mount("vol1").join("after-b")).expect("read"), b"served");
}
