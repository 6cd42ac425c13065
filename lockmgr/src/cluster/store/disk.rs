//! The redb file. Nothing outside this module knows redb.
//!
//! ```text
//! table "log"     index (u64)  -> cluster.Entry
//! table "values"  "owner"      -> cluster.Owner         whose log this is
//!                 "vote"       -> cluster.Vote
//!                 "committed"  -> cluster.LogId         written lazily: a hint for the replay
//!                 "purged"     -> cluster.LogId         last entry that was dropped behind a snapshot
//!                 "meta"       -> cluster.SnapshotMeta
//!                 "snapshot"   -> cluster.Snapshot
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use super::super::codec::{CodecError, uuid, uuid_bytes};
use super::super::pb;
use super::super::raft_codec::{entry_from_pb, log_id_from_pb, meta_from_pb, vote_from_pb};
use super::super::raft_types::{Entry, LogId, SnapshotMeta, Vote};
use crate::{ClusterId, NodeId};

const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const VALUES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("values");

const FILE: &str = "cluster.redb";
const FORMAT: u32 = 1;
/// The log is read once, at the start; its pages need no cache.
const CACHE_BYTES: usize = 1 << 20;

/// The store cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file or its folder cannot be used.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another process has it open.
    #[error("{} is in use by another process: a node with this data folder runs already", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It belongs to another node or cluster.
    #[error("{} belongs to node {found_node} of cluster {found_cluster}, this is node {node} of cluster {cluster}", path.display())]
    WrongOwner {
        /// The file.
        path: PathBuf,
        /// This node.
        node: NodeId,
        /// Its cluster.
        cluster: ClusterId,
        /// Node of the file.
        found_node: u32,
        /// Cluster of the file.
        found_cluster: uuid::Uuid,
    },
    /// It was written by a later release.
    #[error("{} has format {found}, this release reads up to {FORMAT}", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// A record in it is damaged.
    #[error("{} is damaged", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StoreError {
    /// What the administrator can do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Io { .. } => "check the data folder's path, permissions and free space",
            Self::InUse { .. } => "stop the other process first",
            Self::WrongOwner { .. } => "check the node id and the data folder in the configuration",
            Self::TooNew { .. } => "run the release that wrote it, or a later one",
            Self::Damaged { .. } => {
                "remove this node from the cluster, empty its data folder and join it again"
            }
        }
    }
}

/// What a start finds on disk.
#[derive(Default)]
pub(super) struct Loaded {
    pub(super) log: LoadedLog,
    pub(super) snapshot: Option<(SnapshotMeta, Bytes)>,
}

#[derive(Default)]
pub(super) struct LoadedLog {
    pub(super) entries: BTreeMap<u64, Entry>,
    pub(super) purged: Option<LogId>,
    pub(super) committed: Option<LogId>,
    pub(super) vote: Option<Vote>,
}

/// One change of the file.
#[derive(Debug)]
pub(super) enum Change {
    Append(Vec<(u64, Vec<u8>)>),
    Vote(pb::Vote),
    Committed(pb::LogId),
    Truncate { from: u64 },
    Purge { upto: pb::LogId },
    Snapshot { meta: pb::SnapshotMeta, data: Bytes },
}

impl Change {
    /// Whether losing it in a crash does no harm.
    fn lazy(&self) -> bool {
        matches!(self, Self::Committed(_) | Self::Purge { .. })
    }
}

pub(super) struct Disk {
    db: Database,
    path: PathBuf,
}

impl Disk {
    pub(super) fn open(folder: &Path, cluster: ClusterId, node: NodeId) -> Result<Self, StoreError> {
        let path = folder.join(FILE);
        std::fs::create_dir_all(folder).map_err(|error| StoreError::Io {
            doing: "create",
            path: folder.to_owned(),
            source: error.into(),
        })?;
        let db =
            redb::Builder::new().set_cache_size(CACHE_BYTES).create(&path).map_err(|error| match error {
                redb::DatabaseError::DatabaseAlreadyOpen => StoreError::InUse { path: path.clone() },
                error => StoreError::Io { doing: "open", path: path.clone(), source: error.into() },
            })?;
        let disk = Self { db, path };
        disk.claim(cluster, node)?;
        Ok(disk)
    }

    /// Writes the owner into a new file, checks it in an old one.
    fn claim(&self, cluster: ClusterId, node: NodeId) -> Result<(), StoreError> {
        let wanted = pb::Owner { format: FORMAT, cluster: uuid_bytes(cluster.0), node: node.0.into() };
        let claim = || -> Result<Option<Vec<u8>>, redb::Error> {
            let transaction = self.begin()?;
            let found = {
                transaction.open_table(LOG)?;
                let mut values = transaction.open_table(VALUES)?;
                let found = values.get("owner")?.map(|found| found.value().to_vec());
                if found.is_none() {
                    values.insert("owner", wanted.encode_to_vec().as_slice())?;
                }
                found
            };
            transaction.commit()?;
            Ok(found)
        };
        let found = claim().map_err(|error| StoreError::Io {
            doing: "write",
            path: self.path.clone(),
            source: error.into(),
        })?;
        let Some(found) = found else { return Ok(()) };
        let found = pb::Owner::decode(found.as_slice()).map_err(|error| self.damaged(error))?;
        if found.format > FORMAT {
            return Err(StoreError::TooNew { path: self.path.clone(), found: found.format });
        }
        if found != wanted {
            let found_cluster = uuid(&found.cluster).map_err(|error| self.damaged(error))?;
            let (path, found_node) = (self.path.clone(), found.node);
            return Err(StoreError::WrongOwner { path, node, cluster, found_node, found_cluster });
        }
        Ok(())
    }

    /// A commit in one phase: one flush, and checksums of 128 bits tell after a crash whether all of it is there. What is gained by
    /// a second flush, an open after a crash that need not read the file, is little here: the file holds a few thousand small
    /// entries. What it costs is paid by every change of every record, twice: the leader flushes before its followers do.
    fn begin(&self) -> Result<WriteTransaction, redb::Error> {
        Ok(self.db.begin_write()?)
    }

    /// Reads everything.
    pub(super) fn load(&self) -> Result<Loaded, StoreError> {
        let read = || -> Result<Rows, redb::Error> {
            let transaction = self.db.begin_read()?;
            let mut values = BTreeMap::new();
            for row in transaction.open_table(VALUES)?.iter()? {
                let (key, value) = row?;
                values.insert(key.value().to_owned(), value.value().to_vec());
            }
            let mut entries = Vec::new();
            for row in transaction.open_table(LOG)?.iter()? {
                entries.push(row?.1.value().to_vec());
            }
            Ok(Rows { values, entries })
        };
        let rows = read().map_err(|error| self.damaged(error))?;
        decode(rows).map_err(|error| self.damaged(error))
    }

    /// Makes changes in their order, all or none. On stable storage when it returns, unless all of them are lazy.
    pub(super) fn commit<'a>(&self, changes: impl Iterator<Item = &'a Change>) -> std::io::Result<()> {
        self.try_commit(changes)
            .map_err(|error| std::io::Error::other(format!("cannot write {}: {error}", self.path.display())))
    }

    fn try_commit<'a>(&self, changes: impl Iterator<Item = &'a Change>) -> Result<(), redb::Error> {
        let mut transaction = self.begin()?;
        let mut lazy = true;
        {
            let mut log = transaction.open_table(LOG)?;
            let mut values = transaction.open_table(VALUES)?;
            for change in changes {
                lazy &= change.lazy();
                match change {
                    Change::Append(entries) => {
                        for (index, entry) in entries {
                            log.insert(index, entry.as_slice())?;
                        }
                    }
                    Change::Vote(vote) => {
                        values.insert("vote", vote.encode_to_vec().as_slice())?;
                    }
                    Change::Committed(id) => {
                        values.insert("committed", id.encode_to_vec().as_slice())?;
                    }
                    Change::Truncate { from } => log.retain_in(*from.., |_, _| false)?,
                    Change::Purge { upto } => {
                        log.retain_in(..=upto.index, |_, _| false)?;
                        values.insert("purged", upto.encode_to_vec().as_slice())?;
                    }
                    Change::Snapshot { meta, data } => {
                        values.insert("meta", meta.encode_to_vec().as_slice())?;
                        values.insert("snapshot", data.as_ref())?;
                    }
                }
            }
        }
        if lazy {
            transaction.set_durability(Durability::None)?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn damaged(&self, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), source: error.into() }
    }
}

/// The file's rows as they are.
struct Rows {
    values: BTreeMap<String, Vec<u8>>,
    entries: Vec<Vec<u8>>,
}

fn decode(Rows { mut values, entries }: Rows) -> Result<Loaded, CodecError> {
    let mut take = |key: &str| values.remove(key).map(Bytes::from);
    let mut loaded = Loaded::default();
    if let Some(vote) = take("vote") {
        loaded.log.vote = Some(vote_from_pb(&pb::Vote::decode(vote)?));
    }
    if let Some(id) = take("committed") {
        loaded.log.committed = Some(log_id_from_pb(&pb::LogId::decode(id)?));
    }
    if let Some(id) = take("purged") {
        loaded.log.purged = Some(log_id_from_pb(&pb::LogId::decode(id)?));
    }
    if let (Some(meta), Some(data)) = (take("meta"), take("snapshot")) {
        loaded.snapshot = Some((meta_from_pb(pb::SnapshotMeta::decode(meta)?), data));
    }
    for entry in entries {
        let entry = entry_from_pb(pb::Entry::decode(entry.as_slice())?)?;
        loaded.log.entries.insert(entry.log_id.index, entry);
    }
    Ok(loaded)
}
