//! Locks of programs on several nodes, through a change of coordinator too.

mod world;

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use csvfs::node::{FsError, Lock, Node};
use world::{Dice, World, create, later, wait};

fn range(ino: u64, owner: u64, start: u64, end: u64) -> Lock {
    Lock { ino, owner, start, end, write: true, flock: false, pid: 7 }
}

fn take(node: &Node, lock: Lock) -> Result<(), i32> {
    let outcome: Result<(), FsError> = wait(|tell| {
        node.lock(&lock, false, tell);
    });
    outcome.map_err(|error| error.errno())
}

fn wait_for(node: &Node, lock: Lock) -> (u64, Receiver<Result<(), FsError>>) {
    let mut call = 0;
    let told = later(|tell| call = node.lock(&lock, true, tell));
    (call, told)
}

/// Returns when the coordinator has seen everything that the node has asked before.
fn settle(node: &Node) {
    node.statfs().expect("an answer");
}

fn world() -> (World, Arc<Node>, Arc<Node>, u64) {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let ino = create(&a, "f").ino();
    (world, a, b, ino)
}

#[test]
fn ranges_exclude_each_other_across_nodes_and_tell_who_is_in_the_way() {
    let (_world, a, b, ino) = world();
    take(&a, range(ino, 1, 0, 99)).expect("free");
    assert_eq!(
        take(&b, range(ino, 1, 50, 60)),
        Err(libc::EAGAIN),
        "the same number on another node is another owner"
    );
    take(&b, range(ino, 1, 100, 199)).expect("free");
    let found = b.query_lock(&range(ino, 1, 0, 10)).expect("an answer").expect("in the way");
    assert_eq!((found.lock.start, found.lock.end, found.here), (0, 99, false));
    a.unlock(&range(ino, 1, 40, 70)).expect("unlock");
    take(&b, range(ino, 1, 50, 60)).expect("the middle is free");
    assert_eq!(b.query_lock(&range(ino, 1, 45, 65)).expect("an answer"), None);
}

#[test]
fn a_circle_over_two_nodes_is_a_deadlock_for_who_closes_it() {
    let (_world, a, b, ino) = world();
    take(&a, range(ino, 1, 0, 0)).expect("free");
    take(&b, range(ino, 2, 1, 1)).expect("free");
    let (_, waits) = wait_for(&a, range(ino, 1, 1, 1));
    settle(&a);
    let (_, closes) = wait_for(&b, range(ino, 2, 0, 0));
    let refused = closes.recv().expect("an outcome").expect_err("a deadlock");
    assert_eq!(refused.errno(), libc::EDEADLK);
    b.unlock(&range(ino, 2, 1, 1)).expect("unlock");
    waits.recv().expect("an outcome").expect("granted");
}

#[test]
fn who_is_interrupted_waits_no_longer_and_has_nothing() {
    let (_world, a, b, ino) = world();
    take(&a, range(ino, 1, 0, 9)).expect("free");
    let (call, waits) = wait_for(&b, range(ino, 1, 0, 9));
    b.interrupt_lock(call);
    assert_eq!(waits.recv().expect("an outcome").expect_err("interrupted").errno(), libc::EINTR);
    a.unlock_all(ino, 1, false).expect("unlock");
    take(&a, range(ino, 2, 0, 9)).expect("free");
    b.interrupt_lock(call);
}

// Invariant E1: locks survive their coordinator.
#[test]
fn locks_and_who_waits_for_them_survive_the_coordinator() {
    let (world, a, b, ino) = world();
    take(&a, range(ino, 1, 0, 9)).expect("free");
    let (_, waits) = wait_for(&b, range(ino, 2, 0, 9));
    for round in 0..6 {
        if round % 2 == 0 {
            world.kill_coordinator();
        } else {
            world.stop_coordinator();
        }
        world.start_coordinator();
        assert_eq!(take(&b, range(ino, 3, 5, 5)), Err(libc::EAGAIN), "round {round}");
        assert!(waits.try_recv().is_err(), "still waiting");
    }
    a.unlock(&range(ino, 1, 0, 9)).expect("unlock");
    waits.recv().expect("an outcome").expect("granted");
    assert_eq!(take(&a, range(ino, 1, 0, 9)), Err(libc::EAGAIN));
}

#[test]
fn the_locks_of_a_client_that_ends_are_free() {
    let (_world, a, b, ino) = world();
    take(&a, range(ino, 1, 0, 9)).expect("free");
    let (_, waits) = wait_for(&b, range(ino, 2, 0, 9));
    a.detach().expect("detach");
    waits.recv().expect("an outcome").expect("granted");
}

/// Three nodes lock and unlock ranges at random while coordinators change; nobody may hold what somebody else holds.
#[test]
fn no_two_owners_ever_hold_the_same_byte() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    const BYTES: usize = 16;
    let world = World::new();
    let nodes = [world.node(1), world.node(2), world.node(3)];
    let ino = create(&nodes[0], "f").ino();
    let holders: [AtomicU64; BYTES] = Default::default();
    let (end, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for (number, node) in nodes.iter().enumerate() {
            let (holders, end, rounds) = (&holders, &end, &rounds);
            scope.spawn(move || {
                let (owner, mut dice) = (number as u64 + 1, Dice(number as u64 * 77 + 5));
                while !end.load(Ordering::SeqCst) {
                    let start = dice.size(BYTES);
                    let last = start + dice.size(BYTES - start);
                    let lock = range(ino, owner, start as u64, last as u64);
                    wait_for(node, lock).1.recv().expect("an outcome").expect("granted");
                    for byte in &holders[start..=last] {
                        assert_eq!(byte.swap(owner, Ordering::SeqCst), 0, "held by two");
                    }
                    for byte in &holders[start..=last] {
                        byte.store(0, Ordering::SeqCst);
                    }
                    node.unlock(&lock).expect("unlock");
                    rounds.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        for _ in 0..5 {
            let before = rounds.load(Ordering::SeqCst);
            world.kill_coordinator();
            world.start_coordinator();
            while rounds.load(Ordering::SeqCst) < before + 200 {
                std::thread::yield_now();
            }
        }
        end.store(true, Ordering::SeqCst);
    });
}
