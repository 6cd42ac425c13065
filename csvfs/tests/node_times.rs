//! Times of changes: who looks sees each change, and what nobody looks at costs nothing.

mod world;

use std::collections::BTreeSet;
use std::sync::Arc;

use blockio::{BlockDevice, MemoryDevice, Record, Recorder};
use csvfs::node::{Attr, Node, ROOT_INO, SetAttr};
use csvfs::proto::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use world::{World, create, fsync, open, write};

fn mtime(attr: &Attr) -> (i64, u32) {
    (attr.mtime.seconds, attr.mtime.nanos)
}

fn look(node: &Arc<Node>) -> Attr {
    node.lookup(ROOT_INO, b"a").expect("the file")
}

/// The tick of the clock that a change would get now.
fn tick() -> (i64, i64) {
    let tick = clock_gettime(ClockId::RealtimeCoarse);
    (tick.tv_sec, tick.tv_nsec)
}

// Between any two looks lies a change, mostly within one tick of the clock.
#[test]
fn who_looks_after_each_change_sees_a_later_time_on_every_node() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2)];
    let files = [create(&nodes[0], "a"), open(&nodes[1], "a")];
    let mut last = mtime(&look(&nodes[0]));
    for round in 0..3_000_usize {
        // Mostly the same node again, which keeps the file.
        let writer = usize::from(round % 100 == 99);
        write(&files[writer], 0, &[7; 512]).expect("a write");
        let elsewhere = round % 70 == 69;
        let seen = look(&nodes[if elsewhere { 1 - writer } else { writer }]);
        assert!(mtime(&seen) > last, "round {round}: {:?} is not after {last:?}", mtime(&seen));
        assert!((seen.ctime.seconds, seen.ctime.nanos) >= mtime(&seen), "round {round}: {seen:?}");
        last = mtime(&seen);
        if elsewhere {
            assert_eq!(mtime(&look(&nodes[writer])), last, "round {round}");
        }
    }
}

#[test]
fn a_file_that_is_changed_after_another_is_never_the_older_one() {
    let world = World::new();
    let node = world.node(1);
    let files = ["a", "b"].map(|name| create(&node, name));
    let times = || ["a", "b"].map(|name| mtime(&node.lookup(ROOT_INO, name.as_bytes()).expect("there")));
    for round in 0..2_000_usize {
        let (first, second) = (round % 2, 1 - round % 2);
        write(&files[first], 0, &[1; 512]).expect("a write");
        if round % 3 > 0 {
            // The next one has its time to the nanosecond.
            times();
            write(&files[first], 0, &[1; 512]).expect("a write");
        }
        write(&files[second], 0, &[2; 512]).expect("a write");
        let times = times();
        assert!(times[second] >= times[first], "round {round}: {times:?}");
    }
}

#[test]
fn a_time_that_was_set_by_hand_gives_way_to_that_of_the_next_write() {
    let world = World::new();
    let node = world.node(1);
    let file = create(&node, "a");
    for set in [0, 40_000_000_000] {
        write(&file, 0, &[1; 512]).expect("a write");
        let by_hand = Timestamp { seconds: set, nanos: 0 };
        node.setattr(file.ino(), &SetAttr { mtime: Some(by_hand), ..SetAttr::default() }).expect("set");
        assert_eq!(look(&node).mtime, by_hand);
        write(&file, 0, &[2; 512]).expect("a write");
        let (seen, (now, _)) = (look(&node).mtime.seconds, tick());
        assert!((now - 60..=now).contains(&seen), "{seen} is not about {now}");
    }
}

// What is written again and again to blocks that are there is recorded once for each tick of the clock, not for each fsync.
#[test]
fn an_fsync_records_a_time_once_for_each_tick() {
    const ROUNDS: usize = 3_000;
    let memory: Arc<dyn BlockDevice> = Arc::new(MemoryDevice::new(128 << 20));
    let world = World::on(memory.clone());
    let own = Arc::new(Recorder::new(memory));
    let node = world.node_on(1, own.clone());
    let file = create(&node, "a");
    write(&file, 0, &[1; 4096]).expect("a write");
    fsync(&file).expect("an fsync");
    let (before, mut ticks) = (changes(&own), BTreeSet::from([tick()]));
    for _ in 0..ROUNDS {
        write(&file, 0, &[2; 4096]).expect("a write");
        fsync(&file).expect("an fsync");
        ticks.insert(tick());
    }
    let records = changes(&own) - before - ROUNDS;
    // The first may follow a look, and two ticks may pass between two of these looks at the clock.
    assert!(records <= 2 * ticks.len() + 1, "{records} records in {} ticks", ticks.len());
    let known = mtime(&look(&node));
    assert_eq!(mtime(&look(&world.node(2))), known, "what was acknowledged is what others see");
}

fn changes<D: BlockDevice>(device: &Recorder<D>) -> usize {
    device.log().iter().filter(|record| matches!(record, Record::Change(_))).count()
}
