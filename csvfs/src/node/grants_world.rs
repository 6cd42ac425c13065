//! Lock engine and clients' grants under one seed: a simulated network and clock, pauses, crashes, fences, new coordinators.
//!
//! Everything is one thread and one sequence of numbers, so a seed repeats a run step by step. The oracle: what clients may do
//! at the same time is compatible, and whoever may read sees what was written last.
//!
//! `CSVFS_SIM_SECONDS` runs for longer with fresh seeds; `CSVFS_SIM_SEED` repeats one.

use std::collections::{BTreeMap, BTreeSet};

use lockmgr::engine::{Action, Event, Limits, LockEngine};
use lockmgr::{ClientId, Epoch, Millis, Mode, NodeId, ResourceId};

use super::{Grant, OnRecall, Seq};

/// Seeds that are always run; each that has found a mistake stays here.
const KEPT: [u64; 8] =
    [1, 2, 3, 0x5eed, 0xdead_beef, 4_711_471_147, 1_795_669_759_153_654, 1_795_752_155_158_651];

const CLIENTS: usize = 5;
const RESOURCES: usize = 3;
const STEPS: u64 = 20_000;

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn index(&mut self, below: usize) -> usize {
        usize::try_from(self.roll(below as u64)).expect("below a usize")
    }
}

/// What a client asks.
#[derive(Clone, Copy, Debug)]
enum Ask {
    Acquire {
        mode: Mode,
    },
    Release {
        to: Mode,
        recall: u64,
        number: u64,
        value: Option<u64>,
    },
    /// Any question whose answer may bring a grant.
    Look,
}

#[derive(Clone, Copy, Debug)]
enum Message {
    ToCoordinator { client: usize, life: u64, attempt: u64, term: u64, resource: usize, ask: Ask },
    Granted { mode: Mode, seq: Seq, value: u64, attempt: u64 },
    Lent { mode: Mode, seq: Seq, stamp: Seq, value: u64, attempt: u64 },
    Released { number: u64, stamp: Seq },
    Recall { to: Mode, seq: Seq },
}

/// One resource at one client.
#[derive(Default)]
struct View {
    grant: Grant,
    floor: (Seq, Seq),
    /// What it knows of the value, since it has a grant.
    value: u64,
    dirty: bool,
    /// Requests in flight to the LUN end at this step.
    busy_until: u64,
}

struct Client {
    life: u64,
    attempt: u64,
    views: Vec<View>,
    asleep_until: u64,
    /// What came while it slept.
    inbox: Vec<(usize, Message)>,
}

impl Client {
    fn new(life: u64) -> Self {
        let views = (0..RESOURCES).map(|_| View::default()).collect();
        Self { life, attempt: 1, views, asleep_until: 0, inbox: Vec::new() }
    }
}

/// The cluster.
struct World {
    seed: u64,
    dice: Dice,
    now: u64,
    term: u64,
    stamp: u64,
    engine: LockEngine,
    tickets: BTreeMap<u64, (usize, u64, u64, usize)>,
    next_ticket: u64,
    clients: Vec<Client>,
    lives: u64,
    /// By the step of arrival; what arrives in the same step comes in any order.
    network: BTreeMap<(u64, u64), (usize, u64, usize, Message)>,
    sent: u64,
    /// What the coordinator has.
    stored: Vec<u64>,
    /// Releases with a value that were done: client, its life, resource, number. Every coordinator knows them.
    done: BTreeSet<(usize, u64, usize, u64)>,
    /// What was written last by somebody who was not fenced since.
    truth: Vec<u64>,
    reads: u64,
    writes: u64,
    fences: u64,
}

fn id(client: usize, life: u64) -> ClientId {
    ClientId { node: NodeId(u16::try_from(client + 1).expect("few")), epoch: Epoch(life), serial: 1 }
}

fn limits() -> Limits {
    Limits { recall_ms: 400, hold_min_ms: 5, ..Limits::default() }
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            dice: Dice(seed | 1),
            now: 1,
            term: 1,
            stamp: 0,
            engine: LockEngine::new(limits()),
            tickets: BTreeMap::new(),
            next_ticket: 0,
            clients: (0..CLIENTS).map(|_| Client::new(1)).collect(),
            lives: 1,
            network: BTreeMap::new(),
            sent: 0,
            stored: vec![0; RESOURCES],
            done: BTreeSet::new(),
            truth: vec![0; RESOURCES],
            reads: 0,
            writes: 0,
            fences: 0,
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS {
            self.now += 1;
            self.fate();
            self.deliver();
            let actions = self.engine.step(Millis(self.now), Event::Tick);
            self.carry_out(actions);
            for client in 0..CLIENTS {
                if self.clients[client].asleep_until <= self.now {
                    self.act(client);
                }
            }
            self.judge();
        }
        assert!(self.reads > 100 && self.writes > 100, "seed {}: hardly anything happened", self.seed);
    }

    /// Pauses, crashes, new coordinators: rare.
    fn fate(&mut self) {
        let victim = self.dice.index(CLIENTS);
        match self.dice.roll(2000) {
            0 => self.new_coordinator(),
            1 => self.fence(victim),
            // Some sleep past the deadline of a recall.
            2..=9 => self.clients[victim].asleep_until = self.now + self.dice.roll(700),
            _ => {}
        }
    }

    fn send(&mut self, client: usize, resource: usize, message: Message) {
        let (delay, any) = (1 + self.dice.roll(40), self.dice.roll(1 << 20) << 32);
        self.sent += 1;
        let life = self.clients[client].life;
        self.network.insert((self.now + delay, any | self.sent), (client, life, resource, message));
    }

    fn deliver(&mut self) {
        while let Some((&(at, order), _)) = self.network.first_key_value() {
            if at > self.now {
                return;
            }
            let (client, life, resource, message) =
                self.network.remove(&(at, order)).expect("it is the first");
            if let Message::ToCoordinator { .. } = message {
                self.serve(message);
            } else if self.clients[client].life == life {
                if self.clients[client].asleep_until > self.now {
                    self.clients[client].inbox.push((resource, message));
                } else {
                    self.hear(client, resource, message);
                }
            }
        }
    }

    fn next_stamp(&mut self) -> Seq {
        self.stamp += 1;
        (self.term, self.stamp)
    }

    fn serve(&mut self, message: Message) {
        let Message::ToCoordinator { client, life, attempt, term, resource, ask } = message else { return };
        // Whoever was fenced, or speaks of an older term, is refused.
        if term != self.term || self.clients[client].life != life {
            return;
        }
        let (holder, what) = (id(client, life), ResourceId(resource as u64));
        match ask {
            Ask::Acquire { mode } => {
                let ticket = self.next_ticket(client, life, attempt, resource);
                let event = Event::Request { ticket, holder, resource: what, mode };
                let actions = self.engine.step(Millis(self.now), event);
                self.carry_out(actions);
            }
            Ask::Release { to, recall, number, value } => {
                if let Some(value) = value {
                    self.stored[resource] = value;
                    self.done.insert((client, life, resource, number));
                }
                let event = Event::Lower { holder, resource: what, to, recall_seq: recall };
                let actions = self.engine.step(Millis(self.now), event);
                let stamp = self.next_stamp();
                self.carry_out(actions);
                self.send(client, resource, Message::Released { number, stamp });
            }
            Ask::Look => self.lend(client, life, attempt, resource),
        }
    }

    fn next_ticket(&mut self, client: usize, life: u64, attempt: u64, resource: usize) -> u64 {
        self.next_ticket += 1;
        self.tickets.insert(self.next_ticket, (client, life, attempt, resource));
        self.next_ticket
    }

    fn lend(&mut self, client: usize, life: u64, attempt: u64, resource: usize) {
        let (holder, what, mode) = (id(client, life), ResourceId(resource as u64), Mode::ProtectedRead);
        if !self.engine.is_free_for(holder, what, mode) {
            return;
        }
        self.next_ticket += 1;
        let wanted = self.next_ticket;
        let event = Event::Request { ticket: wanted, holder, resource: what, mode };
        for action in self.engine.step(Millis(self.now), event) {
            match action {
                // What comes before it may have ended the one that asked: a new life of it is somebody else.
                Action::Grant { ticket, .. } if ticket == wanted && self.clients[client].life != life => {}
                Action::Grant { ticket, mode, seq, .. } if ticket == wanted => {
                    let (stamp, value) = (self.next_stamp(), self.stored[resource]);
                    let seq = (self.term, seq);
                    self.send(client, resource, Message::Lent { mode, seq, stamp, value, attempt });
                }
                other => self.carry_out(vec![other]),
            }
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Grant { ticket, mode, seq, .. } => {
                    let Some((client, life, attempt, resource)) = self.tickets.remove(&ticket) else {
                        continue;
                    };
                    if self.clients[client].life != life {
                        continue;
                    }
                    let (seq, value) = ((self.term, seq), self.stored[resource]);
                    self.send(client, resource, Message::Granted { mode, seq, value, attempt });
                }
                Action::Recall { holder, resource, to, seq, .. } => {
                    let client = usize::from(holder.node.0) - 1;
                    let resource = usize::try_from(resource.0).expect("few");
                    self.send(client, resource, Message::Recall { to, seq: (self.term, seq) });
                }
                Action::Overdue { holder, .. } => self.fence(usize::from(holder.node.0) - 1),
                Action::ClaimConflict { .. } => {
                    panic!("seed {}: claims exclude each other: {action:?}", self.seed)
                }
                Action::Refuse { .. } => panic!("seed {}: {action:?}", self.seed),
            }
        }
    }

    /// The client is certainly dead, with what it had not given to the coordinator; then others may have what it held.
    fn fence(&mut self, client: usize) {
        self.fences += 1;
        let holder = id(client, self.clients[client].life);
        for (resource, view) in self.clients[client].views.iter().enumerate() {
            if view.dirty {
                self.truth[resource] = self.stored[resource];
            }
        }
        // A release that is on its way is refused from now on: what it carries is lost, unless it was taken.
        let life = self.clients[client].life;
        let lost: Vec<_> = self
            .network
            .iter()
            .filter(|(_, (of, of_life, _, message))| {
                (*of, *of_life) == (client, life) && matches!(message, Message::ToCoordinator { .. })
            })
            .map(|(key, (_, _, resource, message))| (*key, *resource, *message))
            .collect();
        for (key, resource, message) in lost {
            self.network.remove(&key);
            if let Message::ToCoordinator { ask: Ask::Release { value: Some(_), .. }, .. } = message {
                self.truth[resource] = self.stored[resource];
            }
        }
        self.lives += 1;
        self.clients[client] = Client::new(self.lives);
        let actions = self.engine.step(Millis(self.now), Event::HolderGone { holder });
        self.carry_out(actions);
    }

    /// The coordinator is gone with all messages; its successor hears from every client what it holds.
    fn new_coordinator(&mut self) {
        self.term += 1;
        self.engine = LockEngine::new(limits());
        self.tickets.clear();
        // Requests are lost and sent again below; answers and recalls may still be under way.
        let requests: Vec<_> = self
            .network
            .iter()
            .filter(|(_, (.., message))| matches!(message, Message::ToCoordinator { .. }))
            .map(|(key, (.., message))| (*key, *message))
            .collect();
        for (key, _) in &requests {
            self.network.remove(key);
        }
        for client in 0..CLIENTS {
            self.attach(client);
        }
        // What carries a value was kept by its sender until it has an answer, and is done once.
        for (_, message) in requests {
            if let Message::ToCoordinator {
                client,
                life,
                resource,
                ask: Ask::Release { to, value, number, .. },
                ..
            } = message
            {
                let (attempt, term) = (self.clients[client].attempt, self.term);
                // Without a value nothing is left to be done: the claim has said what is held.
                let to = if value.is_some() { to } else { Mode::Exclusive };
                let ask = Ask::Release { to, recall: 0, number, value };
                self.serve(Message::ToCoordinator { client, life, attempt, term, resource, ask });
            }
        }
    }

    fn attach(&mut self, client: usize) {
        self.clients[client].attempt += 1;
        let life = self.clients[client].life;
        let holder = id(client, life);
        for resource in 0..RESOURCES {
            let view = &mut self.clients[client].views[resource];
            view.grant.acquiring = None;
            let mut mode = view.grant.mode;
            // A release whose value the coordinator does not have is claimed as what it was.
            if let Some(release) = view.grant.release.filter(|release| release.committing.is_some()) {
                let done = self.done.contains(&(client, life, resource, release.number));
                mode = if done { release.to } else { release.from };
            }
            if mode != Mode::Null {
                let event = Event::Claim { holder, resource: ResourceId(resource as u64), mode };
                let actions = self.engine.step(Millis(self.now), event);
                self.carry_out(actions);
            }
        }
    }

    fn hear(&mut self, client: usize, resource: usize, message: Message) {
        let current = self.clients[client].attempt;
        let view = &mut self.clients[client].views[resource];
        match message {
            Message::Granted { mode, seq, value, attempt } if attempt == current => {
                let from_nothing = view.grant.mode == Mode::Null;
                if view.grant.granted(mode, seq) && from_nothing {
                    view.value = value;
                }
            }
            Message::Lent { mode, seq, stamp, value, attempt } if attempt == current => {
                let from_nothing = view.grant.mode == Mode::Null;
                if view.grant.lent(mode, seq, stamp) && from_nothing {
                    view.value = value;
                }
            }
            // Nobody waits for the answer to an answer.
            Message::Released { number: 0, .. } => {}
            Message::Released { number, stamp } => {
                if let Some(at) = view.grant.released(number, stamp) {
                    self.answer(client, resource, at);
                }
            }
            // Of a coordinator that is no more: its successor was told what is held, and recalls it itself.
            Message::Recall { seq, .. } if seq.0 < self.term => {}
            Message::Recall { to, seq } => {
                if view.grant.recalled(to, seq) == OnRecall::AnswerNow {
                    self.answer(client, resource, seq);
                }
            }
            Message::Granted { .. } | Message::Lent { .. } | Message::ToCoordinator { .. } => {}
        }
    }

    /// A recall of what is not held (any more). Not of a former coordinator: its successor knows what is held, and the
    /// answer could overtake, or be overtaken by, what it grants.
    fn answer(&mut self, client: usize, resource: usize, (term, recall): Seq) {
        let to = self.clients[client].views[resource].grant.mode;
        if term == self.term {
            self.ask(client, resource, Ask::Release { to, recall, number: 0, value: None });
        }
    }

    fn ask(&mut self, client: usize, resource: usize, ask: Ask) {
        let Client { life, attempt, .. } = self.clients[client];
        let message = Message::ToCoordinator { client, life, attempt, term: self.term, resource, ask };
        self.send(client, resource, message);
    }

    /// One thing that a client does.
    fn act(&mut self, client: usize) {
        for (resource, message) in std::mem::take(&mut self.clients[client].inbox) {
            self.hear(client, resource, message);
        }
        for resource in 0..RESOURCES {
            self.give_back(client, resource);
        }
        let resource = self.dice.index(RESOURCES);
        match self.dice.roll(12) {
            0..=2 => self.read(client, resource),
            3 | 4 => self.write(client, resource),
            5 => self.forget(client, resource),
            6 | 7 => self.ask(client, resource, Ask::Look),
            _ => {}
        }
    }

    /// Answers a recall once nothing is in flight.
    fn give_back(&mut self, client: usize, resource: usize) {
        let view = &mut self.clients[client].views[resource];
        let Some((to, at)) = view.grant.recall else { return };
        if view.busy_until <= self.now && view.grant.release.is_none() {
            view.grant.recall = None;
            let to = view.grant.lowered(to);
            self.release(client, resource, to, at);
        }
    }

    fn release(&mut self, client: usize, resource: usize, to: Mode, (term, number): Seq) {
        let recall = if term == self.term { number } else { 0 };
        let view = &mut self.clients[client].views[resource];
        let value = std::mem::take(&mut view.dirty).then_some(view.value);
        let number = view.grant.begin_release(to);
        view.grant.releasing(value.map(|_| number));
        self.ask(client, resource, Ask::Release { to, recall, number, value });
    }

    fn want(&mut self, client: usize, resource: usize, mode: Mode) {
        let grant = &mut self.clients[client].views[resource].grant;
        if grant.acquiring.is_none() && grant.release.is_none() && grant.recall.is_none() {
            grant.acquiring = Some(mode);
            self.ask(client, resource, Ask::Acquire { mode });
        }
    }

    fn read(&mut self, client: usize, resource: usize) {
        let view = &mut self.clients[client].views[resource];
        if !view.grant.permits(Mode::ProtectedRead) {
            return self.want(client, resource, Mode::ProtectedRead);
        }
        view.busy_until = self.now + self.dice.roll(10);
        self.reads += 1;
        let (seen, truth) = (view.value, self.truth[resource]);
        assert_eq!(seen, truth, "seed {}: step {}: client {client} reads the past", self.seed, self.now);
    }

    fn write(&mut self, client: usize, resource: usize) {
        let view = &mut self.clients[client].views[resource];
        if !view.grant.permits(Mode::Exclusive) {
            return self.want(client, resource, Mode::Exclusive);
        }
        view.busy_until = self.now + self.dice.roll(10);
        self.writes += 1;
        view.value = self.now;
        view.dirty = true;
        self.truth[resource] = self.now;
    }

    /// Gives up by itself what it does not use, and then all memory of it.
    fn forget(&mut self, client: usize, resource: usize) {
        let (now, quiet) = (self.now, self.dice.roll(2) == 0);
        let view = &mut self.clients[client].views[resource];
        let grant = &view.grant;
        let under_way = grant.release.is_some() || grant.recall.is_some() || grant.acquiring.is_some();
        if under_way || view.busy_until > now {
            return;
        }
        if grant.mode == Mode::Null {
            view.floor = grant.floor();
            view.grant = Grant::above(view.floor);
        } else if quiet {
            self.release(client, resource, Mode::Null, (0, 0));
        }
    }

    /// What clients may do at the same moment is compatible.
    fn judge(&self) {
        for resource in 0..RESOURCES {
            let held: Vec<(usize, Mode)> = self
                .clients
                .iter()
                .enumerate()
                .map(|(client, of)| (client, of.views[resource].grant.mode))
                .filter(|(_, mode)| *mode != Mode::Null)
                .collect();
            for (at, (client, mode)) in held.iter().enumerate() {
                for (other, with) in &held[at + 1..] {
                    assert!(
                        mode.compatible(*with),
                        "seed {}: step {}: {client} has {mode} of {resource} beside {other} with {with}",
                        self.seed,
                        self.now
                    );
                }
            }
        }
    }
}

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn fresh() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.cast_unsigned().wrapping_mul(1_000_003) ^ now.tv_nsec.cast_unsigned()
}

// Invariants A1, C6, E1 to E4.
#[test]
#[expect(clippy::print_stderr, reason = "a fresh seed is shown, so that it can be repeated")]
fn whatever_happens_grants_are_compatible_and_readers_see_the_last_write() {
    if let Some(seed) = variable("CSVFS_SIM_SEED") {
        return World::new(seed).run();
    }
    KEPT.iter().for_each(|seed| World::new(*seed).run());
    let end = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec.cast_unsigned()
        + variable("CSVFS_SIM_SECONDS").unwrap_or(2);
    let mut seeds = BTreeSet::new();
    while rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec.cast_unsigned() < end {
        let seed = fresh();
        eprintln!("fresh seed {seed}");
        World::new(seed).run();
        seeds.insert(seed);
    }
}
