//! A volume grows with its LUN while nodes use it.

mod world;

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice, Recorder, Unflushed};
use world::{World, create, fsync, open, read, write};

const OLD: u64 = 96 << 20;
const NEW: u64 = 192 << 20;

fn fill(file: &csvfs::node::File) -> u64 {
    let mut at = 0;
    loop {
        match write(file, at, &[5; 1 << 18]) {
            Ok(bytes) => at += bytes as u64,
            Err(error) => {
                assert_eq!(error.errno(), 28, "{error}");
                return at;
            }
        }
    }
}

#[test]
fn a_full_volume_has_room_again_as_soon_as_its_lun_has_grown() {
    let lun = Arc::new(MemoryDevice::new(OLD));
    let world = World::on(lun.clone());
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "f");
    let end = fill(&file);
    assert_eq!(a.extend().expect("nothing to do"), (OLD, OLD));
    lun.set_len(NEW).expect("the LUN grows");
    assert_eq!(a.extend().expect("it grows"), (OLD, NEW));
    assert_eq!(b.extend().expect("done already"), (NEW, NEW));
    assert!(fill(&file) >= end + (NEW - OLD) / 10 * 9);
    fsync(&file).expect("an fsync");
    assert!(read(&open(&b, "f"), end + (60 << 20), 4096).expect("a read") == [5; 4096]);
    assert_eq!(world.problems(&b), Vec::<String>::new());
    // The next coordinator knows the size too.
    world.stop_coordinator();
    world.start_coordinator();
    assert_eq!(b.extend().expect("nothing to do"), (NEW, NEW));
    assert_eq!(world.problems(&b), Vec::<String>::new());
}

// Invariant G1: an extension can be cut short anywhere; whoever opens the volume next finishes it, or it has not begun.
#[test]
fn an_extension_that_is_cut_short_is_finished_by_the_next_coordinator() {
    let recorder = Arc::new(Recorder::new(MemoryDevice::new(OLD)));
    let device: Arc<dyn BlockDevice> = recorder.clone();
    let world = World::on(device.clone());
    let node = world.node(1);
    recorder.set_len(NEW).expect("the LUN grows");
    device.flush().expect("the SAN keeps it");
    let before = recorder.position();
    assert_eq!(node.extend().expect("it grows"), (OLD, NEW));
    let mut finished = 0;
    for cut in before..=recorder.position() {
        for choice in [Unflushed::None, Unflushed::All, Unflushed::Torn { seed: cut as u64 }] {
            let image: Arc<dyn BlockDevice> = Arc::new(recorder.replay_prefix(cut, choice));
            let report = csvfs::check::check_device(&image).expect("the volume can be checked");
            // One copy of the superblock may be on its way.
            let other = report.problems.iter().filter(|problem| !problem.what.contains("superblock"));
            assert_eq!(other.count(), 0, "cut at {cut} with {choice:?}: {report:?}");
            let world = World::of_after(image, world.volume, 1);
            world.link.coordinator().expect("there").node_gone(lockmgr::NodeId(1), lockmgr::Epoch(1));
            let node = world.node(2);
            let size = node.statfs().expect("numbers").blocks * 4096;
            assert!(size == OLD || size == NEW, "{size}");
            finished += u64::from(size == NEW);
            assert_eq!(world.problems(&node), Vec::<String>::new(), "cut at {cut} with {choice:?}");
            assert_eq!(node.extend().expect("it grows"), (size, NEW));
            assert_eq!(world.problems(&node), Vec::<String>::new());
        }
    }
    assert!(finished > 3, "cuts between the superblock and the tables were met");
}

#[test]
fn a_lun_that_has_become_smaller_is_refused() {
    let lun = Arc::new(MemoryDevice::new(NEW));
    let world = World::on(lun.clone());
    let node = world.node(1);
    lun.set_len(OLD).expect("the LUN shrinks");
    let error = node.extend().expect_err("it is smaller");
    assert!(error.to_string().contains("less than the volume"), "{error}");
}
