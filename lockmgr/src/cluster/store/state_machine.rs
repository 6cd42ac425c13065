//! The records, as openraft asks for them: apply, snapshot, install.

use std::io::Cursor;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use openraft::storage::RaftStateMachine;
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot, StorageIOError};
use tokio::sync::watch;

use super::disk::{Change, StoreError};
use super::write_error;
use super::writer::Writer;
use crate::cluster::codec::End;
use crate::cluster::machine::Machine;
use crate::cluster::raft_codec::meta_to_pb;
use crate::cluster::raft_types::{Entry, LogId, SnapshotMeta, StorageError, StoredMembership, Types};
use crate::cluster::records::ClusterState;

/// The state machine. Clones are the same one.
#[derive(Clone)]
pub(crate) struct StateMachine {
    writer: Arc<Writer>,
    /// Held for memory operations only.
    applied: Arc<Mutex<Applied>>,
    published: Arc<watch::Sender<Arc<ClusterState>>>,
}

#[derive(Default)]
struct Applied {
    machine: Machine,
    last: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<(SnapshotMeta, Bytes)>,
    /// The newest snapshot that is on its way to the disk or there.
    saving: Option<LogId>,
}

impl StateMachine {
    pub(super) fn new(
        loaded: Option<(SnapshotMeta, Bytes)>,
        writer: Arc<Writer>,
    ) -> Result<Self, StoreError> {
        let applied = match loaded {
            None => Applied::default(),
            Some((meta, data)) => from_snapshot(meta, data).map_err(|error| StoreError::Damaged {
                path: std::path::PathBuf::from("the cluster's snapshot"),
                source: error.into(),
            })?,
        };
        let published = watch::Sender::new(Arc::new(applied.machine.state.clone()));
        Ok(Self { writer, applied: Arc::new(Mutex::new(applied)), published: Arc::new(published) })
    }

    pub(super) fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.published.subscribe()
    }

    fn applied(&self) -> MutexGuard<'_, Applied> {
        self.applied.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn publish(&self, applied: &Applied) {
        self.published.send_replace(Arc::new(applied.machine.state.clone()));
    }
}

fn from_snapshot(meta: SnapshotMeta, data: Bytes) -> Result<Applied, crate::cluster::codec::CodecError> {
    Ok(Applied {
        machine: Machine::decode(data.clone())?,
        last: meta.last_log_id,
        membership: meta.last_membership.clone(),
        saving: meta.last_log_id,
        snapshot: Some((meta, data)),
    })
}

impl Applied {
    fn apply(&mut self, entry: Entry) -> End {
        let index = entry.log_id.index;
        self.last = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => self.machine.pass(index),
            EntryPayload::Normal(proposal) => self.machine.apply(index, &proposal),
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                self.machine.pass(index)
            }
        }
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        let applied = self.applied();
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<End>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut applied = self.applied();
        let ends = entries.into_iter().map(|entry| applied.apply(entry)).collect();
        self.publish(&applied);
        Ok(ends)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let applied = self.applied();
        SnapshotBuilder {
            machine: applied.machine.clone(),
            last: applied.last,
            membership: applied.membership.clone(),
            target: self.clone(),
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError> {
        let data = Bytes::from(snapshot.into_inner());
        let installed = from_snapshot(meta.clone(), data.clone())
            .map_err(|error| StorageIOError::read_snapshot(Some(meta.signature()), &error))?;
        let written = {
            let mut applied = self.applied();
            applied.saving = meta.last_log_id;
            self.writer.write(Change::Snapshot { meta: meta_to_pb(meta), data })
        };
        written.await.map_err(|error| write_error(&error))?;
        let mut applied = self.applied();
        *applied = installed;
        self.publish(&applied);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError> {
        let applied = self.applied();
        Ok(applied.snapshot.as_ref().map(|(meta, data)| Snapshot {
            meta: meta.clone(),
            snapshot: Box::new(Cursor::new(data.to_vec())),
        }))
    }
}

/// A copy of the records, to be written while the log goes on.
pub(crate) struct SnapshotBuilder {
    machine: Machine,
    last: Option<LogId>,
    membership: StoredMembership,
    target: StateMachine,
}

impl RaftSnapshotBuilder<Types> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError> {
        let data = Bytes::from(self.machine.encode());
        let snapshot_id = self.last.map_or_else(|| "0".to_owned(), |last| format!("{last}"));
        let meta =
            SnapshotMeta { last_log_id: self.last, last_membership: self.membership.clone(), snapshot_id };
        if let Some(written) = self.save(&meta, &data) {
            written.await.map_err(|error| write_error(&error))?;
            let mut applied = self.target.applied();
            if applied.saving == meta.last_log_id {
                applied.snapshot = Some((meta.clone(), data.clone()));
            }
        }
        Ok(Snapshot { meta, snapshot: Box::new(Cursor::new(data.to_vec())) })
    }
}

impl SnapshotBuilder {
    /// Queues the snapshot, unless a newer one was installed meanwhile: that one must stay the last on disk, because the
    /// log in front of it may be gone.
    fn save(
        &self,
        meta: &SnapshotMeta,
        data: &Bytes,
    ) -> Option<impl Future<Output = std::io::Result<()>> + Send + use<>> {
        let mut applied = self.target.applied();
        if applied.saving > meta.last_log_id {
            return None;
        }
        applied.saving = meta.last_log_id;
        Some(self.target.writer.write(Change::Snapshot { meta: meta_to_pb(meta), data: data.clone() }))
    }
}
