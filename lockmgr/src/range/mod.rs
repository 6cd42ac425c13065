//! Byte-range locks of programs (POSIX, OFD, `flock`): who holds, who waits, and who would wait for ever.
//!
//! ```text
//!   request --no conflict--> Granted                     unlock, cancel, an owner's or a client's end
//!      |                                                    |
//!      +--conflict, waits--> [ waits: ticket -> lock ] --retried in order--> Granted
//!      +--would close a circle of owners------------------> Refused(Deadlock)
//! ```
//! Two families that do not see each other: `flock`, and the ranges of POSIX and OFD locks. As in Linux, changing the kind
//! of a `flock` gives the old one up first, and locks are granted to whoever fits, in the order of asking.
//!
//! **Invariant:** what is held of one family never excludes itself, and no set of owners waits for each other only.

mod held;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{ClientId, ResourceId};

pub use held::HeldLocks;

/// Most locks on one file: each request looks at all of them.
const LOCKS_PER_FILE_MAX: usize = 16_384;
/// Most requests that wait in all.
const WAITS_MAX: usize = 65_536;

/// What a lock lets its owner do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Others may read too.
    Read,
    /// Nobody else.
    Write,
}

/// Which calls a lock belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// `fcntl`: POSIX and OFD locks.
    Range,
    /// `flock`.
    Flock,
}

/// Who has a lock: a process or an open file on a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// Where.
    pub client: ClientId,
    /// Which of them, by a number of the client's choice.
    pub number: u64,
    /// Of which family.
    pub family: Family,
}

/// A range of a file's bytes; both ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Last byte.
    pub end: u64,
}

impl Span {
    /// Everything.
    pub const ALL: Self = Self { start: 0, end: u64::MAX };

    fn overlaps(self, other: Self) -> bool {
        self.start <= other.end && other.start <= self.end
    }

    /// Whether the two overlap or are neighbours.
    fn touches(self, other: Self) -> bool {
        self.start <= other.end.saturating_add(1) && other.start <= self.end.saturating_add(1)
    }

    fn joined(self, other: Self) -> Self {
        Self { start: self.start.min(other.start), end: self.end.max(other.end) }
    }

    fn common(self, other: Self) -> Option<Self> {
        let common = Self { start: self.start.max(other.start), end: self.end.min(other.end) };
        (common.start <= common.end).then_some(common)
    }

    /// What is left and right of `hole`.
    fn without(self, hole: Self) -> impl Iterator<Item = Self> {
        let left = (self.start < hole.start).then(|| Self { start: self.start, end: hole.start - 1 });
        let right = (self.end > hole.end).then(|| Self { start: hole.end + 1, end: self.end });
        left.into_iter().chain(right)
    }

    #[cfg(test)]
    fn contains(self, at: u64) -> bool {
        (self.start..=self.end).contains(&at)
    }
}

/// A lock, held or wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeLock {
    /// Whose.
    pub owner: Owner,
    /// Where.
    pub span: Span,
    /// How.
    pub access: Access,
    /// The process that asked, for those who are told what is in their way.
    pub pid: u32,
}

impl RangeLock {
    fn excludes(&self, other: &Self) -> bool {
        let writes = self.access == Access::Write || other.access == Access::Write;
        let family = self.owner.family == other.owner.family;
        writes && family && self.owner != other.owner && self.span.overlaps(other.span)
    }
}

/// Why a lock is not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Somebody has it, and the request does not wait.
    Busy,
    /// Waiting would be for ever: those in the way wait for this owner.
    Deadlock,
    /// There are too many locks or waiting requests.
    TooMany,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The lock is held.
    Granted,
    /// The request waits; its ticket is named when it is granted.
    Waits,
    /// It is not given.
    Refused(Refusal),
}

/// Tickets of requests that are granted now.
pub type Granted = Vec<u64>;

struct Wait {
    resource: ResourceId,
    lock: RangeLock,
}

/// All locks of a volume. See the module.
#[derive(Default)]
pub struct RangeTable {
    files: HashMap<ResourceId, HeldLocks>,
    /// By ticket: tickets grow, so this is the order of asking.
    waits: BTreeMap<u64, Wait>,
}

impl std::fmt::Debug for RangeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RangeTable({} files, {} waits)", self.files.len(), self.waits.len())
    }
}

impl RangeTable {
    /// Wants a lock. `ticket` must be higher than those before. What gave way to it (a `flock` of another kind, a lock
    /// that became weaker) may let others in, whose tickets come along.
    pub fn request(
        &mut self,
        ticket: u64,
        resource: ResourceId,
        lock: RangeLock,
        wait: bool,
    ) -> (Verdict, Granted) {
        let (number, has_it) = self.files.get(&resource).map_or((0, false), |held| {
            let same = |own: &RangeLock| own.owner == lock.owner && own.access == lock.access;
            (held.len(), lock.owner.family == Family::Flock && held.iter().any(same))
        });
        if has_it {
            return (Verdict::Granted, Granted::new());
        }
        if number >= LOCKS_PER_FILE_MAX {
            return (Verdict::Refused(Refusal::TooMany), Granted::new());
        }
        let mut granted = match lock.owner.family {
            Family::Flock => self.unlock(resource, lock.owner, Span::ALL),
            Family::Range => Granted::new(),
        };
        let held = self.files.entry(resource).or_default();
        let verdict = if held.conflicts(&lock).next().is_none() {
            held.set(lock);
            Verdict::Granted
        } else if !wait {
            Verdict::Refused(Refusal::Busy)
        } else {
            self.queue(ticket, resource, lock)
        };
        granted.extend(self.grant_waiting(resource));
        (verdict, granted)
    }

    fn queue(&mut self, ticket: u64, resource: ResourceId, lock: RangeLock) -> Verdict {
        if self.waits.len() >= WAITS_MAX {
            return Verdict::Refused(Refusal::TooMany);
        }
        if self.closes_a_circle(resource, &lock) {
            return Verdict::Refused(Refusal::Deadlock);
        }
        self.waits.insert(ticket, Wait { resource, lock });
        Verdict::Waits
    }

    /// Whether somebody in the way of `lock` waits, over however many others, for its owner.
    fn closes_a_circle(&self, resource: ResourceId, lock: &RangeLock) -> bool {
        let mut to_visit = self.in_the_way(resource, lock);
        let mut seen = BTreeSet::new();
        while let Some(owner) = to_visit.pop() {
            if owner == lock.owner {
                return true;
            }
            if seen.insert(owner) {
                let waits = self.waits.values().filter(|wait| wait.lock.owner == owner);
                to_visit.extend(waits.flat_map(|wait| self.in_the_way(wait.resource, &wait.lock)));
            }
        }
        false
    }

    fn in_the_way(&self, resource: ResourceId, lock: &RangeLock) -> Vec<Owner> {
        self.files
            .get(&resource)
            .map_or(Vec::new(), |held| held.conflicts(lock).map(|held| held.owner).collect())
    }

    /// The first lock in the file that excludes `lock` now, as POSIX wants it of `F_GETLK`.
    #[must_use]
    pub fn conflict(&self, resource: ResourceId, lock: &RangeLock) -> Option<RangeLock> {
        self.files.get(&resource)?.conflicts(lock).min_by_key(|held| held.span.start).copied()
    }

    /// Gives up what `owner` has within `span`.
    pub fn unlock(&mut self, resource: ResourceId, owner: Owner, span: Span) -> Granted {
        let Some(held) = self.files.get_mut(&resource) else { return Granted::new() };
        if held.unset(owner, span) { self.grant_waiting(resource) } else { Granted::new() }
    }

    /// A request that waits is no longer wanted. `false`: it does not wait (any more).
    pub fn cancel(&mut self, ticket: u64) -> bool {
        self.waits.remove(&ticket).is_some()
    }

    /// Drops all locks and waiting requests of a client.
    pub fn client_gone(&mut self, client: ClientId) -> Granted {
        let changed = self.drop_client(client);
        changed.into_iter().flat_map(|resource| self.grant_waiting(resource)).collect()
    }

    /// The files on which that took something.
    fn drop_client(&mut self, client: ClientId) -> Vec<ResourceId> {
        self.waits.retain(|_, wait| wait.lock.owner.client != client);
        let files = self.files.iter_mut();
        files
            .filter_map(|(file, held)| held.drop_owners(|owner| owner.client == client).then_some(*file))
            .collect()
    }

    /// Takes over what a client says that it holds, in place of all that it had and waited for here.
    ///
    /// # Errors
    /// With the lock of somebody else that one of the claims excludes: both cannot be true.
    pub fn claim(
        &mut self,
        client: ClientId,
        claims: &[(ResourceId, RangeLock)],
    ) -> Result<Granted, RangeLock> {
        let mut changed = self.drop_client(client);
        for (resource, lock) in claims {
            let held = self.files.entry(*resource).or_default();
            if let Some(conflict) = held.conflicts(lock).next() {
                return Err(*conflict);
            }
            held.set(*lock);
            changed.push(*resource);
        }
        Ok(changed.into_iter().flat_map(|resource| self.grant_waiting(resource)).collect())
    }

    /// What is held on a file.
    pub fn held(&self, resource: ResourceId) -> impl Iterator<Item = &RangeLock> {
        self.files.get(&resource).into_iter().flat_map(HeldLocks::iter)
    }

    /// What is waited for on a file, in the order of asking.
    pub fn waiting(&self, resource: ResourceId) -> impl Iterator<Item = &RangeLock> {
        self.waits.values().filter(move |wait| wait.resource == resource).map(|wait| &wait.lock)
    }

    fn grant_waiting(&mut self, resource: ResourceId) -> Granted {
        let Some(held) = self.files.get_mut(&resource) else { return Granted::new() };
        let mut granted = Granted::new();
        for (ticket, wait) in self.waits.iter().filter(|(_, wait)| wait.resource == resource) {
            if held.conflicts(&wait.lock).next().is_none() {
                held.set(wait.lock);
                granted.push(*ticket);
            }
        }
        for ticket in &granted {
            self.waits.remove(ticket);
        }
        if held.is_empty() {
            self.files.remove(&resource);
        }
        granted
    }
}

#[cfg(test)]
mod tests;
