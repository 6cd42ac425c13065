//! Files as an administrator sees them: clones, check and repair, the read cache, who waits for what.

use std::fs;

use cluster_tests::{Cluster, until};

use crate::{device_present, text};

fn volume(cluster: &Cluster) -> String {
    cluster.info()["volume"].as_str().expect("a name").to_owned()
}

#[test]
fn a_file_is_cloned_at_once_and_cp_shares_blocks_too() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (one, two) = (cluster.mount(1), cluster.mount(2));
    let content: Vec<u8> = (0..4_000_000_u32).flat_map(u32::to_le_bytes).collect();
    fs::write(one.join("image"), &content).unwrap();
    let (from, to) = (one.join("image"), one.join("copy"));
    let clone = ["file", "clone", text(&from), text(&to)];
    let report = cluster.ctl(1).must(&clone);
    assert_eq!(report["size_bytes"], 16_000_000, "{report}");
    assert!(report["shared_bytes"].as_u64() >= Some(16_000_000), "{report}");
    assert_eq!(fs::read(two.join("copy")).unwrap(), content, "on another node");
    let error = cluster.ctl(1).run(&clone).expect_err("the name is taken");
    assert!(error.message().contains("exist"), "{error}");

    // The C library's way: copy_file_range shares what it can.
    fs::copy(one.join("image"), one.join("copied")).unwrap();
    assert_eq!(fs::read(two.join("copied")).unwrap(), content);
    let map = cluster.ctl(2).must(&["file", "map", text(&two.join("copied"))]);
    assert_eq!(map["extents"][0]["state"], "shared", "{map}");

    let mut changed = content.clone();
    changed[5_000..5_100].fill(7);
    fs::write(two.join("copy"), &changed).unwrap();
    assert_eq!(fs::read(one.join("copy")).unwrap(), changed);
    assert_eq!(fs::read(one.join("image")).unwrap(), content);
    let report = cluster.ctl(3).must(&["volume", "check", &volume(&cluster), "--repair"]);
    assert_eq!((&report["problems"], &report["actions"]), (&serde_json::json!([]), &serde_json::json!([])));
    assert!(report["shared_blocks"].as_u64() > Some(0), "{report}");
}

#[test]
fn the_read_cache_is_changed_while_the_volume_is_used_and_says_how_it_does() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let name = volume(&cluster);
    let shown = cluster.ctl(1).must(&["volume", "show", &name]);
    assert_eq!(shown["cache"], "off", "{shown}");
    // Nodes that are up are asked: on a busy machine that may take a moment.
    let set = || cluster.ctl(1).run(&["volume", "cache", &name, "--size", "64M"]).unwrap_or_default();
    until("a cache on each node", set, |set| set["caches"].as_array().map(Vec::len) == Some(3));
    let path = cluster.mount(1).join("file");
    fs::write(&path, vec![1; 200_000]).unwrap();
    for byte in [1_u8, 2, 3] {
        // Another node writes; this one reads it twice, the second time from memory.
        fs::write(cluster.mount(2).join("file"), vec![byte; 200_000]).unwrap();
        for _ in 0..2 {
            assert_eq!(fs::read(&path).unwrap(), vec![byte; 200_000]);
        }
    }
    let node = cluster.name(1);
    let of_one = ["volume", "cache", &name, "--node", &node];
    let row = cluster.ctl(3).must(&of_one)["caches"][0].clone();
    assert!(row["hits"].as_u64() > Some(0) && row["hit_rate"].as_f64() > Some(0.0), "{row}");
    let shown = cluster.ctl(1).must(&["volume", "show", &name]);
    assert!(shown["cache"].as_str().is_some_and(|cache| cache.contains("from memory")), "{shown}");
    let fewer = cluster.ctl(3).must(&[&of_one[..], &["--files", "5000"]].concat())["caches"][0].clone();
    assert_eq!(fewer["files_max"], 5000, "{fewer}");
    assert!(fewer["files"].as_u64() > Some(0), "{fewer}");
    assert_eq!(fewer["size_bytes"], row["size_bytes"], "the size stays as it was");
    let row = cluster.ctl(1).must(&["volume", "cache", &name, "--off"])["caches"][0].clone();
    assert_eq!((&row["size_bytes"], &row["used_bytes"]), (&0.into(), &0.into()), "{row}");
    assert_eq!(fs::read(&path).unwrap(), vec![3; 200_000]);
}

#[test]
fn grants_and_locks_say_who_has_them_and_what_happens_next() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let path = cluster.mount(1).join("locked");
    fs::write(&path, b"content").unwrap();
    let file = fs::File::open(&path).unwrap();
    file.lock().expect("a lock that nobody has");
    let list = cluster.ctl(2).must(&["file", "grants", text(&cluster.mount(2).join("locked"))]);
    let lock = &list["locks"][0];
    assert_eq!(
        (&lock["family"], &lock["mode"], &lock["waits"]),
        (&"flock".into(), &"write".into(), &false.into())
    );
    assert_eq!(lock["node"], cluster.name(1).as_str(), "{lock}");
    assert!(lock["next"].as_str().is_some_and(|next| next.contains("until it unlocks")), "{lock}");
    for grant in list["grants"].as_array().expect("grants") {
        assert!(grant["next"].as_str().is_some_and(|next| !next.is_empty()), "{grant}");
    }
    drop(file);
}
