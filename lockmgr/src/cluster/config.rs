//! How a node takes part in the cluster.

use std::path::PathBuf;

use crate::timing::{BASE_MS, Timing};
use crate::{ClusterId, NodeId};

/// A member as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberConfig {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where its peers reach it, `host:port`.
    pub address: String,
}

/// Raft's times. A leader that is silent is replaced after `election_ms_max` and a random time more, or as soon as a node
/// that suspects it stands for election ([`super::Cluster::stand_for_election`]), but never before `election_ms_max`: so
/// long the others stay with a leader that they have heard. An election that was not needed costs a few held proposals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RaftTiming {
    /// A leader is heard at least this often.
    pub heartbeat_ms: u64,
    /// A silent leader is replaced after a random time from here ...
    pub election_ms_min: u64,
    /// ... to here.
    pub election_ms_max: u64,
    /// How long a proposal may take.
    pub propose_ms: u64,
    /// Entries of the log between snapshots.
    pub snapshot_entries: u64,
}

impl RaftTiming {
    /// Times in the default proportions to a network heartbeat every `base_ms`: the others have let go of a silent leader
    /// (`election_ms_max`) by the time at which it is suspected ([`Timing::suspect_after_ms`]).
    #[must_use]
    pub const fn from_base(base_ms: u64) -> Self {
        Self {
            heartbeat_ms: base_ms,
            election_ms_min: base_ms * 5 / 2,
            election_ms_max: base_ms * 7 / 2,
            propose_ms: 5_000,
            snapshot_entries: 2_000,
        }
    }
}

const _: () =
    assert!(RaftTiming::from_base(BASE_MS).election_ms_max < Timing::from_base(BASE_MS).suspect_after_ms);

impl Default for RaftTiming {
    fn default() -> Self {
        Self::from_base(BASE_MS)
    }
}

/// What a node needs to take part.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The cluster, as all members' configurations name it.
    pub cluster: ClusterId,
    /// Its name, written into the records when it is created.
    pub cluster_name: String,
    /// This node.
    pub node: NodeId,
    /// Where its part of the log is kept; made if need be.
    pub data_dir: PathBuf,
    /// All members, this node included.
    pub members: Vec<MemberConfig>,
    /// Whether this node creates the cluster if it does not exist yet. One node of a new cluster has this.
    pub bootstrap: bool,
    /// Raft's times.
    pub timing: RaftTiming,
}

/// A node cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The configuration contradicts itself.
    #[error("cannot take part in the cluster: {what}")]
    Config {
        /// How.
        what: String,
    },
    /// The node's part of the log cannot be used.
    #[error("cannot open this node's part of the cluster's log")]
    Store(#[from] super::StoreError),
    /// Raft refused to start.
    #[error("cannot start raft: {what}")]
    Raft {
        /// Why.
        what: String,
    },
}

impl ClusterError {
    /// What the administrator can do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Config { .. } => "correct the node's configuration",
            Self::Store(error) => error.hint(),
            Self::Raft { .. } => "see the log of this node",
        }
    }
}

impl ClusterConfig {
    pub(super) fn check(&self) -> Result<(), ClusterError> {
        let wrong = |what: String| Err(ClusterError::Config { what });
        if !self.members.iter().any(|member| member.id == self.node) {
            return wrong(format!("node {} is not among the members", self.node));
        }
        let mut ids: Vec<_> = self.members.iter().map(|member| member.id).collect();
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            return wrong(format!("member {} is named twice", twice[0]));
        }
        let timing = &self.timing;
        if !(0 < timing.heartbeat_ms
            && timing.heartbeat_ms < timing.election_ms_min
            && timing.election_ms_min < timing.election_ms_max)
        {
            return wrong("raft times must grow: heartbeat, shortest election, longest election".to_owned());
        }
        if timing.snapshot_entries == 0 {
            return wrong("a snapshot needs at least one entry".to_owned());
        }
        Ok(())
    }
}
