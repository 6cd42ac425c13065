//! What comes back by itself: VMs after failed restarts and after a power cut of all nodes, the cluster after its voters have
//! changed while a part of it was cut off.

use std::fs;

use cluster_tests::{Ctl, Host, until};
use serde_json::Value;
use tempfile::TempDir;

use crate::members::{three, voters, with_volume};
use crate::{device_present, text};

fn vm(host: &Host, name: &str) -> Value {
    host.ctl().run(&["vm", "show", name]).unwrap_or_else(|error| error.to_string().into())
}

fn runs_on(node: &'static str) -> impl Fn(&Value) -> bool {
    move |vm| vm["state"] == "running" && vm["owner"] == node
}

/// A VM on `host` that keeps its clock going, with a disk that it does not look at.
fn start_vm(host: &Host, name: &str) {
    let image = host.mount("vol1").join(format!("{name}.vhdx"));
    Ctl::local().must(&["vhdx", "create", text(&image), "--size", "32M"]);
    let create =
        ["vm", "create", name, "--memory", "16M", "--kernel", "builtin:clock", "--disk", text(&image)];
    host.ctl().must(&create);
    host.ctl().must(&["vm", "start", name]);
}

// Invariant H1: a node that cannot start a VM gives it to the next one; it runs in one place.
#[test]
fn a_vm_that_one_node_cannot_restart_runs_on_the_next_one() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let (mut hosts, lun) = (three(), TempDir::new().expect("a folder"));
    // The node that gets it first has no program to run it with.
    hosts[1].stop();
    hosts[1].set_env("CSV_HV", "/nonexistent/hv");
    hosts[1].start();
    voters(&hosts[0], &["a", "b", "c"]);
    with_volume(&hosts, &lun);
    start_vm(&hosts[0], "web");
    hosts[0].kill();
    let [_, b, c] = &hosts;
    let in_quarantine = |nodes: &Value| {
        nodes["nodes"].as_array().is_some_and(|all| all.iter().any(|node| node["state"] == "fence_failed"))
    };
    until("the verdict", || b.ctl().must(&["node", "list"]), in_quarantine);
    b.ctl().must(&["node", "confirm-dead", "a"]);
    until("the restart", || vm(c, "web"), runs_on("c"));
    let events = c.ctl().must(&["events"]).to_string();
    assert!(events.contains("restart on node b failed"), "who could not, and why, is on record: {events}");
    c.ctl().must(&["vm", "stop", "web"]);
}

// The records carry the wish: nobody has to start anything again.
#[test]
fn vms_run_again_after_a_power_cut_of_the_whole_cluster() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let (mut hosts, lun) = (three(), TempDir::new().expect("a folder"));
    with_volume(&hosts, &lun);
    start_vm(&hosts[1], "web");
    start_vm(&hosts[2], "idle");
    hosts[2].ctl().must(&["vm", "stop", "idle"]);
    let epoch = vm(&hosts[0], "web")["epoch"].as_u64();
    hosts.iter_mut().for_each(Host::kill);
    std::thread::scope(|scope| {
        for host in &mut hosts {
            scope.spawn(|| host.start());
        }
    });
    // A restart is a new epoch: until then the record is the one from before the power cut.
    let restarted = |vm: &Value| vm["state"] == "running" && vm["epoch"].as_u64() > epoch;
    until("the restart", || vm(&hosts[0], "web"), restarted);
    assert_eq!(vm(&hosts[0], "idle")["state"], "stopped", "what did not run does not run");
    hosts[0].ctl().must(&["vm", "stop", "web"]);
}

// Invariant A7: whoever is cut off learns of the change when it is back, and until then decides nothing.
#[test]
fn voters_change_while_a_node_is_cut_off_and_it_follows_when_it_is_back() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (hosts, lun) = (three(), TempDir::new().expect("a folder"));
    with_volume(&hosts, &lun);
    let [a, b, c] = &hosts;
    a.ctl().run(&["volume", "move", "vol1", "--to", "a"]).ok();
    c.fault("partition");
    let cut_off = |node: &Value| node["state"] != "up";
    let shown = |host: &Host, name: &str| {
        let nodes = host.ctl().must(&["node", "list"]);
        let found = nodes["nodes"].as_array().expect("nodes").iter().find(|node| node["name"] == name);
        found.cloned().unwrap_or(Value::Null)
    };
    until("the cut", || shown(a, "c"), cut_off);
    // A fourth node joins and votes, decided by a and b alone.
    let d = Host::join("d", &b.token());
    voters(a, &["a", "b", "d"]);
    assert_eq!(shown(c, "d"), Value::Null, "nobody has told it");
    let refused = c.ctl().run(&["cluster", "token"]).expect_err("no majority");
    assert_eq!(refused.code, 5, "{refused}");
    fs::write(b.mount("vol1").join("meanwhile"), b"goes on").expect("written");
    c.fault("heal");
    until("the way back", || shown(a, "c"), |node| node["state"] == "up" && node["voter"] == true);
    until("the news", || shown(c, "d"), |node| node["voter"] == true);
    assert_eq!(fs::read(c.mount("vol1").join("meanwhile")).expect("read"), b"goes on");
    // Four voters: three are a majority, two are not. With a and b off, c and d wait; with b back they go on.
    d.ctl().must(&["cluster", "wait", "--nodes", "4", "--volume", "vol1"]);
    assert_eq!(a.ctl().must(&["health"])["status"], "ok");
}
