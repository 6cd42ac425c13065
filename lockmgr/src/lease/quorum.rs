//! When a node's lease ends: counted from the heartbeats that a majority has answered.
//!
//! **Invariant (B1):** the deadline is `sent + length`, with `sent` the moment at which the heartbeat *left* that a
//! majority (this node included) has answered; when the answers came does not matter.

use std::collections::BTreeMap;

use crate::{Millis, NodeId};

/// The lease of one incarnation of this node. Pure: times are passed in.
#[derive(Clone, Debug)]
pub struct QuorumLease {
    own: NodeId,
    length_ms: u64,
    /// For each other voter, when the newest heartbeat left that it has answered.
    answered: BTreeMap<NodeId, Option<Millis>>,
    deadline: Option<Millis>,
}

impl QuorumLease {
    /// No lease yet. `length_ms` is [`crate::timing::Timing::holder_stop_ms`]; `voters` are all, this node included.
    pub fn new(own: NodeId, voters: impl IntoIterator<Item = NodeId>, length_ms: u64) -> Self {
        let mut lease = Self { own, length_ms, answered: BTreeMap::new(), deadline: None };
        lease.set_voters(voters);
        lease
    }

    /// Takes a new set of voters. Answers of those that stay count on; a deadline once given stays.
    pub fn set_voters(&mut self, voters: impl IntoIterator<Item = NodeId>) {
        let old = std::mem::take(&mut self.answered);
        for voter in voters.into_iter().filter(|voter| *voter != self.own) {
            self.answered.insert(voter, old.get(&voter).copied().flatten());
        }
    }

    /// `from` has answered the heartbeat that was sent at `sent_at`. Gives the new deadline if this has moved it.
    /// An answer to something that was not sent yet is not believed.
    pub fn answered(&mut self, now: Millis, from: NodeId, sent_at: Millis) -> Option<Millis> {
        if sent_at > now {
            return None;
        }
        let last = self.answered.get_mut(&from)?;
        *last = (*last).max(Some(sent_at));
        self.advance(now)
    }

    /// The deadline now, moved on if a majority allows it. A cluster of one renews by itself.
    pub fn advance(&mut self, now: Millis) -> Option<Millis> {
        let new = self.majority_sent(now)?.plus(self.length_ms);
        let moved = self.deadline.is_none_or(|old| new > old);
        moved.then(|| *self.deadline.insert(new))
    }

    /// After this nothing may be submitted. `None`: there was no majority yet.
    #[must_use]
    pub fn deadline(&self) -> Option<Millis> {
        self.deadline
    }

    /// The newest moment for which a majority, this node included, has answered a heartbeat sent then or later.
    fn majority_sent(&self, now: Millis) -> Option<Millis> {
        let others_needed = self.answered.len().div_ceil(2);
        let mut times: Vec<Option<Millis>> = self.answered.values().copied().collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        match others_needed {
            0 => Some(now),
            needed => times[needed - 1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: u16) -> impl Iterator<Item = NodeId> {
        (1..=count).map(NodeId)
    }

    // Invariant B1
    #[test]
    fn the_lease_counts_from_when_the_heartbeat_was_sent() {
        let mut lease = QuorumLease::new(NodeId(1), nodes(3), 1000);
        assert_eq!(lease.answered(Millis(900), NodeId(2), Millis(100)), Some(Millis(1100)));
        assert_eq!(lease.answered(Millis(901), NodeId(3), Millis(100)), None, "already counted");
        assert_eq!(lease.deadline(), Some(Millis(1100)));
    }

    #[test]
    fn a_minority_gives_no_lease() {
        let mut lease = QuorumLease::new(NodeId(1), nodes(5), 1000);
        assert_eq!(lease.answered(Millis(10), NodeId(2), Millis(5)), None);
        assert_eq!(lease.answered(Millis(11), NodeId(2), Millis(9)), None, "one voter counts once");
        assert_eq!(lease.answered(Millis(12), NodeId(3), Millis(7)), Some(Millis(1007)));
        let mut pair = QuorumLease::new(NodeId(1), nodes(2), 1000);
        assert_eq!(pair.advance(Millis(10)), None, "one of two is no majority");
    }

    #[test]
    fn answers_from_strangers_and_from_the_future_are_not_believed() {
        let mut lease = QuorumLease::new(NodeId(1), nodes(3), 1000);
        assert_eq!(lease.answered(Millis(10), NodeId(9), Millis(5)), None);
        assert_eq!(lease.answered(Millis(10), NodeId(2), Millis(50)), None);
        assert_eq!(lease.deadline(), None);
    }

    #[test]
    fn the_deadline_never_goes_back() {
        let mut lease = QuorumLease::new(NodeId(1), nodes(3), 1000);
        lease.answered(Millis(500), NodeId(2), Millis(400));
        assert_eq!(lease.answered(Millis(600), NodeId(3), Millis(100)), None);
        lease.set_voters(nodes(5));
        assert_eq!(lease.answered(Millis(700), NodeId(4), Millis(300)), None);
        assert_eq!(lease.deadline(), Some(Millis(1400)));
    }

    #[test]
    fn a_cluster_of_one_renews_by_itself() {
        let mut lease = QuorumLease::new(NodeId(1), nodes(1), 1000);
        assert_eq!(lease.advance(Millis(10)), Some(Millis(1010)));
    }
}
