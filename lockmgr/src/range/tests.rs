//! Claims about the table of range locks.

use super::*;
use crate::{Epoch, NodeId};

const FILE: ResourceId = ResourceId(7);
const OTHER: ResourceId = ResourceId(8);

pub(super) fn client(node: u16) -> ClientId {
    ClientId { node: NodeId(node), epoch: Epoch(1), serial: 1 }
}

pub(super) fn owner(number: u64) -> Owner {
    Owner { client: client(1), number, family: Family::Range }
}

pub(super) fn lock(number: u64, span: Span, access: Access) -> RangeLock {
    RangeLock { owner: owner(number), span, access, pid: 1 }
}

fn write(number: u64, start: u64) -> RangeLock {
    lock(number, Span { start, end: start + 9 }, Access::Write)
}

fn flock(number: u64, access: Access) -> RangeLock {
    let owner = Owner { family: Family::Flock, ..owner(number) };
    RangeLock { owner, span: Span::ALL, access, pid: 1 }
}

fn granted(outcome: (Verdict, Granted)) {
    assert_eq!(outcome.0, Verdict::Granted);
}

#[test]
fn a_writer_excludes_everybody_and_readers_only_writers() {
    let mut table = RangeTable::default();
    let read = |number| lock(number, Span { start: 0, end: 99 }, Access::Read);
    granted(table.request(1, FILE, read(1), false));
    granted(table.request(2, FILE, read(2), false));
    assert_eq!(table.request(3, FILE, write(3, 50), false).0, Verdict::Refused(Refusal::Busy));
    granted(table.request(4, FILE, write(3, 100), false));
    granted(table.request(5, OTHER, write(3, 0), false));
    assert_eq!(table.conflict(FILE, &write(3, 50)).map(|lock| lock.access), Some(Access::Read));
    assert_eq!(table.conflict(FILE, &read(4)), None);
}

#[test]
fn who_asks_what_is_in_the_way_is_told_of_the_first_in_the_file() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, write(1, 40), false));
    granted(table.request(2, FILE, write(2, 60), false));
    granted(table.request(3, FILE, write(1, 20), false));
    let all = lock(3, Span { start: 0, end: 99 }, Access::Write);
    assert_eq!(table.conflict(FILE, &all).map(|lock| lock.span.start), Some(20));
}

#[test]
fn who_waits_is_granted_in_order_when_the_way_is_free() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, write(1, 0), true));
    for ticket in 2..5 {
        assert_eq!(table.request(ticket, FILE, write(ticket, 0), true).0, Verdict::Waits);
    }
    assert_eq!(
        table.unlock(FILE, owner(1), Span { start: 0, end: 4 }),
        Granted::new(),
        "a part is not enough"
    );
    assert_eq!(table.unlock(FILE, owner(1), Span::ALL), [2]);
    assert!(table.cancel(3) && !table.cancel(3));
    assert_eq!(table.unlock(FILE, owner(2), Span::ALL), [4]);
}

#[test]
fn a_lock_that_becomes_weaker_lets_readers_in() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, write(1, 0), false));
    let reader = lock(2, Span { start: 5, end: 6 }, Access::Read);
    assert_eq!(table.request(2, FILE, reader, true).0, Verdict::Waits);
    let weaker = RangeLock { access: Access::Read, ..write(1, 0) };
    assert_eq!(table.request(3, FILE, weaker, false), (Verdict::Granted, vec![2]));
}

#[test]
fn a_circle_of_owners_over_several_files_is_refused() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, write(1, 0), true));
    granted(table.request(2, FILE, write(2, 10), true));
    granted(table.request(3, OTHER, write(3, 0), true));
    assert_eq!(table.request(4, FILE, write(1, 10), true).0, Verdict::Waits);
    assert_eq!(table.request(5, OTHER, write(2, 0), true).0, Verdict::Waits);
    assert_eq!(table.request(6, FILE, write(3, 0), true).0, Verdict::Refused(Refusal::Deadlock));
    assert_eq!(
        table.request(7, FILE, write(4, 0), true).0,
        Verdict::Waits,
        "who has nothing closes no circle"
    );
    assert_eq!(table.unlock(OTHER, owner(3), Span::ALL), [5], "the others go on");
}

#[test]
fn a_flock_and_a_range_do_not_see_each_other() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, write(1, 0), false));
    granted(table.request(2, FILE, flock(2, Access::Write), false));
    assert_eq!(table.request(3, FILE, flock(3, Access::Read), false).0, Verdict::Refused(Refusal::Busy));
}

// As flock(2) says: the change of a lock is not atomic, the old one goes first.
#[test]
fn two_who_share_a_flock_can_both_ask_for_more_without_a_deadlock() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, flock(1, Access::Read), true));
    granted(table.request(2, FILE, flock(2, Access::Read), true));
    assert_eq!(table.request(3, FILE, flock(1, Access::Write), true).0, Verdict::Waits);
    assert_eq!(table.request(4, FILE, flock(2, Access::Write), true), (Verdict::Waits, vec![3]));
}

#[test]
fn the_locks_of_a_client_that_is_gone_are_free_and_its_requests_forgotten() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, foreign(1, 0), true));
    assert_eq!(table.request(2, FILE, write(2, 0), true).0, Verdict::Waits);
    assert_eq!(table.request(3, FILE, foreign(3, 0), true).0, Verdict::Waits);
    assert_eq!(table.client_gone(client(2)), [2]);
    assert_eq!(table.unlock(FILE, owner(2), Span::ALL), Granted::new(), "nobody waits any more");
    assert_eq!(table.held(FILE).count(), 0);
}

fn foreign(number: u64, start: u64) -> RangeLock {
    let owner = Owner { client: client(2), ..owner(number) };
    RangeLock { owner, ..write(number, start) }
}

// Invariant E1: claims that exclude each other are an error.
#[test]
fn claims_rebuild_the_locks_and_a_conflicting_one_is_an_error() {
    let mut table = RangeTable::default();
    assert_eq!(table.claim(client(1), &[(FILE, write(1, 0)), (FILE, write(2, 10))]), Ok(vec![]));
    assert_eq!(table.claim(client(2), &[(FILE, foreign(3, 5))]).map_err(|lock| lock.owner), Err(owner(1)));
    assert_eq!(table.claim(client(2), &[(FILE, foreign(3, 20))]), Ok(vec![]));
    assert_eq!(table.held(FILE).count(), 3);
}

#[test]
fn who_claims_again_keeps_what_others_wait_for_and_frees_what_is_not_claimed() {
    let mut table = RangeTable::default();
    granted(table.request(1, FILE, write(1, 0), true));
    granted(table.request(2, OTHER, write(1, 0), true));
    assert_eq!(table.request(3, FILE, foreign(1, 0), true).0, Verdict::Waits);
    assert_eq!(table.request(4, OTHER, foreign(1, 0), true).0, Verdict::Waits);
    assert_eq!(table.claim(client(1), &[(FILE, write(1, 0))]), Ok(vec![4]));
}
