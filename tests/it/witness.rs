//! Two nodes and a witness: either node, or the witness, may be lost.

use std::fs;

use cluster_tests::Host;
use tempfile::TempDir;

use crate::device_present;
use crate::members::{await_node, voters, with_fence};

// Invariant A7: of two nodes that cannot hear each other only one has the quorum, and it goes on alone with the witness.
#[test]
fn a_witness_lets_two_nodes_survive_the_loss_of_either_and_holds_no_data() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (first, folder) = (Host::found("house", "a", &[]), TempDir::new().expect("a folder"));
    let second = Host::join("b", &first.token());
    let witness = Host::join_as("w", &second.token(), &["--witness"]);
    voters(&first, &["a", "b", "w"]);
    await_node(&first, "w", |node| node["role"] == "witness");
    await_node(&first, "b", |node| node["role"] == "node");
    let mut hosts = [first, second];
    with_fence(&hosts, &folder, "lease");
    let refused =
        witness.ctl().run(&["volume", "create", "vol2", "--lun", "file:/nowhere"]).expect_err("no volumes");
    assert_eq!((refused.code, refused.message().contains("is a witness")), (4, true), "{refused}");
    let refused = hosts[0].ctl().run(&["volume", "move", "vol1", "--to", "w"]).expect_err("no coordinator");
    assert_eq!(refused.code, 4, "{refused}");
    assert_eq!(fs::read_dir(witness.dir().join("mnt")).map_or(0, Iterator::count), 0, "it mounts nothing");

    // Without the witness two of three go on; it comes back with its records.
    let mut witness = witness;
    witness.kill();
    fs::write(hosts[0].mount("vol1").join("without the witness"), b"yes").expect("written");
    witness.start();
    await_node(&hosts[0], "w", |node| node["state"] == "up" && node["voter"] == true);
    let shown = witness.ctl().must(&["volume", "list"]).to_string();
    assert!(shown.contains("vol1"), "{shown}");

    // Without the coordinator the other node and the witness are two of three.
    hosts[0].ctl().must(&["volume", "move", "vol1", "--to", "b"]);
    hosts[1].kill();
    fs::write(hosts[0].mount("vol1").join("without the other"), b"yes").expect("held, then written");
    assert_eq!(hosts[0].ctl().must(&["volume", "show", "vol1"])["owner"], "a");
    hosts[1].start();
    hosts[1].ctl().must(&["cluster", "wait", "--nodes", "3", "--volume", "vol1"]);
    assert_eq!(fs::read(hosts[1].mount("vol1").join("without the other")).expect("read"), b"yes");
}
