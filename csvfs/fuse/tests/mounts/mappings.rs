//! Shared mappings: what a program stores in one is what the other nodes read, without any further call.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::fs::{SeekFrom, seek};

use crate::world::{World, can_mount};

/// A program that maps a file and stores and loads bytes as it is told; it never flushes.
const PROGRAM: &str = "
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
m = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED)
print('mapped', flush=True)
for line in sys.stdin:
    at, byte = map(int, line.split())
    if at < 0:
        for page in range(0, len(m), 4096):
            m[page] = byte
        at = 0
    elif byte >= 0:
        m[at] = byte
    print(m[at], flush=True)
os._exit(0)
";

struct Mapping {
    child: Child,
    tell: Option<ChildStdin>,
    told: BufReader<ChildStdout>,
}

impl Mapping {
    fn of(file: &Path) -> Self {
        let mut command = Command::new("python3");
        command.arg("-c").arg(PROGRAM).arg(file).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("python3 starts");
        let tell = child.stdin.take();
        let told = BufReader::new(child.stdout.take().expect("its output is piped"));
        let mut mapping = Self { child, tell, told };
        assert_eq!(mapping.line(), "mapped");
        mapping
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.told.read_line(&mut line).expect("it answers");
        line.trim().to_owned()
    }

    fn say(&mut self, at: impl std::fmt::Display, byte: i32) -> String {
        self.tell(at, byte);
        self.line()
    }

    fn tell(&mut self, at: impl std::fmt::Display, byte: i32) {
        let tell = self.tell.as_mut().expect("it listens");
        writeln!(tell, "{at} {byte}").expect("it listens");
    }

    /// Stores `byte` at the start of each page, and does `meanwhile`.
    fn store_in_each_page(&mut self, byte: u8, meanwhile: impl FnOnce()) {
        self.tell(-1, byte.into());
        meanwhile();
        assert_eq!(self.line(), byte.to_string());
    }

    fn store(&mut self, at: usize, byte: u8) {
        assert_eq!(self.say(at, byte.into()), byte.to_string());
    }

    fn load(&mut self, at: usize) -> String {
        self.say(at, -1)
    }

    fn end(mut self) {
        drop(self.tell.take());
        assert!(self.child.wait().expect("it ends").success());
    }
}

const BYTES: usize = 50_000;

// Invariants F2, F3 and F7.
#[test]
fn what_is_stored_in_a_mapping_is_read_on_another_node_and_the_other_way_round() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::write(a.join("f"), vec![1; BYTES]).expect("write");
    let mut mapping = Mapping::of(&a.join("f"));
    let other = File::options().read(true).write(true).open(b.join("f")).expect("open");
    for round in 0..60_usize {
        let (at, byte) = (round * 7919 % BYTES, u8::try_from(round % 200 + 20).expect("small"));
        mapping.store(at, byte);
        let mut seen = [0];
        other.read_exact_at(&mut seen, at as u64).expect("read");
        assert_eq!(seen, [byte], "round {round}: stored in a mapping");
        other.write_all_at(&[byte + 1], at as u64).expect("write");
        assert_eq!(mapping.load(at), (byte + 1).to_string(), "round {round}: written on another node");
    }
    mapping.end();
    drop(other);
    world.end();
}

// Invariants F2 and E4.
#[test]
fn two_nodes_that_store_in_mappings_of_one_file_lose_nothing() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let mounts = [world.mount(), world.mount()];
    fs::write(mounts[0].join("f"), vec![0; BYTES]).expect("write");
    let mut mappings = mounts.each_ref().map(|mount| Mapping::of(&mount.join("f")));
    // All within a few pages, so that both keep taking them from each other.
    for round in 0..100_usize {
        let byte = u8::try_from(round % 250 + 1).expect("small");
        mappings[round % 2].store(round * 97 % 9000, byte);
        assert_eq!(mappings[(round + 1) % 2].load(round * 97 % 9000), byte.to_string(), "round {round}");
    }
    mappings.into_iter().for_each(Mapping::end);
    let content = fs::read(mounts[1].join("f")).expect("read");
    let stored = (0..100_usize).map(|round| round * 97 % 9000).collect::<std::collections::BTreeSet<_>>();
    assert_eq!(content.iter().filter(|byte| **byte != 0).count(), stored.len());
    world.end();
}

// Who copies a file leaves out what is no data. To open it would have the kernel write back what was stored.
#[test]
fn what_is_stored_in_a_mapping_over_a_hole_is_data_at_once_on_every_node() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    File::create_new(a.join("f")).and_then(|file| file.set_len(1 << 20)).expect("a file of one hole");
    let mut mapping = Mapping::of(&a.join("f"));
    let files = [&a, &a, &b].map(|mount| File::open(mount.join("f")).expect("open"));
    mapping.store(300_000, 7);
    for file in files {
        let data = seek(&file, SeekFrom::Data(0)).expect("there is data");
        assert!(data <= 300_000, "what is stored at 300000 is data, not first what is at {data}");
        let hole = seek(&file, SeekFrom::Hole(data)).expect("the end of the data");
        assert!(hole > 300_000, "what is stored at 300000 is data, and none from {hole} on");
    }
    mapping.end();
    world.end();
}

// Invariant F3, within one node: a page that was read before a write and changed after it would be written back over it.
#[test]
fn a_write_to_one_part_of_a_page_and_a_store_to_another_lose_neither() {
    const PAGES: u64 = 64;
    const ROUNDS: u8 = 200;
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let mount = world.mount();
    let file = File::options().read(true).write(true).create_new(true).open(mount.join("f")).expect("create");
    file.set_len(PAGES * 4096).expect("truncate");
    let mut mapping = Mapping::of(&mount.join("f"));
    for round in 1..=ROUNDS {
        mapping.store_in_each_page(round, || {
            for page in 0..PAGES {
                file.write_all_at(&[round; 8], page * 4096 + 1024).expect("write");
            }
        });
        let mut content = vec![0; usize::try_from(PAGES * 4096).expect("small")];
        file.read_exact_at(&mut content, 0).expect("read");
        for (number, page) in content.chunks(4096).enumerate() {
            assert_eq!((page[0], page[1024]), (round, round), "page {number}, stored and written");
        }
    }
    mapping.end();
    drop(file);
    world.end();
}

#[test]
fn what_is_stored_in_a_mapping_stays_when_the_program_ends() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let mount = world.mount();
    fs::write(mount.join("f"), vec![0; BYTES]).expect("write");
    let mut mapping = Mapping::of(&mount.join("f"));
    (0..BYTES).step_by(1000).for_each(|at| mapping.store(at, 9));
    mapping.end();
    let content = fs::read(mount.join("f")).expect("read");
    assert_eq!(content.iter().filter(|byte| **byte == 9).count(), BYTES / 1000);
    world.end();
}

// Invariant F2: the kernel writes back no page while it waits for a new size, and another node waits for the pages.
#[test]
fn the_size_changes_while_another_node_waits_for_pages_that_were_stored_to() {
    const PAGES: u64 = 16;
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let here = File::create_new(a.join("f")).expect("create");
    here.set_len(4096 * PAGES).expect("a size");
    let mut mapping = Mapping::of(&a.join("f"));
    let there = File::open(b.join("f")).expect("open");
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                there.read_at(&mut [0; 4096], 0).expect("read");
            }
        });
        for round in 0..300_u64 {
            mapping.store_in_each_page(u8::try_from(round % 251).expect("small"), || {
                // What is mapped stays.
                here.set_len(4096 * (PAGES + round % 3)).expect("a new size");
            });
        }
        ended.store(true, Ordering::SeqCst);
    });
    mapping.end();
    drop((here, there));
    world.end();
}
