//! Who may touch what: lock engine, leases, fencing, membership and ownership.
//!
//! Deciding parts (`engine`, `detector`) are pure: events in, actions out, the time passed in. Threads, sockets and
//! files are at the edges.

pub mod clock;
pub mod cluster;
pub mod detector;
pub mod engine;
pub mod fence;
pub mod heartbeat;
mod ids;
pub mod lease;
mod mode;
pub mod range;
mod resource;
pub mod timing;

pub use ids::{ClientId, ClusterId, Epoch, Millis, NODES_MAX, NodeId, ResourceId, Term, VolumeId};
pub use mode::Mode;
