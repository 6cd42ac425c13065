//! The journal of the metadata store: a commit is one forced write.
//!
//! ```text
//!   batch:        pages of the store stay in memory  +  one record in the journal, forced  ->  acknowledged
//!   checkpoint:   pages and the number of the next record are made stable together         ->  the journal begins anew
//!   opening:      the records from that number on are done again, then a checkpoint
//! ```
//! A commit of the store itself takes two flushes and writes every page that it touched; a record takes one and has the changed
//! rows alone. Checkpoints come when the journal is full, when a batch is too large for it, and at the end.
//! **Invariants:** a record is written only after the ones before it were acknowledged; the term and the number of the first record
//! are stable in the store before it is written (D5), and no record is overwritten whose changes are not stable in the store (D1).

use blockio::{BlockDevice, IoError};
use lockmgr::{Term, VolumeId};

use super::changes;
use super::region::Region;
use super::store::{StoreError, device as failed};
use crate::format::journal::{RecordId, claimed_bytes, decode, encode, record_bytes};
use crate::format::layout::{BLOCK_BYTES, JOURNAL_BYTES, JOURNAL_OFFSET};

const _: () = assert!((changes::BYTES_MAX as u64) + 2 * BLOCK_BYTES <= JOURNAL_BYTES);

/// Whose the journal is, and which record comes first. What the store itself says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) term: Term,
    pub(super) next: u64,
}

/// Where the next record goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Journal {
    head: Head,
    offset: u64,
}

impl Journal {
    /// An empty journal. The store must have `head` on stable media.
    pub(super) fn begin(head: Head) -> Self {
        Self { head, offset: JOURNAL_OFFSET }
    }

    /// What the store must have on stable media before the journal begins anew.
    pub(super) fn head(&self) -> Head {
        self.head
    }

    /// Whether there are records in it.
    pub(super) fn is_empty(&self) -> bool {
        self.offset == JOURNAL_OFFSET
    }

    /// Whether a record of these changes has its place.
    pub(super) fn has_room(&self, changes: &[u8]) -> bool {
        self.offset + record_bytes(changes.len()) <= JOURNAL_OFFSET + JOURNAL_BYTES
    }

    /// Writes the next record, and returns when it is stable. It must have its place.
    pub(super) fn append(&mut self, region: &Region, changes: &[u8]) -> Result<(), IoError> {
        let id = self.id(region.volume());
        let bytes = encode(&id, changes);
        region.force(id.offset, &bytes)?;
        self.offset += bytes.len() as u64;
        self.head.next += 1;
        Ok(())
    }

    /// Reads the next record and calls `visit` with what it changed; false when there is none.
    pub(super) fn replay_next(
        &mut self,
        device: &dyn BlockDevice,
        volume: VolumeId,
        visit: impl FnOnce(&[u8]) -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        let id = self.id(volume);
        if id.offset + BLOCK_BYTES > JOURNAL_OFFSET + JOURNAL_BYTES {
            return Ok(false);
        }
        let read = |bytes: u64| -> Result<Vec<u8>, StoreError> {
            let mut buf = vec![0; usize::try_from(bytes).expect("less than the journal")];
            device.read_at(id.offset, &mut buf).map_err(failed("read the metadata's journal"))?;
            Ok(buf)
        };
        let Some(len) = claimed_bytes(&read(BLOCK_BYTES)?, id.offset) else { return Ok(false) };
        let bytes = read(len)?;
        // Torn, or older than the checkpoint: it was never acknowledged, or is in the store.
        let Ok(changes) = decode(&bytes, &id) else { return Ok(false) };
        visit(changes)?;
        self.offset += len;
        self.head.next += 1;
        Ok(true)
    }

    fn id(&self, volume: VolumeId) -> RecordId {
        RecordId { volume, term: self.head.term, number: self.head.next, offset: self.offset }
    }
}
