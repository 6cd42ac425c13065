//! The intent log of this client: what an fsync needs to find again, written to the LUN by the client itself.
//!
//! ```text
//!   fsync: flush of the data -> append --+-> [ records, one write at a time, forced ] -> acknowledged
//!          other files' appends ---------+                    |
//!                                                             '--> Merge to the coordinator, later: room in the ring again
//! ```
//! Appends that come while a write is under way share the next one. Records are merged when half of the ring is used, when
//! somebody needs it (a grant goes back, a file is cut), and soon after anyhow.
//!
//! **Invariant:** a record is begun only when all before it are stable, so a replay stops at nothing that was
//! acknowledged; and its place in the ring is used again only after the coordinator has merged it (D1).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockio::{AlignedBuf, BlockDevice, IoBuf, IoError, IoOp, IoRequest};
use lockmgr::Term;
use pb::request::Op;

use super::FsError;
use super::core::Core;
use super::map::BLOCK_BYTES;
use super::rank::{self, Ranked};
use super::session::Answered;
use super::sync::FlushDone;
use crate::format::log_record::{ENTRIES_MAX, Entry, LANE_RECORDS, LogId, LogRecord, record_offset};
use crate::proto as pb;

/// Records of one append: half a ring.
const APPEND_RECORDS_MAX: usize = 7;
const _: () = assert!(2 * APPEND_RECORDS_MAX as u64 <= LANE_RECORDS);
/// Entries of one append: what fits its records, whatever these begin with.
pub(super) const APPEND_ENTRIES_MAX: usize = APPEND_RECORDS_MAX * (ENTRIES_MAX - 1) - 4;
/// With as many records that are not merged, it is time to.
const MERGE_RECORDS: u64 = LANE_RECORDS.div_ceil(2);
/// How long a record waits for others to be merged with it.
const MERGE_AFTER: Duration = Duration::from_millis(250);

/// Called with the number of the record that holds what was appended.
pub(super) type Appended = Box<dyn FnOnce(Result<u64, FsError>) + Send>;

/// See the module.
#[derive(Default)]
pub(super) struct Log {
    /// Rank 6.
    state: Mutex<State>,
    /// Number of the last record that the coordinator has.
    merged: AtomicU64,
    open: AtomicBool,
    writes: AtomicU64,
}

#[derive(Default)]
struct State {
    id: Option<LogId>,
    /// Number of the last record that was begun.
    last: u64,
    /// Number of the last record that is stable.
    stable: u64,
    writing: bool,
    queue: VecDeque<Append>,
    /// What the stable records say and the coordinator has not been told.
    untold: Vec<pb::Commit>,
    merging: bool,
    timer: bool,
    /// Who waits for a record to be merged.
    waiters: Vec<(u64, FlushDone)>,
}

struct Append {
    commit: pb::Commit,
    entries: Vec<Entry>,
    done: Appended,
}

/// Records on their way to the LUN.
struct Batch {
    appends: Vec<Append>,
    last: u64,
}

impl Log {
    fn lock(&self) -> Ranked<MutexGuard<'_, State>> {
        Ranked::take(rank::LOG, || self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this client has a log.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// Whether the coordinator has all up to record `lsn`.
    pub(super) fn is_merged(&self, lsn: u64) -> bool {
        self.merged.load(Ordering::Acquire) >= lsn
    }

    /// Writes of records so far.
    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// The coordinator has given this client a log; once.
    pub(super) fn open(&self, id: LogId) {
        self.lock().id.get_or_insert(id);
        self.open.store(true, Ordering::Release);
    }
}

impl Core {
    /// Writes what `commit` says to the log; it is stable when `done` is called, on a worker, or here where this thread waits.
    pub(super) fn append_log(self: &Arc<Self>, commit: pb::Commit, done: Appended) {
        if let Some(why) = self.stopped() {
            return done(Err(why));
        }
        let entries = entries_of(&commit);
        self.log.lock().queue.push_back(Append { commit, entries, done });
        self.write_log();
    }

    /// Starts to write what waits, as far as the ring has room.
    fn write_log(self: &Arc<Self>) {
        let mut state = self.log.lock();
        let Some(id) = state.id else { return };
        if state.writing || state.queue.is_empty() {
            return;
        }
        let room = LANE_RECORDS - (state.last - self.log.merged.load(Ordering::Acquire));
        let appends = state.take_fitting(room);
        if appends.is_empty() {
            drop(state);
            return self.merge_log();
        }
        let first = state.last + 1;
        let packed = pack(&appends);
        state.last += packed.len() as u64;
        state.writing = true;
        let last = state.last;
        drop(state);
        let (term, epoch) = (Term(self.session.term()), self.client.epoch.0);
        let records = packed.into_iter().zip(first..);
        let records = records.map(|(entries, lsn)| LogRecord { lsn, term, epoch, entries });
        self.submit_records(id, records, Batch { appends, last });
    }

    /// One write for each stretch of the ring: one, or two where it begins again.
    fn submit_records(self: &Arc<Self>, id: LogId, records: impl Iterator<Item = LogRecord>, batch: Batch) {
        let mut stretches: Vec<(u64, Vec<u8>)> = Vec::new();
        for record in records {
            let (at, bytes) = (record_offset(id.lane, record.lsn), record.encode(&id));
            match stretches.last_mut() {
                Some((start, before)) if *start + before.len() as u64 == at => before.extend(bytes),
                _ => stretches.push((at, bytes)),
            }
        }
        self.log.writes.fetch_add(1, Ordering::Relaxed);
        let joint = Arc::new(Joint {
            core: self.clone(),
            left: AtomicUsize::new(stretches.len()),
            outcome: Mutex::new((Ok(()), Some(batch))),
        });
        // Whoever waits for the flush before it waits for this too.
        let _here = blockio::inside().then(blockio::here);
        for (offset, bytes) in stretches {
            let joint = joint.clone();
            let buf = IoBuf::from(AlignedBuf::copy_of(&bytes));
            let done = Box::new(move |outcome| joint.ended(outcome));
            self.device.submit(IoRequest { op: IoOp::Write { offset, buf, fua: true }, done });
        }
    }

    fn log_written(self: &Arc<Self>, batch: Batch, outcome: Result<(), IoError>) {
        if let Err(error) = outcome {
            self.stop(&format!("a write of the intent log failed: {error}"));
            let why = self.stopped().unwrap_or(FsError::Io(error));
            return batch.appends.into_iter().for_each(|append| (append.done)(Err(why.clone())));
        }
        let mut dones = Vec::with_capacity(batch.appends.len());
        let mut state = self.log.lock();
        state.writing = false;
        state.stable = batch.last;
        for append in batch.appends {
            state.untold.push(append.commit);
            dones.push(append.done);
        }
        let full = state.stable - self.log.merged.load(Ordering::Acquire) >= MERGE_RECORDS;
        let arm = !full && !std::mem::replace(&mut state.timer, true);
        drop(state);
        for done in dones {
            done(Ok(batch.last));
        }
        self.write_log();
        if full {
            self.merge_log();
        } else if arm {
            let core = Arc::downgrade(self);
            self.workers.after(MERGE_AFTER, move || {
                if let Some(core) = core.upgrade() {
                    core.merge_in_time();
                }
            });
        }
    }

    fn merge_in_time(self: &Arc<Self>) {
        self.log.lock().timer = false;
        self.merge_log();
    }

    /// Completes `done` when the coordinator has all up to record `lsn`.
    pub(super) fn when_merged(self: &Arc<Self>, lsn: u64, done: FlushDone) {
        if let Some(why) = self.stopped() {
            return done(Err(why));
        }
        let mut state = self.log.lock();
        if self.log.is_merged(lsn) {
            drop(state);
            return done(Ok(()));
        }
        state.waiters.push((lsn, done));
        drop(state);
        self.merge_log();
    }

    /// Tells the coordinator what the stable records say, unless that is under way.
    fn merge_log(self: &Arc<Self>) {
        let mut state = self.log.lock();
        if state.merging || state.untold.is_empty() {
            return;
        }
        state.merging = true;
        let lsn = state.stable;
        let commits = std::mem::take(&mut state.untold);
        drop(state);
        let core = self.clone();
        self.session.call(Op::Merge(pb::Merge { lsn, commits }), move |outcome| {
            let workers = core.workers.clone();
            workers.run(move || core.log_merged(lsn, outcome));
        });
    }

    fn log_merged(self: &Arc<Self>, lsn: u64, outcome: Result<Answered, FsError>) {
        if let Err(why) = outcome {
            if !matches!(why, FsError::Detached) {
                self.stop(&format!("the coordinator refused what the intent log says: {why}"));
            }
            return self.fail_log(&why);
        }
        let mut state = self.log.lock();
        self.log.merged.store(lsn, Ordering::Release);
        state.merging = false;
        let (ready, rest) = std::mem::take(&mut state.waiters).into_iter().partition(|(at, _)| *at <= lsn);
        state.waiters = rest;
        let ready: Vec<(u64, FlushDone)> = ready;
        let again = !state.waiters.is_empty() || state.stable - lsn >= MERGE_RECORDS;
        drop(state);
        for (_, done) in ready {
            done(Ok(()));
        }
        self.write_log();
        if again {
            self.merge_log();
        }
    }

    /// Nothing is logged or merged any more.
    pub(super) fn fail_log(&self, why: &FsError) {
        let mut state = self.log.lock();
        let (queue, waiters) = (std::mem::take(&mut state.queue), std::mem::take(&mut state.waiters));
        drop(state);
        queue.into_iter().for_each(|append| (append.done)(Err(why.clone())));
        waiters.into_iter().for_each(|(_, done)| done(Err(why.clone())));
    }
}

impl State {
    /// Takes out the first appends, as many as `room` records hold.
    fn take_fitting(&mut self, room: u64) -> Vec<Append> {
        let (mut taken, mut entries) = (Vec::new(), 0);
        while let Some(next) = self.queue.front() {
            entries += next.entries.len();
            // Each record may have to say again which file it is about.
            if entries.div_ceil(ENTRIES_MAX - 1) as u64 > room {
                break;
            }
            taken.extend(self.queue.pop_front());
        }
        taken
    }
}

/// Writes of one batch, one end.
struct Joint {
    core: Arc<Core>,
    left: AtomicUsize,
    /// Rank: leaf.
    outcome: Mutex<(Result<(), IoError>, Option<Batch>)>,
}

impl Joint {
    fn ended(&self, outcome: Result<(), IoError>) {
        let mut joint = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if joint.0.is_ok() {
            joint.0 = outcome;
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let (outcome, batch) = (joint.0.clone(), joint.1.take());
        drop(joint);
        let (core, Some(batch)) = (self.core.clone(), batch) else { return };
        if blockio::inside() {
            return core.log_written(batch, outcome);
        }
        let workers = core.workers.clone();
        workers.run(move || core.log_written(batch, outcome));
    }
}

/// What a commit says, as entries of a record.
fn entries_of(commit: &pb::Commit) -> Vec<Entry> {
    let mut entries = Vec::with_capacity(3 + commit.placed.len() + commit.written.len());
    entries.push(Entry::File { ino: commit.ino });
    entries.extend(commit.placed.iter().map(|extent| Entry::Placed {
        file: extent.file_offset / BLOCK_BYTES,
        blocks: extent.length / BLOCK_BYTES,
        lun: extent.lun_offset / BLOCK_BYTES,
    }));
    entries.extend(commit.written.iter().map(|range| Entry::Written {
        file: range.offset / BLOCK_BYTES,
        blocks: range.length / BLOCK_BYTES,
    }));
    // The size comes last: a record that is lost with the tail of its append then shows less of the file, not holes in it.
    entries.extend(commit.mtime.map(|time| Entry::Time { seconds: time.seconds, nanos: time.nanos }));
    entries.extend(commit.size_bytes.map(|bytes| Entry::Size { bytes }));
    entries
}

/// Entries cut into records, each of which says first which file it is about.
fn pack(appends: &[Append]) -> Vec<Vec<Entry>> {
    let mut records: Vec<Vec<Entry>> = vec![Vec::new()];
    for append in appends {
        let file = append.entries.first().copied();
        for entry in &append.entries {
            let full = records.last().is_none_or(|record| record.len() == ENTRIES_MAX);
            if full {
                records.push(file.filter(|file| file != entry).into_iter().collect());
            }
            records.last_mut().expect("there is one").push(*entry);
        }
    }
    records
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(ino: u64, placed: u64) -> Append {
        let extent = |n: u64| pb::Extent {
            file_offset: n * 2 * BLOCK_BYTES,
            length: BLOCK_BYTES,
            lun_offset: (ino * 10_000 + n) * BLOCK_BYTES,
            state: pb::ExtentState::Data.into(),
        };
        let commit = pb::Commit {
            ino,
            placed: (0..placed).map(extent).collect(),
            size_bytes: Some(7),
            ..pb::Commit::default()
        };
        Append { entries: entries_of(&commit), commit, done: Box::new(|_| {}) }
    }

    #[test]
    fn every_record_begins_with_its_file_and_none_is_too_long() {
        for placed in [0, 1, 120, 121, 122, 123, 124, 247, 500] {
            let appends = [append(5, placed), append(6, 3)];
            let records = pack(&appends);
            assert!(records.iter().all(|record| record.len() <= ENTRIES_MAX));
            assert!(records.iter().all(|record| matches!(record.first(), Some(Entry::File { .. }))));
            let placed_of = |e: &&Entry| matches!(e, Entry::Placed { .. });
            assert_eq!(records.iter().flatten().filter(placed_of).count() as u64, placed + 3);
            let most = appends.iter().map(|a| a.entries.len()).sum::<usize>().div_ceil(ENTRIES_MAX - 1);
            assert!(records.len() <= most.max(1));
        }
    }

    #[test]
    fn the_largest_append_fits_half_a_ring() {
        let mut state = State::default();
        state.queue.push_back(append(1, APPEND_ENTRIES_MAX as u64));
        assert_eq!(state.take_fitting(LANE_RECORDS / 2).len(), 1);
        state.queue.push_back(append(1, 200));
        assert!(state.take_fitting(1).is_empty(), "no room, nothing is taken");
        assert_eq!(state.take_fitting(2).len(), 1);
    }
}
