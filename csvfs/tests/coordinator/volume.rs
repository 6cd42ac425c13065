//! Making volumes, and telling what a LUN is.

use std::process::{Command, Stdio};
use std::sync::Arc;

use blockio::{BlockDevice, FileDevice, MemoryDevice, OpenOptions};
use csvfs::format::layout::{FIRST_CHUNK_OFFSET, META_SLOT_OFFSETS, OWNER_OFFSETS, SUPERBLOCK_OFFSETS};
use csvfs::{CreateParams, Superblock, Volume, VolumeError, check};
use lockmgr::ClusterId;
use uuid::Uuid;

use crate::world::{MIB, ROOT, World, assert_clean_offline, format};

fn params(force: bool) -> CreateParams {
    CreateParams { name: "vol1".into(), cluster: ClusterId(Uuid::from_u128(77)), force }
}

fn lun() -> Arc<dyn BlockDevice> {
    Arc::new(MemoryDevice::new(64 * MIB))
}

fn scribble(device: &dyn BlockDevice, offset: u64) {
    device.write_at(offset, &[0xab; 4096]).expect("the device is good");
}

#[test]
fn a_new_volume_is_clean_and_says_what_it_is() {
    let device = lun();
    let made = Volume::create(device.clone(), params(false)).expect("the LUN is empty");
    assert_eq!(Superblock::read(device.as_ref()).expect("it is a volume"), made);
    let report = assert_clean_offline(&device);
    assert_eq!((report.inodes, report.directories), (1, 1));
}

#[test]
fn a_lun_that_is_too_small_is_refused_with_the_minimum() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(64 * MIB - 4096));
    let error = Volume::create(device, params(false)).expect_err("too small");
    assert!(matches!(error, VolumeError::TooSmall { min_bytes, .. } if min_bytes == 64 * MIB));
    assert!(error.to_string().contains("67108864"), "{error}");
}

#[test]
fn a_name_that_cannot_be_one_is_refused() {
    for name in ["", "a b", "a/b", ".hidden", &"x".repeat(65)] {
        let bad = CreateParams { name: name.into(), ..params(false) };
        assert!(matches!(Volume::create(lun(), bad), Err(VolumeError::BadName { .. })), "{name:?}");
    }
}

#[test]
fn a_volume_is_not_destroyed_by_accident() {
    let device = lun();
    let first = Volume::create(device.clone(), params(false)).expect("the LUN is empty");
    let error = Volume::create(device.clone(), params(false)).expect_err("it is in use");
    let told = error.to_string();
    assert!(told.contains("'vol1'") && told.contains(&first.volume.to_string()), "{told}");
    assert!(told.contains(&first.cluster.to_string()), "{told}");
    assert_eq!(Superblock::read(device.as_ref()).expect("untouched"), first);
    let second = Volume::create(device.clone(), params(true)).expect("forced");
    assert_ne!(second.volume, first.volume);
    assert_clean_offline(&device);
}

#[test]
fn filesystems_of_other_tools_are_named() {
    let tools: [(&str, &[&str], &str); 5] = [
        ("mke2fs", &["-q", "-F", "-t", "ext4"], "an ext4 filesystem"),
        ("mke2fs", &["-q", "-F", "-t", "ext3"], "an ext3 filesystem"),
        ("mke2fs", &["-q", "-F", "-t", "ext2"], "an ext2 filesystem"),
        ("mkswap", &["-q"], "Linux swap space"),
        ("mkfs.xfs", &["-q", "-f"], "an XFS filesystem"),
    ];
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (i, (tool, args, name)) in tools.into_iter().enumerate() {
        let path = dir.path().join(format!("{i}-{tool}"));
        FileDevice::create(&path, 320 * MIB).expect("a file");
        let made =
            Command::new(tool).args(args).arg(&path).stderr(Stdio::null()).stdout(Stdio::null()).status();
        // A tool that is not installed has its signature tested in `probe`.
        if !made.is_ok_and(|status| status.success()) {
            continue;
        }
        let options = OpenOptions { writable: true, direct: false, ..OpenOptions::default() };
        let device: Arc<dyn BlockDevice> = Arc::new(FileDevice::open(&path, options).expect("it opens"));
        let error = Volume::create(device.clone(), params(false)).expect_err("it is in use");
        assert!(error.to_string().contains(name), "{tool}: {error}");
        let not_ours = Superblock::read(device.as_ref()).expect_err("not ours");
        assert!(not_ours.to_string().contains(name), "{tool}: {not_ours}");
    }
}

// Invariant D2.
#[test]
fn a_torn_superblock_is_served_by_the_other_one_and_repaired() {
    for copy in 0..2 {
        let device = lun();
        let volume = format(&device);
        scribble(device.as_ref(), SUPERBLOCK_OFFSETS[copy]);
        assert_eq!(Superblock::read(device.as_ref()).expect("the other copy is whole").volume, volume);
        assert!(!check::check_device(&device).expect("it opens").problems.is_empty());
        let world = World::open(device.clone(), volume, 1);
        world.client(1).create(ROOT, "a");
        world.coordinator.close().expect("a clean end");
        assert_clean_offline(&device);
        // Now the copy that was good may go.
        scribble(device.as_ref(), SUPERBLOCK_OFFSETS[1 - copy]);
        assert_eq!(Superblock::read(device.as_ref()).expect("repaired").volume, volume);
    }
}

#[test]
fn two_torn_superblocks_are_a_clear_refusal() {
    let device = lun();
    let volume = format(&device);
    for offset in SUPERBLOCK_OFFSETS {
        let mut bytes = vec![0; 4096];
        device.read_at(offset, &mut bytes).expect("readable");
        bytes[100..512].fill(0);
        device.write_at(offset, &bytes).expect("writable");
    }
    let error = Superblock::read(device.as_ref()).expect_err("both are torn");
    assert!(matches!(error, VolumeError::BothTorn { .. }), "{error}");
    assert!(World::try_open(device.clone(), volume, 1).is_err());
    let create = Volume::create(device, params(false)).expect_err("it was a volume");
    assert!(create.to_string().contains("csvfs"), "{create}");
}

// Invariant G4.
#[test]
fn a_volume_of_a_newer_version_is_refused_by_the_name_of_its_features() {
    let device = lun();
    let mut block = Volume::create(device.clone(), params(false)).expect("the LUN is empty");
    block.incompat |= 1 << 9;
    block.generation += 1;
    device.write_at(0, &block.encode(0)).expect("writable");
    let error = Superblock::read(device.as_ref()).expect_err("unknown feature");
    assert!(error.to_string().contains("incompat bit 9"), "{error}");
}

#[test]
fn a_lun_that_has_shrunk_is_refused() {
    let device = Arc::new(MemoryDevice::new(96 * MIB));
    let dynamic: Arc<dyn BlockDevice> = device.clone();
    format(&dynamic);
    blockio::ImageFile::set_len(device.as_ref(), 80 * MIB).expect("it can shrink");
    assert!(matches!(Superblock::read(device.as_ref()), Err(VolumeError::Shrunk { .. })));
}

#[test]
fn a_check_names_damage_and_changes_nothing() {
    let device = Arc::new(MemoryDevice::new(64 * MIB));
    let dynamic: Arc<dyn BlockDevice> = device.clone();
    let volume = format(&dynamic);
    let world = World::open(dynamic.clone(), volume, 1);
    let c = world.client(1);
    for i in 0..50 {
        c.create(ROOT, &format!("f{i}"));
    }
    drop(c);
    drop(world);
    for offset in OWNER_OFFSETS {
        scribble(device.as_ref(), offset);
    }
    let before = device.to_bytes();
    let report = check::check_device(&dynamic).expect("it opens");
    assert!(report.problems.iter().any(|p| p.what.contains("owner block")), "{report:?}");
    assert!(device.to_bytes() == before, "a check writes nothing");
    for offset in META_SLOT_OFFSETS {
        scribble(device.as_ref(), offset);
    }
    let error = check::check_device(&dynamic).expect_err("without slots there is no store");
    assert!(error.to_string().contains("metadata slot"), "{error}");
}

#[test]
fn one_torn_metadata_slot_costs_nothing() {
    for slot in META_SLOT_OFFSETS {
        let device = lun();
        let volume = format(&device);
        let world = World::open(device.clone(), volume, 1);
        world.client(1).create(ROOT, "a");
        world.coordinator.close().expect("a clean end");
        scribble(device.as_ref(), slot);
        // The store may have become shorter or longer with the last slot; either way it opens, or says why not.
        match World::try_open(device.clone(), volume, 2) {
            Ok(next) => {
                next.coordinator.client_gone(world.stranger(1).id);
                let c = next.client(2);
                assert!(c.exists(ROOT, "a"));
            }
            Err(error) => panic!("slot at {slot}: {error}"),
        }
    }
}

#[test]
fn damaged_pages_of_the_store_are_errors_and_no_panic() {
    let device = Arc::new(MemoryDevice::new(64 * MIB));
    let dynamic: Arc<dyn BlockDevice> = device.clone();
    let volume = format(&dynamic);
    let world = World::open(dynamic, volume, 1);
    let c = world.client(1);
    for i in 0..200 {
        c.create(ROOT, &format!("file-{i}"));
    }
    world.coordinator.close().expect("a clean end");
    let mut unnoticed = 0;
    for block in 0..48 {
        let image: Arc<dyn BlockDevice> = Arc::new(device.fork());
        scribble(image.as_ref(), FIRST_CHUNK_OFFSET + block * 4096);
        // A page that is not in use may hold anything.
        unnoticed += u32::from(check::check_device(&image).is_ok_and(|report| report.problems.is_empty()));
        // A coordinator may find out late, but it must say so.
        if let Ok(world) = World::try_open(image, volume, 2) {
            world.coordinator.client_gone(c.id);
            let stranger = world.stranger(2);
            drop(stranger.start(csvfs::pb::request::Op::Attach(csvfs::pb::Attach::default())).recv());
            drop(stranger.lookup(ROOT, "file-7"));
        }
    }
    assert!(unnoticed < 40, "the store has more than eight pages in use, {unnoticed} of 48 are not missed");
}

// Invariant G4: a volume of an older program gets what this one adds, and is from then on refused by the older one.
#[test]
fn a_volume_without_pools_logs_and_journal_is_upgraded_when_it_is_opened() {
    let device: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(64 * MIB));
    let volume = format(&device);
    let mut older = Superblock::read(device.as_ref()).expect("a volume");
    let added = csvfs::format::superblock::INCOMPAT_POOLS | csvfs::format::superblock::INCOMPAT_JOURNAL;
    older.incompat &= !added;
    for offset in SUPERBLOCK_OFFSETS {
        device.write_at(offset, &older.encode(offset)).expect("a write");
    }
    let world = World::open(device.clone(), volume, 1);
    let now = Superblock::read(device.as_ref()).expect("a volume");
    assert_eq!(now.incompat, older.incompat | added);
    assert!(now.generation > older.generation);
    world.assert_clean(&world.client(1));
}
