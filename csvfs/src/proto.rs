//! The messages between clients and coordinator, generated from `proto/csvfs.proto`, and the conversions between their
//! ids and ours.
//!
//! **Invariant:** what comes from the wire is checked here or where it is used; a message never panics its receiver.

#[expect(missing_docs, reason = "generated; proto/csvfs.proto carries the documentation")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/csvfs.rs"));
}
pub use generated::*;

use lockmgr::{Epoch, Mode, NODES_MAX, NodeId};

impl From<lockmgr::ClientId> for ClientId {
    fn from(id: lockmgr::ClientId) -> Self {
        Self { node: u32::from(id.node.0), epoch: id.epoch.0, serial: id.serial }
    }
}

impl ClientId {
    /// Ours, if the node number is one.
    #[must_use]
    pub fn checked(&self) -> Option<lockmgr::ClientId> {
        let node = u16::try_from(self.node).ok().filter(|n| (1..=NODES_MAX).contains(n))?;
        Some(lockmgr::ClientId { node: NodeId(node), epoch: Epoch(self.epoch), serial: self.serial })
    }
}

impl Timestamp {
    /// What times are compared by.
    pub(crate) fn order(self) -> (i64, u32) {
        (self.seconds, self.nanos)
    }

    pub(crate) fn earlier(self, other: Self) -> Self {
        std::cmp::min_by_key(self, other, |time| time.order())
    }

    pub(crate) fn later(self, other: Self) -> Self {
        std::cmp::max_by_key(self, other, |time| time.order())
    }
}

impl From<Mode> for GrantMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Null => Self::Null,
            Mode::ProtectedRead => Self::ProtectedRead,
            Mode::ConcurrentWrite => Self::ConcurrentWrite,
            Mode::Exclusive => Self::Exclusive,
        }
    }
}

impl From<GrantMode> for Mode {
    fn from(mode: GrantMode) -> Self {
        match mode {
            GrantMode::Null => Self::Null,
            GrantMode::ProtectedRead => Self::ProtectedRead,
            GrantMode::ConcurrentWrite => Self::ConcurrentWrite,
            GrantMode::Exclusive => Self::Exclusive,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_of_an_impossible_node_is_refused() {
        assert_eq!(ClientId { node: 0, epoch: 1, serial: 1 }.checked(), None);
        assert_eq!(ClientId { node: 70_000, epoch: 1, serial: 1 }.checked(), None);
        let id = lockmgr::ClientId { node: NodeId(3), epoch: Epoch(4), serial: 5 };
        assert_eq!(ClientId::from(id).checked(), Some(id));
    }
}
