//! The lock engine: events in, actions out, the time passed in.
//!
//! ```text
//!   Request  Lower  Cancel  HolderGone  Claim  Tick
//!      \       |      |         |         |     /
//!       +------+------+----+----+---------+----+
//!                          v
//!               step(now, event) -> [Grant, Recall, Overdue, ClaimConflict, Refuse]
//! ```
//! Queues are first come, first served and bounded. A hold lasts a minimum time before it is recalled, so that a
//! resource that two clients fight for still gets work done. A recall that is not answered in time is reported as
//! overdue once, and nothing is taken from the holder: the caller fences it and then says [`Event::HolderGone`].
//!
//! Sequence numbers of grants and recalls come from one counter. A client drops a grant that is older than the last
//! recall it got, and a recall that is older than the grant it has; the engine drops an answer to any recall but the
//! one that is open. Clients send at most one message per resource at a time: an acquisition that could overtake the
//! client's own release would leave the two with different views.
//!
//! **Invariant:** after each step the holders of every resource are pairwise compatible.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use crate::resource::{Resource, Step, Waiter};
use crate::{ClientId, Millis, Mode, ResourceId};

/// Bounds and times of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Time to answer a recall before it is overdue.
    pub recall_ms: u64,
    /// Time that a hold lasts before it is recalled for somebody else.
    pub hold_min_ms: u64,
    /// Most requests waiting for one resource.
    pub waiters_per_resource_max: usize,
    /// Most requests waiting in all.
    pub waiters_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { recall_ms: 15_000, hold_min_ms: 5, waiters_per_resource_max: 4096, waiters_max: 65_536 }
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A client wants a mode. A mode that it holds already is granted at once.
    Request {
        /// Names this request, unique among those that wait.
        ticket: u64,
        /// Who.
        holder: ClientId,
        /// What.
        resource: ResourceId,
        /// How.
        mode: Mode,
    },
    /// A client has drained and made durable whatever the difference allowed, and now has only `to`.
    Lower {
        /// Who.
        holder: ClientId,
        /// What.
        resource: ResourceId,
        /// What is left; [`Mode::Null`] gives it up.
        to: Mode,
        /// The recall that this answers, 0 when the client does it by itself.
        recall_seq: u64,
    },
    /// A request that waits is no longer wanted.
    Cancel {
        /// The request.
        ticket: u64,
    },
    /// A client has ended for certain: it left cleanly, or its node was fenced. Frees its holds and its requests.
    HolderGone {
        /// Who.
        holder: ClientId,
    },
    /// A client says what it has from the previous term. Only while the table is rebuilt, before requests are served.
    Claim {
        /// Who.
        holder: ClientId,
        /// What.
        resource: ResourceId,
        /// How.
        mode: Mode,
    },
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A request is granted.
    Grant {
        /// The request.
        ticket: u64,
        /// Who.
        holder: ClientId,
        /// What.
        resource: ResourceId,
        /// What the client holds now; covers what it asked for.
        mode: Mode,
        /// Orders this against recalls.
        seq: u64,
    },
    /// Tell the client to lower its hold, and to say so with this `seq`.
    Recall {
        /// Who.
        holder: ClientId,
        /// What.
        resource: ResourceId,
        /// Strongest mode that it may keep.
        to: Mode,
        /// Orders this against grants.
        seq: u64,
        /// After this it is overdue.
        deadline: Millis,
    },
    /// A recall was not answered in time: the holder is to be fenced.
    Overdue {
        /// Who.
        holder: ClientId,
        /// What.
        resource: ResourceId,
    },
    /// Two clients claim what cannot both be true. Nothing was recorded; the caller must not serve.
    ClaimConflict {
        /// Whose claim was not recorded.
        holder: ClientId,
        /// What.
        resource: ResourceId,
        /// The mode claimed.
        mode: Mode,
        /// Who holds it.
        with: ClientId,
        /// In which mode.
        held: Mode,
    },
    /// A request was not accepted.
    Refuse {
        /// The request.
        ticket: u64,
        /// Why.
        reason: RefuseReason,
    },
}

/// Why a request was not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefuseReason {
    /// Too many wait for this resource.
    ResourceQueueFull,
    /// Too many wait in all.
    QueueFull,
    /// Another request with this ticket is waiting.
    TicketInUse,
    /// A request for NL asks for nothing.
    NothingRequested,
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResourceQueueFull => "too many requests wait for this resource",
            Self::QueueFull => "too many requests wait for locks",
            Self::TicketInUse => "another waiting request has this ticket",
            Self::NothingRequested => "a request must be for a mode above NL",
        })
    }
}

/// A holder, as shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Who.
    pub client: ClientId,
    /// How.
    pub mode: Mode,
    /// Sequence number of its newest grant.
    pub seq: u64,
    /// Since when.
    pub since: Millis,
    /// The open recall: what it may keep, and until when it has to answer.
    pub recalled: Option<(Mode, Millis)>,
}

/// A request that waits, as shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The request.
    pub ticket: u64,
    /// Who.
    pub client: ClientId,
    /// What it wants.
    pub mode: Mode,
    /// Since when.
    pub since: Millis,
}

/// All locks of one volume. See the module.
#[derive(Debug)]
pub struct LockEngine {
    limits: Limits,
    /// Only for lookup, never walked: its order is not the same in each run.
    resources: HashMap<ResourceId, Resource>,
    /// Where each client holds or waits.
    by_client: HashMap<ClientId, BTreeSet<ResourceId>>,
    tickets: HashMap<u64, ResourceId>,
    timers: BTreeSet<(Millis, ResourceId)>,
    seq: u64,
    now: Millis,
}

impl LockEngine {
    /// An engine without holders.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            resources: HashMap::new(),
            by_client: HashMap::new(),
            tickets: HashMap::new(),
            timers: BTreeSet::new(),
            seq: 0,
            now: Millis::default(),
        }
    }

    /// Takes one event and says what follows from it, and from the time that has passed.
    pub fn step(&mut self, now: Millis, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        let mut out = Vec::new();
        self.run_timers(&mut out);
        match event {
            Event::Request { ticket, holder, resource, mode } => {
                self.request(Waiter { ticket, holder, mode, since: self.now }, resource, &mut out);
            }
            Event::Lower { holder, resource, to, recall_seq } => {
                self.change(resource, &mut out, |held| held.lower(holder, to, recall_seq));
            }
            Event::Cancel { ticket } => self.cancel(ticket, &mut out),
            Event::HolderGone { holder } => self.holder_gone(holder, &mut out),
            Event::Claim { holder, resource, mode } => self.claim(holder, resource, mode, &mut out),
            Event::Tick => {}
        }
        out
    }

    /// When to send the next [`Event::Tick`] at the latest.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Millis> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// Who holds `resource`.
    #[must_use]
    pub fn holders(&self, resource: ResourceId) -> Vec<Holder> {
        let Some(resource) = self.resources.get(&resource) else { return Vec::new() };
        let view = |(&client, hold): (&ClientId, &crate::resource::Hold)| Holder {
            client,
            mode: hold.mode,
            seq: hold.seq,
            since: hold.since,
            recalled: hold.recall.map(|recall| (recall.to, recall.deadline)),
        };
        resource.holders.iter().map(view).collect()
    }

    /// Who waits for `resource`, next first.
    #[must_use]
    pub fn waiters(&self, resource: ResourceId) -> Vec<Waiting> {
        let Some(resource) = self.resources.get(&resource) else { return Vec::new() };
        let view = |w: &Waiter| Waiting { ticket: w.ticket, client: w.holder, mode: w.mode, since: w.since };
        resource.waiters.iter().map(view).collect()
    }

    /// What `client` holds of `resource`.
    #[must_use]
    pub fn held(&self, client: ClientId, resource: ResourceId) -> Mode {
        let hold = self.resources.get(&resource).and_then(|resource| resource.holders.get(&client));
        hold.map_or(Mode::Null, |hold| hold.mode)
    }

    /// Whether a request for `mode` would be granted now, without a recall and without passing anybody who waits.
    #[must_use]
    pub fn is_free_for(&self, client: ClientId, resource: ResourceId, mode: Mode) -> bool {
        self.resources.get(&resource).is_none_or(|resource| resource.is_free_for(client, mode))
    }

    /// The recall that `client` has not answered yet: what it may keep, and the number. To be told again when the first
    /// message may have been lost.
    #[must_use]
    pub fn open_recall(&self, client: ClientId, resource: ResourceId) -> Option<(Mode, u64)> {
        let recall = self.resources.get(&resource)?.holders.get(&client)?.recall?;
        Some((recall.to, recall.seq))
    }

    /// The resources that `client` holds or waits for, in order.
    pub fn resources_of(&self, client: ClientId) -> impl Iterator<Item = ResourceId> {
        self.by_client.get(&client).into_iter().flatten().copied()
    }

    /// Number of resources with a holder or a waiter.
    #[must_use]
    pub fn resources_in_use(&self) -> usize {
        self.resources.len()
    }

    /// Number of requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.tickets.len()
    }

    fn request(&mut self, waiter: Waiter, id: ResourceId, out: &mut Vec<Action>) {
        if let Some(reason) = self.objection(&waiter, id) {
            out.push(Action::Refuse { ticket: waiter.ticket, reason });
            return;
        }
        self.by_client.entry(waiter.holder).or_default().insert(id);
        let resource = self.resources.entry(id).or_default();
        if resource.has(waiter.holder, waiter.mode) {
            let mut step = Step { now: self.now, limits: &self.limits, seq: &mut self.seq, out };
            resource.grant(id, waiter, &mut step);
            return;
        }
        self.tickets.insert(waiter.ticket, id);
        self.change(id, out, |resource| resource.waiters.push_back(waiter));
    }

    fn objection(&self, waiter: &Waiter, id: ResourceId) -> Option<RefuseReason> {
        let here = self.resources.get(&id);
        if waiter.mode == Mode::Null {
            return Some(RefuseReason::NothingRequested);
        }
        if self.tickets.contains_key(&waiter.ticket) {
            return Some(RefuseReason::TicketInUse);
        }
        if here.is_some_and(|resource| resource.has(waiter.holder, waiter.mode)) {
            return None;
        }
        if here.is_some_and(|resource| resource.waiters.len() >= self.limits.waiters_per_resource_max) {
            return Some(RefuseReason::ResourceQueueFull);
        }
        (self.tickets.len() >= self.limits.waiters_max).then_some(RefuseReason::QueueFull)
    }

    fn cancel(&mut self, ticket: u64, out: &mut Vec<Action>) {
        let Some(id) = self.tickets.remove(&ticket) else { return };
        let client = self.resources.get(&id).and_then(|resource| {
            resource.waiters.iter().find(|waiter| waiter.ticket == ticket).map(|waiter| waiter.holder)
        });
        self.change(id, out, |resource| resource.cancel(ticket));
        if let Some(client) = client {
            self.unlink_if_unconcerned(client, id);
        }
    }

    fn holder_gone(&mut self, holder: ClientId, out: &mut Vec<Action>) {
        for id in self.by_client.remove(&holder).unwrap_or_default() {
            let Some(resource) = self.resources.get(&id) else { continue };
            for waiter in resource.waiters.iter().filter(|waiter| waiter.holder == holder) {
                self.tickets.remove(&waiter.ticket);
            }
            self.change(id, out, |resource| resource.forget(holder));
        }
    }

    fn claim(&mut self, holder: ClientId, id: ResourceId, mode: Mode, out: &mut Vec<Action>) {
        if mode == Mode::Null {
            return;
        }
        let resource = self.resources.entry(id).or_default();
        let mut step = Step { now: self.now, limits: &self.limits, seq: &mut self.seq, out };
        match resource.claim(holder, mode, &mut step) {
            Ok(()) => {
                self.by_client.entry(holder).or_default().insert(id);
                self.change(id, out, |_| {});
            }
            Err((with, held)) => {
                out.push(Action::ClaimConflict { holder, resource: id, mode, with, held });
            }
        }
    }

    fn run_timers(&mut self, out: &mut Vec<Action>) {
        while let Some(&(at, id)) = self.timers.first() {
            if at > self.now {
                return;
            }
            self.change(id, out, |_| {});
        }
    }

    /// Changes one resource, then grants and recalls what follows and sets its timer anew.
    fn change(&mut self, id: ResourceId, out: &mut Vec<Action>, change: impl FnOnce(&mut Resource)) {
        let Some(resource) = self.resources.get_mut(&id) else { return };
        let before: Vec<ClientId> = resource.holders.keys().copied().collect();
        change(resource);
        let mut step = Step { now: self.now, limits: &self.limits, seq: &mut self.seq, out };
        let mut granted = Vec::new();
        resource.expire(id, &mut step);
        resource.pump(id, &mut step, &mut granted);
        let timer = resource.next_timer(&self.limits);
        if let Some(old) = std::mem::replace(&mut resource.timer, timer) {
            self.timers.remove(&(old, id));
        }
        if let Some(at) = timer {
            self.timers.insert((at, id));
        }
        for ticket in granted {
            self.tickets.remove(&ticket);
        }
        for client in before {
            self.unlink_if_unconcerned(client, id);
        }
        if self.resources.get(&id).is_some_and(Resource::is_unused) {
            self.resources.remove(&id);
        }
    }

    fn unlink_if_unconcerned(&mut self, client: ClientId, id: ResourceId) {
        if self.resources.get(&id).is_some_and(|resource| resource.concerns(client)) {
            return;
        }
        if let Some(resources) = self.by_client.get_mut(&client) {
            resources.remove(&id);
            if resources.is_empty() {
                self.by_client.remove(&client);
            }
        }
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
