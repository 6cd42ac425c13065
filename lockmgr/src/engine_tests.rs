//! The engine's claims: stories first, then a model of clients whose messages are delayed and reordered at will.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::Mode::{ConcurrentWrite, Exclusive, Null, ProtectedRead};
use crate::{Epoch, NodeId};

const R: ResourceId = ResourceId(7);

fn client(serial: u64) -> ClientId {
    ClientId { node: NodeId(1), epoch: Epoch(1), serial }
}

fn engine() -> LockEngine {
    LockEngine::new(Limits { recall_ms: 1000, hold_min_ms: 10, ..Limits::default() })
}

fn request(ticket: u64, serial: u64, mode: Mode) -> Event {
    Event::Request { ticket, holder: client(serial), resource: R, mode }
}

fn lower(serial: u64, to: Mode, recall_seq: u64) -> Event {
    Event::Lower { holder: client(serial), resource: R, to, recall_seq }
}

fn granted(actions: &[Action]) -> Vec<u64> {
    let ticket = |action: &Action| match action {
        Action::Grant { ticket, .. } => Some(*ticket),
        _ => None,
    };
    actions.iter().filter_map(ticket).collect()
}

fn recalls(actions: &[Action]) -> Vec<(ClientId, Mode, u64)> {
    let recall = |action: &Action| match action {
        Action::Recall { holder, to, seq, .. } => Some((*holder, *to, *seq)),
        _ => None,
    };
    actions.iter().filter_map(recall).collect()
}

/// Requests `mode` at `now` and expects the grant at once.
fn take(engine: &mut LockEngine, now: u64, ticket: u64, serial: u64, mode: Mode) {
    assert_eq!(granted(&engine.step(Millis(now), request(ticket, serial, mode))), [ticket]);
}

#[test]
fn readers_share_and_a_writer_waits_until_all_have_lowered() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, ProtectedRead);
    take(&mut engine, 0, 2, 2, ProtectedRead);
    let asked = recalls(&engine.step(Millis(20), request(3, 3, Exclusive)));
    assert_eq!(asked.iter().map(|r| (r.0, r.1)).collect::<Vec<_>>(), [(client(1), Null), (client(2), Null)]);
    assert!(engine.step(Millis(21), lower(1, Null, asked[0].2)).is_empty());
    assert_eq!(granted(&engine.step(Millis(22), lower(2, Null, asked[1].2))), [3]);
    assert_eq!(engine.held(client(3), R), Exclusive);
}

#[test]
fn a_held_mode_that_covers_the_request_is_granted_at_once() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    let again = engine.step(Millis(1), request(2, 1, ProtectedRead));
    assert!(matches!(again[..], [Action::Grant { ticket: 2, mode: Exclusive, .. }]));
}

#[test]
fn a_writer_is_only_asked_down_to_what_a_reader_leaves_it() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    let asked = recalls(&engine.step(Millis(50), request(2, 2, ProtectedRead)));
    assert_eq!(asked[0].1, ProtectedRead);
    assert_eq!(granted(&engine.step(Millis(51), lower(1, ProtectedRead, asked[0].2))), [2]);
}

// Invariant C6
#[test]
fn an_answer_to_an_older_recall_is_dropped() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    let first = recalls(&engine.step(Millis(20), request(2, 2, Exclusive)))[0].2;
    engine.step(Millis(21), lower(1, Null, first));
    // Client 1 comes back, and a late copy of its old answer arrives.
    let second = recalls(&engine.step(Millis(40), request(3, 1, Exclusive)))[0].2;
    assert_eq!(granted(&engine.step(Millis(41), lower(2, Null, second))), [3]);
    assert!(engine.step(Millis(42), lower(1, Null, first)).is_empty());
    assert_eq!(engine.held(client(1), R), Exclusive);
}

// Invariant C6
#[test]
fn a_recalled_holder_is_granted_nothing_before_it_has_answered() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    let seq = recalls(&engine.step(Millis(20), request(2, 2, ProtectedRead)))[0].2;
    assert!(engine.step(Millis(21), request(3, 1, ProtectedRead)).is_empty());
    assert_eq!(granted(&engine.step(Millis(22), lower(1, Null, seq))), [2, 3]);
}

#[test]
fn an_answer_that_keeps_too_much_does_not_end_the_recall() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    let seq = recalls(&engine.step(Millis(20), request(2, 2, Exclusive)))[0].2;
    assert!(engine.step(Millis(21), lower(1, ProtectedRead, seq)).is_empty());
    assert_eq!(granted(&engine.step(Millis(22), lower(1, Null, seq))), [2]);
}

#[test]
fn lowering_cannot_raise() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, ProtectedRead);
    engine.step(Millis(1), lower(1, Exclusive, 0));
    engine.step(Millis(1), lower(1, ConcurrentWrite, 0));
    assert_eq!(engine.held(client(1), R), ProtectedRead);
}

// Invariant E1
#[test]
fn claims_rebuild_the_table_and_a_conflicting_claim_is_an_error() {
    let mut engine = engine();
    let claim = |serial, mode| Event::Claim { holder: client(serial), resource: R, mode };
    assert!(engine.step(Millis(0), claim(1, ProtectedRead)).is_empty());
    assert!(engine.step(Millis(0), claim(2, ProtectedRead)).is_empty());
    let conflict = engine.step(Millis(0), claim(3, Exclusive));
    let expected = Action::ClaimConflict {
        holder: client(3),
        resource: R,
        mode: Exclusive,
        with: client(1),
        held: ProtectedRead,
    };
    assert_eq!(conflict, [expected]);
    assert_eq!(engine.held(client(3), R), Null);
    assert_eq!(engine.holders(R).len(), 2);
}

#[test]
fn a_claim_that_is_sent_again_changes_nothing() {
    let mut engine = engine();
    let claim = Event::Claim { holder: client(1), resource: R, mode: Exclusive };
    engine.step(Millis(0), claim);
    assert!(engine.step(Millis(1), claim).is_empty());
    assert_eq!(engine.held(client(1), R), Exclusive);
}

// Invariant E2
#[test]
fn a_recall_without_answer_is_overdue_once_and_takes_nothing_away() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    engine.step(Millis(20), request(2, 2, Exclusive));
    assert_eq!(engine.next_deadline(), Some(Millis(1020)));
    assert!(engine.step(Millis(1019), Event::Tick).is_empty());
    assert_eq!(engine.step(Millis(1020), Event::Tick), [Action::Overdue { holder: client(1), resource: R }]);
    assert!(engine.step(Millis(9000), Event::Tick).is_empty());
    assert_eq!(engine.held(client(1), R), Exclusive);
    assert_eq!(granted(&engine.step(Millis(9001), Event::HolderGone { holder: client(1) })), [2]);
}

// Invariant E4
#[test]
fn a_hold_lasts_its_minimum_time_before_it_is_recalled() {
    let mut engine = engine();
    take(&mut engine, 100, 1, 1, Exclusive);
    assert!(engine.step(Millis(101), request(2, 2, Exclusive)).is_empty());
    assert_eq!(engine.next_deadline(), Some(Millis(110)));
    assert_eq!(recalls(&engine.step(Millis(110), Event::Tick)).len(), 1);
}

// Invariant E4
#[test]
fn asking_again_does_not_prolong_the_minimum_hold() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    engine.step(Millis(1), request(2, 2, Exclusive));
    take(&mut engine, 9, 3, 1, Exclusive);
    assert_eq!(recalls(&engine.step(Millis(10), Event::Tick)).len(), 1);
}

// Invariant E4
#[test]
fn grants_are_first_come_first_served() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, ProtectedRead);
    let seq = recalls(&engine.step(Millis(20), request(2, 2, Exclusive)))[0].2;
    // A reader that could share with client 1 still waits behind the writer.
    assert!(engine.step(Millis(21), request(3, 3, ProtectedRead)).is_empty());
    assert_eq!(granted(&engine.step(Millis(22), lower(1, Null, seq))), [2]);
    assert_eq!(engine.waiters(R).iter().map(|w| w.ticket).collect::<Vec<_>>(), [3]);
}

// Invariant E4
#[test]
fn two_clients_that_fight_for_a_resource_take_turns() {
    let mut engine = engine();
    take(&mut engine, 0, 0, 0, Exclusive);
    let (mut now, mut owner) = (0, 0_u64);
    for turn in 1..200 {
        let rival = 1 - owner;
        engine.step(Millis(now), request(turn, rival, Exclusive));
        now = engine.next_deadline().expect("a recall is due").0;
        let seq = recalls(&engine.step(Millis(now), Event::Tick))[0].2;
        assert_eq!(granted(&engine.step(Millis(now), lower(owner, Null, seq))), [turn]);
        owner = rival;
    }
    assert!(now >= 199 * 10, "each turn lasted the minimum hold time");
}

#[test]
fn two_readers_that_both_want_to_write_do_not_block_each_other() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, ProtectedRead);
    take(&mut engine, 0, 2, 2, ProtectedRead);
    let asked = recalls(&engine.step(Millis(20), request(3, 1, Exclusive)));
    assert_eq!(asked[0].0, client(2));
    assert!(engine.step(Millis(20), request(4, 2, Exclusive)).is_empty());
    assert_eq!(granted(&engine.step(Millis(21), lower(2, Null, asked[0].2))), [3]);
    let asked = recalls(&engine.step(Millis(40), Event::Tick));
    assert_eq!(granted(&engine.step(Millis(41), lower(1, Null, asked[0].2))), [4]);
}

#[test]
fn a_reader_that_wants_to_write_beside_others_first_drops_its_cache() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, ProtectedRead);
    let asked = recalls(&engine.step(Millis(20), request(2, 1, ConcurrentWrite)));
    assert_eq!((asked[0].0, asked[0].1), (client(1), Null));
    assert_eq!(granted(&engine.step(Millis(21), lower(1, Null, asked[0].2))), [2]);
}

// Invariant E4
#[test]
fn the_queue_is_bounded() {
    let limits = Limits { waiters_per_resource_max: 2, waiters_max: 3, ..Limits::default() };
    let mut engine = LockEngine::new(limits);
    let on = |ticket, resource| Event::Request { ticket, holder: client(ticket), resource, mode: Exclusive };
    engine.step(Millis(0), on(1, R));
    engine.step(Millis(0), on(2, R));
    engine.step(Millis(0), on(3, R));
    let refused = engine.step(Millis(0), on(4, R));
    assert_eq!(refused, [Action::Refuse { ticket: 4, reason: RefuseReason::ResourceQueueFull }]);
    let other = ResourceId(8);
    engine.step(Millis(0), on(5, other));
    engine.step(Millis(0), on(6, other));
    let refused = engine.step(Millis(0), on(7, other));
    assert_eq!(refused, [Action::Refuse { ticket: 7, reason: RefuseReason::QueueFull }]);
    engine.step(Millis(0), Event::Cancel { ticket: 2 });
    engine.step(Millis(0), Event::Cancel { ticket: 3 });
    assert_eq!(engine.waiting(), 1);
}

#[test]
fn a_client_that_is_gone_leaves_nothing_behind() {
    let mut engine = engine();
    take(&mut engine, 0, 1, 1, Exclusive);
    engine.step(Millis(0), request(2, 2, ProtectedRead));
    engine.step(Millis(0), request(3, 2, Exclusive));
    engine.step(Millis(1), Event::HolderGone { holder: client(2) });
    engine.step(Millis(1), Event::HolderGone { holder: client(1) });
    assert_eq!((engine.resources_in_use(), engine.waiting(), engine.next_deadline()), (0, 0, None));
    assert!(engine.resources_of(client(1)).next().is_none());
}

/// What one client believes, following the rules of the protocol.
#[derive(Default)]
struct View {
    mode: Mode,
    /// Newest grant or recall taken into account.
    seq: u64,
    /// The request under way: its ticket and mode.
    asked: Option<(u64, Mode)>,
    /// A release of its own is under way; it says nothing else about the resource until that has arrived.
    releasing: bool,
}

/// A message under way, from the engine to a client or back.
#[derive(Clone, Copy, Debug)]
enum Mail {
    Grant { to: u64, ticket: u64, mode: Mode, seq: u64 },
    Recall { to: u64, mode: Mode, seq: u64 },
    Answer(Event),
}

/// Clients, one engine, and a post that delivers in any order.
struct World {
    engine: LockEngine,
    now: u64,
    tickets: u64,
    views: BTreeMap<u64, View>,
    mail: Vec<Mail>,
    served: BTreeSet<u64>,
    overdue: BTreeSet<ClientId>,
}

impl World {
    fn new(clients: u64) -> Self {
        Self {
            engine: engine(),
            now: 0,
            tickets: 0,
            views: (0..clients).map(|serial| (serial, View::default())).collect(),
            mail: Vec::new(),
            served: BTreeSet::new(),
            overdue: BTreeSet::new(),
        }
    }

    fn feed(&mut self, event: Event) {
        for action in self.engine.step(Millis(self.now), event) {
            match action {
                Action::Grant { ticket, holder, mode, seq, .. } => {
                    self.mail.push(Mail::Grant { to: holder.serial, ticket, mode, seq });
                }
                Action::Recall { holder, to, seq, .. } => {
                    self.mail.push(Mail::Recall { to: holder.serial, mode: to, seq });
                }
                Action::Overdue { holder, .. } => assert!(self.overdue.insert(holder)),
                Action::ClaimConflict { .. } | Action::Refuse { .. } => {
                    panic!("not in this story: {action:?}")
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        let holders = self.engine.holders(R);
        for (i, a) in holders.iter().enumerate() {
            assert!(holders[i + 1..].iter().all(|b| a.mode.compatible(b.mode)), "{holders:?}");
        }
        // A client never believes in more than the engine knows of.
        for (&serial, view) in &self.views {
            let held = self.engine.held(client(serial), R);
            assert!(held.covers(view.mode), "client {serial} believes {} but holds {held}", view.mode);
        }
    }

    fn ask(&mut self, serial: u64, mode: Mode) {
        let view = self.views.get_mut(&serial).expect("a client of this world");
        if view.asked.is_some() || view.releasing {
            return;
        }
        self.tickets += 1;
        view.asked = Some((self.tickets, mode));
        self.feed(Event::Request { ticket: self.tickets, holder: client(serial), resource: R, mode });
    }

    /// Gives up what it holds, unasked.
    fn release(&mut self, serial: u64) {
        let view = self.views.get_mut(&serial).expect("a client of this world");
        if view.asked.is_some() || view.releasing || view.mode == Null {
            return;
        }
        view.mode = Null;
        view.releasing = true;
        self.mail.push(Mail::Answer(lower(serial, Null, 0)));
    }

    fn deliver(&mut self, at: usize) {
        match self.mail.swap_remove(at) {
            Mail::Answer(event @ Event::Lower { holder, recall_seq: 0, .. }) => {
                self.feed(event);
                self.views.get_mut(&holder.serial).expect("it has not left").releasing = false;
            }
            Mail::Grant { to, ticket, mode, seq } => self.on_grant(to, ticket, mode, seq),
            Mail::Recall { to, mode, seq } => self.on_recall(to, mode, seq),
            Mail::Answer(event) => self.feed(event),
        }
    }

    /// A grant older than the last recall is dropped, and asked for again.
    fn on_grant(&mut self, serial: u64, ticket: u64, mode: Mode, seq: u64) {
        let Some(view) = self.views.get_mut(&serial) else { return };
        let Some((asked, wanted)) = view.asked.filter(|(asked, _)| *asked == ticket) else { return };
        view.asked = None;
        if seq < view.seq {
            self.ask(serial, wanted);
            return;
        }
        (view.mode, view.seq) = (mode, seq);
        self.served.insert(asked);
        self.check();
    }

    fn on_recall(&mut self, serial: u64, to: Mode, seq: u64) {
        let Some(view) = self.views.get_mut(&serial) else { return };
        if seq < view.seq {
            return;
        }
        view.seq = seq;
        if !to.covers(view.mode) {
            view.mode = to;
        }
        // It may believe in less than it is allowed to keep, when the grant is still under way: that one is dropped.
        let left = view.mode;
        self.mail.push(Mail::Answer(lower(serial, left, seq)));
    }

    fn leave(&mut self, serial: u64) {
        if self.views.len() > 1 && self.views.remove(&serial).is_some() {
            self.mail.retain(
                |mail| !matches!(mail, Mail::Answer(Event::Lower { holder, .. }) if holder.serial == serial),
            );
            self.feed(Event::HolderGone { holder: client(serial) });
        }
    }

    /// Delivers everything and lets time pass until nothing more happens.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.mail.is_empty() {
                self.deliver(0);
            } else if self.engine.waiting() > 0 {
                let next = self.engine.next_deadline().expect("a waiter means that something is due");
                self.now = self.now.max(next.0);
                self.feed(Event::Tick);
            } else {
                return;
            }
        }
        panic!("requests are never granted: {:?}", self.engine.waiters(R));
    }
}

#[derive(Clone, Copy, Debug)]
enum Move {
    Ask(u64, Mode),
    Deliver(usize),
    Wait(u64),
    Release(u64),
    Leave(u64),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let modes = prop::sample::select(vec![ProtectedRead, ConcurrentWrite, Exclusive]);
    let one = prop_oneof![
        4 => (0..5_u64, modes).prop_map(|(serial, mode)| Move::Ask(serial, mode)),
        6 => (0..64_usize).prop_map(Move::Deliver),
        2 => (0..15_u64).prop_map(Move::Wait),
        2 => (0..5_u64).prop_map(Move::Release),
        1 => (0..5_u64).prop_map(Move::Leave),
    ];
    prop::collection::vec(one, 0..120)
}

proptest! {
    // Invariants C6, E4: whatever the order of messages, holders are compatible, no client believes in more than it
    // has, and in the end every request of a client that stayed is granted.
    #[test]
    fn clients_that_answer_are_all_served_and_never_conflict(moves in moves()) {
        let mut world = World::new(5);
        for step in moves {
            match step {
                Move::Ask(serial, mode) if world.views.contains_key(&serial) => world.ask(serial, mode),
                Move::Deliver(at) if !world.mail.is_empty() => world.deliver(at % world.mail.len()),
                Move::Wait(ms) => { world.now += ms; world.feed(Event::Tick); }
                Move::Leave(serial) => world.leave(serial),
                Move::Release(serial) if world.views.contains_key(&serial) => world.release(serial),
                Move::Ask(..) | Move::Release(_) | Move::Deliver(_) => {}
            }
        }
        world.settle();
        prop_assert!(world.views.values().all(|view| view.asked.is_none()));
        prop_assert!(world.overdue.is_empty() || world.now >= 1000);
    }

    // Nothing a client can send makes the engine panic or lose its invariant.
    #[test]
    fn arbitrary_events_keep_holders_compatible(
        events in prop::collection::vec((0..7_u8, 0..4_u64, 0..4_u8, 0..12_u64, 0..30_u64), 0..200)
    ) {
        let mut engine = LockEngine::new(Limits { recall_ms: 40, hold_min_ms: 3, waiters_per_resource_max: 4, waiters_max: 6 });
        let mut now = 0;
        for (kind, serial, mode, number, ms) in events {
            now += ms / 4;
            let (holder, resource) = (client(serial), ResourceId(number % 2));
            let mode = [Null, ProtectedRead, ConcurrentWrite, Exclusive][usize::from(mode)];
            let event = match kind {
                0 | 1 => Event::Request { ticket: number, holder, resource, mode },
                2 | 3 => Event::Lower { holder, resource, to: mode, recall_seq: number },
                4 => Event::Cancel { ticket: number },
                5 => Event::Claim { holder, resource, mode },
                _ => Event::HolderGone { holder },
            };
            engine.step(Millis(now), event);
            for id in [ResourceId(0), ResourceId(1)] {
                let holders = engine.holders(id);
                prop_assert!(engine.waiters(id).len() <= 4);
                for (i, a) in holders.iter().enumerate() {
                    prop_assert!(a.mode != Null);
                    prop_assert!(holders[i + 1..].iter().all(|b| a.mode.compatible(b.mode)));
                }
            }
        }
        for serial in 0..4 {
            engine.step(Millis(now), Event::HolderGone { holder: client(serial) });
        }
        prop_assert_eq!((engine.resources_in_use(), engine.waiting(), engine.next_deadline()), (0, 0, None));
    }
}
