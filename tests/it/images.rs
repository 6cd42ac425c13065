//! Work on the images of VMs that run: the guest does not notice it, and loses nothing, whatever happens meanwhile.

use std::thread;

use cluster_tests::{Cluster, Ctl, CtlError, Guest, PATIENCE, until};
use hv_guest::Ack;
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

/// Whether everything is here that these scenarios need.
fn can_run() -> bool {
    device_present("/dev/fuse") && device_present("/dev/kvm")
}

/// A VM on node 1 that writes to `NAME-0.vhdx`, and is not started again elsewhere.
fn start_vm(cluster: &Cluster, name: &str) -> Guest {
    let system = format!("{name}-system.vhdx");
    for image in [&system, &image(name, 0)] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image)), "--size", "32M"]);
    }
    Guest::start_with(cluster, name, &system, &image(name, 0), 1024, &["--on-node-loss", "stay"])
}

fn image(name: &str, number: usize) -> String {
    format!("{name}-{number}.{}", if number == 0 { "vhdx" } else { "avhdx" })
}

/// `csvctl vhdx VERB IMAGE...` on node `node`, with images named by number.
fn vhdx(cluster: &Cluster, node: usize, verb: &str, images: &[(&str, usize)]) -> Result<Value, CtlError> {
    let at =
        |(name, number): &(&str, usize)| text(&cluster.mount(node).join(image(name, *number))).to_owned();
    let mut arguments = vec!["vhdx".to_owned(), verb.to_owned()];
    arguments.extend(images.iter().map(at));
    cluster.ctl(node).run(&arguments)
}

/// What the record names as the written disk, and what the process says lies below it.
fn chain(cluster: &Cluster, name: &str) -> (String, Vec<String>) {
    let shown = cluster.ctl(3).must(&["vm", "show", name]);
    let top = shown["spec"]["disks"][1]["path"].as_str().expect("a second disk").to_owned();
    let parents = shown["disks"][1]["parents"].as_array().cloned().unwrap_or_default();
    (top, parents.iter().map(|path| path.as_str().expect("a path").to_owned()).collect())
}

fn stop_and_verify(cluster: &Cluster, guest: &Guest, name: &str, top: usize, acked: Ack) {
    cluster.ctl(2).must(&["vm", "stop", name]);
    let checked = vhdx(cluster, 2, "check", &[(name, top)]).expect("the image is sound");
    assert_eq!((&checked["sound"], &checked["defects"]), (&true.into(), &Value::Array(vec![])), "{checked}");
    let folder = TempDir::new().unwrap();
    guest.verify_ours(cluster, &image(name, top), acked, folder.path());
}

// Invariants E6, H1, H3: the record names the image that is written, wherever the VM goes.
#[test]
fn a_snapshot_and_a_merge_of_a_running_vms_disk_lose_nothing_and_move_with_it() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "snap");
    let mut acked = guest.progress(&cluster, 1, 0);
    for top in [1, 2] {
        // From a node on which it does not run.
        let made = vhdx(&cluster, 2, "snapshot", &[("snap", top - 1), ("snap", top)]).expect("it forks");
        assert_eq!(
            (&made["kind"], &made["size_bytes"]),
            (&"differencing".into(), &(32 << 20).into()),
            "{made}"
        );
        let below: Vec<_> = (0..top).rev().map(|number| image("snap", number)).collect();
        assert_eq!(chain(&cluster, "snap"), (image("snap", top), below));
        acked = guest.progress(&cluster, 1, acked.sequence);
    }
    cluster.ctl(3).must(&["vm", "migrate", "snap", "--to", &cluster.name(2)]);
    acked = guest.progress(&cluster, 2, acked.sequence);
    // A child that no VM uses keeps what it rests on as it is.
    let sibling = cluster.mount(2).join("sibling.avhdx");
    let base = cluster.mount(2).join(image("snap", 0));
    cluster.ctl(2).must(&["vhdx", "create", text(&sibling), "--parent", text(&base)]);
    let refused = vhdx(&cluster, 3, "merge", &[("snap", 1), ("snap", 0)]).expect_err("another rests on it");
    assert!(refused.code == 4 && refused.message().contains("sibling.avhdx"), "{refused}");
    std::fs::remove_file(&sibling).expect("it is removed");
    let merged = vhdx(&cluster, 3, "merge", &[("snap", 1), ("snap", 0)]).expect("it merges");
    assert_eq!(merged["child_removed"], true, "{merged}");
    assert!(!cluster.mount(1).join(image("snap", 1)).exists(), "its file is gone");
    assert_eq!(chain(&cluster, "snap"), (image("snap", 2), vec![image("snap", 0)]));
    acked = guest.progress(&cluster, 2, acked.sequence);
    cluster.ctl(3).must(&["vm", "migrate", "snap", "--to", &cluster.name(3), "--type", "quick"]);
    acked = guest.progress(&cluster, 3, acked.sequence);
    stop_and_verify(&cluster, &guest, "snap", 2, acked);
    // What lay below is whole, and the guest's later writes are not in it.
    assert_eq!(vhdx(&cluster, 1, "check", &[("snap", 0)]).expect("it is sound")["sound"], true);
}

// Invariant E6: only the VM's process writes the images that it uses.
#[test]
fn images_of_a_running_vm_are_looked_at_and_compacted_by_its_process_alone() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "used");
    let mut acked = guest.progress(&cluster, 1, 0);
    vhdx(&cluster, 1, "snapshot", &[("used", 0), ("used", 1)]).expect("it forks");
    acked = guest.progress(&cluster, 1, acked.sequence);
    let info = vhdx(&cluster, 2, "info", &[("used", 1)]).expect("it is looked at");
    assert_eq!((&info["kind"], &info["log"]), (&"differencing".into(), &"clean".into()), "{info}");
    assert_eq!(info["parent"]["relative_path"], r".\used-0.vhdx", "{info}");
    let checked = vhdx(&cluster, 2, "check", &[("used", 1)]).expect("it is sound");
    assert_eq!((&checked["sound"], &checked["defects"]), (&true.into(), &Value::Array(vec![])), "{checked}");
    let map = vhdx(&cluster, 3, "map", &[("used", 1)]).expect("it is mapped");
    assert!(map["extents"].to_string().contains("parent"), "{map}");
    let [base, top] = [0, 1].map(|number| cluster.mount(3).join(image("used", number)));
    let changed = cluster.ctl(3).must(&["vhdx", "map", text(&top), "--since", text(&base)]);
    assert_eq!(changed["extents"][0]["kind"], "changed", "{changed}");
    vhdx(&cluster, 3, "compact", &[("used", 1)]).expect("it is compacted");
    acked = guest.progress(&cluster, 1, acked.sequence);
    for verb in ["compact", "resize"] {
        let mut arguments = vec!["vhdx", verb];
        let base = cluster.mount(2).join("used-0.vhdx");
        arguments.push(text(&base));
        arguments.extend(if verb == "resize" { vec!["--size", "64M"] } else { vec![] });
        let refused = cluster.ctl(2).run(&arguments).expect_err("a running VM rests on it");
        assert_eq!(refused.code, 4, "{refused}");
        assert!(refused.message().contains("below vol1:/used-1.avhdx"), "{refused}");
    }
    let base = cluster.mount(2).join(image("used", 0));
    let create = ["vm", "create", "other", "--memory", "16M", "--disk", text(&base)];
    let refused = cluster.ctl(2).run(&create).expect_err("a disk of another VM rests on it");
    assert!(refused.code == 4 && refused.message().contains("rests on it"), "{refused}");
    let repair =
        ["vhdx", "check", "--repair", text(&cluster.mount(2).join("used-1.avhdx"))].map(ToOwned::to_owned);
    assert_eq!(cluster.ctl(2).run(&repair).expect_err("it is in use").code, 4);
    let taken = vhdx(&cluster, 2, "snapshot", &[("used", 1), ("used", 0)]).expect_err("the file exists");
    assert!(taken.message().contains("used-0.vhdx") && !taken.hint().is_empty(), "{taken}");
    let written = vhdx(&cluster, 2, "merge", &[("used", 1), ("used", 0)]).expect_err("the guest writes it");
    assert!(written.code == 4 && written.hint().contains("snapshot"), "{written}");
    assert_eq!(chain(&cluster, "used").0, image("used", 1), "what was refused changes nothing");
    acked = guest.progress(&cluster, 1, acked.sequence);
    stop_and_verify(&cluster, &guest, "used", 1, acked);
}

#[test]
fn the_disk_of_a_running_vm_grows_under_its_guest() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let disk = cluster.mount(1).join("grows.vhdx");
    Ctl::local().must(&["vhdx", "create", text(&disk), "--size", "32M"]);
    let ctl = cluster.ctl(2);
    let vm = ["vm", "create", "grows", "--memory", "16M", "--kernel", "builtin:listener", "--disk"];
    ctl.must(&[&vm[..], &[text(&disk)]].concat());
    cluster.ctl(1).must(&["vm", "start", "grows"]);
    cluster.console(1, "grows", PATIENCE, |said| said.contains("listener disks=8 ready"));
    let would = ctl.must(&["vhdx", "resize", text(&disk), "--size", "64M", "--dry-run"]);
    assert_eq!((&would["dry_run"], &would["old_size_bytes"]), (&true.into(), &(32 << 20).into()), "{would}");
    let grown = ctl.must(&["vhdx", "resize", text(&disk), "--size", "64M"]);
    assert_eq!(grown["size_bytes"], 64 << 20, "{grown}");
    cluster.console(1, "grows", PATIENCE, |said| said.contains("changed index=0 from=65536 sectors=131072"));
    let refused = ctl.run(&["vhdx", "resize", text(&disk), "--size", "32M", "--expand-only"]).unwrap_err();
    assert!(refused.code == 4 && refused.message().contains("shrink"), "{refused}");
    ctl.must(&["vm", "stop", "--force", "grows"]);
}

// Invariants E6, H6: the image that is the disk is the one that the record names, wherever a crash comes.
#[test]
fn a_node_that_dies_in_a_snapshot_leaves_a_record_that_names_a_whole_disk() {
    if !can_run() {
        return;
    }
    for (step, top) in [("snapshot", 0), ("snapshot-recorded", 1)] {
        let cluster = Cluster::start("1G");
        let guest = start_vm(&cluster, "cut");
        let _ = guest.progress(&cluster, 1, 0);
        cluster.hold(1, step);
        let acked = thread::scope(|scope| {
            let forking = scope.spawn(|| vhdx(&cluster, 1, "snapshot", &[("cut", 0), ("cut", 1)]));
            cluster.fault(1, "held");
            let acked = guest.progress(&cluster, 1, 0);
            cluster.fault(1, "kill");
            forking.join().expect("the call ends").expect_err("its node is gone");
            acked
        });
        let shown = || cluster.ctl(2).must(&["vm", "show", "cut"]);
        let vm = until("the verdict", shown, |vm| vm["state"] == "failed");
        assert_eq!(vm["spec"]["disks"][1]["path"], image("cut", top).as_str(), "killed at {step}: {vm}");
        let folder = TempDir::new().unwrap();
        guest.verify_crashed(&cluster, &image("cut", top), acked, folder.path());
        cluster.ctl(2).must(&["vm", "start", "cut"]);
        assert_eq!(chain(&cluster, "cut").1.len(), top, "it runs on what the record names");
        let acked = guest.progress(&cluster, 2, 0);
        stop_and_verify(&cluster, &guest, "cut", top, acked);
    }
}
