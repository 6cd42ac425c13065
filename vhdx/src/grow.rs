//! The growth thread: space is made before it is needed, and whoever needs it earlier waits here, not in a completion.
//!
//! Space comes from what discards gave up and from gaps (zeroed first), then from the end of the file, in steps that double.
//!
//! **Invariant:** space becomes fresh only after a flush that covers the size of the file and the zeroing.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};

use blockio::{IoError, IoOp, IoRequest};

use crate::core::{Core, Ticket, lock};
use crate::disk::submit_modifying;
use crate::error::{VhdxError, doing};
use crate::flush::{FlushJob, For};
use crate::format::MIB;
use crate::mutation::Mutation;
use crate::space::{Extent, Space};

/// First growth step, unless eight blocks are more.
pub(crate) const STEP_MIN: u64 = 64 * MIB;
/// Steps do not double beyond this, unless 32 blocks are more.
const STEP_MAX: u64 = 1024 * MIB;

/// What the growth thread is asked to do.
pub(crate) enum GrowthJob {
    /// Do this request once the session has begun and there is space.
    Deferred {
        /// The request.
        request: IoRequest,
        /// Blocks that it lacked.
        blocks: u64,
        /// What admitted it.
        ticket: Ticket,
    },
    /// Begin the session and find space for so many blocks, then tell.
    Reserve {
        /// Blocks to be handed out.
        blocks: u64,
        /// Whom to tell.
        tell: SyncSender<Result<(), IoError>>,
    },
    /// Space runs low.
    Ahead,
    /// End.
    Stop,
}

/// Body of the growth thread.
pub(crate) fn run(core: &Arc<Core>) {
    loop {
        for job in core.growth.take_all() {
            match job {
                GrowthJob::Deferred { request, blocks, ticket } => match reserve(core, blocks) {
                    // It comes back if others took the space meanwhile.
                    Ok(()) => submit_modifying(ticket, request),
                    Err(error) => (request.done)(Err(error)),
                },
                GrowthJob::Reserve { blocks, tell } => drop(tell.send(reserve(core, blocks))),
                // No room ahead of need is not yet a failure.
                GrowthJob::Ahead => drop(grow_ahead(core)),
                GrowthJob::Stop => return,
            }
        }
    }
}

fn reserve(core: &Arc<Core>, blocks: u64) -> Result<(), IoError> {
    if let Some(error) = core.poisoned() {
        return Err(error.into_io());
    }
    if !core.session.load(Ordering::SeqCst) {
        let (tell, told) = sync_channel(1);
        core.flushes.push(FlushJob::Begin(For::TheGuest, tell));
        told.recv().unwrap_or(Ok(())).map_err(VhdxError::into_io)?;
    }
    while lock(&core.space).fresh_blocks() < blocks {
        grow(core, blocks * core.bat.shape.block_bytes)?;
    }
    Ok(())
}

fn grow_ahead(core: &Arc<Core>) -> Result<(), IoError> {
    let runs_out = lock(&core.space).runs_out();
    if runs_out { grow(core, core.bat.shape.block_bytes) } else { Ok(()) }
}

/// Adds at least `needed` bytes of fresh space, more if there is room for it.
fn grow(core: &Arc<Core>, needed: u64) -> Result<(), IoError> {
    let mut space = lock(&core.space);
    while space.growing {
        space = core.space_changed.wait(space).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
    if space.stopped {
        return Err(IoError::Closed);
    }
    if space.fresh_blocks() * core.bat.shape.block_bytes >= needed && !space.runs_out() {
        return Ok(());
    }
    space.growing = true;
    let step = next_step(&mut space);
    if core.skips(Mutation::ReuseEarly) {
        space.reuse_early();
    }
    let stale = space.take_stale(step, |block| core.busy.is_idle(block));
    drop(space);
    let outcome = if stale.is_empty() {
        extend(core, step, needed).map(|extent| vec![extent])
    } else {
        zero(core, stale)
    };
    let extents = match outcome {
        Ok(extents) => extents,
        Err(error) => {
            finish(core, []);
            return Err(error);
        }
    };
    if core.skips(Mutation::UnflushedZeros) {
        finish(core, extents);
        return Ok(());
    }
    let flushed = core.file.flush().map_err(doing("flushing the grown file"));
    if let Err(error) = flushed {
        let error = core.poison(&error);
        finish(core, []);
        return Err(error.into_io());
    }
    finish(core, extents);
    Ok(())
}

/// How much to grow by: steps double, and never exceed what the disk still lacks.
pub(crate) fn next_step(space: &mut Space) -> u64 {
    let step = space.begin_step(STEP_MAX);
    step.min(space.wanted_bytes()).next_multiple_of(MIB)
}

/// Makes the file longer; by less than a step if there is no room for all of it.
fn extend(core: &Core, step: u64, needed: u64) -> Result<Extent, IoError> {
    let offset = lock(&core.space).file_end;
    let sizes = [step.max(needed), needed];
    let mut outcome = Ok(());
    for len in sizes {
        outcome = core.file.set_len(offset + len);
        if outcome.is_ok() {
            return Ok(Extent { offset, len, former_block: None });
        }
    }
    outcome.map(|()| Extent { offset, len: 0, former_block: None })
}

/// Zeroes space of unknown content.
fn zero(core: &Core, stale: Vec<Extent>) -> Result<Vec<Extent>, IoError> {
    for extent in stale.iter().filter(|_| !core.skips(Mutation::KeepLeftovers)) {
        let op = IoOp::WriteZeroes { offset: extent.offset, len: extent.len, may_unmap: true };
        if let Err(error) = core.file.run(op) {
            lock(&core.space).put_stale(stale);
            return Err(error);
        }
    }
    Ok(stale)
}

/// Makes the file longer for a flush that is about to happen anyway. It is fresh after that flush, see [`finish`].
pub(crate) fn extend_ahead(core: &Core) -> Option<Extent> {
    let step = {
        let mut space = lock(&core.space);
        if !space.runs_low() {
            return None;
        }
        space.growing = true;
        next_step(&mut space)
    };
    let grown = extend(core, step, core.bat.shape.block_bytes);
    if grown.is_err() {
        finish(core, []);
    }
    grown.ok()
}

/// Growth ended: `extents` are durable and read as zeros.
pub(crate) fn finish(core: &Core, extents: impl IntoIterator<Item = Extent>) {
    let mut space = lock(&core.space);
    for extent in extents {
        space.file_end = space.file_end.max(extent.offset + extent.len);
        core.file_bytes.fetch_max(space.file_end, Ordering::SeqCst);
        space.add_fresh(Extent { former_block: None, ..extent });
    }
    space.growing = false;
    core.space_changed.notify_all();
}

/// Waits until nobody grows the file and lets nobody begin.
pub(crate) fn stop(core: &Core) {
    let mut space = lock(&core.space);
    while space.growing {
        space = core.space_changed.wait(space).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
    space.stopped = true;
}
