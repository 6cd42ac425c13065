//! Membership and ownership: the small truths on which authority rests, agreed on by Raft.
//!
//! ```text
//!   propose(Command) ──► leader ──► log on a majority ──► apply, on every node, in the same order
//!                                                             │
//!   watch() ◄─────────────────────────────── Arc<ClusterState>┘
//! ```
//!
//! **Invariants:** every change is a compare-and-swap that has exactly one winner. A command that was acknowledged is on
//! the disks of a majority. What lies on disk and on the wire is our own encoding (`proto/cluster.proto`).

mod apply;
mod apply_members;
#[cfg(test)]
mod apply_tests;
mod codec;
mod command;
mod config;
mod drain;
#[doc(hidden)]
pub mod fuzz;
mod machine;
mod network;
mod node;
mod pb;
mod propose;
mod raft_codec;
mod raft_types;
mod records;
mod regress;
mod settings;
mod store;
mod voters;

pub use command::{
    BASELINES_MAX, Command, Given, NAME_BYTES_MAX, Outcome, PROCESSOR_BYTES_MAX, ProposeError, Rejection,
    SPEC_BYTES_MAX, TEXT_BYTES_MAX, VMS_MAX, VOLUMES_MAX, VmUpdate,
};
pub use config::{ClusterConfig, ClusterError, MemberConfig, RaftTiming};
pub use drain::{Drain, DrainPhase, STUCK_MAX};
pub use node::{Cluster, RaftStatus, not_started};
pub use records::{
    Baseline, ClusterState, EVENTS_MAX, EventRecord, FenceKind, Member, MemberState, Renewal, VmRecord,
    VmState, VolumeRecord, VolumeState,
};
pub use settings::SETTINGS_MAX;
pub use store::StoreError;

/// What a log filter in the syntax of `tracing` should say about the consensus engine: a peer that is away is told once by
/// the mesh, and the engine would repeat it ten times a second.
pub const LOG_FILTER: &str = "openraft=error,openraft::replication=off";
