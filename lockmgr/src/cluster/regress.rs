//! Members whose log went back: a disk that was restored from an old copy has forgotten what it had acknowledged.
//!
//! ```text
//!   leader: entries up to 120 are on node 3, it said so      node 3, after its disk was rolled back: I have none after 80
//! ```
//! A majority may have counted on those entries, so such a node must not go on as if nothing had happened. The leader that
//! sees it gives the node no more of its log, and refuses what it proposes, with the reason.
//!
//! **Invariant:** within the reign of one leader, what a node has acknowledged never becomes less in the eyes of Raft.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use openraft::Vote;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use wire::{Refusal, RefusalCode};

use super::raft_types::Types;

/// What this leader holds against its followers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Regressed {
    /// By node, what it was caught with. Rank: a leaf.
    nodes: Arc<Mutex<BTreeMap<u64, String>>>,
}

impl Regressed {
    pub(crate) fn accuse(&self, node: u64, what: &str) {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.insert(node, what.to_owned()).is_none() {
            tracing::error!(node, "{what}");
        }
    }

    /// What `node` is told when it wants something of this leader.
    pub(crate) fn refusal(&self, node: u16) -> Option<Refusal> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&u64::from(node)).map(|what| {
            Refusal::new(RefusalCode::Denied, what.clone())
                .with_hint("evict the node and let it join anew, with an empty folder")
        })
    }
}

/// What one follower has acknowledged to one leader.
#[derive(Debug, Default)]
pub(crate) struct Acknowledged {
    vote: Option<Vote<u64>>,
    up_to: u64,
}

impl Acknowledged {
    /// Takes an answer; says what is wrong when the follower has less than it had.
    pub(crate) fn take(
        &mut self,
        asked: &AppendEntriesRequest<Types>,
        answer: &AppendEntriesResponse<u64>,
    ) -> Result<(), String> {
        if self.vote != Some(asked.vote) {
            // Of another leader's entries some may have been replaced.
            *self = Self { vote: Some(asked.vote), up_to: 0 };
        }
        let before = asked.prev_log_id.map_or(0, |id| id.index);
        match answer {
            AppendEntriesResponse::Success => {
                let last = asked.entries.last().map_or(before, |entry| entry.log_id.index);
                self.up_to = self.up_to.max(last);
            }
            AppendEntriesResponse::PartialSuccess(matching) => {
                self.up_to = self.up_to.max(matching.map_or(0, |id| id.index));
            }
            AppendEntriesResponse::Conflict if before <= self.up_to && before > 0 => {
                return Err(format!(
                    "its log does not have entry {before}, and it has acknowledged entries up to {}: \
                     the disk of this node was rolled back to an older state",
                    self.up_to
                ));
            }
            AppendEntriesResponse::Conflict | AppendEntriesResponse::HigherVote(_) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, LogId};

    use super::*;

    fn asked(term: u64, before: u64) -> AppendEntriesRequest<Types> {
        let prev_log_id = Some(LogId::new(CommittedLeaderId::new(term, 1), before));
        let vote = Vote::new_committed(term, 1);
        AppendEntriesRequest { vote, prev_log_id, entries: Vec::new(), leader_commit: None }
    }

    #[test]
    fn an_acknowledged_entry_that_is_gone_is_noticed_and_a_log_that_was_never_as_long_is_not() {
        let (mut node, conflict) = (Acknowledged::default(), AppendEntriesResponse::Conflict);
        node.take(&asked(3, 120), &conflict).expect("it was never asked before");
        node.take(&asked(3, 80), &AppendEntriesResponse::Success).expect("found");
        node.take(&asked(3, 120), &conflict).expect("it has not said that it has them");
        node.take(&asked(3, 120), &AppendEntriesResponse::Success).expect("now it has");
        node.take(&asked(4, 110), &conflict).expect("another leader's entries may have been replaced");
        node.take(&asked(4, 120), &AppendEntriesResponse::Success).expect("and it has them again");
        let wrong = node.take(&asked(4, 90), &conflict).expect_err("gone");
        assert!(wrong.contains("90") && wrong.contains("120") && wrong.contains("rolled back"), "{wrong}");
    }
}
