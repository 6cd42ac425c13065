//! Damaged and foreign media: a clear error with a hint, and nothing is lost.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cluster_tests::{Cluster, Ctl, run_tool};
use tempfile::TempDir;

use crate::{device_present, text};

/// A superblock's copies lie at these offsets of the LUN (csvfs/FORMAT.md).
const SUPERBLOCKS: [u64; 2] = [0, 1 << 20];

fn sparse(folder: &Path, name: &str, size_bytes: u64) -> PathBuf {
    let path = folder.join(name);
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    path
}

fn create_volume(
    cluster: &Cluster,
    name: &str,
    lun: &Path,
) -> Result<serde_json::Value, cluster_tests::CtlError> {
    cluster.ctl(1).run(&["volume", "create", name, "--lun", &format!("file:{}", text(lun))])
}

#[test]
fn volume_create_refuses_what_it_must_not_destroy_and_says_what_it_found() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let folder = TempDir::new().unwrap();

    let small = sparse(folder.path(), "small.img", 1 << 20);
    let refused = create_volume(&cluster, "small", &small).unwrap_err();
    assert!(refused.message().contains("small") && !refused.hint().is_empty(), "{refused}");

    let ext4 = folder.path().join("ext4.img");
    run_tool("mke2fs", &["-q", "-F", "-t", "ext4", text(&ext4), "512M"]);
    let before = fs::read(&ext4).unwrap();
    let refused = create_volume(&cluster, "ext", &ext4).unwrap_err();
    assert!(refused.message().contains("ext4"), "{refused}");
    assert_eq!(refused.code, 4, "{refused}");
    assert!(fs::read(&ext4).unwrap() == before, "the refused LUN was not touched");

    let refused = create_volume(&cluster, "again", &cluster.lun()).unwrap_err();
    assert!(refused.message().contains("vol1"), "it names the volume that is there: {refused}");
}

#[test]
fn a_torn_superblock_is_served_by_its_copy_and_two_torn_ones_are_refused() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    fs::write(cluster.mount(1).join("kept"), b"kept").unwrap();
    let dir = text(cluster.dir()).to_owned();
    let tear = |offset: u64| {
        let lun = OpenOptions::new().write(true).open(cluster.lun()).unwrap();
        lun.write_all_at(&[0x5a; 512], offset + 8).unwrap();
        lun.sync_all().unwrap();
    };
    Ctl::local().must(&["dev", "down", "--dir", &dir]);
    tear(SUPERBLOCKS[0]);
    Ctl::local().must(&["dev", "up", "--dir", &dir]);
    assert_eq!(fs::read(cluster.mount(2).join("kept")).unwrap(), b"kept");

    Ctl::local().must(&["dev", "down", "--dir", &dir]);
    tear(SUPERBLOCKS[0]);
    tear(SUPERBLOCKS[1]);
    let refused = Ctl::local().run(&["dev", "up", "--dir", &dir]).unwrap_err();
    assert!(refused.message().contains("superblock"), "{refused}");
    assert!(!refused.hint().is_empty(), "{refused}");
}

#[test]
fn images_that_are_no_vhdx_are_refused_by_name() {
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("raw.vhdx");
    fs::write(&raw, vec![0; 2 << 20]).unwrap();
    let refused = Ctl::local().run(&["vhdx", "info", text(&raw)]).unwrap_err();
    assert!(refused.message().contains("not a VHDX"), "{refused}");

    let good = folder.path().join("good.vhdx");
    run_tool("qemu-img", &["create", "-q", "-f", "vhdx", text(&good), "64M"]);
    let bytes = fs::read(&good).unwrap();
    let cut = folder.path().join("cut.vhdx");
    File::create(&cut).unwrap().write_all(&bytes[..bytes.len() / 3]).unwrap();
    let refused = Ctl::local().run(&["vhdx", "info", text(&cut)]).unwrap_err();
    assert!(!refused.message().is_empty() && !refused.hint().is_empty(), "{refused}");
}

#[test]
fn a_full_volume_says_so_and_is_usable_again_after_deletes() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("256M");
    let mount = cluster.mount(2);
    fs::write(mount.join("precious"), vec![42; 1 << 20]).unwrap();
    let mut filler = File::create(mount.join("filler")).unwrap();
    let block = vec![1; 1 << 20];
    let full = loop {
        if let Err(error) = filler.write_all(&block) {
            break error;
        }
    };
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC), "{full}");
    assert!(fs::read(mount.join("precious")).unwrap() == vec![42; 1 << 20], "nothing is damaged");
    drop(filler);
    fs::remove_file(cluster.mount(3).join("filler")).unwrap();
    fs::write(mount.join("again"), &block).unwrap();
    let report = cluster.ctl(1).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}
