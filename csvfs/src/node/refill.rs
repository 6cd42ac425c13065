//! Keeping the pool filled, and giving it back when space is short.
//!
//! ```text
//!   files --take_space--> pool --low--> TakePool, ahead of need --> pool
//!                          |--empty--> TakePool, files wait -----'
//!   PoolRecall: what no file uses --> ReturnPool
//! ```
//! **Invariant:** one TakePool is under way at most, and whoever waits for space hears its outcome.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pb::request::Op;

use super::FsError;
use super::core::Core;
use super::map::BLOCK_BYTES;
use super::names::unexpected;
use super::pool::{LunRun, Pool};
use super::rank::{self, Ranked};
use super::session::Answered;
use super::space::last_byte;
use super::sync::FlushDone;
use crate::format::log_record::{LANES, LogId};
use crate::proto as pb;

/// The pool, and who waits for it.
#[derive(Default)]
pub(super) struct Space {
    /// Rank 3: taken under a file's lock.
    inner: Mutex<Inner>,
    /// More should be asked for.
    low: AtomicBool,
    /// The coordinator gives this client no pool: it allocates for it, as it does for all that have no log.
    none: AtomicBool,
}

#[derive(Default)]
struct Inner {
    pool: Pool,
    /// Bytes that are waited for.
    waiters: Vec<(u64, FlushDone)>,
}

impl Space {
    fn lock(&self) -> Ranked<MutexGuard<'_, Inner>> {
        Ranked::take(rank::POOL, || self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this client may have a pool.
    pub(super) fn may_come(&self) -> bool {
        !self.none.load(Ordering::Relaxed)
    }

    /// Bytes in the pool.
    pub(super) fn bytes(&self) -> u64 {
        self.lock().pool.bytes()
    }

    /// As [`Pool::take`].
    pub(super) fn take(&self, goal: Option<u64>, need: u64, want: u64) -> Option<Vec<LunRun>> {
        let mut inner = self.lock();
        let taken = inner.pool.take(goal, need, want);
        if inner.pool.is_low() {
            self.low.store(true, Ordering::Relaxed);
        }
        taken
    }

    /// Blocks that were taken and that no file uses.
    pub(super) fn put(&self, runs: impl IntoIterator<Item = LunRun>) {
        self.lock().pool.put(runs);
    }

    fn fail(&self, why: &FsError) {
        let waiters = std::mem::take(&mut self.lock().waiters);
        waiters.into_iter().for_each(|(_, done)| done(Err(why.clone())));
    }
}

impl Core {
    /// Asks for more when the pool has run low. Called after each request, with no lock held.
    pub(super) fn refill_ahead(self: &Arc<Self>) {
        if self.space.low.load(Ordering::Relaxed) && self.space.low.swap(false, Ordering::Relaxed) {
            self.ask_for_space();
        }
    }

    /// Completes `done` when the pool was refilled for somebody who needs `need` bytes.
    pub(super) fn want_space(self: &Arc<Self>, need: u64, done: FlushDone) {
        if let Some(why) = self.stopped() {
            return done(Err(why));
        }
        self.space.lock().waiters.push((need, done));
        self.ask_for_space();
    }

    fn ask_for_space(self: &Arc<Self>) {
        let mut inner = self.space.lock();
        let need: u64 = inner.waiters.iter().map(|(need, _)| *need).max().unwrap_or(0);
        let Some((need, want)) = inner.pool.ask(need) else { return };
        drop(inner);
        let core = self.clone();
        self.session.call(Op::TakePool(pb::TakePool { need, want }), move |outcome| {
            let workers = core.workers.clone();
            workers.run(move || core.space_came(outcome));
        });
    }

    fn space_came(self: &Arc<Self>, outcome: Result<Answered, FsError>) {
        let came = outcome.and_then(|answered| self.checked_pool(answered));
        let mut inner = self.space.lock();
        let outcome = match came {
            Ok((id, runs)) => {
                inner.pool.came(runs);
                self.log.open(id);
                Ok(())
            }
            Err(why) => {
                inner.pool.refused();
                Err(why)
            }
        };
        let waiters = std::mem::take(&mut inner.waiters);
        drop(inner);
        if outcome.as_ref().is_err_and(|why| why.errno() == libc::EOPNOTSUPP) {
            self.space.none.store(true, Ordering::Relaxed);
        }
        for (_, done) in waiters {
            done(outcome.clone());
        }
    }

    /// What the coordinator gave, checked to be whole blocks on the LUN (C10).
    fn checked_pool(&self, answered: Answered) -> Result<(LogId, Vec<LunRun>), FsError> {
        let pool = match answered.result {
            pb::reply::Result::Pool(pool) => pool,
            other => return Err(unexpected("TakePool", &other)),
        };
        let lun_bytes = self.lun_bytes(last_byte(&pool.runs));
        let good = |run: &pb::Extent| {
            let whole = run.lun_offset.is_multiple_of(BLOCK_BYTES) && run.length.is_multiple_of(BLOCK_BYTES);
            let end = run.lun_offset.checked_add(run.length);
            whole && run.length > 0 && end.is_some_and(|end| end <= lun_bytes)
        };
        let lane = u16::try_from(pool.lane).ok().filter(|lane| *lane < LANES);
        let (Some(lane), true) = (lane, pool.runs.iter().all(good)) else {
            return Err(FsError::Protocol(format!("a pool that cannot be, in lane {}", pool.lane)));
        };
        let id = LogId { volume: self.volume, lane, log: pool.log };
        Ok((id, pool.runs.iter().map(|run| (run.lun_offset, run.length)).collect()))
    }

    /// The coordinator needs space: gives back what no file uses, also what files have ahead.
    pub(super) fn pool_recalled(self: &Arc<Self>) {
        for inode in self.all_files() {
            inode.lock().give_up_ahead(self);
        }
        let runs = self.space.lock().pool.empty();
        let extent =
            |(lun_offset, length): (u64, u64)| pb::Extent { lun_offset, length, ..pb::Extent::default() };
        let runs = runs.into_iter().map(extent).collect();
        self.session.call(Op::ReturnPool(pb::ReturnPool { runs, recalled: true }), |outcome| {
            if let Err(error) = outcome {
                tracing::warn!(%error, "blocks of the pool could not be given back");
            }
        });
    }

    /// Nobody gets space any more.
    pub(super) fn fail_space(&self, why: &FsError) {
        self.space.fail(why);
    }
}
