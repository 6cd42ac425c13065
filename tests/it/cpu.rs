//! Nodes whose processors differ: what guests are given, where they may go, and where it is said that they may not.

use std::thread;

use cluster_tests::{Cluster, Ctl};
use serde_json::Value;

use crate::{device_present, text};

/// CMPXCHG16B: every host has it, and the test guests do without.
const FEATURE: &str = "0x1.0.ecx.13";

fn start_vm(cluster: &Cluster, name: &str) {
    let ctl = cluster.ctl(1);
    let cmdline = "role=dirtier set=1 rate=64";
    ctl.must(&["vm", "create", name, "--memory", "32M", "--kernel", "builtin:dirtier", "--cmdline", cmdline]);
    ctl.must(&["vm", "start", name]);
}

/// Takes a feature away from a node, or gives all back.
fn cpu(cluster: &Cluster, node: usize, without: Option<&str>) {
    let (dir, name) = (text(cluster.dir()), cluster.name(node));
    let mut fault = vec!["dev", "fault", &name, "cpu", "--dir", dir];
    if let Some(without) = without {
        fault.extend(["--without", without]);
    }
    Ctl::local().must(&fault);
}

fn baseline(cluster: &Cluster, vm: &str) -> u64 {
    cluster.ctl(3).must(&["vm", "show", vm])["spec"]["baseline"].as_u64().unwrap_or(0)
}

fn kinds(problems: &Value) -> Vec<String> {
    let list = problems["problems"].as_array().expect("a list");
    list.iter().map(|problem| problem["kind"].as_str().expect("a kind").to_owned()).collect()
}

#[test]
fn a_guest_goes_only_where_the_processor_has_what_it_was_given_and_a_new_one_goes_everywhere() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    // All nodes have told what they can give: they are the same machine, so this freezes nothing new.
    (1..=3).for_each(|node| cpu(&cluster, node, None));
    start_vm(&cluster, "old");
    let first = baseline(&cluster, "old");
    assert!(first > 0, "booted on a baseline");
    cpu(&cluster, 2, Some(FEATURE));
    let asked = cluster.ctl(3).run(&["vm", "check-migrate", "old", "--to", &cluster.name(2)]);
    let error = asked.expect_err("node 2 lacks a feature");
    assert_eq!(error.code, 4, "{error}");
    let refused = cluster.ctl(1).run(&["vm", "migrate", "old", "--to", &cluster.name(2)]);
    let refused = refused.expect_err("for the same reason");
    assert!(refused.code == 4 && refused.to_string().contains("CPUID 0x1.0"), "{refused}");
    let fine = cluster.ctl(3).must(&["vm", "check-migrate", "old", "--to", &cluster.name(3)]);
    assert_eq!(kinds(&fine), [""; 0]);
    // A guest that boots now is given what all three have.
    start_vm(&cluster, "new");
    assert!(baseline(&cluster, "new") > first, "a weaker node makes a new baseline");
    for to in [2, 3] {
        cluster.ctl(3).must(&["vm", "migrate", "new", "--to", &cluster.name(to)]);
    }
    cluster.ctl(3).must(&["vm", "migrate", "old", "--to", &cluster.name(3)]);
    assert_eq!(baseline(&cluster, "old"), first, "what a guest has seen stays");
    for vm in ["old", "new"] {
        cluster.ctl(3).must(&["vm", "stop", "--force", vm]);
    }
}

// Invariant H6: what a preflight goes by is what the guest has, also when that comes from a time before the VM's last boot.
#[test]
fn a_vm_that_returns_to_a_checkpoint_has_the_baseline_of_then_and_returns_only_where_the_processor_has_it() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(3);
    (1..=3).for_each(|node| cpu(&cluster, node, None));
    start_vm(&cluster, "back");
    let first = baseline(&cluster, "back");
    ctl.must(&["vm", "checkpoint", "create", "back", "then"]);
    cpu(&cluster, 2, Some(FEATURE));
    ctl.must(&["vm", "stop", "--force", "back"]);
    cluster.ctl(2).must(&["vm", "start", "back"]);
    let second = baseline(&cluster, "back");
    assert!(second > first, "it was booted on what all three have");

    for dry_run in [&["--dry-run"][..], &[]] {
        let before = ctl.must(&["vm", "show", "back"]);
        let restore = [&["vm", "checkpoint", "restore", "back", "then"], dry_run].concat();
        let refused = ctl.run(&restore).expect_err("node 2 lacks what that memory was given");
        assert!(refused.code == 4 && refused.message().contains("CPUID 0x1.0"), "{refused}");
        assert!(
            refused.message().contains(&cluster.name(2)) && refused.hint().contains("migrate"),
            "{refused}"
        );
        let after = ctl.must(&["vm", "show", "back"]);
        for same in ["state", "owner", "epoch", "pid", "spec"] {
            assert_eq!(after[same], before[same], "{same}");
        }
    }

    ctl.must(&["vm", "migrate", "back", "--to", &cluster.name(1)]);
    ctl.must(&["vm", "checkpoint", "restore", "back", "then"]);
    assert_eq!(baseline(&cluster, "back"), first, "what its memory was given");
    let asked = ctl.run(&["vm", "check-migrate", "back", "--to", &cluster.name(2)]);
    assert_eq!(asked.expect_err("node 2 lacks a feature of it").code, 4);
    ctl.must(&["vm", "migrate", "back", "--to", &cluster.name(3)]);
    ctl.must(&["vm", "stop", "--force", "back"]);
}

// Invariant H6
#[test]
fn a_target_that_turns_out_to_be_weaker_after_the_preflight_refuses_and_the_vm_runs_on() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    (1..=3).for_each(|node| cpu(&cluster, node, None));
    start_vm(&cluster, "late");
    cluster.hold(1, "prepare");
    let outcome = thread::scope(|scope| {
        let moving = scope.spawn(|| cluster.ctl(1).run(&["vm", "migrate", "late", "--to", &cluster.name(2)]));
        cluster.fault(1, "held");
        cpu(&cluster, 2, Some(FEATURE));
        cluster.fault(1, "release");
        moving.join().expect("the move ends")
    });
    let error = outcome.expect_err("its process sees what the node lacks").to_string();
    assert!(error.contains("CPUID 0x1.0") && error.contains("runs on where it was"), "{error}");
    let shown = cluster.ctl(3).must(&["vm", "show", "late"]);
    assert_eq!((&shown["owner"], &shown["state"]), (&cluster.name(1).into(), &"running".into()), "{shown}");
    cluster.ctl(3).must(&["vm", "stop", "--force", "late"]);
}
