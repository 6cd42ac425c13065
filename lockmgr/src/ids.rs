//! Ids and counters that must not be mixed up.

use std::fmt;

use uuid::Uuid;

/// Highest number of nodes; the LUN has one heartbeat slot and one intent log for each.
pub const NODES_MAX: u16 = 64;

/// A member of the cluster, 1 to [`NODES_MAX`]. Its LUN slot is `id - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u16);

/// Incarnation of a node, given by the quorum at each join. A higher epoch means that the lower one is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Epoch(pub u64);

/// Reign of a volume's coordinator; grows by one with each new coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Term(pub u64);

/// A volume, as its superblock names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub Uuid);

/// A cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId(pub Uuid);

/// One user of a volume on a node: the daemon's own mount, or one `hv` process. It holds grants and open files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClientId {
    /// Where it runs.
    pub node: NodeId,
    /// The node's incarnation: when this ends, so does the client.
    pub epoch: Epoch,
    /// Distinguishes the clients of one node; never reused within an epoch.
    pub serial: u64,
}

/// What a lock is about; opaque to the lock engine (csvfs puts an inode number here).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ResourceId(pub u64);

/// Milliseconds on a clock of the caller's choice that never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub u64);

impl Millis {
    /// This moment plus `ms` milliseconds.
    #[must_use]
    pub fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds since `earlier`, 0 if that lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

macro_rules! display_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}
display_number!(NodeId, Epoch, Term, VolumeId, ClusterId, ResourceId);

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.node, self.epoch, self.serial)
    }
}
