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
//! | `lease` | nothing can, so time does it | comes with a later release |
//! | `reservation` | the LUN refuses its writes | comes with a later release |
//!
//! **Invariant:** a [`Confirmed`] is made only here, by a fence that has seen the end of the incarnation. Whoever reuses
//! what a node held asks for one, so reuse without a fence does not compile.

mod agent;
mod group;
mod ledger;
mod local;
mod operator;
mod process;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use agent::AgentFence;
pub use group::{GroupError, ProcessGroup};
pub use ledger::{Ledger, Quarantined};
pub use local::LocalKill;
pub use operator::OperatorFence;

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
    /// This build cannot do it.
    #[error("fence kind {kind} comes with a later release; configure kind agent, or the built-in local kill")]
    Unsupported {
        /// The kind.
        kind: FenceKind,
    },
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

/// How the `agent` kind does it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Agent {
    /// Nodes share this machine: kill the process group that each node's pid file names.
    LocalKill {
        /// The pid files.
        pid_files: BTreeMap<NodeId, PathBuf>,
    },
    /// Run a program, see PROTOCOL.md.
    Program {
        /// The program.
        path: PathBuf,
    },
}

/// Sets up the fence that a volume or a cluster is configured with. `limit` bounds one attempt.
///
/// # Errors
/// [`FenceError::Unsupported`] for the kinds of later releases.
pub fn configure(kind: FenceKind, agent: Agent, limit: Duration) -> Result<Box<dyn Fence>, FenceError> {
    match (kind, agent) {
        (FenceKind::Agent, Agent::LocalKill { pid_files }) => Ok(Box::new(LocalKill::new(pid_files, limit))),
        (FenceKind::Agent, Agent::Program { path }) => Ok(Box::new(AgentFence::new(path, limit))),
        (FenceKind::Lease | FenceKind::Reservation, _) => Err(FenceError::Unsupported { kind }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_later_releases_are_refused_when_they_are_configured() {
        for kind in [FenceKind::Lease, FenceKind::Reservation] {
            let agent = Agent::LocalKill { pid_files: BTreeMap::new() };
            let Err(error) = configure(kind, agent, Duration::from_secs(1)) else {
                panic!("{kind} was accepted")
            };
            let text = error.to_string();
            assert!(
                text.contains(&kind.to_string()) && text.contains("comes with a later release"),
                "{text}"
            );
        }
    }

    // Invariant A1
    #[test]
    fn a_proof_covers_an_incarnation_and_those_before_it_but_none_after() {
        let proof = Confirmed::new(NodeId(2), Epoch(5), "seen".to_owned());
        assert!(proof.covers(NodeId(2), Epoch(5)) && proof.covers(NodeId(2), Epoch(4)));
        assert!(!proof.covers(NodeId(2), Epoch(6)) && !proof.covers(NodeId(3), Epoch(5)));
    }
}
