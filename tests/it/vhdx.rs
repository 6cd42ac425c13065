//! The image tools on files of this machine: no cluster is needed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use cluster_tests::Ctl;
use tempfile::TempDir;

use crate::text;

/// 8 MiB with some bytes in it.
fn raw(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(8 << 20).unwrap();
    file.write_all_at(&[7; 4096], 3 << 20).unwrap();
    path
}

#[test]
fn an_image_is_made_checked_resized_mapped_and_compacted() {
    let folder = TempDir::new().unwrap();
    let (raw, image) = (raw(&folder), folder.path().join("disk.vhdx"));
    let (ctl, image) = (Ctl::local(), text(&image));
    let made = ctl.must(&["vhdx", "convert", text(&raw), image, "--block", "1M"]);
    assert_eq!(made["size_bytes"], 8 << 20);
    assert_eq!(ctl.must(&["vhdx", "check", image])["sound"], true);
    assert_eq!(ctl.must(&["vhdx", "resize", image, "--size", "16M"])["size_bytes"], 16 << 20);
    let refused = ctl.run(&["vhdx", "resize", image, "--size", "1M"]).unwrap_err();
    assert_eq!(refused.code, 2, "{refused}");
    assert!(refused.message().contains("smallest safe size"), "{refused}");
    assert_eq!(ctl.must(&["vhdx", "resize", image, "--to-minimum"])["size_bytes"], 4 << 20);
    let map = ctl.must(&["vhdx", "map", image]);
    assert_eq!(map["extents"][1]["kind"], "data");
    assert_eq!(map["extents"][1]["offset_bytes"], 3 << 20);
    assert_eq!(ctl.must(&["vhdx", "compact", image])["moved_blocks"], 0);
}

#[test]
fn a_chain_is_made_mapped_flattened_and_merged() {
    let folder = TempDir::new().unwrap();
    let at = |name: &str| text(&folder.path().join(name)).to_owned();
    let (ctl, raw) = (Ctl::local(), raw(&folder));
    ctl.must(&["vhdx", "convert", text(&raw), &at("base.vhdx")]);
    File::options().write(true).open(&raw).unwrap().write_all_at(&[9; 512], 5 << 20).unwrap();
    ctl.must(&["vhdx", "convert", text(&raw), &at("child.avhdx"), "--parent", &at("base.vhdx")]);
    let changed = ctl.must(&["vhdx", "map", &at("child.avhdx"), "--since", &at("base.vhdx")]);
    assert_eq!(changed["extents"].as_array().unwrap().len(), 1);
    assert_eq!(changed["extents"][0]["offset_bytes"], 5 << 20);
    ctl.must(&["vhdx", "snapshot", &at("child.avhdx"), &at("top.avhdx")]);
    let dry = ["vhdx", "merge", &at("child.avhdx"), &at("base.vhdx"), "--dry-run"];
    let refused = ctl.run(&dry).expect_err("another image rests on it");
    assert!(refused.code == 4 && refused.message().contains("top.avhdx"), "{refused}");
    let merge = ["vhdx", "merge", &at("child.avhdx"), &at("base.vhdx"), "--top", &at("top.avhdx")];
    ctl.must(&merge);
    assert!(!folder.path().join("child.avhdx").exists());
    ctl.must(&["vhdx", "convert", &at("top.avhdx"), &at("back.raw")]);
    assert!(fs::read(folder.path().join("back.raw")).unwrap() == fs::read(&raw).unwrap());
}

// Invariant E6: one writer. The offline tools are refused while anybody else has the image.
#[test]
fn an_image_in_use_is_refused_by_every_verb_that_needs_it_alone() {
    let folder = TempDir::new().unwrap();
    let (raw, image) = (raw(&folder), folder.path().join("disk.vhdx"));
    let ctl = Ctl::local();
    ctl.must(&["vhdx", "convert", text(&raw), text(&image)]);
    let before = fs::read(&image).unwrap();
    let user = File::open(&image).unwrap();
    user.lock().unwrap();
    for verb in ["check", "compact", "map", "resize"] {
        let mut arguments = vec!["vhdx", verb, text(&image)];
        arguments.extend(if verb == "resize" { vec!["--size", "16M"] } else { vec![] });
        let refused = ctl.run(&arguments).unwrap_err();
        assert_eq!(refused.code, 4, "{verb}: {refused}");
        assert!(refused.message().contains("in use") && !refused.hint().is_empty(), "{verb}: {refused}");
    }
    assert!(fs::read(&image).unwrap() == before, "it was touched");
}

#[test]
fn a_damaged_copy_is_reported_and_repaired() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("disk.vhdx");
    let ctl = Ctl::local();
    ctl.must(&["vhdx", "create", text(&image), "--size", "64M"]);
    File::options().write(true).open(&image).unwrap().write_all_at(&[0xEE; 8], 64 << 10).unwrap();
    let found = ctl.run(&["vhdx", "check", text(&image)]).unwrap_err();
    assert_eq!(found.code, 4, "{found}");
    let repaired = ctl.must(&["vhdx", "check", text(&image), "--repair"]);
    assert_eq!(repaired["repaired"][0]["code"], "header_copy");
    assert_eq!(ctl.must(&["vhdx", "check", text(&image)])["defects"].as_array().unwrap().len(), 0);
}
