//! What all files of a node share: the LUN, the session, the table of files, flushes, and the end of it all.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use blockio::{BlockDevice, IoError, IoOp, IoRequest, Permission, WriteRight};
use lockmgr::{ClientId, Mode, VolumeId};
use pb::request::Op;

use super::advance::Out;
use super::bad::BadRanges;
use super::cache::ReadCache;
use super::grants::Seq;
use super::inode::Inode;
use super::locks::Locks;
use super::log::Log;
use super::pages::KernelCache;
use super::promise::Parted;
use super::rank::{self, Ranked};
use super::refill::Space;
use super::remember::Memory;
use super::session::{Holder, Holdings, Session};
use super::sync::FlushDone;
use super::times::Times;
use super::workers::Workers;
use super::{FileKind, FsError};
use crate::proto as pb;

/// See the module.
pub(super) struct Core {
    pub(super) device: Arc<dyn BlockDevice>,
    /// What the LUN can address, in bytes.
    pub(super) lun_unit: u64,
    pub(super) session: Arc<Session>,
    pub(super) workers: Arc<Workers>,
    pub(super) client: ClientId,
    pub(super) volume: VolumeId,
    pub(super) space: Space,
    pub(super) log: Log,
    /// Rank 1.
    files: Mutex<HashMap<u64, Arc<Inode>>>,
    /// A file left the table.
    retired: Condvar,
    /// Rank 4.
    flusher: Mutex<Flusher>,
    pub(super) locks: Locks,
    pub(super) memory: Memory,
    pub(super) parted: Parted,
    pub(super) times: Times,
    pub(super) bad: BadRanges,
    pub(super) cache: ReadCache,
    /// Who knows whether others may suspect this node: then nothing is told from memory.
    right: OnceLock<Arc<dyn WriteRight>>,
    /// Rank 3.
    kernel: Mutex<Option<Arc<dyn KernelCache>>>,
    /// Changes under way that may concern inodes that are not known.
    pub(super) unknown_changes: AtomicUsize,
    stopped: OnceLock<String>,
    /// Changes of names by this node: each may have changed link counts.
    names: AtomicU64,
    pub(super) recalls: AtomicU64,
    pub(super) flushes: AtomicU64,
}

/// Callers of flush: those of the one under way, and those who came too late for it and share the next.
#[derive(Default)]
struct Flusher {
    running: bool,
    next: Vec<FlushDone>,
}

/// Somebody who uses a file: keeps it in the table.
pub(super) struct Pin {
    pub(super) inode: Arc<Inode>,
}

impl Pin {
    /// The coordinator has counted one more open of it here, as it answered under the attach `attempt`. `false`: another attach was begun
    /// since, which does not claim it, so it does not count.
    #[must_use]
    pub(super) fn opened_as(&self, kind: FileKind, attempt: u64) -> bool {
        let mut state = self.inode.lock();
        let counts = self.inode.core.session.is_attempt(attempt);
        if counts {
            state.registered += 1;
            state.opened_as = Some(kind);
        }
        counts
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut state = self.inode.lock();
        state.users -= 1;
        if state.users == 0 {
            self.inode.core.put_to_rest(&self.inode, state);
        }
    }
}

impl Core {
    pub(super) fn new(
        device: Arc<dyn BlockDevice>,
        session: Arc<Session>,
        workers: Arc<Workers>,
        (client, volume): (ClientId, VolumeId),
    ) -> Arc<Self> {
        let lun_unit = u64::from(device.geometry().block_bytes.max(1));
        Arc::new(Self {
            device,
            lun_unit,
            session,
            workers,
            client,
            volume,
            space: Space::default(),
            log: Log::default(),
            files: Mutex::default(),
            retired: Condvar::new(),
            flusher: Mutex::default(),
            locks: Locks::default(),
            memory: Memory::default(),
            parted: Parted::default(),
            times: Times::default(),
            bad: BadRanges::default(),
            cache: ReadCache::default(),
            right: OnceLock::new(),
            kernel: Mutex::default(),
            unknown_changes: AtomicUsize::new(0),
            stopped: OnceLock::new(),
            names: AtomicU64::new(1),
            recalls: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        })
    }

    pub(super) fn files(&self) -> Ranked<MutexGuard<'_, HashMap<u64, Arc<Inode>>>> {
        Ranked::take(rank::FILES, || self.files.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn flusher(&self) -> Ranked<MutexGuard<'_, Flusher>> {
        Ranked::take(rank::FLUSHER, || self.flusher.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn files_count(&self) -> usize {
        self.files().len()
    }

    /// The place for who keeps pages of files.
    pub(super) fn kernel(&self) -> Ranked<MutexGuard<'_, Option<Arc<dyn KernelCache>>>> {
        Ranked::take(rank::MEMORY, || self.kernel.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The file, if it is in use here.
    pub(super) fn find(&self, ino: u64) -> Option<Pin> {
        let files = self.files();
        let inode = files.get(&ino)?.clone();
        Self::used(&inode);
        Some(Pin { inode })
    }

    /// The file, in use from now on.
    pub(super) fn pin(self: &Arc<Self>, ino: u64) -> Pin {
        let mut files = self.files();
        let inode = files.entry(ino).or_insert_with(|| Inode::new(self.clone(), ino)).clone();
        Self::used(&inode);
        Pin { inode }
    }

    fn used(inode: &Inode) {
        let mut state = inode.lock();
        state.users += 1;
        state.unwanted = false;
    }

    /// Takes a file that nobody uses and of which nothing is held out of the table, and closes it.
    pub(super) fn retire(&self, inode: &Arc<Inode>) {
        let mut files = self.files();
        let mut state = inode.lock();
        let held = state.grant.mode != Mode::Null
            || state.grant.release.is_some()
            || state.grant.acquiring.is_some();
        if held || (state.users > 0 && !state.leaving) || state.in_flight > 0 {
            return;
        }
        let (opens, claimed_in) = (std::mem::take(&mut state.registered), state.claimed_in);
        let closes: Vec<u64> =
            (0..opens).filter_map(|_| self.session.keep_close(inode.ino, claimed_in)).collect();
        let was_there = files.get(&inode.ino).is_some_and(|found| Arc::ptr_eq(found, inode));
        if was_there {
            files.remove(&inode.ino);
            self.memory.raise_floor(inode.ino, state.grant.floor());
        }
        drop((state, files));
        for id in closes {
            self.session.dispatch(id);
        }
        self.retired.notify_all();
    }

    /// A recall for a file, whether it is here or not.
    pub(super) fn recalled(&self, ino: u64, to: Mode, at: Seq) {
        self.recalls.fetch_add(1, Ordering::Relaxed);
        match self.find(ino) {
            Some(pin) => pin.inode.recalled(to, at),
            None => {
                // A grant that came along with an answer may still be on its way: it is taken back by this.
                self.memory.raise_floor(ino, (at, (0, 0)));
                if let Some(id) = self.answer(ino, Mode::Null, at) {
                    self.session.dispatch(id);
                }
            }
        }
    }

    /// Keeps an answer to a recall of something that is not held (any more). None for the recall of a former coordinator:
    /// its successor was told what is held, and an answer without a number would take away what that one has granted since.
    pub(super) fn answer(&self, ino: u64, held: Mode, at: Seq) -> Option<u64> {
        // A recall may overtake the answer to the attach that it follows: it is of the coordinator to come then.
        let (term, recall_seq) = at;
        if term < self.session.term() {
            return None;
        }
        let release =
            pb::ReleaseGrant { ino, to: pb::GrantMode::from(held).into(), recall_seq, commit: None };
        Some(self.session.keep_for(term, Op::ReleaseGrant(release), |_| {}))
    }

    /// The number of a recall, as far as it means something to the coordinator of now.
    pub(super) fn recall_number(&self, (term, number): Seq) -> u64 {
        if term == self.session.term() { number } else { 0 }
    }

    pub(super) fn names_now(&self) -> u64 {
        self.names.load(Ordering::Acquire)
    }

    pub(super) fn names_changed(&self) {
        self.names.fetch_add(1, Ordering::AcqRel);
        let promised: Vec<_> =
            self.files().values().filter(|inode| inode.lock().promise.outdate()).cloned().collect();
        promised.iter().for_each(Inode::kick);
    }

    /// `false` when it is known already.
    pub(super) fn set_right(&self, right: Arc<dyn WriteRight>) -> bool {
        self.right.set(right).is_ok()
    }

    /// Whether something may be told from memory: what this node holds is given to nobody before it can be suspected (B3).
    pub(super) fn may_tell(&self) -> bool {
        self.right.get().is_none_or(|right| right.check() == Permission::Granted)
    }

    /// For how long that stays so at least.
    pub(super) fn tells_for(&self) -> Duration {
        self.right.get().map_or(Duration::MAX, |right| right.lasts())
    }

    /// Why nothing is written any more.
    pub(super) fn stopped(&self) -> Option<FsError> {
        self.stopped.get().map(|cause| FsError::Stopped { cause: cause.clone() })
    }

    /// Stops all writing for good (D6).
    pub(super) fn stop(&self, cause: &str) {
        if self.stopped.set(cause.to_owned()).is_err() {
            return;
        }
        tracing::error!(cause, "this node stops writing to the volume");
        let why = FsError::Stopped { cause: cause.to_owned() };
        self.fail_log(&why);
        self.fail_space(&why);
        for inode in self.all_files() {
            inode.kick();
        }
    }

    /// Size of the LUN in bytes; asked anew when something is said to end beyond it, at `end`.
    pub(super) fn lun_bytes(&self, end: u64) -> u64 {
        let known = self.device.geometry().size_bytes;
        if end <= known { known } else { self.device.size_now() }
    }

    /// All files of the table.
    pub(super) fn all_files(&self) -> Vec<Arc<Inode>> {
        self.files().values().cloned().collect()
    }

    /// Completes `done`, on a worker, when all writes that had completed before are on stable media. Callers share.
    pub(super) fn flush(self: &Arc<Self>, done: FlushDone) {
        let mut flusher = self.flusher();
        flusher.next.push(done);
        if std::mem::replace(&mut flusher.running, true) {
            return;
        }
        let sharing = std::mem::take(&mut flusher.next);
        drop(flusher);
        self.start_flush(sharing);
    }

    fn start_flush(self: &Arc<Self>, sharing: Vec<FlushDone>) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        let core = self.clone();
        let done = Box::new(move |result: Result<(), IoError>| {
            if blockio::inside() {
                return core.flushed(sharing, result);
            }
            let workers = core.workers.clone();
            workers.run(move || core.flushed(sharing, result));
        });
        self.device.submit(IoRequest { op: IoOp::Flush, done });
    }

    fn flushed(self: &Arc<Self>, sharing: Vec<FlushDone>, result: Result<(), IoError>) {
        let result = result.map_err(|error| {
            self.stop(&format!("a flush of the LUN failed: {error}"));
            self.stopped().unwrap_or(FsError::Io(error))
        });
        let mut flusher = self.flusher();
        let next = std::mem::take(&mut flusher.next);
        flusher.running = !next.is_empty();
        drop(flusher);
        if !next.is_empty() {
            self.start_flush(next);
        }
        for done in sharing {
            done(result.clone());
        }
    }

    /// Gives back what all files hold; waits at most `patience` for it. Says whether all is given back.
    pub(super) fn give_back(&self, patience: Duration) -> bool {
        self.forget_all();
        for inode in self.all_files() {
            inode.lock().leaving = true;
            inode.kick();
        }
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = self.retired.wait_timeout_while(files, patience, |files| !files.is_empty());
        waiting.unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }

    /// Ends everything at once. Nothing is written any more, and nobody waits any longer.
    pub(super) fn end(&self, why: &FsError) {
        self.session.close(why);
        self.fail_log(why);
        self.fail_space(why);
        let files: Vec<_> = self.files().drain().map(|(_, inode)| inode).collect();
        for inode in files {
            let mut out = Out::default();
            let mut state = inode.lock();
            state.leaving = true;
            state.fail_all(why, &mut out);
            drop(state);
            out.carry_out(&inode);
        }
        self.workers.close();
    }
}

impl Holder for Core {
    fn holdings(&self, attempt: u64) -> Holdings {
        let mut holdings = Holdings { locks: self.locks.claims(), ..Holdings::default() };
        for inode in self.all_files() {
            let (claim, open, merely_remembered) = inode.holding(attempt);
            match claim {
                Some(claim) if merely_remembered => holdings.readers.push(claim.ino),
                claim => holdings.claims.extend(claim),
            }
            holdings.opens.extend(open);
        }
        holdings
    }

    fn refused(&self, why: &FsError) {
        self.stop(&format!("the coordinator does not accept this client any more: {why}"));
    }
}
