//! Who is at the other end of a connection.

use std::fmt;
use std::sync::Arc;

/// What a connection is used for. Bulk never shares a connection with what must not wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Raft, heartbeats, metadata, grants and recalls.
    Control,
    /// Snapshots, migration streams.
    Bulk,
    /// Redirected blocks: bytes that are handed over as they are, without frames.
    Blocks,
    /// The memory of a VM that moves: bare bytes for a thread that blocks; see [`crate::Stream`].
    Stream,
    /// The admin interface of the node, for a program elsewhere: bytes that are handed over as they are.
    Admin,
}

impl Class {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Control => 0,
            Self::Bulk => 1,
            Self::Blocks => 2,
            Self::Stream => 3,
            Self::Admin => 4,
        }
    }

    /// The protocol version that brought it.
    pub(crate) fn since_version(self) -> u32 {
        match self {
            Self::Admin => 2,
            Self::Control | Self::Bulk | Self::Blocks | Self::Stream => 1,
        }
    }

    pub(crate) fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Control),
            1 => Some(Self::Bulk),
            2 => Some(Self::Blocks),
            3 => Some(Self::Stream),
            4 => Some(Self::Admin),
            _ => None,
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Bulk => "bulk",
            Self::Blocks => "blocks",
            Self::Stream => "stream",
            Self::Admin => "admin",
        })
    }
}

/// How the peer proved who it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// A certificate of the cluster's authority that names the node.
    Tls,
    /// A Unix socket: the kernel names the process.
    Unix {
        /// User id of the process.
        uid: u32,
        /// Its process id when it connected; 0 where the kernel did not say.
        pid: u32,
    },
}

/// The other end of a connection, as checked by the handshake.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Node id; on a Unix socket it is what the process claims.
    pub node: u16,
    /// Name from the hello, for logs.
    pub name: Arc<str>,
    /// What the connection is used for.
    pub class: Class,
    /// How it proved who it is.
    pub via: Via,
    /// Protocol version that both sides speak.
    pub version: u32,
    /// When its certificate was issued, in ms since 1970; 0 on a Unix socket, or when it does not say.
    pub issued_ms: u64,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} ({})", self.node, self.name)
    }
}
