//! Vote and log, as openraft asks for them.
//!
//! All entries behind the last snapshot are also in memory: reading never touches the disk.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::ops::RangeBounds;
use std::sync::{Arc, Mutex, MutexGuard};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{LogState, OptionalSend, RaftLogReader};
use prost::Message;

use super::disk::{Change, LoadedLog};
use super::write_error;
use super::writer::{Done, Writer};
use crate::cluster::raft_codec::{entry_to_pb, log_id_to_pb, vote_to_pb};
use crate::cluster::raft_types::{Entry, LogId, StorageError, Types, Vote};

/// Entries of one message to a follower, so that a message stays well below the longest frame.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// The log. Clones are the same log.
#[derive(Clone)]
pub(crate) struct LogStore {
    writer: Arc<Writer>,
    /// Held for memory operations and queueing only, so that the order of both is the same.
    log: Arc<Mutex<Log>>,
}

struct Log {
    entries: BTreeMap<u64, Stored>,
    purged: Option<LogId>,
    committed: Option<LogId>,
    vote: Option<Vote>,
}

struct Stored {
    entry: Entry,
    bytes: usize,
}

impl LogStore {
    pub(super) fn new(loaded: LoadedLog, writer: Arc<Writer>) -> Self {
        let stored = |entry: Entry| Stored { bytes: entry_to_pb(&entry).encoded_len(), entry };
        let log = Log {
            entries: loaded.entries.into_iter().map(|(index, entry)| (index, stored(entry))).collect(),
            purged: loaded.purged,
            committed: loaded.committed,
            vote: loaded.vote,
        };
        Self { writer, log: Arc::new(Mutex::new(log)) }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<R>(&mut self, range: R) -> Result<Vec<Entry>, StorageError>
    where
        R: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        Ok(self.log().entries.range(range).map(|(_, stored)| stored.entry.clone()).collect())
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        let mut bytes = 0;
        let mut some = Vec::new();
        for stored in self.log().entries.range(start..end.max(start)).map(|(_, stored)| stored) {
            bytes += stored.bytes;
            if !some.is_empty() && bytes > BATCH_BYTES_MAX {
                break;
            }
            some.push(stored.entry.clone());
        }
        Ok(some)
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError> {
        let log = self.log();
        let last = log.entries.last_key_value().map(|(_, stored)| stored.entry.log_id);
        Ok(LogState { last_purged_log_id: log.purged, last_log_id: last.or(log.purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let written = {
            let mut log = self.log();
            log.vote = Some(*vote);
            self.writer.write(Change::Vote(vote_to_pb(vote)))
        };
        written.await.map_err(|error| write_error(&error))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        Ok(self.log().vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        let mut log = self.log();
        log.committed = committed;
        if let Some(committed) = committed {
            // Not waited for: what was committed is known again as soon as there is a leader.
            self.writer.queue(Change::Committed(log_id_to_pb(&committed)), Done::Nobody);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(self.log().committed)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let encoded = |entry: Entry| (entry_to_pb(&entry).encode_to_vec(), entry);
        let entries: Vec<_> = entries.into_iter().map(encoded).collect();
        let mut log = self.log();
        let mut rows = Vec::with_capacity(entries.len());
        for (bytes, entry) in entries {
            let index = entry.log_id.index;
            log.entries.insert(index, Stored { entry, bytes: bytes.len() });
            rows.push((index, bytes));
        }
        self.writer.queue(Change::Append(rows), Done::Log(callback));
        Ok(())
    }

    async fn truncate(&mut self, from: LogId) -> Result<(), StorageError> {
        let written = {
            let mut log = self.log();
            log.entries.split_off(&from.index);
            self.writer.write(Change::Truncate { from: from.index })
        };
        written.await.map_err(|error| write_error(&error))
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), StorageError> {
        let mut log = self.log();
        log.purged = Some(upto);
        log.entries = log.entries.split_off(&upto.index.saturating_add(1));
        // Not waited for: entries that come back after a crash are behind a snapshot and do no harm.
        self.writer.queue(Change::Purge { upto: log_id_to_pb(&upto) }, Done::Nobody);
        Ok(())
    }
}
