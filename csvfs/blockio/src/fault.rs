//! A device that fails, holds and forgets on demand.
//!
//! ```text
//!   submit -> [hold] -> [fail the n-th] -> volatile log --flush--> inner device
//!                                              |
//!                                           crash(choice): what survives goes to the inner device, the rest is gone
//! ```
//!
//! **Invariant:** nothing unflushed is on the inner device before `crash` has decided about it.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::crash::{Change, Survivors, Unflushed};
use crate::poison::Poison;
use crate::queue::Workers;
use crate::{BlockDevice, Geometry, ImageFile, IoBuf, IoError, IoOp, IoRequest};

/// Kinds of requests that a fault can aim at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Reads.
    Read,
    /// Writes, discards and zeroing.
    Write,
    /// Flushes.
    Flush,
}

impl OpKind {
    fn of(op: &IoOp) -> Self {
        match op {
            IoOp::Read { .. } => Self::Read,
            IoOp::Flush => Self::Flush,
            IoOp::Write { .. } | IoOp::Discard { .. } | IoOp::WriteZeroes { .. } => Self::Write,
        }
    }
}

/// A faulty device over `D`. Requests are served one after the other, in the order of their submission.
pub struct FaultDevice<D: BlockDevice + 'static> {
    faulty: Arc<Faulty<D>>,
    serving: Workers<IoRequest>,
}

struct Faulty<D> {
    inner: D,
    poison: Poison,
    /// Lock rank: above the inner device's locks. Protects everything below; requests are served under it.
    state: Mutex<State<D>>,
    held_more: Condvar,
}

struct State<D> {
    faults: Vec<Fault>,
    /// Bytes that cannot be read or written.
    broken: Vec<Range<u64>>,
    unflushed: Vec<Change>,
    hold: Option<OpKind>,
    hold_all: bool,
    held: Vec<IoRequest>,
    crashed: bool,
    /// Size as the user sees it, and as the last flush made it stable.
    size_bytes: u64,
    stable_size_bytes: u64,
    /// How to resize the inner device; known once somebody did.
    resize: Option<Resize<D>>,
}

type Resize<D> = fn(&D, u64) -> Result<(), IoError>;

struct Fault {
    kind: OpKind,
    /// Requests of the kind that still succeed.
    pass: u64,
    for_ever: bool,
    errno: i32,
}

impl<D: BlockDevice + 'static> FaultDevice<D> {
    /// A device over `inner` that works until told otherwise.
    #[must_use]
    pub fn new(inner: D) -> Self {
        let size_bytes = inner.geometry().size_bytes;
        let state = State {
            faults: Vec::new(),
            broken: Vec::new(),
            unflushed: Vec::new(),
            hold: None,
            hold_all: false,
            held: Vec::new(),
            crashed: false,
            size_bytes,
            stable_size_bytes: size_bytes,
            resize: None,
        };
        let faulty = Arc::new(Faulty {
            inner,
            poison: Poison::default(),
            state: Mutex::new(state),
            held_more: Condvar::new(),
        });
        let served = Arc::clone(&faulty);
        let serving = Workers::new("io:fault", 1, move |request| served.serve(request));
        Self { faulty, serving }
    }

    /// The device below: what is stable.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.faulty.inner
    }

    /// Fails the `nth` request of the kind from now (1 is the next) with `errno`, once.
    pub fn fail(&self, kind: OpKind, nth: u64, errno: i32) {
        let fault = Fault { kind, pass: nth.saturating_sub(1), for_ever: false, errno };
        self.faulty.lock().faults.push(fault);
    }

    /// Fails the `nth` request of the kind from now, and all after it.
    pub fn fail_from(&self, kind: OpKind, nth: u64, errno: i32) {
        let fault = Fault { kind, pass: nth.saturating_sub(1), for_ever: true, errno };
        self.faulty.lock().faults.push(fault);
    }

    /// Makes a range of bytes unreadable and unwritable: requests that touch it fail with `EIO`, others do not.
    pub fn break_range(&self, range: Range<u64>) {
        self.faulty.lock().broken.push(range);
    }

    /// Ends all faults. A failed flush is not forgotten.
    pub fn heal(&self) {
        let mut state = self.faulty.lock();
        state.faults.clear();
        state.broken.clear();
    }

    /// Holds requests of the kind, or all (`None`), until [`Self::release`].
    pub fn hold(&self, kind: Option<OpKind>) {
        let mut state = self.faulty.lock();
        state.hold = kind;
        state.hold_all = kind.is_none();
    }

    /// Waits until `count` requests are held.
    pub fn wait_held(&self, count: usize) {
        let enough = |state: &mut State<D>| state.held.len() < count;
        drop(
            self.faulty
                .held_more
                .wait_while(self.faulty.lock(), enough)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Lets the held requests go on, in their order, and holds no more.
    pub fn release(&self) {
        let mut state = self.faulty.lock();
        state.hold = None;
        state.hold_all = false;
        let held = std::mem::take(&mut state.held);
        drop(state);
        for request in held {
            self.serving.push(request);
        }
    }

    /// Cuts the power: of what was not flushed the `choice` survives on the inner device, and every request from now
    /// on, held ones included, ends with [`IoError::Closed`].
    ///
    /// # Errors
    /// Those of the inner device.
    pub fn crash(&self, choice: Unflushed) -> Result<(), IoError> {
        let mut state = self.faulty.lock();
        state.crashed = true;
        let held = std::mem::take(&mut state.held);
        let outcome = self.faulty.cut(&mut state, choice);
        drop(state);
        for request in held {
            self.serving.push(request);
        }
        outcome
    }
}

impl<D: BlockDevice> Faulty<D> {
    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, request: IoRequest) {
        let mut state = self.lock();
        let kind = OpKind::of(&request.op);
        if !state.crashed && (state.hold_all || state.hold == Some(kind)) {
            state.held.push(request);
            return self.held_more.notify_all();
        }
        let outcome = self.decide(&mut state, &request.op);
        drop(state);
        (request.done)(outcome);
    }

    fn decide(&self, state: &mut State<D>, op: &IoOp) -> Result<(), IoError> {
        if state.crashed {
            return Err(IoError::Closed);
        }
        let kind = OpKind::of(op);
        if kind != OpKind::Read {
            self.poison.check()?;
        }
        let outcome = match state.take_fault(kind).or_else(|| state.broken_under(op)) {
            Some(errno) => Err(injected(op, errno)),
            None => self.carry_out(state, op),
        };
        if let (OpKind::Flush, Err(cause)) = (kind, &outcome) {
            self.poison.set(cause);
        }
        outcome
    }

    fn carry_out(&self, state: &mut State<D>, op: &IoOp) -> Result<(), IoError> {
        match op {
            IoOp::Read { offset, buf } => {
                self.check("read", *offset, buf.len() as u64, state)?;
                self.inner.run(op.clone())?;
                state.unflushed.iter().for_each(|change| overlay(change, *offset, buf));
                Ok(())
            }
            IoOp::Write { offset, buf, fua } => {
                self.check("write", *offset, buf.len() as u64, state)?;
                let change = Change::Write { offset: *offset, bytes: buf.to_vec().into() };
                if *fua {
                    return self.force(state, change).inspect_err(|cause| self.poison.set(cause));
                }
                state.unflushed.push(change);
                Ok(())
            }
            IoOp::WriteZeroes { offset, len, .. } => {
                self.check("write-zeroes", *offset, *len, state)?;
                state.unflushed.push(Change::Zero { offset: *offset, len: *len });
                Ok(())
            }
            IoOp::Discard { offset, len } => self.check("discard", *offset, *len, state),
            IoOp::Flush => self.settle(state),
        }
    }

    fn check(&self, op: &'static str, offset: u64, len: u64, state: &State<D>) -> Result<(), IoError> {
        let (size_bytes, block_bytes) = (state.size_bytes, self.inner.geometry().block_bytes);
        let block = u64::from(block_bytes);
        let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
        if inside && offset.is_multiple_of(block) && len.is_multiple_of(block) {
            return Ok(());
        }
        Err(IoError::OutOfRange { op, offset, len, size_bytes, block_bytes })
    }

    /// Makes one write stable, and no other, unless an earlier one touches the same place.
    fn force(&self, state: &mut State<D>, change: Change) -> Result<(), IoError> {
        if state.unflushed.iter().any(|earlier| earlier.touches(&change)) {
            state.unflushed.push(change);
            return self.settle(state);
        }
        self.apply(state, &change)?;
        self.inner.flush()
    }

    /// Moves everything to the inner device and makes it stable there.
    fn settle(&self, state: &mut State<D>) -> Result<(), IoError> {
        let unflushed = std::mem::take(&mut state.unflushed);
        for change in &unflushed {
            self.apply(state, change)?;
        }
        self.inner.flush()?;
        state.stable_size_bytes = state.size_bytes;
        Ok(())
    }

    fn cut(&self, state: &mut State<D>, choice: Unflushed) -> Result<(), IoError> {
        let unflushed = std::mem::take(&mut state.unflushed);
        if let Some(resize) = state.resize {
            resize(&self.inner, state.stable_size_bytes)?;
        }
        let mut survivors = Survivors::new(choice, self.inner.geometry().block_bytes as usize);
        for change in unflushed.iter().flat_map(|change| survivors.of(change)) {
            self.apply(state, &change)?;
        }
        self.inner.flush()
    }

    /// Does a change on the inner device. What lies past its end went with the size that did not survive.
    fn apply(&self, state: &State<D>, change: &Change) -> Result<(), IoError> {
        let Geometry { size_bytes, .. } = self.inner.geometry();
        match change {
            Change::Write { offset, bytes } => match clip(*offset, bytes.len() as u64, size_bytes) {
                0 => Ok(()),
                fits => self.inner.write_at(*offset, &bytes[..usize::try_from(fits).unwrap_or(bytes.len())]),
            },
            Change::Zero { offset, len } => match clip(*offset, *len, size_bytes) {
                0 => Ok(()),
                len => self.inner.run(IoOp::WriteZeroes { offset: *offset, len, may_unmap: true }),
            },
            Change::SetLen { size_bytes } => {
                state.resize.map_or(Ok(()), |resize| resize(&self.inner, *size_bytes))
            }
            Change::Discard { .. } => Ok(()),
        }
    }
}

impl<D> State<D> {
    /// What a request that touches a broken range gets.
    fn broken_under(&self, op: &IoOp) -> Option<i32> {
        let touched = match op {
            IoOp::Read { offset, buf } | IoOp::Write { offset, buf, .. } => {
                *offset..*offset + buf.len() as u64
            }
            IoOp::WriteZeroes { offset, len, .. } => *offset..offset.saturating_add(*len),
            IoOp::Flush | IoOp::Discard { .. } => return None,
        };
        let overlaps = |range: &Range<u64>| range.start < touched.end && touched.start < range.end;
        self.broken.iter().any(overlaps).then_some(libc::EIO)
    }

    /// Counts a request; gives the error number when its turn to fail has come.
    fn take_fault(&mut self, kind: OpKind) -> Option<i32> {
        let mut hit = None;
        self.faults.retain_mut(|fault| {
            if fault.kind != kind {
                return true;
            }
            if fault.pass > 0 {
                fault.pass -= 1;
                return true;
            }
            hit.get_or_insert(fault.errno);
            fault.for_ever
        });
        hit
    }
}

/// How many of `len` bytes at `offset` lie below `end`.
fn clip(offset: u64, len: u64, end: u64) -> u64 {
    len.min(end.saturating_sub(offset))
}

/// Lays an unflushed change over bytes that were read at `offset`.
fn overlay(change: &Change, offset: u64, buf: &IoBuf) {
    let (from, len) = match change {
        Change::Write { offset, bytes } => (*offset, bytes.len() as u64),
        Change::Zero { offset, len } => (*offset, *len),
        Change::SetLen { size_bytes } => (*size_bytes, u64::MAX - size_bytes),
        Change::Discard { .. } => return,
    };
    let (first, end) = (from.max(offset), (from + len).min(offset + buf.len() as u64));
    if first >= end {
        return;
    }
    let within = |at: u64, start: u64| usize::try_from(at - start).expect("inside a buffer");
    let part = buf.slice(within(first, offset)..within(end, offset));
    match change {
        Change::Write { bytes, .. } => part.copy_from(&bytes[within(first, from)..within(end, from)]),
        _ => part.fill_zero(),
    }
}

fn injected(op: &IoOp, errno: i32) -> IoError {
    match op {
        IoOp::Read { offset, .. } => IoError::Os { op: "read", offset: *offset, errno },
        IoOp::Write { offset, .. } => IoError::Os { op: "write", offset: *offset, errno },
        IoOp::Discard { offset, .. } => IoError::Os { op: "discard", offset: *offset, errno },
        IoOp::WriteZeroes { offset, .. } => IoError::Os { op: "write-zeroes", offset: *offset, errno },
        IoOp::Flush => IoError::Os { op: "flush", offset: 0, errno },
    }
}

impl<D: BlockDevice + 'static> BlockDevice for FaultDevice<D> {
    fn geometry(&self) -> Geometry {
        let size_bytes = self.faulty.lock().size_bytes;
        Geometry { size_bytes, ..self.faulty.inner.geometry() }
    }

    fn submit(&self, request: IoRequest) {
        self.serving.push(request);
    }
}

impl<D: ImageFile + 'static> ImageFile for FaultDevice<D> {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.faulty.poison.check()?;
        let mut state = self.faulty.lock();
        if state.crashed {
            return Err(IoError::Closed);
        }
        state.resize = Some(|inner, size_bytes| inner.set_len(size_bytes));
        // The inner device grows at once, so that writes to the new part have a place; it shrinks with the flush.
        if size_bytes > self.faulty.inner.geometry().size_bytes {
            self.faulty.inner.set_len(size_bytes)?;
        }
        state.unflushed.push(Change::SetLen { size_bytes });
        state.size_bytes = size_bytes;
        Ok(())
    }

    fn identity(&self) -> String {
        self.faulty.inner.identity()
    }
}

impl<D: BlockDevice + 'static> Drop for FaultDevice<D> {
    fn drop(&mut self) {
        // Held requests end as those of a closed device do: with an answer.
        let held = {
            let mut state = self.faulty.lock();
            state.crashed = true;
            std::mem::take(&mut state.held)
        };
        held.into_iter().for_each(|request| self.serving.push(request));
    }
}

impl<D: BlockDevice + 'static> fmt::Debug for FaultDevice<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultDevice")
            .field("unflushed", &self.faulty.lock().unflushed.len())
            .finish_non_exhaustive()
    }
}
