//! LUNs that are not what they seem.

use std::fs;

use cluster_tests::{Cluster, Ctl};
use tempfile::TempDir;

use crate::{device_present, text};

// Invariants G2 and G3: a LUN that belongs to somebody is refused, and so is a copy of one, with the name of what is there.
#[test]
fn a_lun_of_another_cluster_and_a_copy_of_a_lun_are_refused_by_name() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (first, second) = (Cluster::start("256M"), Cluster::start("256M"));
    let folder = TempDir::new().expect("a folder");
    fs::write(first.mount(1).join("kept"), b"kept").expect("written");
    let lun = first.lun();
    let copy = folder.path().join("copy.img");
    let dir = text(first.dir()).to_owned();
    Ctl::local().must(&["dev", "down", "--dir", &dir]);
    fs::copy(&lun, &copy).expect("copied");
    Ctl::local().must(&["dev", "up", "--dir", &dir]);
    for (cluster, place) in [(&second, &lun), (&first, &copy), (&second, &copy)] {
        let uri = format!("file:{}", text(place));
        let refused =
            cluster.ctl(1).run(&["volume", "create", "other", "--lun", &uri]).expect_err("somebody's");
        assert_eq!(refused.code, 4, "{refused}");
        assert!(refused.message().contains("volume") && !refused.hint().is_empty(), "{refused}");
    }
    assert_eq!(fs::read(first.mount(2).join("kept")).expect("read"), b"kept");
}
