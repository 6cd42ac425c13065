//! What was fenced, so that each incarnation is cut off once and a failure is never forgotten.
//!
//! **Invariants:** fencing is idempotent per (node, epoch): once confirmed, the same proof is given out again. A failure
//! stays as quarantine until a later attempt succeeds or an operator vouches (A4). Two threads that want the same node
//! fenced share one attempt.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{Confirmed, Fence, FenceError};
use crate::{Epoch, NodeId};

/// An incarnation that could not be cut off. Nothing that it held may be reused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantined {
    /// The node.
    pub node: NodeId,
    /// The incarnation.
    pub epoch: Epoch,
    /// Why the last attempt failed.
    pub error: FenceError,
    /// How many attempts there were.
    pub attempts: u32,
}

#[derive(Debug, Default)]
struct Books {
    /// The proof of the latest epoch of each node; it covers the ones before.
    confirmed: BTreeMap<NodeId, Confirmed>,
    quarantined: BTreeMap<(NodeId, Epoch), Quarantined>,
    running: Vec<NodeId>,
}

/// The memory of a fence.
#[derive(Debug, Default)]
pub struct Ledger {
    /// Lock rank: leaf. Not held while a fence works.
    books: Mutex<Books>,
    attempt_ended: Condvar,
}

impl Ledger {
    /// Makes certain that `node` in `epoch` is cut off, with `fence` unless it is known already.
    ///
    /// # Errors
    /// When that is not certain; the incarnation is then in quarantine.
    pub fn fence(&self, fence: &dyn Fence, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        let mut books = self.lock();
        while books.running.contains(&node) {
            books = self.attempt_ended.wait(books).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(proof) = books.proof(node, epoch) {
            return Ok(proof);
        }
        books.running.push(node);
        drop(books);
        let outcome = fence.fence(node, epoch);
        self.enter(node, epoch, &outcome);
        outcome
    }

    /// Takes down that an operator vouches for the end of a node. `proof` comes from [`Confirmed::by_operator`].
    pub fn accept(&self, proof: Confirmed) {
        self.lock().confirm(proof);
    }

    /// The proof for `node` in `epoch`, if there is one.
    #[must_use]
    pub fn proof(&self, node: NodeId, epoch: Epoch) -> Option<Confirmed> {
        self.lock().proof(node, epoch)
    }

    /// What could not be cut off.
    #[must_use]
    pub fn quarantined(&self) -> Vec<Quarantined> {
        self.lock().quarantined.values().cloned().collect()
    }

    fn enter(&self, node: NodeId, epoch: Epoch, outcome: &Result<Confirmed, FenceError>) {
        let mut books = self.lock();
        books.running.retain(|other| *other != node);
        match outcome {
            Ok(proof) => books.confirm(proof.clone()),
            Err(error) => books.quarantine(node, epoch, error),
        }
        self.attempt_ended.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn proof(&self, node: NodeId, epoch: Epoch) -> Option<Confirmed> {
        self.confirmed.get(&node).filter(|proof| proof.covers(node, epoch)).cloned()
    }

    fn confirm(&mut self, proof: Confirmed) {
        tracing::info!(node = %proof.node(), epoch = %proof.epoch(), how = proof.how(), "fence confirmed");
        self.quarantined.retain(|(node, epoch), _| !proof.covers(*node, *epoch));
        let newest = self.confirmed.entry(proof.node()).or_insert_with(|| proof.clone());
        if newest.epoch() < proof.epoch() {
            *newest = proof;
        }
    }

    fn quarantine(&mut self, node: NodeId, epoch: Epoch, error: &FenceError) {
        tracing::error!(%node, %epoch, %error, "fence failed");
        let new = Quarantined { node, epoch, error: error.clone(), attempts: 0 };
        let entry = self.quarantined.entry((node, epoch)).or_insert(new);
        entry.attempts = entry.attempts.saturating_add(1);
        entry.error = error.clone();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::super::FenceKind;
    use super::*;

    /// Fails as often as it is told to, then confirms.
    struct Flaky {
        failures: u32,
        calls: AtomicU32,
    }

    impl Fence for Flaky {
        fn kind(&self) -> FenceKind {
            FenceKind::Agent
        }

        fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
            if self.calls.fetch_add(1, Ordering::SeqCst) < self.failures {
                return Err(FenceError::NotConfirmed { node, epoch, reason: "no answer".to_owned() });
            }
            Ok(Confirmed::new(node, epoch, "off".to_owned()))
        }
    }

    fn flaky(failures: u32) -> Flaky {
        Flaky { failures, calls: AtomicU32::new(0) }
    }

    // Invariant A4
    #[test]
    fn an_incarnation_is_fenced_once_and_the_proof_given_out_again() {
        let (ledger, fence) = (Ledger::default(), flaky(0));
        let first = ledger.fence(&fence, NodeId(2), Epoch(5)).expect("confirmed");
        assert_eq!(ledger.fence(&fence, NodeId(2), Epoch(5)), Ok(first.clone()));
        assert_eq!(ledger.fence(&fence, NodeId(2), Epoch(4)), Ok(first), "an earlier epoch ended before");
        assert_eq!(fence.calls.load(Ordering::SeqCst), 1);
        ledger.fence(&fence, NodeId(2), Epoch(6)).expect("a later epoch is another matter");
        assert_eq!(fence.calls.load(Ordering::SeqCst), 2);
    }

    // Invariant A4
    #[test]
    fn a_failed_fence_stays_in_quarantine_until_one_succeeds() {
        let (ledger, fence) = (Ledger::default(), flaky(2));
        for attempts in 1..=2 {
            ledger.fence(&fence, NodeId(2), Epoch(5)).expect_err("no answer");
            assert_eq!(ledger.quarantined()[0].attempts, attempts);
            assert_eq!(ledger.proof(NodeId(2), Epoch(5)), None);
        }
        ledger.fence(&fence, NodeId(2), Epoch(5)).expect("third time");
        assert!(ledger.quarantined().is_empty());
    }

    // Invariant A4
    #[test]
    fn an_operator_can_vouch_for_a_node_that_nothing_else_can_reach() {
        let (ledger, fence) = (Ledger::default(), flaky(u32::MAX));
        ledger.fence(&fence, NodeId(2), Epoch(5)).expect_err("no answer");
        ledger.accept(Confirmed::by_operator(NodeId(2), Epoch(5), "admin"));
        assert!(ledger.quarantined().is_empty());
        assert!(ledger.fence(&fence, NodeId(2), Epoch(5)).is_ok());
    }

    #[test]
    fn threads_that_want_the_same_node_fenced_share_one_attempt() {
        let (ledger, fence) = (Ledger::default(), flaky(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| ledger.fence(&fence, NodeId(2), Epoch(5)).expect("confirmed"));
            }
        });
        assert_eq!(fence.calls.load(Ordering::SeqCst), 1);
    }
}
