//! Pools: free blocks that a client places in its files by itself, and the log in which it says so.
//!
//! ```text
//!   free --TakePool--> pool of a client --Commit, Merge, replay of its log--> file
//!     ^                     |
//!     '---- ReturnPool, or the client has ended and its log is replayed
//! ```
//! The blocks of a pool are durably the client's before it learns of them (C1), and nobody else's until it gave them up or
//! has ended for certain (A1). **Invariant:** the tables `pools` and `logs` change in the same transaction as what they
//! stand for, so a block has one owner at every moment, and a record is merged once.

use std::collections::{BTreeMap, BTreeSet};

use lockmgr::ClientId;

use super::core::{Core, Work};
use crate::extents::Run;
use crate::format::layout::BLOCK_BYTES;
use crate::format::log_record::LANES;
use crate::format::superblock::INCOMPAT_CLONES;
use crate::meta::{LogRow, PoolRun, StoreError, Tables};
use crate::proto::{self as pb, Done, FailureKind, Pool as PoolReply, ReturnPool, TakePool, reply};
use crate::refusal::{OpError, errno, refused};

/// Of what is free, a client gets at most this part ahead of its need.
const AHEAD_PART: u64 = 8;
/// Blocks in pools for which one more block is kept free: what the metadata needs when each of them becomes an extent.
const BLOCKS_PER_METADATA_BLOCK: u64 = 32;
/// The same when there are clones: a block that replaces a shared one cuts an extent and a count in three.
const COPIES_PER_METADATA_BLOCK: u64 = 8;

/// What a client may place.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) log: u64,
    pub(super) lane: u16,
    pub(super) merged_lsn: u64,
    /// Blocks by first block.
    runs: BTreeMap<u64, u64>,
}

/// All pools.
#[derive(Debug, Default)]
pub(super) struct Pools {
    by_client: BTreeMap<ClientId, Pool>,
    blocks: u64,
    /// Logs given out in this term.
    given: u64,
    /// Lanes of logs that could not be read: who gets one may not be able to write there either.
    doubtful: BTreeSet<u16>,
}

impl Pools {
    /// As the tables have them.
    pub(super) fn load(tables: &Tables<'_>) -> Result<Self, StoreError> {
        let damaged = |what: String| StoreError::Damaged { what };
        let mut pools = Self::default();
        let mut owners = BTreeMap::new();
        for (client, row) in tables.logs()? {
            let lane = u16::try_from(row.lane).ok().filter(|lane| *lane < LANES);
            let lane = lane.ok_or_else(|| damaged(format!("the intent log of client {client}")))?;
            owners.insert(row.log, client);
            let (log, merged_lsn) = (row.log, row.merged_lsn);
            pools.by_client.insert(client, Pool { log, lane, merged_lsn, runs: BTreeMap::new() });
        }
        for PoolRun { start, blocks, log } in tables.pools()? {
            let owner = owners.get(&log).and_then(|client| pools.by_client.get_mut(client));
            let pool = owner.ok_or_else(|| damaged(format!("block {start} is in the pool of nobody")))?;
            pool.runs.insert(start, blocks);
            pools.blocks += blocks;
        }
        Ok(pools)
    }

    /// Takes over what was loaded anew; numbers of logs are not given twice.
    pub(super) fn replace(&mut self, loaded: Self) {
        let doubtful = std::mem::take(&mut self.doubtful);
        *self = Self { given: self.given, doubtful, ..loaded };
    }

    pub(super) fn of(&self, client: ClientId) -> Option<&Pool> {
        self.by_client.get(&client)
    }

    /// Blocks in all pools.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Free blocks that the metadata may need for what is in pools.
    pub(super) fn metadata_blocks(&self, clones: bool) -> u64 {
        let each = if clones { COPIES_PER_METADATA_BLOCK } else { BLOCKS_PER_METADATA_BLOCK };
        self.blocks.div_ceil(each)
    }

    /// Who has blocks, beside `but`.
    pub(super) fn holders(&self, but: Option<ClientId>) -> Vec<ClientId> {
        let has = |(client, pool): (&ClientId, &Pool)| {
            (Some(*client) != but && !pool.runs.is_empty()).then_some(*client)
        };
        self.by_client.iter().filter_map(has).collect()
    }

    fn free_lane(&self) -> Option<u16> {
        let used: BTreeSet<u16> = self.by_client.values().map(|pool| pool.lane).collect();
        let free = |lane: &u16| !used.contains(lane);
        let good = (0..LANES).find(|lane| free(lane) && !self.doubtful.contains(lane));
        good.or_else(|| (0..LANES).find(free))
    }

    /// The lane of this client's log is given to others only when there is no other.
    pub(super) fn doubt_lane(&mut self, client: ClientId) {
        self.doubtful.extend(self.by_client.get(&client).map(|pool| pool.lane));
    }

    /// The client's pool, made with a log of its own if there is none.
    fn open(&mut self, tables: &mut Tables<'_>, client: ClientId, term: u64) -> Result<(u64, u16), OpError> {
        if let Some(pool) = self.by_client.get(&client) {
            return Ok((pool.log, pool.lane));
        }
        let lane = self.free_lane().ok_or_else(|| {
            refused(FailureKind::Unsupported, format!("all {LANES} intent logs of the volume are in use"))
        })?;
        self.given += 1;
        // A term has one coordinator, and it gives each number once.
        let log = term << 24 | self.given & 0xFF_FFFF;
        let pool = Pool { log, lane, merged_lsn: 0, runs: BTreeMap::new() };
        tables.put_log(client, &pool.row())?;
        self.by_client.insert(client, pool);
        Ok((log, lane))
    }

    fn put(&mut self, tables: &mut Tables<'_>, client: ClientId, run: Run) -> Result<(), StoreError> {
        let Some(pool) = self.by_client.get_mut(&client) else { return Ok(()) };
        self.blocks += run.blocks;
        pool.runs.insert(run.start, run.blocks);
        tables.put_pool_run(PoolRun { start: run.start, blocks: run.blocks, log: pool.log })
    }

    /// Whether all of `run` is in the client's pool. Runs that touch count as one.
    pub(super) fn holds(&self, client: ClientId, run: Run) -> bool {
        let Some(pool) = self.by_client.get(&client) else { return false };
        let (mut at, end) = (run.start, run.start.saturating_add(run.blocks));
        while at < end {
            match pool.runs.range(..=at).next_back() {
                Some((start, blocks)) if start + blocks > at => at = start + blocks,
                _ => return false,
            }
        }
        true
    }

    /// Takes `run`, which it holds, out of the client's pool.
    pub(super) fn cut(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        run: Run,
    ) -> Result<(), StoreError> {
        let Some(pool) = self.by_client.get_mut(&client) else { return Ok(()) };
        let (mut at, end) = (run.start, run.start + run.blocks);
        while at < end {
            let found = pool.runs.range(..=at).next_back().map(|(start, blocks)| (*start, *blocks));
            let (start, blocks) = found.expect("the caller asked whether the pool holds it");
            let cut_end = end.min(start + blocks);
            pool.runs.remove(&start);
            tables.remove_pool_run(start)?;
            for (start, blocks) in [(start, at - start), (cut_end, start + blocks - cut_end)] {
                if blocks > 0 {
                    pool.runs.insert(start, blocks);
                    tables.put_pool_run(PoolRun { start, blocks, log: pool.log })?;
                }
            }
            self.blocks -= cut_end - at;
            at = cut_end;
        }
        Ok(())
    }

    /// All records up to `lsn` are in the tables now.
    pub(super) fn merged(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        lsn: u64,
    ) -> Result<(), StoreError> {
        let Some(pool) = self.by_client.get_mut(&client) else { return Ok(()) };
        pool.merged_lsn = pool.merged_lsn.max(lsn);
        tables.put_log(client, &pool.row())
    }

    /// Takes the pool apart: gives what was in it.
    pub(super) fn close(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
    ) -> Result<Vec<Run>, StoreError> {
        let Some(pool) = self.by_client.remove(&client) else { return Ok(Vec::new()) };
        tables.remove_log(client)?;
        let mut runs = Vec::with_capacity(pool.runs.len());
        for (start, blocks) in pool.runs {
            tables.remove_pool_run(start)?;
            self.blocks -= blocks;
            runs.push(Run { start, blocks });
        }
        Ok(runs)
    }
}

impl Pool {
    /// Blocks in it.
    pub(super) fn blocks(&self) -> u64 {
        self.runs.values().sum()
    }

    fn row(&self) -> LogRow {
        LogRow { log: self.log, lane: self.lane.into(), merged_lsn: self.merged_lsn }
    }
}

impl Core {
    pub(super) fn take_pool(
        &mut self,
        tables: &mut Tables<'_>,
        work: &Work,
        op: &TakePool,
    ) -> Result<reply::Result, OpError> {
        let client = work.client;
        self.room_for_metadata()?;
        let blocks = |bytes: u64| bytes.div_ceil(BLOCK_BYTES);
        let need = blocks(op.need).max(1);
        self.check_room(work, Some(client), need)?;
        let plenty = self.alloc.available() / AHEAD_PART;
        let give = blocks(op.want).min(plenty).max(need);
        let (log, lane) = self.pools.open(tables, client, self.term.0)?;
        let runs = self.alloc.take(None, give).ok_or_else(|| errno(libc::ENOSPC, "the volume is full"))?;
        for run in &runs {
            self.pools.put(tables, client, *run)?;
        }
        self.hold_back();
        let runs = runs.iter().map(pool_run).collect();
        Ok(reply::Result::Pool(PoolReply { log, lane: lane.into(), runs }))
    }

    pub(super) fn return_pool(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        op: &ReturnPool,
    ) -> Result<reply::Result, OpError> {
        let runs: Vec<Run> = op.runs.iter().map(checked_run).collect::<Result<_, _>>()?;
        if let Some(run) = runs.iter().find(|run| !self.pools.holds(client, **run)) {
            let what = format!("block {} is not in the pool of client {client}", run.start);
            return Err(errno(libc::EINVAL, what));
        }
        for run in runs {
            // Twice the same block in one message.
            if self.pools.holds(client, run) {
                self.pools.cut(tables, client, run)?;
                self.alloc.free(run);
            }
        }
        self.hold_back();
        if op.recalled {
            self.pool_answered(client);
        }
        Ok(reply::Result::Done(Done {}))
    }

    /// Keeps back from files what the metadata may need.
    pub(super) fn hold_back(&mut self) {
        let clones = self.incompat & INCOMPAT_CLONES != 0;
        self.alloc.hold_back(self.held_back + self.pools.metadata_blocks(clones));
    }
}

fn pool_run(run: &Run) -> pb::Extent {
    pb::Extent {
        file_offset: 0,
        length: run.blocks * BLOCK_BYTES,
        lun_offset: run.start * BLOCK_BYTES,
        state: pb::ExtentState::Fresh.into(),
    }
}

fn checked_run(extent: &pb::Extent) -> Result<Run, OpError> {
    let whole = extent.lun_offset.is_multiple_of(BLOCK_BYTES) && extent.length.is_multiple_of(BLOCK_BYTES);
    let fits = extent.lun_offset.checked_add(extent.length).is_some();
    if !whole || !fits || extent.length == 0 {
        return Err(errno(libc::EINVAL, "a run of a pool is not of whole blocks"));
    }
    Ok(Run { start: extent.lun_offset / BLOCK_BYTES, blocks: extent.length / BLOCK_BYTES })
}
