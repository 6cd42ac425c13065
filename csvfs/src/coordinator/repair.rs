//! Repair of the volume while it is used, and intent logs that are given up.
//!
//! ```text
//!   Repair: grants on the inodes in question lowered -> alone in its transaction -> tables repaired -> memory loaded anew
//! ```
//! **Invariant:** a repair shares its transaction with nothing, so that what is kept in memory of the tables is what they
//! had before it, and is read from them after it.

use std::collections::BTreeSet;

use lockmgr::{ClientId, Millis, NodeId, ResourceId};

use super::admit::is_at_once;
use super::core::{Core, Errand, Parked};
use super::pools::Pools;
use super::quiesce::Need;
use crate::alloc::Allocator;
use crate::check::repair;
use crate::format::layout::{BLOCK_BYTES, FIRST_CHUNK_OFFSET};
use crate::meta::{StoreError, Tables};
use crate::proto::{Done, GiveUpLog, RepairReport, reply};
use crate::refusal::{OpError, errno};

/// Between two attempts to read a log that could not be read. Whoever says again and again that its client has ended, which each
/// failed read may be a reason for, does not keep the coordinator at it.
const LOG_AGAIN_AFTER_MS: u64 = 2_000;

/// A log that cannot be read.
pub(super) struct Unreadable {
    pub(super) why: String,
    /// When it was tried last.
    tried: Millis,
}

impl Core {
    /// Whether a client's log was found unreadable a moment ago.
    pub(super) fn rests(&self, client: ClientId) -> bool {
        let rests = |unreadable: &Unreadable| self.now < unreadable.tried.plus(LOG_AGAIN_AFTER_MS);
        self.unreadable.get(&client).is_some_and(rests)
    }

    pub(super) fn repair(&mut self, tables: &mut Tables<'_>) -> Result<reply::Result, OpError> {
        if tables.changed() || self.alloc.pending() > 0 {
            return Err(OpError::Later);
        }
        let is_quiet = |ino: u64| {
            // Those who only wait here hold it for nobody.
            self.engine.holders(ResourceId(ino)).iter().all(|holder| holder.client.node == NodeId(0))
        };
        let params = repair::Params {
            area: FIRST_CHUNK_OFFSET / BLOCK_BYTES..self.lun_bytes / BLOCK_BYTES,
            chunks: (self.chunks)(),
            now: self.wall,
            is_quiet: &is_quiet,
        };
        let actions = repair::run(tables, params)?;
        for action in &actions {
            tracing::warn!(volume = %self.volume, ino = action.ino, done = action.done, "repair: {}", action.what);
        }
        if !tables.shared_runs(&(0..u64::MAX - 1), 1)?.is_empty() {
            self.announce_clones()?;
        }
        self.load_again(tables)?;
        Ok(reply::Result::RepairReport(RepairReport { actions }))
    }

    /// Reads what is kept in memory of the tables.
    fn load_again(&mut self, tables: &Tables<'_>) -> Result<(), StoreError> {
        let twice = |error: crate::alloc::FreeTwice| StoreError::Damaged { what: error.to_string() };
        self.alloc = Allocator::new(tables.free()?).map_err(twice)?;
        let pools = Pools::load(tables)?;
        self.pools.replace(pools);
        self.hold_back();
        self.globals = tables.globals()?;
        self.globals_changed = false;
        self.orphans = tables.orphans()?.into_iter().collect();
        let unused = self.orphans.iter().copied().filter(|ino| self.open_count(*ino) == 0);
        self.reclaimable = if self.grace.is_none() { unused.collect() } else { BTreeSet::new() };
        Ok(())
    }

    /// The log of a client that has ended cannot be read: the client keeps what it held, and nobody gets it (D4).
    pub(super) fn log_unreadable(&mut self, client: ClientId, error: &StoreError) {
        let unreadable = Unreadable { why: error.to_string(), tried: self.now };
        if self.unreadable.insert(client, unreadable).is_none() {
            tracing::error!(
                %client, %error,
                "the intent log of a client that has ended cannot be read: what it held stays locked until the LUN can \
                 be read there again, or the log is given up (csvctl volume give-up-log)"
            );
        }
    }

    /// The refusal of what waits for a client that has ended and keeps what it held, when one is in the way.
    pub(super) fn lock_of_the_ended(&self, needs: &[Need]) -> Option<OpError> {
        let holders = needs.iter().flat_map(|(ino, _)| self.engine.holders(ResourceId(*ino)));
        let ended = holders.map(|holder| holder.client).find(|client| self.unreadable.contains_key(client));
        ended.map(|client| self.locked_by(client))
    }

    pub(super) fn locked_by(&self, client: ClientId) -> OpError {
        let why = self.unreadable.get(&client).map_or("", |unreadable| unreadable.why.as_str());
        errno(
            libc::EBUSY,
            format!(
                "client {client} held it when it ended, and its intent log cannot be read ({why}): it stays locked until the \
                 LUN can be read there again, or the log is given up (csvctl volume give-up-log --client {client})"
            ),
        )
    }

    /// What is not to wait for a client that has ended is looked at again.
    pub(super) fn refuse_what_is_locked(&mut self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        let waits = |parked: &Parked| matches!(&parked.what, Errand::Work(work) if is_at_once(work));
        let ids: Vec<u64> =
            self.parked.iter().filter(|(_, parked)| waits(parked)).map(|(id, _)| *id).collect();
        for id in ids {
            if let Some(Errand::Work(work)) = self.unpark_what(id) {
                self.release(id);
                self.proceed(tables, work)?;
            }
        }
        Ok(())
    }

    /// Ends a client without what its log may say.
    pub(super) fn give_up_log(
        &mut self,
        tables: &mut Tables<'_>,
        op: &GiveUpLog,
    ) -> Result<reply::Result, OpError> {
        let client = op.client.as_ref().and_then(crate::pb::ClientId::checked);
        let client = client.filter(|client| self.unreadable.contains_key(client)).ok_or_else(|| {
            errno(libc::ENOENT, "no client of that name has ended with a log that cannot be read")
        })?;
        let why = self.unreadable.remove(&client).map(|unreadable| unreadable.why).unwrap_or_default();
        tracing::error!(%client, why, "an intent log is given up: what its client had flushed last may be lost");
        self.given_up.insert(client);
        self.pools.doubt_lane(client);
        self.client_gone(tables, client)?;
        Ok(reply::Result::Done(Done {}))
    }
}
