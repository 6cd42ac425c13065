//! Length-prefixed frames over mutual TLS between cluster processes.
//!
//! ```text
//!   Mesh ── one connection per peer and class, reconnects by itself
//!    │
//!   ByteStream ── after the hello, bytes as they are: the admin interface
//!   Connection ── calls (many in flight), pushes; both ends may call
//!    │   reader task ── frames in order ── Handler
//!    │   writer task ── drains its queue, then flushes once
//!   Stream ── bare bytes, for a thread that blocks: the memory of VMs
//!    │ Duplex ── the same for a thread that sends and one that receives: redirected blocks
//!   Hello ── version range, cluster, node, checked against the certificate
//!    │
//!   TLS 1.3 with both certificates (between nodes)  |  Unix socket (inside a node)
//! ```
//!
//! **Invariant:** nothing that a peer sends panics, or makes this side allocate more than one frame
//! ([`FRAME_BYTES_MAX`]) before it has been checked.

pub mod authority;
mod bare;
mod blocking;
mod connect;
mod connection;
mod driver;
mod duplex;
mod endpoint;
mod error;
mod frame;
mod handler;
mod hello;
mod identity;
mod incoming;
mod join;
mod mesh;
mod partition;
mod peer;
mod server;
mod stream;
mod ticket;

pub use bare::{Stream, StreamEnd};
pub use blocking::{BlockingCallbacks, BlockingConnection, BlockingHandler, BlockingServer};
pub use connect::{connect_bare, connect_blocks, connect_tls, connect_unix};
pub use connection::Connection;
pub use duplex::Duplex;
pub use endpoint::{Endpoint, Local};
pub use error::{Refusal, RefusalCode, WireError};
pub use frame::{FRAME_BYTES_MAX, Frame, FrameCodec, HEADER_BYTES, Kind};
pub use handler::{Handler, RefuseAll};
pub use hello::{VERSION_MAX, VERSION_MIN, speak_at_most, spoken_max};
pub use identity::Identity;
pub use join::{JoinMember, JoinReply, JoinRequest, join};
pub use mesh::{Mesh, PeerStatus};
pub use partition::Partition;
pub use peer::{Class, Peer, Via};
pub use server::Server;
pub use stream::{ByteStream, connect_admin};
pub use ticket::{Digest, JoinToken, sha256};

/// What a frame is for. A number that the receiver does not serve is refused as [`RefusalCode::Unsupported`].
pub mod service {
    /// Raft messages between the members.
    pub const RAFT: u16 = 1;
    /// Changes of the cluster's records, forwarded to the leader.
    pub const PROPOSAL: u16 = 2;
    /// Heartbeats between nodes.
    pub const HEARTBEAT: u16 = 3;
    /// A request to a volume's coordinator.
    pub const CSVFS: u16 = 10;
    /// A push from a volume's coordinator to one of its clients.
    pub const CSVFS_PUSH: u16 = 11;
    /// How a node's processes are to reach a LUN.
    pub const PATHS: u16 = 12;
    /// Virtual machines and their moves.
    pub const VM: u16 = 20;
    /// Control of an `hv` process.
    pub const HV: u16 = 30;
    /// A request of the admin interface that another node must answer.
    pub const ADMIN: u16 = 40;
}
