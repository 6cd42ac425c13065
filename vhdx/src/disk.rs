//! A disk image opened for writing.
//!
//! **resolve -> do the I/O -> complete**, for callers that do their own I/O, and [`BlockDevice`] on top for all others.
//!
//! **Invariant:** payload passes through no lock and through no log; requests that must wait for space wait on the growth
//! thread, flushes on the flush thread, and completions never wait.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder as ThreadBuilder, JoinHandle};

use blockio::{BlockDevice, Completion, Geometry, IoBuf, IoError, IoOp, IoRequest};

use crate::bat::Entry;
use crate::core::{Core, Ticket, lock};
use crate::error::VhdxError;
use crate::flush::{Closed, FlushJob, Session};
use crate::format::{MIB, bytes, index};
use crate::grow::{self, GrowthJob, STEP_MIN};
use crate::guard::{ReadGuard, Resolved, WriteGuard, resolve_read, resolve_write, try_resolve_write};
use crate::load::Loaded;
use crate::open::Options;
use crate::pieces::{check_range, check_request, submit_all};
use crate::resolve::{BlockPart, ReadSegment, WriteSegment};
use crate::space::{Space, gaps};

/// A disk image opened for writing, by its only writer.
///
/// Dropping it without [`Disk::close`] leaves the file as a crash would: everything flushed is there, and the next opener
/// replays the log. Dropping waits for requests in flight, so it must not happen in one of their completions.
pub struct Disk {
    core: Arc<Core>,
    threads: Vec<JoinHandle<()>>,
}

impl Disk {
    pub(crate) fn start(loaded: Loaded, options: Options) -> Result<Self, VhdxError> {
        refuse_unwritable(&loaded)?;
        let (header, used_end) = (loaded.header, loaded.used_end());
        let core = Arc::new(core_of(loaded, options));
        let session = Session::new(Arc::clone(&core), header, used_end);
        let grower = Arc::clone(&core);
        let mut disk = Self { core, threads: Vec::new() };
        disk.spawn("vhdx-flush", move || session.run())?;
        disk.spawn("vhdx-grow", move || grow::run(&grower))?;
        Ok(disk)
    }

    fn spawn(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), VhdxError> {
        let thread =
            ThreadBuilder::new().name(name.to_owned()).spawn(body).map_err(|error| VhdxError::Io {
                doing: format!("starting the thread {name}"),
                source: IoError::Os { op: "spawn", offset: 0, errno: error.raw_os_error().unwrap_or(0) },
            })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Where the bytes of a range of the disk are. They stay there as long as the guard lives.
    ///
    /// # Errors
    /// When the range does not fit the disk, or the disk was closed or stopped.
    pub fn resolve_read(&self, offset: u64, len: u64) -> Result<ReadGuard, IoError> {
        check_range(self, "read", offset, len)?;
        Ok(resolve_read(self.core.admit()?, offset, len))
    }

    /// Where the bytes of a range of the disk go. New blocks get their place; waits for the file to grow if need be.
    ///
    /// The caller writes every segment, then calls [`WriteGuard::complete`].
    ///
    /// # Errors
    /// When the range does not fit the disk, the file cannot grow, or the disk was closed or stopped.
    pub fn resolve_write(&self, offset: u64, len: u64) -> Result<WriteGuard, IoError> {
        check_range(self, "write", offset, len)?;
        resolve_write(&self.core, offset, len)
    }

    /// Waits for what is in flight, makes everything durable and leaves a file with a clean log and no surplus.
    ///
    /// Closing again gives the same answer.
    ///
    /// # Errors
    /// When the file fails; it is recoverable then, as after a crash.
    pub fn close(&self) -> Result<Closed, VhdxError> {
        self.core.drain();
        let (tell, told) = sync_channel(1);
        self.core.flushes.push(FlushJob::Close(tell));
        told.recv().unwrap_or(Err(VhdxError::Poisoned { cause: "the flush thread ended".to_owned() }))
    }

    /// Blocks that have their place in the file.
    #[must_use]
    pub fn allocated_blocks(&self) -> u64 {
        let bat = &self.core.bat;
        bytes((0..bat.shape.blocks).filter(|block| bat.get(*block).data_offset().is_some()).count())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.core.drain();
        self.core.growth.push(GrowthJob::Stop);
        self.core.flushes.push(FlushJob::Stop);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("params", &self.core.params).finish_non_exhaustive()
    }
}

fn refuse_unwritable(loaded: &Loaded) -> Result<(), VhdxError> {
    if loaded.header.log_area().1 == 0 {
        return Err(VhdxError::Unsupported {
            what: "writing an image without a log (log length 0 in the header)".to_owned(),
            hint: "convert it to a new image",
        });
    }
    // Two updates for a session, and one per log generation: any number below this lasts for ever.
    if loaded.header.header.sequence.get() > u64::MAX - (1 << 32) {
        return Err(crate::error::corrupt(
            "header",
            0,
            format!(
                "sequence number {} leaves no room for newer headers",
                loaded.header.header.sequence.get()
            ),
        ));
    }
    Ok(())
}

fn core_of(loaded: Loaded, options: Options) -> Core {
    let block_bytes = loaded.params.block_bytes;
    let shape = loaded.bat.shape;
    let blocks = loaded.payload_mib.iter().map(|start| (start * MIB, block_bytes));
    let used = loaded.areas().iter().map(|area| (area.offset, area.length)).chain(blocks).collect();
    let placed = (0..shape.blocks).filter(|block| loaded.bat.get(*block).data_offset().is_some()).count();
    let step = match options.growth_bytes {
        0 => STEP_MIN.max(8 * block_bytes),
        fixed => fixed.next_multiple_of(MIB).max(block_bytes),
    };
    let mut space = Space::new(block_bytes, shape.blocks - bytes(placed), gaps(used, block_bytes), step);
    space.fixed_step = options.growth_bytes != 0;
    Core::new(loaded.view.file, loaded.params, loaded.bat, space, loaded.view.file_bytes)
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        let params = &self.core.params;
        Geometry {
            size_bytes: params.disk_bytes,
            block_bytes: params.logical_sector,
            can_discard: !params.fixed,
        }
    }

    fn submit(&self, request: IoRequest) {
        let admitted = check_request(self, &request.op).and_then(|()| self.core.admit());
        let ticket = match admitted {
            Ok(ticket) => ticket,
            Err(error) => return (request.done)(Err(error)),
        };
        match request.op {
            IoOp::Read { offset, buf } => read(ticket, offset, &buf, request.done),
            IoOp::Flush => self.core.flushes.push(FlushJob::Flush(request.done)),
            _ => submit_modifying(ticket, request),
        }
    }
}

fn read(ticket: Ticket, offset: u64, buf: &IoBuf, done: Completion) {
    let file = Arc::clone(&ticket.core().file);
    let guard = resolve_read(ticket, offset, bytes(buf.len()));
    let (mut ops, mut at) = (Vec::new(), 0);
    for segment in guard.segments() {
        let part = buf.slice(at..at + index(segment.len()));
        at += part.len();
        match segment {
            ReadSegment::Data { file_offset, .. } => ops.push(IoOp::Read { offset: *file_offset, buf: part }),
            ReadSegment::Zero { .. } => part.fill_zero(),
        }
    }
    let finish = move |outcome| {
        guard.complete();
        done(outcome);
    };
    submit_all(&*file, ops, Box::new(finish));
}

/// Does a request that changes the disk, or hands it to the growth thread.
pub(crate) fn submit_modifying(ticket: Ticket, request: IoRequest) {
    let IoRequest { op, done } = request;
    match op {
        IoOp::Write { offset, buf, fua } => write(ticket, offset, buf, fua, done),
        IoOp::Discard { offset, len } => discard(ticket, offset, len, done),
        IoOp::WriteZeroes { offset, len, may_unmap } => write_zeroes(ticket, offset, len, may_unmap, done),
        IoOp::Read { .. } | IoOp::Flush => unreachable!("only requests that change the disk come here"),
    }
}

/// Leaves a request to the growth thread.
fn defer(ticket: Ticket, blocks: u64, op: IoOp, done: Completion) {
    let core = Arc::clone(ticket.core());
    core.growth.push(GrowthJob::Deferred { request: IoRequest { op, done }, blocks, ticket });
}

fn write(ticket: Ticket, offset: u64, buf: IoBuf, fua: bool, done: Completion) {
    let core = Arc::clone(ticket.core());
    let guard = match try_resolve_write(ticket, offset, bytes(buf.len())) {
        Resolved::Ready(guard) => guard,
        Resolved::Wait { blocks, ticket } => {
            return defer(ticket, blocks, IoOp::Write { offset, buf, fua }, done);
        }
    };
    let direct_fua = fua && guard.mapping_is_durable();
    let (mut ops, mut at) = (Vec::new(), 0);
    for WriteSegment::Data { file_offset, len } in guard.segments() {
        let part = buf.slice(at..at + index(*len));
        at += part.len();
        ops.push(IoOp::Write { offset: *file_offset, buf: part, fua: direct_fua });
    }
    submit_all(&*core.file, ops, finish_write(guard, fua && !direct_fua, done));
}

/// What happens when the file has the bytes: publish, then flush if the request asks for it, then tell.
fn finish_write(guard: WriteGuard, flush: bool, done: Completion) -> Completion {
    let ticket = guard.ticket();
    Box::new(move |outcome| {
        match &outcome {
            Ok(()) => guard.complete(),
            Err(_) => drop(guard),
        }
        if flush && outcome.is_ok() {
            let core = Arc::clone(ticket.core());
            // The request is in flight until its flush is done.
            let done = Box::new(move |outcome| {
                done(outcome);
                drop(ticket);
            });
            return core.flushes.push(FlushJob::Flush(done));
        }
        done(outcome);
    })
}

/// Gives whole blocks up. Parts of blocks stay: a discard is a hint.
fn discard(ticket: Ticket, offset: u64, len: u64, done: Completion) {
    let core = Arc::clone(ticket.core());
    let shape = core.bat.shape;
    let whole: Vec<BlockPart> = shape.parts(offset, len).filter(|part| shape.covers(part)).collect();
    let nothing =
        core.params.fixed || whole.iter().all(|part| core.bat.get(part.block).data_offset().is_none());
    if nothing {
        return done(Ok(()));
    }
    if !core.session.load(Ordering::SeqCst) {
        return defer(ticket, 0, IoOp::Discard { offset, len }, done);
    }
    for part in whole {
        drop_block(&core, part.block, Entry::UNMAPPED);
    }
    done(Ok(()));
}

/// Takes the place of a block away. Blocks whose first write is in flight are left alone.
fn drop_block(core: &Core, block: u64, becomes: Entry) -> bool {
    let mut space = lock(&core.space);
    let Some(place) = core.bat.get(block).data_offset() else { return false };
    core.bat.set(block, becomes);
    space.free(block, place);
    space.mark_dirty(core.bat.page_of(block));
    core.written.store(true, Ordering::SeqCst);
    true
}

/// Whole blocks give their place up, parts of blocks are zeroed in the file, blocks without a place read as zeros already.
fn write_zeroes(ticket: Ticket, offset: u64, len: u64, may_unmap: bool, done: Completion) {
    let core = Arc::clone(ticket.core());
    let shape = core.bat.shape;
    let reads_zero = |entry: Entry| entry.data_offset().is_none() && !entry.in_transition();
    if shape.parts(offset, len).all(|part| reads_zero(core.bat.get(part.block))) {
        return done(Ok(()));
    }
    if !core.session.load(Ordering::SeqCst) {
        return defer(ticket, 0, IoOp::WriteZeroes { offset, len, may_unmap }, done);
    }
    let (mut ops, mut guards) = (Vec::new(), Vec::new());
    for part in shape.parts(offset, len) {
        let unmap = may_unmap && !core.params.fixed && shape.covers(&part);
        let entry = core.bat.get(part.block);
        if reads_zero(entry) || (unmap && drop_block(&core, part.block, Entry::ZERO)) {
            continue;
        }
        let start = part.block * shape.block_bytes + part.within;
        // The block has its place or is about to: no space is needed, unless it was given up in between.
        let Resolved::Ready(guard) = try_resolve_write(ticket.clone(), start, part.len) else { continue };
        let segments = guard.segments().iter();
        ops.extend(segments.map(|WriteSegment::Data { file_offset, len }| IoOp::WriteZeroes {
            offset: *file_offset,
            len: *len,
            may_unmap: may_unmap && !core.params.fixed,
        }));
        guards.push(guard);
    }
    let finish = move |outcome: Result<(), IoError>| {
        if outcome.is_ok() {
            guards.into_iter().for_each(WriteGuard::complete);
        } else {
            drop(guards);
        }
        done(outcome);
    };
    submit_all(&*core.file, ops, Box::new(finish));
}
