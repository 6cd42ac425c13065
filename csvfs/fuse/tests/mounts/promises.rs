//! Attributes that the kernel tells by itself, on mounts of one volume, each with a node of its own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use blockio::{Permission, WriteRight};

use crate::world::{World, can_mount};
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps};

/// A lease that never ends, and counts how often somebody looked how long it lasts: once for each answer with attributes.
#[derive(Default)]
struct Looks(AtomicU64);

impl WriteRight for Looks {
    fn check(&self) -> Permission {
        Permission::Granted
    }

    fn lasts(&self) -> Duration {
        self.0.fetch_add(1, Ordering::SeqCst);
        Duration::from_secs(3600)
    }
}

/// Whether the kernel is one that is promised anything: Linux 6.14.
fn is_promised() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel");
    let mut numbers = release.split('.').map(str::parse::<u32>);
    matches!((numbers.next(), numbers.next()), (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 14))
}

#[test]
fn attributes_that_were_promised_are_told_without_asking() {
    if !can_mount() || !is_promised() {
        return;
    }
    let mut world = World::new();
    let (a, _b) = (world.mount(), world.mount());
    fs::write(a.join("f"), b"content").expect("write");
    let looks = Arc::new(Looks::default());
    assert!(world.node(0).set_right(looks.clone()));
    let file = File::open(a.join("f")).expect("open");
    for _ in 0..1000 {
        assert_eq!(file.metadata().expect("fstat").len(), 7);
    }
    // One look for each promise of a second, and a few that found the file not at rest.
    let looked = looks.0.load(Ordering::SeqCst);
    assert!(looked < 500, "asked {looked} times");
    drop(file);
    world.end();
}

/// Sets the time of the last change, as a number that only grows.
fn set(path: &Path, number: i64) {
    let time = Timespec { tv_sec: number, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::empty()).expect("set");
}

/// Two mounts take turns in changing what programs on both look at all the time: a look that begins after a change has ended, or
/// after another look that showed it, shows it too.
#[test]
fn no_look_shows_less_than_a_change_or_a_look_that_had_ended() {
    const ROUNDS: i64 = 1500;
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let mounts = [world.mount(), world.mount()];
    fs::create_dir(mounts[0].join("d")).expect("a directory");
    File::create_new(mounts[0].join("d/f")).expect("a file");
    for name in ["d", "d/f"] {
        let paths = mounts.each_ref().map(|mount| mount.join(name));
        set(&paths[0], 1);
        let (seen, ended) = (AtomicI64::new(1), AtomicBool::new(false));
        thread::scope(|scope| {
            let looks = [(0, true), (0, false), (1, true), (1, false)];
            for (number, by_name) in looks {
                let (path, node, seen, ended) = (&paths[number], world.node(number), &seen, &ended);
                let opened = File::open(path).expect("open");
                let ino = opened.metadata().expect("stat").ino();
                scope.spawn(move || {
                    while !ended.load(Ordering::SeqCst) {
                        let least = seen.load(Ordering::SeqCst);
                        let about = if by_name { fs::metadata(path) } else { opened.metadata() };
                        let shown = about.expect("stat").mtime();
                        if shown < least {
                            let known = node.attr_at_hand(ino).map(|attr| attr.mtime.seconds);
                            let again = opened.metadata().expect("stat").mtime();
                            panic!(
                                "mount {number}, {name}, by name: {by_name}: {shown} after {least}, then {again}; the node knows {known:?}"
                            );
                        }
                        seen.fetch_max(shown, Ordering::SeqCst);
                    }
                });
            }
            for round in 2..ROUNDS {
                set(&paths[usize::from(round % 3 == 0)], round);
                seen.fetch_max(round, Ordering::SeqCst);
            }
            ended.store(true, Ordering::SeqCst);
        });
        assert_eq!(fs::metadata(&paths[1]).expect("stat").mtime(), ROUNDS - 1);
    }
    world.end();
}
