//! One lock resource: who holds, who waits, who is next.
//!
//! ```text
//!   Request --> [ waiters, first come first served ] --head is compatible--> [ holders ] --Lower--> gone or weaker
//!                          |                                                     ^
//!                          +---- head conflicts: Recall, once the hold has ------+
//!                                lasted its minimum time
//! ```
//! A holder that was recalled gets nothing for this resource until it has answered, so a client never sees a grant
//! that an older recall could still undo.
//!
//! **Invariant:** the modes of all holders are pairwise compatible.

use std::collections::{BTreeMap, VecDeque};

use crate::engine::{Action, Limits};
use crate::{ClientId, Millis, Mode, ResourceId};

/// What one client has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hold {
    pub(crate) mode: Mode,
    /// Sequence number of the newest grant.
    pub(crate) seq: u64,
    /// Since when it has been held without a gap, for the minimum hold time.
    pub(crate) since: Millis,
    pub(crate) recall: Option<Recall>,
}

/// A demand to lower a hold that has not been answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recall {
    pub(crate) to: Mode,
    pub(crate) seq: u64,
    pub(crate) deadline: Millis,
    /// Whether [`Action::Overdue`] was given for it.
    pub(crate) overdue: bool,
}

/// A request that is not granted yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiter {
    pub(crate) ticket: u64,
    pub(crate) holder: ClientId,
    pub(crate) mode: Mode,
    pub(crate) since: Millis,
}

/// What the engine lends to a resource for one step.
pub(crate) struct Step<'a> {
    pub(crate) now: Millis,
    pub(crate) limits: &'a Limits,
    /// Last sequence number given out; grants and recalls of all resources share it.
    pub(crate) seq: &'a mut u64,
    pub(crate) out: &'a mut Vec<Action>,
}

impl Step<'_> {
    fn next_seq(&mut self) -> u64 {
        *self.seq += 1;
        *self.seq
    }
}

/// Holders and waiters of one resource.
#[derive(Debug, Default)]
pub(crate) struct Resource {
    pub(crate) holders: BTreeMap<ClientId, Hold>,
    pub(crate) waiters: VecDeque<Waiter>,
    /// The timer that the engine has set for this resource.
    pub(crate) timer: Option<Millis>,
}

impl Resource {
    pub(crate) fn is_unused(&self) -> bool {
        self.holders.is_empty() && self.waiters.is_empty()
    }

    pub(crate) fn concerns(&self, client: ClientId) -> bool {
        self.holders.contains_key(&client) || self.waiters.iter().any(|w| w.holder == client)
    }

    /// Whether `client` already has what `mode` permits, with no recall under way that would take it.
    pub(crate) fn has(&self, client: ClientId, mode: Mode) -> bool {
        self.holders.get(&client).is_some_and(|hold| hold.recall.is_none() && hold.mode.covers(mode))
    }

    /// Whether nobody waits, and nothing stands in the way of `mode` for `client`.
    pub(crate) fn is_free_for(&self, client: ClientId, mode: Mode) -> bool {
        let waiter = Waiter { ticket: 0, holder: client, mode, since: Millis::default() };
        self.waiters.is_empty() && self.grantable(&waiter)
    }

    /// Gives `waiter` its mode, or leaves the stronger one that it has.
    pub(crate) fn grant(&mut self, id: ResourceId, waiter: Waiter, step: &mut Step<'_>) {
        let seq = step.next_seq();
        let now = step.now;
        let hold = self.holders.entry(waiter.holder).or_insert(Hold {
            mode: waiter.mode,
            seq,
            since: now,
            recall: None,
        });
        assert!(hold.recall.is_none(), "a recalled holder gets nothing until it has answered");
        if !hold.mode.covers(waiter.mode) {
            hold.mode = waiter.mode;
            hold.since = now;
        }
        hold.seq = seq;
        let mode = hold.mode;
        step.out.push(Action::Grant {
            ticket: waiter.ticket,
            holder: waiter.holder,
            resource: id,
            mode,
            seq,
        });
        self.assert_compatible(waiter.holder, mode);
    }

    /// Takes over what a client held under the previous coordinator.
    ///
    /// # Errors
    /// The first client whose hold conflicts, and its mode; nothing is changed then.
    pub(crate) fn claim(
        &mut self,
        client: ClientId,
        mode: Mode,
        step: &mut Step<'_>,
    ) -> Result<(), (ClientId, Mode)> {
        if let Some(conflict) = self.others(client).find(|(_, held)| !held.compatible(mode)) {
            return Err(conflict);
        }
        let seq = step.next_seq();
        let hold = self.holders.entry(client).or_insert(Hold { mode, seq, since: step.now, recall: None });
        if !hold.mode.covers(mode) {
            hold.mode = mode;
        }
        Ok(())
    }

    /// Lowers a hold. `recall_seq` names the recall that is answered; 0 means that the client does it by itself.
    /// A stale answer, and one that would raise the mode, changes nothing.
    pub(crate) fn lower(&mut self, client: ClientId, to: Mode, recall_seq: u64) {
        let Some(hold) = self.holders.get_mut(&client) else { return };
        let answers_nothing = recall_seq != 0 && hold.recall.is_none_or(|recall| recall.seq != recall_seq);
        if answers_nothing || !hold.mode.covers(to) {
            return;
        }
        hold.mode = to;
        if hold.recall.is_some_and(|recall| recall.to.covers(to)) {
            hold.recall = None;
        }
        if to == Mode::Null {
            self.holders.remove(&client);
        }
    }

    pub(crate) fn forget(&mut self, client: ClientId) {
        self.holders.remove(&client);
        self.waiters.retain(|waiter| waiter.holder != client);
    }

    pub(crate) fn cancel(&mut self, ticket: u64) {
        self.waiters.retain(|waiter| waiter.ticket != ticket);
    }

    /// Grants from the head of the queue as far as that goes, then recalls what stands in the way of the next.
    pub(crate) fn pump(&mut self, id: ResourceId, step: &mut Step<'_>, granted: &mut Vec<u64>) {
        while let Some(&head) = self.waiters.front() {
            if !self.grantable(&head) {
                self.recall_for(id, &head, step);
                return;
            }
            self.waiters.pop_front();
            granted.push(head.ticket);
            self.grant(id, head, step);
        }
    }

    fn grantable(&self, waiter: &Waiter) -> bool {
        let recalled = self.holders.get(&waiter.holder).is_some_and(|hold| hold.recall.is_some());
        !recalled && !self.holders.iter().any(|(&client, hold)| in_the_way(client, hold, waiter))
    }

    fn recall_for(&mut self, id: ResourceId, head: &Waiter, step: &mut Step<'_>) {
        let (now, limits) = (step.now, step.limits);
        for (&client, hold) in &mut self.holders {
            if !in_the_way(client, hold, head) || hold.recall.is_some() {
                continue;
            }
            if now < hold.since.plus(limits.hold_min_ms) {
                continue;
            }
            let to = hold.mode.lowered_for(head.mode);
            let (seq, deadline) = (step.next_seq(), now.plus(limits.recall_ms));
            hold.recall = Some(Recall { to, seq, deadline, overdue: false });
            step.out.push(Action::Recall { holder: client, resource: id, to, seq, deadline });
        }
    }

    /// Reports recalls whose deadline has passed, each once. The hold stays: only its holder's answer or end frees it.
    pub(crate) fn expire(&mut self, id: ResourceId, step: &mut Step<'_>) {
        for (&holder, hold) in &mut self.holders {
            let Some(recall) = &mut hold.recall else { continue };
            if !recall.overdue && step.now >= recall.deadline {
                recall.overdue = true;
                step.out.push(Action::Overdue { holder, resource: id });
            }
        }
    }

    /// When something happens here without an event: a recall falls due or a minimum hold time ends.
    pub(crate) fn next_timer(&self, limits: &Limits) -> Option<Millis> {
        let head = self.waiters.front();
        let timer_of = |(&client, hold): (&ClientId, &Hold)| match hold.recall {
            Some(recall) if recall.overdue => None,
            Some(recall) => Some(recall.deadline),
            None => head
                .filter(|head| in_the_way(client, hold, head))
                .map(|_| hold.since.plus(limits.hold_min_ms)),
        };
        self.holders.iter().filter_map(timer_of).min()
    }

    fn others(&self, client: ClientId) -> impl Iterator<Item = (ClientId, Mode)> {
        self.holders
            .iter()
            .filter(move |(other, _)| **other != client)
            .map(|(other, hold)| (*other, hold.mode))
    }

    fn assert_compatible(&self, client: ClientId, mode: Mode) {
        for (other, held) in self.others(client) {
            assert!(held.compatible(mode), "{client} has {mode} beside {other} with {held}");
        }
    }
}

/// A client's own hold is in the way when it is neither weaker nor stronger than what it wants: a reader that wants to
/// write beside others has to drop its cache first, and until the grant reaches it, it would not know.
fn in_the_way(client: ClientId, hold: &Hold, head: &Waiter) -> bool {
    if client == head.holder {
        !hold.mode.covers(head.mode) && !head.mode.covers(hold.mode)
    } else {
        !hold.mode.compatible(head.mode)
    }
}
