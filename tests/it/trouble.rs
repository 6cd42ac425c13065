//! VMs whose volume is full or whose LUN is gone: they are halted, lose nothing, and go on by themselves.

use std::fs;
use std::io::Write;
use std::path::Path;

use cluster_tests::{Cluster, Ctl, Guest, until};
use hv_guest::Layout;
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

fn until_vm(ctl: &Ctl, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    until(name, || ctl.must(&["vm", "show", name]), wanted)
}

fn is_halted(ctl: &Ctl, name: &str, why: &str) -> Value {
    let halted = until_vm(ctl, name, |vm| vm["state"] == "paused");
    assert!(halted["reason"].as_str().is_some_and(|reason| reason.contains(why)), "{halted}");
    let listed = ctl.must(&["vm", "list"]).to_string();
    assert!(listed.contains(why), "{listed}");
    let health = ctl.run(&["health"]).expect_err("degraded");
    assert_eq!(health.code, 6, "{health}");
    let resume = ctl.run(&["vm", "resume", name]).expect_err("it would only fail");
    assert!(resume.code == 4 && resume.message().contains(why), "{resume}");
    halted
}

fn images(cluster: &Cluster, size: &str) {
    for image in ["system.vhdx", "scratch.vhdx"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image)), "--size", size]);
    }
}

/// Writes a file until there is no space left.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).expect("a file");
    let piece = vec![1_u8; 1 << 20];
    let full = (0..4096).find_map(|_| file.write_all(&piece).err()).expect("the volume has a size");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull, "{full}");
}

#[test]
fn a_vm_on_a_full_volume_is_halted_and_goes_on_when_there_is_space() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    images(&cluster, "512M");
    let ctl = cluster.ctl(2);
    // Less room than the guest's disk may take, so that it runs out whatever the speed of either.
    let (filler, room) = (cluster.mount(2).join("filler"), cluster.mount(2).join("room"));
    fs::write(&room, vec![1_u8; 16 << 20]).expect("the volume has that much");
    fill(&filler);
    fs::remove_file(&room).expect("removed");
    let layout = Layout { range: 100_000, sectors: 8, seed: 7 };
    let guest = Guest::start_greedy(&cluster, "thirsty", ("system.vhdx", "scratch.vhdx"), layout);
    let before = guest.progress(&cluster, 1, 0);
    is_halted(&ctl, "thirsty", "full");
    let refused = ctl.run(&["vm", "migrate", "thirsty", "--to", &cluster.name(2)]).expect_err("halted");
    assert_eq!(refused.code, 4, "a halted VM is not moved: {refused}");
    let errors = ctl.must(&["vm", "show", "thirsty"])["disks"][1]["errors"].clone();
    assert_eq!(errors, 0, "the guest has seen no error");

    fs::remove_file(&filler).expect("removed");
    until_vm(&ctl, "thirsty", |vm| vm["state"] == "running");
    let after = guest.progress(&cluster, 1, before.sequence + 100);
    let events = ctl.must(&["events"]).to_string();
    assert!(events.contains("vm thirsty is paused") && events.contains("vm thirsty is running"), "{events}");
    ctl.must(&["vm", "stop", "thirsty"]);
    guest.verify(&cluster, "scratch.vhdx", after, TempDir::new().unwrap().path());
}

#[test]
fn a_vm_whose_lun_is_gone_for_all_nodes_is_halted_and_goes_on_when_it_is_back() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    images(&cluster, "32M");
    let ctl = cluster.ctl(2);
    let guest = Guest::start(&cluster, "stranded", "system.vhdx", "scratch.vhdx", 1024);
    let before = guest.progress(&cluster, 1, 0);
    for node in 1..=3 {
        cluster.fault(node, "lun-fail");
    }
    is_halted(&ctl, "stranded", "no way leads to the LUN");
    for node in 1..=3 {
        cluster.fault(node, "lun-heal");
    }
    until_vm(&ctl, "stranded", |vm| vm["state"] == "running");
    let after = guest.progress(&cluster, 1, before.sequence + 100);
    let events = ctl.must(&["events"]).to_string();
    assert!(!events.contains("fencing"), "nobody is cut off for a LUN that all have lost: {events}");
    ctl.must(&["vm", "stop", "stranded"]);
    guest.verify(&cluster, "scratch.vhdx", after, TempDir::new().unwrap().path());
}
