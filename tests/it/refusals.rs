//! Wrong calls and foreign peers.

use cluster_tests::{Cluster, Ctl};
use tempfile::TempDir;

use crate::{device_present, text};

#[test]
fn a_second_dev_up_on_a_running_folder_is_refused() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let refused = Ctl::local().run(&["dev", "up", "--dir", text(cluster.dir())]).unwrap_err();
    assert_eq!(refused.code, 4, "{refused}");
    assert!(refused.hint().contains("dev down"), "{refused}");
    cluster.ctl(1).must(&["health"]);
}

#[test]
fn exit_codes_tell_usage_missing_and_unreachable_apart() {
    let folder = TempDir::new().unwrap();
    let nobody = Ctl::to(folder.path().join("nobody.sock"));
    assert_eq!(nobody.run(&["volume", "list"]).unwrap_err().code, 5);
    assert_eq!(Ctl::local().run(&["volume", "frobnicate"]).unwrap_err().code, 2);
    if device_present("/dev/fuse") {
        let cluster = Cluster::start("1G");
        let missing = cluster.ctl(1).run(&["volume", "show", "nosuch"]).unwrap_err();
        assert_eq!(missing.code, 3, "{missing}");
        assert!(missing.message().contains("nosuch"), "{missing}");
    }
}

#[test]
fn a_vm_needs_disks_that_exist_on_a_cluster_volume() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let outside = TempDir::new().unwrap();
    let image = outside.path().join("outside.vhdx");
    Ctl::local().must(&["vhdx", "create", text(&image), "--size", "16M"]);
    let refused =
        cluster.ctl(1).run(&["vm", "create", "out", "--memory", "64M", "--disk", text(&image)]).unwrap_err();
    assert!(refused.message().contains("outside.vhdx") && !refused.hint().is_empty(), "{refused}");
    let missing = cluster.mount(1).join("missing.vhdx");
    let refused = cluster
        .ctl(1)
        .run(&["vm", "create", "gone", "--memory", "64M", "--disk", text(&missing)])
        .unwrap_err();
    assert!(refused.message().contains("missing.vhdx"), "{refused}");
    assert_eq!(cluster.ctl(2).must(&["vm", "list"])["vms"].as_array().map(Vec::len), Some(0));
}

#[test]
fn a_lun_in_use_is_not_formatted_again_under_another_path() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    std::fs::write(cluster.mount(2).join("kept"), b"kept").unwrap();
    let other_path = cluster.dir().join("same-lun");
    std::os::unix::fs::symlink(cluster.lun(), &other_path).unwrap();
    let uri = format!("file:{}", text(&other_path));
    let refused = cluster.ctl(2).run(&["volume", "create", "vol2", "--lun", &uri, "--force"]).unwrap_err();
    assert_eq!(refused.code, 4, "{refused}");
    assert!(refused.message().contains("vol1"), "{refused}");
    assert_eq!(std::fs::read(cluster.mount(3).join("kept")).unwrap(), b"kept");
}

// Invariant E6: on whichever node, under whichever name.
#[test]
fn a_disk_that_a_running_vm_writes_is_refused_to_another_vm() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let path = |name: &str| text(&cluster.mount(1).join(name)).to_owned();
    let (disk, link) = (path("shared.vhdx"), path("link.vhdx"));
    Ctl::local().must(&["vhdx", "create", &disk, "--size", "32M"]);
    std::fs::hard_link(&disk, &link).unwrap();
    let define = |name: &str, disk: &str| {
        cluster.ctl(1).must(&[
            "vm",
            "create",
            name,
            "--memory",
            "64M",
            "--cmdline",
            "verify=9 write=0",
            "--disk",
            disk,
        ])
    };
    let twice = ["vm", "create", "twice", "--memory", "64M", "--disk", &disk, "--disk", &link];
    assert_eq!(cluster.ctl(1).run(&twice).unwrap_err().code, 2);
    define("first", &disk);
    define("second", &disk);
    define("third", &link);
    cluster.ctl(1).must(&["vm", "start", "first"]);
    for (node, name) in [(1, "second"), (2, "second"), (3, "third")] {
        let refused = cluster.ctl(node).run(&["vm", "start", name]).unwrap_err();
        assert_eq!(refused.code, 4, "{refused}");
        assert!(refused.to_string().contains("VM first"), "{refused}");
        assert_eq!(cluster.ctl(node).must(&["vm", "show", name])["state"], "stopped");
    }
    cluster.ctl(1).must(&["vm", "stop", "first"]);
    cluster.ctl(2).must(&["vm", "start", "second"]);
    cluster.ctl(2).must(&["vm", "stop", "second"]);
}
