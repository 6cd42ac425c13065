//! A recorder of everything that changes a device, and the images that a crash at any moment could leave.
//!
//! ```text
//!   log:   W0  W1  F{W0}  W2  ...          replay_prefix(4, None)  = base + W0
//!                                          replay_prefix(4, All)   = base + W0 + W1 + W2
//! ```
//!
//! A write enters the log when it is submitted, because a crash may catch any part of it from then on. A flush enters
//! when it completes, with the writes that had completed before it was submitted: those, and only those, it made safe.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::crash::{Change, SECTOR_BYTES, Survivors, Unflushed};
use crate::cuts::Cuts;
use crate::{BlockDevice, Geometry, ImageFile, IoError, IoOp, IoRequest, MemoryDevice};

/// One entry of a [`Recorder`]'s log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// Something changed, or was about to.
    Change(Change),
    /// The changes with these positions in the log became stable.
    Flush {
        /// Positions in the log.
        covers: Vec<usize>,
    },
}

/// A clock that several recorders share, so that one power cut hits all of their devices at the same moment.
///
/// It ticks with every record. A record that was caused by another, of whatever device, bears a later moment.
#[derive(Clone, Debug, Default)]
pub struct Timeline(Arc<AtomicU64>);

impl Timeline {
    /// The moment of the newest record.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }

    fn tick(&self) -> u64 {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }
}

/// Passes every request on and records it.
pub struct Recorder<D> {
    inner: D,
    base: MemoryDevice,
    log: Arc<Mutex<Log>>,
}

#[derive(Default)]
struct Log {
    records: Vec<Record>,
    /// When each was made.
    moments: Vec<u64>,
    timeline: Timeline,
    /// Positions of changes that have completed and that no flush has covered.
    unflushed: BTreeSet<usize>,
}

impl<D: BlockDevice> Recorder<D> {
    /// Records a device that holds only zeros now.
    #[must_use]
    pub fn new(inner: D) -> Self {
        let Geometry { size_bytes, block_bytes, .. } = inner.geometry();
        Self::with_base(inner, MemoryDevice::with_block_bytes(size_bytes, block_bytes))
    }

    /// Records a device that holds now what `base` holds.
    #[must_use]
    pub fn with_base(inner: D, base: MemoryDevice) -> Self {
        Self { inner, base, log: Arc::default() }
    }

    /// The same by the clock `timeline`. Nothing may be recorded yet.
    #[must_use]
    pub fn on(self, timeline: &Timeline) -> Self {
        lock(&self.log).timeline = timeline.clone();
        self
    }

    /// The moments of all records, in order.
    #[must_use]
    pub fn moments(&self) -> Vec<u64> {
        lock(&self.log).moments.clone()
    }

    /// The recorded device.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.inner
    }

    /// Length of the log now: what is acknowledged before this call lies in the prefix of that length.
    #[must_use]
    pub fn position(&self) -> usize {
        lock(&self.log).records.len()
    }

    /// A copy of the log.
    #[must_use]
    pub fn log(&self) -> Vec<Record> {
        lock(&self.log).records.clone()
    }

    /// Every moment at which the power could be cut, in order.
    #[must_use]
    pub fn cuts(&self) -> Cuts {
        Cuts::new(self.base.fork(), self.log())
    }

    /// The image after a power cut when the log was `prefix` entries long.
    #[must_use]
    pub fn replay_prefix(&self, prefix: usize, choice: Unflushed) -> MemoryDevice {
        let log = lock(&self.log);
        let records = &log.records[..prefix.min(log.records.len())];
        let flushes = records.iter().filter_map(|record| match record {
            Record::Flush { covers } => Some(covers),
            Record::Change(_) => None,
        });
        let safe: BTreeSet<usize> = flushes.flatten().copied().collect();
        let image = self.base.fork();
        let mut survivors = Survivors::new(choice, SECTOR_BYTES);
        for (at, record) in records.iter().enumerate() {
            let Record::Change(change) = record else { continue };
            let left = if safe.contains(&at) { vec![change.clone()] } else { survivors.of(change) };
            left.iter().for_each(|change| image.apply(change));
        }
        image
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    fn push(&mut self, record: Record) {
        // Under the lock of this log, so that moments ascend with positions.
        self.moments.push(self.timeline.tick());
        self.records.push(record);
    }

    fn begin(&mut self, change: Change) -> usize {
        self.push(Record::Change(change));
        self.records.len() - 1
    }

    fn flushed(&mut self, covers: BTreeSet<usize>) {
        self.unflushed.retain(|at| !covers.contains(at));
        self.push(Record::Flush { covers: covers.into_iter().collect() });
    }
}

/// What a request will change; `None` for reads and flushes.
fn change_of(op: &IoOp) -> Option<Change> {
    match op {
        IoOp::Write { offset, buf, .. } => {
            Some(Change::Write { offset: *offset, bytes: buf.to_vec().into() })
        }
        IoOp::WriteZeroes { offset, len, .. } => Some(Change::Zero { offset: *offset, len: *len }),
        IoOp::Discard { offset, len } => Some(Change::Discard { offset: *offset, len: *len }),
        IoOp::Read { .. } | IoOp::Flush => None,
    }
}

impl<D: BlockDevice> BlockDevice for Recorder<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let IoRequest { op, done } = request;
        let log = Arc::clone(&self.log);
        let done: crate::Completion = match change_of(&op) {
            Some(change) => {
                let at = lock(&log).begin(change);
                let forced = matches!(op, IoOp::Write { fua: true, .. });
                Box::new(move |outcome| {
                    match outcome {
                        Ok(()) if forced => lock(&log).flushed(BTreeSet::from([at])),
                        Ok(()) => drop(lock(&log).unflushed.insert(at)),
                        Err(_) => {}
                    }
                    done(outcome);
                })
            }
            None if matches!(op, IoOp::Flush) => {
                let covers = lock(&log).unflushed.clone();
                Box::new(move |outcome| {
                    if outcome.is_ok() {
                        lock(&log).flushed(covers);
                    }
                    done(outcome);
                })
            }
            None => done,
        };
        self.inner.submit(IoRequest { op, done });
    }
}

impl<D: ImageFile> ImageFile for Recorder<D> {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        let at = lock(&self.log).begin(Change::SetLen { size_bytes });
        self.inner.set_len(size_bytes)?;
        lock(&self.log).unflushed.insert(at);
        Ok(())
    }

    fn identity(&self) -> String {
        self.inner.identity()
    }

    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        self.inner.data_from(from)
    }
}

impl<D> fmt::Debug for Recorder<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder").field("records", &lock(&self.log).records.len()).finish_non_exhaustive()
    }
}
