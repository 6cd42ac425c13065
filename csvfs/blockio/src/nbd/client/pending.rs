//! Requests that wait for their replies, found by cookie.
//!
//! A cookie is a slot and how often the slot was used before, so that a reply that comes twice, or for a request that
//! nobody made, finds nothing.

use crate::{Completion, IoBuf, IoError};

/// Pieces of one read that the server may send out of order. More come only from somebody who means harm.
const PIECES_MAX: usize = 1024;

/// A request on its way.
pub(super) struct Flight {
    /// `read`, `write`, ...
    pub(super) op: &'static str,
    pub(super) offset: u64,
    /// Where a read's data goes.
    pub(super) memory: Option<IoBuf>,
    /// Which parts of it have come.
    pub(super) covered: Covered,
    /// The first error that a chunk of the reply has named.
    pub(super) errno: Option<i32>,
    pub(super) done: Completion,
}

impl Flight {
    pub(super) fn new(op: &'static str, offset: u64, memory: Option<IoBuf>, done: Completion) -> Self {
        Self { op, offset, memory, covered: Covered::default(), errno: None, done }
    }

    /// Tells the submitter.
    pub(super) fn finish(self, outcome: Result<(), IoError>) {
        let Self { memory, done, .. } = self;
        // Whoever is told wants the memory back as its only owner.
        drop(memory);
        done(outcome);
    }

    /// An error number of the server, as this request's error.
    pub(super) fn error(&self, errno: i32) -> IoError {
        match errno {
            libc::ENOSPC => IoError::NoSpace { what: "the export".to_owned() },
            errno => IoError::Os { op: self.op, offset: self.offset, errno },
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Pending {
    slots: Vec<Slot>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    flight: Option<Flight>,
}

impl Pending {
    /// Number of requests on their way.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds a request and names it.
    pub(super) fn insert(&mut self, flight: Flight) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("far fewer requests are in flight")
        });
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        slot.flight = Some(flight);
        u64::from(slot.generation) << 32 | u64::from(index)
    }

    pub(super) fn get(&mut self, cookie: u64) -> Option<&mut Flight> {
        let slot = self.slots.get_mut(index_of(cookie))?;
        if u64::from(slot.generation) != cookie >> 32 {
            return None;
        }
        slot.flight.as_mut()
    }

    pub(super) fn remove(&mut self, cookie: u64) -> Option<Flight> {
        self.get(cookie)?;
        let index = index_of(cookie);
        self.free.push(u32::try_from(index).expect("it is a slot"));
        self.slots[index].flight.take()
    }

    /// Takes all out.
    pub(super) fn take_all(&mut self) -> Vec<Flight> {
        std::mem::take(self).slots.into_iter().filter_map(|slot| slot.flight).collect()
    }
}

fn index_of(cookie: u64) -> usize {
    usize::try_from(cookie & u64::from(u32::MAX)).expect("a u32 is an index")
}

/// Which bytes of a read have come.
#[derive(Debug, Default)]
pub(super) struct Covered {
    /// Ascending, neither touching nor overlapping.
    pieces: Vec<(usize, usize)>,
}

impl Covered {
    /// Adds `start..end`. `false`, with nothing changed, when part of it has come before or there are too many pieces.
    pub(super) fn add(&mut self, start: usize, end: usize) -> bool {
        let at = self.pieces.partition_point(|piece| piece.1 <= start);
        if start >= end || self.pieces.get(at).is_some_and(|next| next.0 < end) {
            return false;
        }
        let joins_left = at > 0 && self.pieces[at - 1].1 == start;
        let joins_right = self.pieces.get(at).is_some_and(|next| next.0 == end);
        match (joins_left, joins_right) {
            (true, true) => self.pieces[at - 1].1 = self.pieces.remove(at).1,
            (true, false) => self.pieces[at - 1].1 = end,
            (false, true) => self.pieces[at].0 = start,
            (false, false) if self.pieces.len() < PIECES_MAX => self.pieces.insert(at, (start, end)),
            (false, false) => return false,
        }
        true
    }

    /// Whether exactly `0..len` has come.
    pub(super) fn is_whole(&self, len: usize) -> bool {
        if len == 0 { self.pieces.is_empty() } else { self.pieces == [(0, len)] }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flight() -> Flight {
        Flight::new("read", 0, None, Box::new(|_| ()))
    }

    #[test]
    fn a_cookie_finds_its_request_once() {
        let mut pending = Pending::default();
        let first = pending.insert(flight());
        assert!(pending.get(first).is_some() && pending.remove(first).is_some());
        assert!(pending.get(first).is_none() && pending.remove(first).is_none());
        let second = pending.insert(flight());
        assert_ne!(first, second, "the slot is the same, the cookie is not");
        assert!(pending.get(first).is_none());
        assert_eq!(pending.len(), 1);
    }

    proptest! {
        #[test]
        fn any_cookie_finds_a_request_or_nothing(cookie: u64) {
            let mut pending = Pending::default();
            let known = pending.insert(flight());
            prop_assert_eq!(pending.get(cookie).is_some(), cookie == known);
        }

        #[test]
        fn bytes_are_taken_once_and_the_whole_is_known(pieces in proptest::collection::vec((0_usize..24, 0_usize..6), 0..30)) {
            let mut covered = Covered::default();
            let mut model = [false; 32];
            for (start, len) in pieces {
                let end = start + len;
                let free = len > 0 && !model[start..end].iter().any(|there| *there);
                prop_assert_eq!(covered.add(start, end), free);
                if free {
                    model[start..end].fill(true);
                }
            }
            for len in 0..32 {
                let whole = model[..len].iter().all(|there| *there) && !model[len..].iter().any(|there| *there);
                prop_assert_eq!(covered.is_whole(len), whole);
            }
        }
    }
}
