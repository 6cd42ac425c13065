//! The intent log of a client that has ended: what it had acknowledged is brought into the tables.
//!
//! ```text
//!   merged ----> | n+1 | n+2 | n+3 | torn, or of another log     records are applied in order, up to the first gap
//! ```
//! Each record was stable before the next was begun, so nothing that was acknowledged lies behind a gap. Replay, the end of
//! the pool and the end of the grants are one transaction: after a crash in between it is done again, from the same log (D3).
//!
//! **Invariant:** nobody gets what the client held before its log is replayed (D4); when the log cannot be read, nobody
//! gets it until somebody gives the log up in so many words.

use blockio::BlockDevice;
use lockmgr::ClientId;

use super::core::Core;
use crate::format::layout::BLOCK_BYTES;
use crate::format::log_record::{Entry, LANE_RECORDS, LogId, LogRecord, RECORD_BYTES, record_offset};
use crate::meta::{StoreError, Tables};
use crate::proto::{self as pb, ByteRange, Commit};
use crate::refusal::OpError;

impl Core {
    /// Applies what the log of `client` has beyond what was merged.
    /// Gives, within, the error of a log that cannot be read: nothing has changed then.
    pub(super) fn replay_log(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
    ) -> Result<Result<(), StoreError>, StoreError> {
        let Some(pool) = self.pools.of(client) else { return Ok(Ok(())) };
        let id = LogId { volume: self.volume, lane: pool.lane, log: pool.log };
        let records = match read_log(self.device.as_ref(), &id, pool.merged_lsn) {
            Ok(records) if records.is_empty() => return Ok(Ok(())),
            Ok(records) => records,
            Err(error) => return Ok(Err(error)),
        };
        let commits: Vec<Commit> = records.iter().flat_map(|record| commits_of(&record.entries)).collect();
        let count = records.len();
        tracing::info!(%client, records = count, commits = commits.len(), "replaying an intent log");
        for commit in &commits {
            match self.apply_commit(tables, client, commit, false) {
                Ok(_) => {}
                Err(OpError::Store(error)) => return Err(error),
                // The file is gone, or damage: its blocks stay in the pool, and so become free.
                Err(error) => tracing::error!(%client, ino = commit.ino, ?error, "a record does not apply"),
            }
        }
        Ok(Ok(()))
    }

    /// The pool of a client that has ended becomes free space.
    pub(super) fn dissolve_pool(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
    ) -> Result<(), StoreError> {
        for run in self.pools.close(tables, client)? {
            self.alloc.free(run);
        }
        self.hold_back();
        self.pool_answered(client);
        Ok(())
    }
}

/// The records of a log after `merged_lsn`, up to the first that is not there.
pub(crate) fn read_log(
    device: &dyn BlockDevice,
    id: &LogId,
    merged_lsn: u64,
) -> Result<Vec<LogRecord>, StoreError> {
    let mut records = Vec::new();
    for lsn in (1..=LANE_RECORDS).filter_map(|n| merged_lsn.checked_add(n)) {
        let mut bytes = vec![0; RECORD_BYTES];
        let read = device.read_at(record_offset(id.lane, lsn), &mut bytes);
        read.map_err(|error| StoreError::Engine {
            doing: "read the intent log of a client that has ended",
            source: Box::new(error),
        })?;
        match LogRecord::decode(&bytes, id, lsn) {
            Ok(record) => records.push(record),
            Err(_) => break,
        }
    }
    Ok(records)
}

/// Entries as the commits that they stand for, file by file.
fn commits_of(entries: &[Entry]) -> Vec<Commit> {
    let mut commits: Vec<Commit> = Vec::new();
    for entry in entries {
        if let Entry::File { ino } = entry {
            commits.push(Commit { ino: *ino, ..Commit::default() });
            continue;
        }
        if let Some(commit) = commits.last_mut() {
            add(commit, entry);
        }
    }
    commits
}

fn add(commit: &mut Commit, entry: &Entry) {
    let bytes = |blocks: u64| blocks.saturating_mul(BLOCK_BYTES);
    match *entry {
        Entry::File { .. } => {}
        Entry::Placed { file, blocks, lun } => commit.placed.push(pb::Extent {
            file_offset: bytes(file),
            length: bytes(blocks),
            lun_offset: bytes(lun),
            state: pb::ExtentState::Data.into(),
        }),
        Entry::Written { file, blocks } => {
            commit.written.push(ByteRange { offset: bytes(file), length: bytes(blocks) });
        }
        Entry::Size { bytes } => commit.size_bytes = Some(bytes),
        Entry::Time { seconds, nanos } => commit.mtime = Some(pb::Timestamp { seconds, nanos }),
    }
}
