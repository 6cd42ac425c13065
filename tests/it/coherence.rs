//! What one node has done is what every node sees as soon as the call has returned.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use cluster_tests::Cluster;

use crate::{device_present, text};

/// One change to the tree, by one of the nodes.
type Step<'a> = &'a dyn Fn() -> io::Result<()>;

/// All that a tree shows: names, kinds, attributes, content.
fn snapshot(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<PathBuf> =
            fs::read_dir(&folder).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
        entries.sort();
        for path in entries {
            let meta = fs::symlink_metadata(&path).expect("attributes");
            let content = if meta.is_file() {
                format!("{:08x}", checksum(&fs::read(&path).expect("content")))
            } else if meta.is_symlink() {
                fs::read_link(&path).expect("a target").display().to_string()
            } else {
                folders.push(path.clone());
                String::new()
            };
            let below = path.strip_prefix(root).expect("below the root").display();
            lines.push(format!(
                "{below} ino={} mode={:o} links={} owner={}:{} size={} mtime={}.{} {content}",
                meta.ino(),
                meta.mode(),
                meta.nlink(),
                meta.uid(),
                meta.gid(),
                meta.len(),
                meta.mtime(),
                meta.mtime_nsec()
            ));
        }
    }
    lines.sort();
    lines
}

fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(17, |sum: u32, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte)))
}

fn all_agree(cluster: &Cluster, after: &str) {
    let first = snapshot(&cluster.mount(1));
    for node in 2..=3 {
        assert_eq!(snapshot(&cluster.mount(node)), first, "node {node} disagrees with node 1 after: {after}");
    }
}

#[test]
fn three_mounts_agree_after_every_operation() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (one, two, three) = (cluster.mount(1), cluster.mount(2), cluster.mount(3));
    let open = |path: PathBuf| OpenOptions::new().write(true).open(path).unwrap();
    let steps: [(&str, Step<'_>); 14] = [
        ("mkdir", &|| fs::create_dir(one.join("folder"))),
        ("create", &|| fs::write(two.join("folder/a"), vec![7; 123_456])),
        ("overwrite on another node", &|| fs::write(three.join("folder/a"), vec![8; 70_001])),
        ("append", &|| OpenOptions::new().append(true).open(one.join("folder/a"))?.write_all(b"tail")),
        ("write in the middle", &|| open(two.join("folder/a")).write_all_at(b"middle", 4093)),
        ("hard link", &|| fs::hard_link(three.join("folder/a"), three.join("b"))),
        ("symlink", &|| symlink("folder/a", one.join("link"))),
        ("chmod", &|| fs::set_permissions(two.join("b"), fs::Permissions::from_mode(0o640))),
        ("rename", &|| fs::rename(three.join("b"), three.join("folder/c"))),
        ("rename over", &|| {
            fs::write(one.join("x"), b"new")?;
            fs::rename(one.join("x"), one.join("folder/a"))
        }),
        ("truncate", &|| open(two.join("folder/c")).set_len(5000)),
        ("extend", &|| open(three.join("folder/c")).set_len(1 << 20)),
        ("unlink", &|| fs::remove_file(one.join("link"))),
        ("unlink and rmdir", &|| {
            fs::remove_file(two.join("folder/a"))?;
            fs::remove_file(two.join("folder/c"))?;
            fs::remove_dir(two.join("folder"))
        }),
    ];
    for (name, step) in &steps {
        step().unwrap_or_else(|error| panic!("{name}: {error}"));
        all_agree(&cluster, name);
    }
    assert!(snapshot(&one).is_empty(), "everything was removed");
    let report = cluster.ctl(1).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}

#[test]
fn a_write_is_what_another_node_reads_as_soon_as_it_has_returned() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let mut model = Vec::new();
    let mut handles: Vec<File> = (1..=3)
        .map(|node| {
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(cluster.mount(node).join("shared"))
                .unwrap()
        })
        .collect();
    // A fixed pseudo-random walk: unaligned offsets and lengths, each time another writer and reader.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |bound: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % bound
    };
    for round in 0..200_usize {
        let offset = usize::try_from(next(200_000)).unwrap();
        let bytes = vec![u8::try_from(round % 251).unwrap() + 1; usize::try_from(next(9_000) + 1).unwrap()];
        handles[round % 3].write_all_at(&bytes, offset as u64).unwrap();
        if model.len() < offset + bytes.len() {
            model.resize(offset + bytes.len(), 0);
        }
        model[offset..offset + bytes.len()].copy_from_slice(&bytes);
        let reader = &mut handles[(round + 1) % 3];
        let mut seen = Vec::new();
        reader.seek(SeekFrom::Start(0)).unwrap();
        reader.read_to_end(&mut seen).unwrap();
        assert_eq!(seen.len(), model.len(), "round {round}: size");
        assert!(seen == model, "round {round}: content differs from what was written");
    }
}

#[test]
fn file_map_names_the_places_on_the_lun_that_hold_the_bytes() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let content: Vec<u8> = (0..3_000_000_u32).flat_map(|number| number.to_le_bytes()).collect();
    let path = cluster.mount(2).join("mapped");
    let mut file = File::create(&path).unwrap();
    file.write_all(&content).unwrap();
    file.sync_all().unwrap();
    let map = cluster.ctl(3).must(&["file", "map", text(&cluster.mount(3).join("mapped"))]);
    let lun = File::open(cluster.lun()).unwrap();
    let mut covered = 0;
    for extent in map["extents"].as_array().expect("extents") {
        let number = |field: &str| extent[field].as_u64().unwrap_or_else(|| panic!("{field} in {extent}"));
        let (file_offset, length, lun_offset) =
            (number("file_offset_bytes"), number("length_bytes"), number("lun_offset_bytes"));
        let end = (file_offset + length).min(content.len() as u64);
        if extent["state"] != "data" || file_offset >= end {
            continue;
        }
        let mut there = vec![0; usize::try_from(end - file_offset).unwrap()];
        lun.read_exact_at(&mut there, lun_offset).unwrap();
        let from = usize::try_from(file_offset).unwrap();
        assert!(there == content[from..from + there.len()], "the LUN holds other bytes at {lun_offset}");
        covered += there.len();
    }
    assert_eq!(covered, content.len(), "the map covers the whole file: {map}");
}

#[test]
fn an_unlinked_open_file_lives_until_its_last_close_on_any_node() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    fs::write(cluster.mount(1).join("victim"), b"still here").unwrap();
    let open_elsewhere = File::open(cluster.mount(2).join("victim")).unwrap();
    fs::remove_file(cluster.mount(1).join("victim")).unwrap();
    assert!(!cluster.mount(3).join("victim").exists());
    let mut seen = vec![0; 10];
    open_elsewhere.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, b"still here");
    drop(open_elsewhere);
    let report = cluster.ctl(1).must(&["volume", "check", "vol1"]);
    assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
}
