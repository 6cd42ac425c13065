//! Taking over a volume.
//!
//! ```text
//!   superblock -> owner block: is our term higher? -> write it, flush -> open the store -> load what is kept in memory
//! ```
//! **Invariant:** the term is on the LUN before the store is opened for writing (D5).

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use blockio::BlockDevice;
use lockmgr::ClientId;
use lockmgr::engine::LockEngine;
use lockmgr::range::RangeTable;

use super::batch::Server;
use super::core::{Core, Grace, Outbox};
use super::extend::account_for;
use super::mailbox::Mailbox;
use super::pools::Pools;
use super::scarcity::Scarcity;
use super::sessions::Session;
use super::{OpenError, OpenParams};
use crate::alloc::Allocator;
use crate::extents::Run;
use crate::format::layout::BLOCK_BYTES;
use crate::format::meta_slot::Chunk;
use crate::format::owner::OwnerBlock;
use crate::format::superblock::Superblock;
use crate::meta::{Store, StoreError, Tables, guarded};
use crate::volume::{read_owner, write_owner};

/// Part of the data area that files do not get: room for the metadata store to grow when the volume is full.
const HELD_BACK_PART: u64 = 128;
const HELD_BACK_BLOCKS_MIN: u64 = 512;

pub(super) fn open(params: OpenParams) -> Result<Server, OpenError> {
    let block = Superblock::read(params.device.as_ref())?;
    if block.volume != params.volume {
        return Err(OpenError::WrongVolume { found: block.volume, expected: params.volume });
    }
    take_ownership(&params)?;
    block.repair(params.device.as_ref())?;
    let block = block.upgraded(params.device.as_ref())?;
    let mut store = guarded("a page that cannot be read", || {
        Store::open(params.device.clone(), block.volume, block.lun_bytes, params.term)
    })??;
    let revoker = store.revoker();
    let core = guarded("a page that cannot be read", || load(params, &block, &mut store))??;
    Ok(Server::new(store, core, Mailbox::new(revoker)))
}

fn take_ownership(params: &OpenParams) -> Result<(), OpenError> {
    let last = read_owner(params.device.as_ref(), params.volume)?;
    let ours = OwnerBlock {
        volume: params.volume,
        node: Some(params.node),
        epoch: params.epoch,
        term: params.term,
        generation: 0,
    };
    let again = OwnerBlock { generation: 0, ..last } == ours;
    if last.term > params.term || (last.term == params.term && !again) {
        return Err(OpenError::Superseded { term: params.term, found: last.term, node: last.node });
    }
    if !again {
        write_owner(params.device.as_ref(), &last, ours)?;
    }
    Ok(())
}

fn load(params: OpenParams, block: &Superblock, store: &mut Store) -> Result<Core, OpenError> {
    let transaction = store.begin()?;
    let mut tables = transaction.tables()?;
    finish_growth(&tables, store)?;
    let mut alloc = Allocator::new(tables.free()?)
        .map_err(|error| StoreError::Damaged { what: format!("the table of free space: {error}") })?;
    let accounted = account_for(&mut tables, &mut alloc, block.lun_bytes)?;
    let pools = Pools::load(&tables)?;
    let sessions = load_sessions(&tables)?;
    let now = params.clock.now();
    let missing: BTreeSet<ClientId> = sessions.keys().copied().collect();
    let grace = (!missing.is_empty()).then(|| Grace::new(missing, now.plus(params.timing.grace_ms)));
    let orphans: BTreeSet<u64> = tables.readable_orphans()?.into_iter().collect();
    let reclaimable = if grace.is_none() { orphans.clone() } else { BTreeSet::new() };
    let mut core = Core {
        volume: params.volume,
        term: params.term,
        lun_bytes: block.lun_bytes,
        ro_compat: block.ro_compat,
        incompat: block.incompat,
        device: params.device,
        pushes: params.pushes,
        clock: params.clock.clone(),
        timing: params.timing,
        alloc,
        held_back: held_back(block.lun_bytes),
        pools,
        scarcity: Scarcity::default(),
        globals: tables.globals()?,
        globals_changed: false,
        engine: LockEngine::new(params.timing.locks),
        sessions,
        open_counts: HashMap::new(),
        orphans,
        reclaimable,
        reclaim_at: None,
        tickets: HashMap::new(),
        range_locks: RangeTable::default(),
        lock_since: HashMap::new(),
        lock_waits: BTreeMap::new(),
        parked: BTreeMap::new(),
        ready: VecDeque::new(),
        later: Vec::new(),
        grace,
        next_id: 0,
        answers: 0,
        departed: VecDeque::new(),
        contended: super::lend::Contended::default(),
        out: Outbox::default(),
        now,
        wall: params.clock.wall(),
        owner_checked: now,
        tight: false,
        growable: true,
        chunks: store.chunk_lister(),
        unreadable: BTreeMap::new(),
        given_up: BTreeSet::new(),
        checking: Arc::default(),
        requests: 0,
        commits: 0,
        recalls: 0,
    };
    core.hold_back();
    let changes = tables.into_changes();
    if accounted {
        store.commit(transaction, &changes)?;
    } else {
        store.keep(transaction);
    }
    Ok(core)
}

/// Blocks that files do not get on a LUN of this size.
pub(super) fn held_back(lun_bytes: u64) -> u64 {
    (lun_bytes / BLOCK_BYTES / HELD_BACK_PART).max(HELD_BACK_BLOCKS_MIN)
}

/// A crash may have come between the commit that took chunks and the slot that lists them.
fn finish_growth(tables: &Tables<'_>, store: &Store) -> Result<(), StoreError> {
    let listed: BTreeSet<u64> = store.chunks().iter().map(|c| c.offset / BLOCK_BYTES).collect();
    let owned = tables.chunks()?;
    let missing: Vec<Chunk> = owned
        .iter()
        .filter(|(start, _)| !listed.contains(start))
        .map(|(start, blocks)| chunk(Run { start: *start, blocks: *blocks }))
        .collect();
    if missing.is_empty() { Ok(()) } else { store.add_chunks(&missing) }
}

pub(super) fn chunk(run: Run) -> Chunk {
    Chunk { offset: run.start * BLOCK_BYTES, bytes: run.blocks * BLOCK_BYTES }
}

fn load_sessions(tables: &Tables<'_>) -> Result<BTreeMap<ClientId, Session>, StoreError> {
    let load = |(id, record): (ClientId, crate::meta::ClientRecord)| {
        let stored = tables.reply_ids(id, u64::MAX)?.into_iter().collect();
        Ok((id, Session { name: record.name, stored, ..Session::default() }))
    };
    tables.clients()?.into_iter().map(load).collect()
}

/// Whether the owner block still names us. Another coordinator's term may only be higher.
pub(super) fn still_owner(device: &dyn BlockDevice, core: &Core) -> Result<bool, OpenError> {
    Ok(read_owner(device, core.volume)?.term <= core.term)
}
