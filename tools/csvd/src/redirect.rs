//! Redirected I/O: a node that has lost its path to a LUN goes on through a peer, and peers go through this node.
//!
//! ```text
//!   mounts, coordinator -> PathDevice -> road.rs -- NBD in mutual TLS, protected.rs --> serving.rs of a peer -> its LUN
//!   hv processes -> NBD on blocks.sock -> local.rs -> PathDevice
//! ```
//! A peer serves only what it reaches directly, so nothing is passed on twice. Each incarnation of a node has at most one
//! session per volume with a peer; a new one begins when the former has ended, with all that it had begun.
//!
//! **Invariants:** a peer refuses each request of an incarnation that is over; before anything that a dead node held is
//! given to others, every living node has ended that node's sessions (A1); a way is left for another one only when the
//! peer has said, or its own end has proven, that nothing is on its way any more (C9).

mod local;
pub(crate) mod orders;
mod places;
mod protected;
mod road;
mod serving;
mod sessions;
#[cfg(test)]
mod testing;

pub(crate) use local::{ProcessKey, serve as serve_processes};
pub(crate) use road::Road;
pub(crate) use serving::{PeerKey, cut_off_the_dead, end_over, end_session, serve};
pub(crate) use sessions::Sessions;
