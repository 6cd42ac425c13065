//! Checkpoints: a VM returns to a moment with its memory and its disks, as often as one likes, and forgets moments again.

use cluster_tests::{Cluster, Ctl, Guest};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

/// Whether everything is here that these scenarios need.
fn can_run() -> bool {
    device_present("/dev/fuse") && device_present("/dev/kvm")
}

fn start_vm(cluster: &Cluster, name: &str) -> Guest {
    for kind in ["system", "disk"] {
        let image = cluster.mount(1).join(format!("{name}-{kind}.vhdx"));
        Ctl::local().must(&["vhdx", "create", text(&image), "--size", "32M"]);
    }
    let (system, disk) = (format!("{name}-system.vhdx"), format!("{name}-disk.vhdx"));
    Guest::start_with(cluster, name, &system, &disk, 1024, &["--on-node-loss", "stay"])
}

fn checkpoint(cluster: &Cluster, node: usize, action: &str, of: &[&str]) -> Value {
    cluster.ctl(node).must(&[&["vm", "checkpoint", action], of].concat())
}

fn names(shown: &Value) -> Vec<&str> {
    let all = shown["checkpoints"].as_array().expect("a list");
    all.iter().map(|one| one["name"].as_str().expect("a name")).collect()
}

/// The image that the VM writes as its second disk.
fn top(cluster: &Cluster, name: &str) -> String {
    let shown = cluster.ctl(3).must(&["vm", "show", name]);
    shown["spec"]["disks"][1]["path"].as_str().expect("a path").to_owned()
}

/// Images and saved memories on the volume.
fn files(cluster: &Cluster, of: &str) -> Vec<String> {
    let listed = std::fs::read_dir(cluster.mount(2)).expect("a mount").flatten();
    let mut names: Vec<_> = listed.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| name.contains(of));
    names.sort_unstable();
    names
}

// Invariants E6, H3: memory and disks of a checkpoint are of one moment. The guest checks every record that it has written
// against what it remembers, so memory that is older or newer than the disk is noticed by the guest itself.
#[test]
fn a_vm_returns_to_a_checkpoint_with_memory_and_disks_of_one_moment_as_often_as_asked() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "back");
    let _ = guest.progress(&cluster, 1, 0);
    let made = checkpoint(&cluster, 2, "create", &["back", "first"]);
    assert_eq!((names(&made), &made["state"]), (vec!["first"], &"running".into()), "{made}");
    let then = guest.progress(&cluster, 1, 0);
    let mut acked = guest.progress(&cluster, 1, then.sequence + 200);
    cluster.ctl(3).must(&["vm", "migrate", "back", "--to", &cluster.name(2)]);
    acked = guest.progress(&cluster, 2, acked.sequence);
    for node in [3, 1] {
        let left = top(&cluster, "back");
        let restored = checkpoint(&cluster, node, "restore", &["back", "first"]);
        assert_eq!((&restored["state"], &restored["checkpoint"]), (&"running".into(), &"first".into()));
        assert!(files(&cluster, &left).is_empty(), "what was given up is gone: {left}");
        // It goes on from where it was: what it acknowledges first is less than what it had reached.
        let again = guest.progress(&cluster, 2, 0);
        assert!(again.sequence < acked.sequence, "{again:?} after {acked:?}");
        let _ = guest.progress(&cluster, 2, again.sequence + 50);
    }
    acked = guest.progress(&cluster, 2, 0);
    let image = top(&cluster, "back");
    cluster.ctl(3).must(&["vm", "stop", "back"]);
    let folder = TempDir::new().unwrap();
    guest.verify_ours(&cluster, &image, acked, folder.path());
}

#[test]
fn checkpoints_are_deleted_while_the_vm_runs_and_their_images_go_with_them() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "tidy");
    let mut acked = guest.progress(&cluster, 1, 0);
    for name in ["a", "b"] {
        checkpoint(&cluster, 1, "create", &["tidy", name]);
        acked = guest.progress(&cluster, 1, acked.sequence);
    }
    assert_eq!(files(&cluster, ".checkpoint").len(), 2);
    let taken = cluster.ctl(1).run(&["vm", "checkpoint", "create", "tidy", "a"]).expect_err("there is one");
    assert_eq!(taken.code, 4, "{taken}");
    let left = checkpoint(&cluster, 2, "delete", &["tidy", "a"]);
    assert_eq!((names(&left), &left["kept"]), (vec!["b"], &Value::Array(vec![])), "{left}");
    acked = guest.progress(&cluster, 1, acked.sequence);
    let left = checkpoint(&cluster, 2, "delete", &["tidy", "b"]);
    assert_eq!((names(&left), &left["kept"]), (vec![], &Value::Array(vec![])), "{left}");
    acked = guest.progress(&cluster, 1, acked.sequence);
    assert!(files(&cluster, ".checkpoint").is_empty(), "memories are gone");
    let image = top(&cluster, "tidy");
    // The disk as it was named at first, and what the guest writes since the last merge.
    assert_eq!(files(&cluster, "tidy-disk"), ["tidy-disk.vhdx".to_owned(), image.clone()].map(|name| name));
    cluster.ctl(1).must(&["vm", "stop", "tidy"]);
    let folder = TempDir::new().unwrap();
    guest.verify_ours(&cluster, &image, acked, folder.path());
}

#[test]
fn a_stopped_vm_returns_to_its_disks_and_gets_its_first_image_back_when_the_checkpoint_goes() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "calm");
    let before = guest.progress(&cluster, 1, 0);
    cluster.ctl(1).must(&["vm", "stop", "calm"]);
    let made = checkpoint(&cluster, 2, "create", &["calm"]);
    assert_eq!((names(&made), &made["state"]), (vec!["checkpoint-1"], &"stopped".into()), "{made}");
    let kept = cluster.mount(1).join("calm-disk.vhdx");
    let refused = cluster.ctl(1).run(&["vhdx", "compact", text(&kept)]).expect_err("a checkpoint needs it");
    assert!(refused.code == 4 && refused.message().contains("kept for checkpoint"), "{refused}");
    cluster.ctl(1).must(&["vm", "start", "calm"]);
    let _ = guest.progress(&cluster, 1, 0);
    let restored = checkpoint(&cluster, 3, "restore", &["calm", "checkpoint-1"]);
    assert_eq!(restored["state"], "stopped", "it did not run then: {restored}");
    let folder = TempDir::new().unwrap();
    guest.verify_ours(&cluster, &top(&cluster, "calm"), before, folder.path());
    let left = checkpoint(&cluster, 3, "delete", &["calm", "checkpoint-1"]);
    assert_eq!((names(&left), &left["kept"]), (vec![], &Value::Array(vec![])), "{left}");
    assert_eq!(top(&cluster, "calm"), "calm-disk.vhdx");
    assert_eq!(files(&cluster, "calm-disk"), ["calm-disk.vhdx"]);
    guest.verify(&cluster, "calm-disk.vhdx", before, folder.path());
    let missing = cluster.ctl(1).run(&["vm", "checkpoint", "restore", "calm", "checkpoint-1"]).unwrap_err();
    assert_eq!(missing.code, 3, "{missing}");
}
