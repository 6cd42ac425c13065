//! Nodes that found a cluster, join it, and leave it, set up one by one as on hosts of their own.

use std::fs;
use std::time::Instant;

use cluster_tests::{Ctl, Host, PATIENCE};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

/// Asks until the node is as wanted in the eyes of `host`.
pub(crate) fn await_node(host: &Host, name: &str, wanted: impl Fn(&Value) -> bool) {
    let started = Instant::now();
    loop {
        let nodes = host.ctl().must(&["node", "list"]);
        let node = nodes["nodes"].as_array().expect("nodes").iter().find(|node| node["name"] == name);
        if node.is_some_and(&wanted) {
            return;
        }
        assert!(started.elapsed() < PATIENCE, "{name} did not get there within {PATIENCE:?}: {nodes}");
    }
}

pub(crate) fn voters(host: &Host, names: &[&str]) {
    for name in names {
        await_node(host, name, |node| node["voter"] == true && node["state"] == "up");
    }
}

/// Three nodes, joined one by one.
pub(crate) fn three() -> [Host; 3] {
    let first = Host::found("house", "a", &[]);
    let second = Host::join("b", &first.token());
    // Any member can let others join.
    voters(&first, &["a", "b"]);
    let third = Host::join("c", &second.token());
    voters(&first, &["a", "b", "c"]);
    [first, second, third]
}

pub(crate) fn with_volume(hosts: &[Host], lun: &TempDir) {
    with_fence(hosts, lun, "agent");
}

pub(crate) fn with_fence(hosts: &[Host], lun: &TempDir, fence: &str) {
    let path = lun.path().join("lun");
    fs::File::create(&path).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
    let uri = format!("file:{}", text(&path));
    hosts[0].ctl().must(&["volume", "create", "vol1", "--lun", &uri, "--fence", fence]);
    for host in hosts {
        host.ctl().must(&["cluster", "wait", "--volume", "vol1"]);
    }
}

#[test]
fn nodes_join_with_tokens_share_a_volume_and_survive_a_power_cut_of_all() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (mut hosts, lun) = (three(), TempDir::new().expect("a folder"));
    with_volume(&hosts, &lun);
    let [a, _, c] = &hosts;
    fs::write(a.mount("vol1").join("shared"), b"by all").expect("written");
    assert_eq!(fs::read(c.mount("vol1").join("shared")).expect("read"), b"by all");

    let file = fs::File::open(a.mount("vol1").join("shared")).expect("open");
    file.sync_all().expect("durable");
    drop(file);
    hosts.iter_mut().for_each(Host::kill);
    std::thread::scope(|scope| {
        for host in &mut hosts {
            scope.spawn(|| host.start());
        }
    });
    for host in &hosts {
        host.ctl().must(&["cluster", "wait", "--nodes", "3", "--volume", "vol1"]);
        assert_eq!(fs::read(host.mount("vol1").join("shared")).expect("read"), b"by all");
    }
}

// Invariants A1 and A4: nothing of a silent node is reused before its end is certain, and only then it is forgotten.
#[test]
fn a_dead_node_without_a_fence_waits_for_an_operator_and_can_be_replaced() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (mut hosts, lun) = (three(), TempDir::new().expect("a folder"));
    with_volume(&hosts, &lun);
    hosts[0].ctl().must(&["volume", "move", "vol1", "--to", "c"]);
    hosts[2].kill();
    let [a, b, _] = &hosts;
    await_node(a, "c", |node| node["state"] == "fence_failed");
    let refused = a.ctl().run(&["node", "evict", "c"]).expect_err("it may be alive");
    assert_eq!((refused.code, refused.kind()), (4, "conflict"), "{refused}");
    assert_eq!(a.ctl().must(&["volume", "show", "vol1"])["owner"], "c", "what it held is not given away");

    a.ctl().must(&["node", "confirm-dead", "c"]);
    b.ctl().must(&["cluster", "wait", "--volume", "vol1"]);
    fs::write(b.mount("vol1").join("after"), b"served by another").expect("written");
    assert_ne!(a.ctl().must(&["volume", "show", "vol1"])["owner"], "c");
    let events = a.ctl().must(&["events"]).to_string();
    assert!(events.contains("node.confirmed-dead"), "who vouched is on record: {events}");

    a.ctl().must(&["node", "evict", "c"]);
    let token = b.token();
    let d = Host::join("c", &token);
    voters(a, &["a", "b", "c"]);
    assert_eq!(d.ctl().must(&["node", "show", "c"])["id"], 4, "a number is not given twice");
    d.ctl().must(&["cluster", "wait", "--volume", "vol1"]);
    assert_eq!(fs::read(d.mount("vol1").join("after")).expect("read"), b"served by another");
}

#[test]
fn a_token_is_good_for_one_node_of_its_own_cluster() {
    let first = Host::found("house", "a", &[]);
    let (token, stranger) = (first.token(), Host::found("other", "x", &[]));
    let second = Host::join("b", &token);
    let again = Host::new("d");
    let refused =
        Ctl::local().run(&again.arguments(&["node", "join", "--token", &token])).expect_err("used up");
    assert_eq!(refused.code, 4, "{refused}");
    assert!(refused.hint().contains("cluster token"), "{refused}");
    assert!(!again.dir().join("csvd.toml").exists(), "a refused node leaves nothing behind");

    let twin = Host::new("b");
    let taken = Ctl::local().run(&twin.arguments(&["node", "join", "--token", &first.token()]));
    assert!(taken.expect_err("the name is taken").message().contains("node b"));
    let nonsense = Ctl::local().run(&again.arguments(&["node", "join", "--token", "csv1-00"]));
    assert_eq!(nonsense.expect_err("no token").code, 2);
    let members = stranger.ctl().must(&["node", "list"]);
    assert_eq!(members["nodes"].as_array().map(Vec::len), Some(1), "{members}");
    drop(second);
}
