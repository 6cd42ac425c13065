//! Opening, transactions and growth of the metadata store.
//!
//! Every commit of pages is two-phase with quick repair, so that the store of a dead coordinator opens in milliseconds. Most commits
//! are a record in the journal instead: one transaction of the store goes on from checkpoint to checkpoint, so that a page is
//! written once, however many batches have changed it.
//! **Invariant:** chunks are added ahead: between batches the capacity covers the next growth of the database, or the
//! store says that it is `tight` and only what frees space is let in.

use std::error::Error;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use blockio::{BlockDevice, IoError};
use lockmgr::{Term, VolumeId};
use redb::{Durability, ReadableDatabase};

use super::backend::LunBackend;
use super::changes::Changes;
use super::journal::{Head, Journal};
use super::region::Region;
use super::tables::{self, Globals, Tables, View};
use crate::format::layout::{BLOCK_BYTES, FIRST_CHUNK_BYTES, FIRST_CHUNK_OFFSET};
use crate::format::meta_slot::Chunk;
use crate::proto::FileKind;

use super::InodeRecord;

/// Memory for the store's page cache.
const CACHE_BYTES: usize = 24 << 20;
/// Space beyond twice the length that is kept ready for growth.
const READY_BYTES: u64 = 6 << 20;
/// With less than this beyond the next growth the store is tight.
const TIGHT_BYTES: u64 = 1 << 20;
/// The database grows by at most two of its 4 GiB regions at once.
const REGION_BYTES: u64 = 4 << 30;

/// Why the metadata store failed. Each of these ends the coordinator: nothing in the store may be assumed after it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database or the LUN under it failed.
    #[error("cannot {doing}: {source}")]
    Engine {
        /// What was being done.
        doing: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// This coordinator's right to write is over.
    #[error("this coordinator was replaced: {how}")]
    Superseded {
        /// How it was noticed.
        how: String,
    },
    /// A record is not what its table must hold.
    #[error("damaged metadata: {what}; run volume check")]
    Damaged {
        /// Which record.
        what: String,
    },
}

pub(super) fn engine<E: Into<redb::Error>>(doing: &'static str) -> impl FnOnce(E) -> StoreError {
    move |error| StoreError::Engine { doing, source: Box::new(error.into()) }
}

pub(super) fn device(doing: &'static str) -> impl FnOnce(IoError) -> StoreError {
    move |error| StoreError::Engine { doing, source: Box::new(error) }
}

/// The database may panic on pages that it has not written so. What is on the LUN must not take the process down.
pub(crate) fn guarded<T>(what: &str, work: impl FnOnce() -> T) -> Result<T, StoreError> {
    std::panic::catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| StoreError::Damaged { what: what.to_owned() })
}

/// The open store. Only a coordinator has one, or a check on a copy.
pub(crate) struct Store {
    /// What was committed to the journal and not to the pages. Before `db`: it must end first.
    going_on: Option<Transaction>,
    db: redb::Database,
    region: Arc<Region>,
    /// None: every commit is one of pages.
    journal: Option<Journal>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("region", &self.region).finish_non_exhaustive()
    }
}

impl Store {
    /// Makes the store of a new volume: a root directory, and the rest of the LUN free.
    pub(crate) fn create(
        device_: Arc<dyn BlockDevice>,
        volume: VolumeId,
        lun_bytes: u64,
    ) -> Result<(), StoreError> {
        let chunk = Chunk { offset: FIRST_CHUNK_OFFSET, bytes: FIRST_CHUNK_BYTES };
        let region =
            Region::create(device_, volume, Vec::new()).map_err(device("write the metadata slot"))?;
        region.add_chunks(&[chunk]).map_err(device("write the first metadata chunk"))?;
        let mut store = Self::on(region, false)?;
        let transaction = store.begin()?;
        let mut tables = transaction.tables()?;
        fill_new(&mut tables, chunk, lun_bytes)?;
        let changes = tables.into_changes();
        store.commit(transaction, &changes)?;
        store.close()
    }

    /// Opens the store, after a crash too, for the coordinator of `term`.
    pub(crate) fn open(
        device_: Arc<dyn BlockDevice>,
        volume: VolumeId,
        lun_bytes: u64,
        term: Term,
    ) -> Result<Self, StoreError> {
        let region = Region::open(device_, volume, lun_bytes).map_err(device("read the metadata slot"))?;
        let mut store = Self::on(region, false)?;
        store.replay(Some(term))?;
        Ok(store)
    }

    /// As `open`, with the checksum of every page verified: for a copy that nobody serves.
    pub(crate) fn open_verified(
        device_: Arc<dyn BlockDevice>,
        volume: VolumeId,
        lun_bytes: u64,
    ) -> Result<Self, StoreError> {
        let region = Region::open(device_, volume, lun_bytes).map_err(device("read the metadata slot"))?;
        let mut store = Self::on(region, true)?;
        store.replay(None)?;
        Ok(store)
    }

    fn on(region: Region, verified: bool) -> Result<Self, StoreError> {
        let region = Arc::new(region);
        let mut builder = redb::Builder::new();
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(verified);
        let backend = LunBackend::new(region.clone());
        let opened = guarded("a page that cannot be", || builder.create_with_backend(backend))?;
        let db = opened.map_err(engine("open the metadata store"))?;
        Ok(Self { going_on: None, db, region, journal: None })
    }

    /// Does again what the journal has beyond the pages, in one transaction, and begins the journal of `term`. A crash
    /// in it leaves pages and journal as they were (D3).
    fn replay(&mut self, term: Option<Term>) -> Result<(), StoreError> {
        let transaction = self.begin()?;
        let mut tables = transaction.tables()?;
        let known = tables.journal_head()?;
        let mut journal = Journal::begin(known.unwrap_or(Head { term: Term(0), next: 0 }));
        let mut records: u64 = 0;
        if known.is_some() {
            let (device, volume) = (self.region.device(), self.region.volume());
            while journal.replay_next(device, volume, |bytes| tables.redo(bytes))? {
                records += 1;
            }
        }
        let head = Head { term: term.unwrap_or(journal.head().term), next: journal.head().next };
        if records > 0 {
            tracing::info!(volume = %self.region.volume(), records, "the metadata's journal was replayed");
        }
        if known == Some(head) {
            drop(tables);
            self.keep(transaction);
        } else {
            tables.put_journal_head(head)?;
            drop(tables);
            transaction.make_stable()?;
        }
        self.journal = term.map(|_| Journal::begin(head));
        Ok(())
    }

    /// The tables as they are, to be changed: to be given to `commit`, or to `keep` when nothing was. Dropped instead, all that
    /// the journal has since the last checkpoint is gone from memory, and the store must not be used any more.
    pub(crate) fn begin(&mut self) -> Result<Transaction, StoreError> {
        if let Some(transaction) = self.going_on.take() {
            return Ok(transaction);
        }
        let inner = self.db.begin_write().map_err(engine("begin a metadata transaction"))?;
        Ok(Transaction { inner })
    }

    /// Takes a transaction back in which nothing was changed.
    pub(crate) fn keep(&mut self, transaction: Transaction) {
        self.going_on = Some(transaction);
    }

    /// Ends a batch that made these changes. Returns when all of it is on stable media.
    pub(crate) fn commit(&mut self, transaction: Transaction, changes: &Changes) -> Result<(), StoreError> {
        let Some(journal) = &mut self.journal else { return transaction.make_stable() };
        match changes.bytes().filter(|bytes| journal.has_room(bytes)) {
            Some(bytes) => {
                journal.append(&self.region, bytes).map_err(device("write the metadata's journal"))?;
                self.keep(transaction);
                Ok(())
            }
            None => self.checkpoint_with(transaction),
        }
    }

    /// Makes all that the journal has stable in the pages.
    fn checkpoint_with(&mut self, transaction: Transaction) -> Result<(), StoreError> {
        if let Some(journal) = &mut self.journal {
            let head = journal.head();
            transaction.tables()?.put_journal_head(head)?;
            transaction.make_stable()?;
            *journal = Journal::begin(head);
            return Ok(());
        }
        transaction.make_stable()
    }

    /// Makes tables that this version has and the one that made the volume had not.
    pub(crate) fn make_tables(&mut self) -> Result<(), StoreError> {
        let transaction = self.begin()?;
        drop(transaction.tables()?);
        transaction.make_stable()
    }

    /// All tables as they were committed last; later commits do not show. No transaction may have begun.
    pub(crate) fn snapshot(&mut self) -> Result<Snapshot, StoreError> {
        if let Some(transaction) = self.going_on.take() {
            transaction.keep_in_memory()?;
        }
        let inner = self.db.begin_read().map_err(engine("begin reading the metadata"))?;
        tables::open_read(&inner)
    }

    /// Ends all writing, for good, and returns when the last write has landed: only then may another open the store.
    pub(crate) fn end_writing(&self) {
        self.region.revoke();
        self.region.settle();
    }

    /// Ends all writing, for good; for somebody who does not own the store, and does not wait for what is in flight.
    pub(crate) fn revoker(&self) -> Box<dyn Fn() + Send + Sync> {
        let region = self.region.clone();
        Box::new(move || region.revoke())
    }

    /// Leaves the store clean for the next opener.
    pub(crate) fn close(mut self) -> Result<(), StoreError> {
        if self.journal.is_some_and(|journal| !journal.is_empty()) {
            let transaction = self.begin()?;
            self.checkpoint_with(transaction)?;
        }
        self.going_on = None;
        self.db.close().map_err(engine("close the metadata store"))
    }

    /// The chunks that the metadata slot lists.
    pub(crate) fn chunks(&self) -> Vec<Chunk> {
        self.region.chunks()
    }

    /// As `chunks`, for somebody who does not own the store.
    pub(crate) fn chunk_lister(&self) -> Box<dyn Fn() -> Vec<Chunk> + Send> {
        let region = self.region.clone();
        Box::new(move || region.chunks())
    }

    /// Blocks that should be added, so that the next growth of the database finds its room.
    pub(crate) fn blocks_wanted(&self) -> u64 {
        (self.next_len() + READY_BYTES).saturating_sub(self.region.capacity()).div_ceil(BLOCK_BYTES)
    }

    /// Whether the next growth would not find its room even with `blocks` more.
    pub(crate) fn is_tight(&self, blocks: u64) -> bool {
        self.region.capacity() + blocks * BLOCK_BYTES < self.next_len() + TIGHT_BYTES
    }

    /// The database doubles, up to its region size.
    fn next_len(&self) -> u64 {
        let len = self.region.len();
        if len < REGION_BYTES { 2 * len } else { len + 2 * REGION_BYTES }
    }

    /// How many more chunks the slot can list.
    pub(crate) fn chunk_slots_free(&self) -> usize {
        self.region.chunk_slots_free()
    }

    /// Puts chunks into use that the table of chunks lists already.
    pub(crate) fn add_chunks(&self, chunks: &[Chunk]) -> Result<(), StoreError> {
        self.region.add_chunks(chunks).map_err(device("add space to the metadata store"))
    }
}

fn fill_new(tables: &mut Tables<'_>, chunk: Chunk, lun_bytes: u64) -> Result<(), StoreError> {
    let now = crate::clock::wall();
    let root = InodeRecord {
        kind: FileKind::Directory.into(),
        mode: 0o755,
        nlink: 2,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        generation: 1,
        parent: crate::ROOT_INO,
        next_cookie: 1,
        ..InodeRecord::default()
    };
    tables.put_inode(crate::ROOT_INO, &root)?;
    tables.put_globals(Globals { next_ino: crate::ROOT_INO + 1, inodes: 1 })?;
    tables.put_chunk(chunk.offset / BLOCK_BYTES, chunk.bytes / BLOCK_BYTES)?;
    tables.put_area_blocks(lun_bytes / BLOCK_BYTES)?;
    let first = (chunk.offset + chunk.bytes) / BLOCK_BYTES;
    tables.put_free(first, lun_bytes / BLOCK_BYTES - first)
}

/// One write transaction of the store.
pub(crate) struct Transaction {
    inner: redb::WriteTransaction,
}

impl Transaction {
    pub(crate) fn tables(&self) -> Result<Tables<'_>, StoreError> {
        tables::open_write(&self.inner)
    }

    /// Returns when all of it, and all before, is on stable media.
    fn make_stable(mut self) -> Result<(), StoreError> {
        self.inner.set_quick_repair(true);
        self.inner.commit().map_err(engine("commit metadata"))
    }

    /// Makes it visible to snapshots, and no more than that.
    fn keep_in_memory(mut self) -> Result<(), StoreError> {
        self.inner.set_durability(Durability::None).map_err(engine("commit metadata in memory"))?;
        self.inner.commit().map_err(engine("commit metadata in memory"))
    }
}

/// All tables at one moment.
pub(crate) type Snapshot = View<tables::ReadTable>;
