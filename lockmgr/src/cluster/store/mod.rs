//! Where a node keeps its part of Raft: vote, log and snapshot in one redb file.
//!
//! ```text
//!   openraft ─► LogStore (entries in memory) ─┐
//!                                             ├─► Writer: own thread, one transaction per group ─► Disk (redb)
//!   openraft ─► StateMachine (records) ───────┘        completes in the order of the requests
//! ```
//!
//! The records themselves live in memory. On disk are the last snapshot and the log behind it; a restart replays the log
//! up to what was known to be committed. **Invariants:** a vote or an entry is acknowledged only when it is on stable
//! storage; writes reach the disk in the order in which they were asked for; the log has no holes.

mod disk;
mod log;
mod state_machine;
#[cfg(test)]
mod tests;
mod writer;

use std::path::Path;
use std::sync::Arc;

use openraft::StorageIOError;
use tokio::sync::watch;

pub use disk::StoreError;
pub(crate) use log::LogStore;
pub(crate) use state_machine::StateMachine;

use self::disk::Disk;
use self::writer::Writer;
use super::raft_types::StorageError;
use super::records::ClusterState;
use crate::{ClusterId, NodeId};

/// The opened store.
pub(crate) struct Store {
    pub(crate) log: LogStore,
    pub(crate) machine: StateMachine,
    writer: Arc<Writer>,
}

impl Store {
    /// Opens or creates the store of a node. Blocks on the disk.
    pub(crate) fn open(folder: &Path, cluster: ClusterId, node: NodeId) -> Result<Self, StoreError> {
        let disk = Disk::open(folder, cluster, node)?;
        let loaded = disk.load()?;
        let writer = Arc::new(Writer::start(disk)?);
        let log = LogStore::new(loaded.log, Arc::clone(&writer));
        let machine = StateMachine::new(loaded.snapshot, Arc::clone(&writer))?;
        Ok(Self { log, machine, writer })
    }

    /// The records as they change.
    pub(crate) fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.machine.watch()
    }

    /// Parts that outlive the handing over to openraft.
    pub(crate) fn into_parts(self) -> (LogStore, StateMachine, Closer) {
        (self.log, self.machine, Closer { writer: self.writer })
    }
}

/// Closes the file.
pub(crate) struct Closer {
    writer: Arc<Writer>,
}

impl Closer {
    /// Writes what is queued and closes the file; later requests fail. Blocks on the disk.
    pub(crate) fn close(&self) {
        self.writer.close();
    }
}

/// A failed write stops Raft on this node.
fn write_error(error: &std::io::Error) -> StorageError {
    StorageIOError::write(error).into()
}
