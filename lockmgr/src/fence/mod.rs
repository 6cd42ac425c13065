//! Fencing: making certain that a node's incarnation can no longer write.
//!
//! ```text
//!   detector: Dead --> quorum decides --> Ledger --> Fence --> Confirmed --> its locks, extents and ownership are reused
//!                                                      |
//!                                                      +--> FenceError: quarantine, nothing is reused (A4)
//! ```
//! | kind | how a node is cut off | here |
//! |---|---|---|
//! | `agent` | a program that powers it off; on one machine, SIGKILL of its processes | [`AgentFence`], [`LocalKill`] |
//! | (shown as `agent`) | nothing can but a person, who confirms it | [`OperatorFence`] |
//! | `lease` | nothing can, so time does it | [`LeaseFence`] |
//! | `reservation` | the LUN refuses its writes | [`ReservationFence`] |
//!
//! **Invariant:** a [`Confirmed`] is made only here, by a fence that has seen the end of the incarnation. Whoever reuses
//! what a node held asks for one, so reuse without a fence does not compile.

mod agent;
mod group;
mod lease;
mod ledger;
mod local;
mod operator;
mod process;
mod reservation;

use std::fmt;

pub use agent::AgentFence;
pub use group::{GroupError, ProcessGroup};
pub use lease::{LeaseFence, refusals_needed};
pub use ledger::{Ledger, Quarantined};
pub use local::LocalKill;
pub use operator::OperatorFence;
pub use reservation::{
    Cutter, EnrollError, OwnPath, ReservationFence, ReservationKey, Seen, Standing, enroll, look,
    reserve_again, standing, withdraw,
};

pub use crate::cluster::FenceKind;
use crate::{Epoch, NodeId};

/// A way to cut a node off. Calls block until it is certain, or certain that it is not.
pub trait Fence: Send + Sync {
    /// Which kind it is.
    fn kind(&self) -> FenceKind;

    /// Makes certain that `node` in `epoch` writes nothing any more. Doing it again does no harm.
    ///
    /// # Errors
    /// When that is not certain. The node must then be taken as alive.
    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError>;
}

/// Proof that an incarnation of a node, and all before it, can no longer write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confirmed {
    node: NodeId,
    epoch: Epoch,
    how: String,
}

impl Confirmed {
    /// Only a fence makes one, after it has seen the end.
    fn new(node: NodeId, epoch: Epoch, how: String) -> Self {
        Self { node, epoch, how }
    }

    /// An operator vouches that the node is powered off, after a fence could not tell (A4). `who` goes into the log.
    #[must_use]
    pub fn by_operator(node: NodeId, epoch: Epoch, who: &str) -> Self {
        tracing::warn!(%node, %epoch, who, "an operator confirms that the node is off");
        Self::new(node, epoch, format!("confirmed by {who}"))
    }

    /// Whose end it proves.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The last incarnation whose end it proves.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// What was seen.
    #[must_use]
    pub fn how(&self) -> &str {
        &self.how
    }

    /// Whether this proves the end of `node` in `epoch`.
    #[must_use]
    pub fn covers(&self, node: NodeId, epoch: Epoch) -> bool {
        self.node == node && epoch <= self.epoch
    }
}

impl fmt::Display for Confirmed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} epoch {} is cut off: {}", self.node, self.epoch, self.how)
    }
}

/// Why it is not certain that a node is cut off, or why a fence cannot be set up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// The fence does not know this node.
    #[error("no fence is configured for node {node}; add it to the members in csvd.toml")]
    UnknownNode {
        /// The node.
        node: NodeId,
    },
    /// It was tried, and the node may still be alive.
    #[error(
        "fencing node {node} epoch {epoch} is not confirmed: {reason}; what it holds stays blocked until a fence \
         succeeds or an operator confirms that it is off"
    )]
    NotConfirmed {
        /// The node.
        node: NodeId,
        /// The incarnation.
        epoch: Epoch,
        /// What went wrong.
        reason: String,
    },
}

/// For a member that has nothing to write to: a witness. It holds no lock, no extent and no VM that others could reuse.
#[derive(Clone, Copy, Debug, Default)]
pub struct NothingToCut;

impl Fence for NothingToCut {
    fn kind(&self) -> FenceKind {
        FenceKind::Agent
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        Ok(Confirmed::new(node, epoch, "it is a witness and reaches no LUN".to_owned()))
    }
}

/// Several ways, all of which are gone: a node may have volumes with different kinds of fence.
pub struct EveryFence(Vec<Box<dyn Fence>>);

impl EveryFence {
    /// Confirms only when all of `ways` do; they are gone in this order.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn new(ways: Vec<Box<dyn Fence>>) -> Self {
        assert!(!ways.is_empty(), "no fence confirms nothing");
        Self(ways)
    }
}

impl fmt::Debug for EveryFence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|fence| fence.kind())).finish()
    }
}

impl Fence for EveryFence {
    fn kind(&self) -> FenceKind {
        self.0[0].kind()
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        let mut said = Vec::new();
        for way in &self.0 {
            said.push(way.fence(node, epoch)?.how().to_owned());
        }
        Ok(Confirmed::new(node, epoch, said.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Confirms, or not.
    struct Fixed(bool);

    impl Fence for Fixed {
        fn kind(&self) -> FenceKind {
            FenceKind::Agent
        }

        fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
            let reason = "no answer".to_owned();
            if self.0 {
                Ok(Confirmed::new(node, epoch, "seen".to_owned()))
            } else {
                Err(FenceError::NotConfirmed { node, epoch, reason })
            }
        }
    }

    // Invariant A1: the node of volumes of several kinds is cut off only when it is on all of them.
    #[test]
    fn one_kind_of_fence_that_fails_leaves_the_node_unconfirmed() {
        let fence = |outcomes: &[bool]| {
            let ways = outcomes.iter().map(|outcome| Box::new(Fixed(*outcome)) as Box<dyn Fence>);
            EveryFence::new(ways.collect()).fence(NodeId(2), Epoch(5))
        };
        fence(&[true, false]).expect_err("the second does not");
        assert!(fence(&[true, true]).expect("both do").covers(NodeId(2), Epoch(5)));
    }

    // Invariant A1
    #[test]
    fn a_proof_covers_an_incarnation_and_those_before_it_but_none_after() {
        let proof = Confirmed::new(NodeId(2), Epoch(5), "seen".to_owned());
        assert!(proof.covers(NodeId(2), Epoch(5)) && proof.covers(NodeId(2), Epoch(4)));
        assert!(!proof.covers(NodeId(2), Epoch(6)) && !proof.covers(NodeId(3), Epoch(5)));
    }
}
