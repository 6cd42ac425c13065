//! A disk image opened for writing.
//!
//! **resolve -> do the I/O -> complete**, for callers that do their own I/O, and [`BlockDevice`] on top for all others.
//!
//! **Invariant:** payload passes through no lock and through no log; requests that must wait for space wait on the growth
//! thread, flushes on the flush thread, and completions never wait.

use std::sync::Arc;

use blockio::{BlockDevice, Completion, Geometry, ImageFile, IoBuf, IoError, IoOp, IoRequest};

use crate::bat::Entry;
use crate::chain::Origin;
use crate::core::{Core, Ticket};
use crate::error::VhdxError;
use crate::exchange::{Admitted, Exchange, Next};
use crate::flush::{Closed, FlushJob};
use crate::format::{bytes, index};
use crate::grow::GrowthJob;
use crate::guard::{Pin, ReadGuard, Resolved, WriteGuard, resolve_read, resolve_write, try_resolve_write};
use crate::image::Image;
use crate::open::{Builder, Options};
use crate::pieces::{check_range, check_request, submit_all};
use crate::plan::Plan;
use crate::resolve::{Said, WriteSegment};
use crate::running::Running;
use crate::trim::{discard, write_zeroes};

/// A disk image opened for writing, by its only writer.
///
/// Dropping it without [`Disk::close`] leaves the file as a crash would: everything flushed is there, and the next opener
/// replays the log. Dropping waits for requests in flight, so it must not happen in one of their completions.
pub struct Disk {
    behind: Exchange,
}

impl Disk {
    pub(crate) fn open(file: &Arc<dyn ImageFile>, options: Options) -> Result<Self, VhdxError> {
        Ok(Self { behind: Exchange::new(Running::open(file, &options)?, options) })
    }

    /// Where the bytes of a range of the disk are. They stay there as long as the guard lives.
    ///
    /// # Errors
    /// When the range does not fit the disk, or the disk was closed or stopped.
    pub fn resolve_read(&self, offset: u64, len: u64) -> Result<ReadGuard, IoError> {
        let ticket = self.behind.enter()?;
        check_range(ticket.core().geometry(), "read", offset, len)?;
        Ok(resolve_read(ticket, offset, len))
    }

    /// Where the bytes of a range of the disk go. New blocks get their place; waits for the file to grow if need be.
    ///
    /// The caller writes every segment, then calls [`WriteGuard::complete`].
    ///
    /// # Errors
    /// When the range does not fit the disk, the file cannot grow, or the disk was closed or stopped.
    pub fn resolve_write(&self, offset: u64, len: u64) -> Result<WriteGuard, IoError> {
        let ticket = self.behind.enter()?;
        check_range(ticket.core().geometry(), "write", offset, len)?;
        resolve_write(ticket, offset, len)
    }

    /// Waits for what is in flight, makes everything durable and leaves a file with a clean log and no surplus.
    ///
    /// Closing again gives the same answer.
    ///
    /// # Errors
    /// When the file fails; it is recoverable then, as after a crash.
    pub fn close(&self) -> Result<Closed, VhdxError> {
        self.behind.close()
    }

    /// Gives the surplus at the end of the file back, as a close does, while the guest goes on: its requests wait for a few
    /// flushes. No guard of this disk may be held by the caller.
    ///
    /// # Errors
    /// When the disk was closed, or the file fails; the disk stops then.
    pub fn give_back(&self) -> Result<(), VhdxError> {
        self.exchange(|_| Ok(()))
    }

    /// Lets `look` read the closed image with its parents, while the guest's requests wait: every byte is in its place, and the
    /// log is empty. What it reads is the disk as it is at one moment. No guard of this disk may be held by the caller.
    ///
    /// # Errors
    /// What `look` says, or when the disk was closed, or the file fails; the disk stops then.
    pub fn look<T>(
        &self,
        look: impl FnOnce(&Arc<dyn ImageFile>) -> Result<T, VhdxError>,
    ) -> Result<T, VhdxError> {
        self.exchange(look)
    }

    /// The same for who wants to read the disk, and not its file.
    ///
    /// # Errors
    /// As [`Disk::look`].
    pub fn look_at_image<T>(
        &self,
        look: impl FnOnce(&Image) -> Result<T, VhdxError>,
    ) -> Result<T, VhdxError> {
        self.exchange_for(|file, options| {
            let image = Builder::with(Arc::clone(file), options.clone()).read_only()?;
            Ok((look(&image)?, None))
        })
    }

    /// Where the parents were found, the nearest first.
    #[must_use]
    pub fn parent_paths(&self) -> Vec<String> {
        self.core().chain.paths().to_vec()
    }

    /// Admits work of the crate's own.
    pub(crate) fn enter(&self) -> Result<Ticket, IoError> {
        self.behind.enter()
    }

    /// The core as it is when no exchange runs.
    pub(crate) fn core(&self) -> Arc<Core> {
        self.behind.core()
    }

    /// Changes the closed file while requests wait.
    pub(crate) fn exchange<T>(
        &self,
        change: impl FnOnce(&Arc<dyn ImageFile>) -> Result<T, VhdxError>,
    ) -> Result<T, VhdxError> {
        self.behind.exchange(|file, _| Ok((change(file)?, None)))
    }

    /// The same, and goes on with another image if `change` names one.
    pub(crate) fn exchange_for<'a, T>(
        &self,
        change: impl FnOnce(&Arc<dyn ImageFile>, &Options) -> Result<(T, Option<Next<'a>>), VhdxError>,
    ) -> Result<T, VhdxError> {
        self.behind.exchange(change)
    }

    /// Where the image lies and where its parents may be, if that was said.
    pub(crate) fn origin(&self) -> Option<Origin> {
        self.options().origin
    }

    /// How the image was opened.
    pub(crate) fn options(&self) -> Options {
        self.behind.options()
    }

    /// Blocks that have their place in the file.
    #[must_use]
    pub fn allocated_blocks(&self) -> u64 {
        let core = self.core();
        let is_placed = |(at, _, entry): &(u64, u64, Entry)| {
            core.bat.shape.block_at(*at).is_some() && entry.place().is_some()
        };
        bytes(core.bat.runs().filter(is_placed).count())
    }

    /// End of the block table in the file. Header and log lie before it in images as we, and all others that we know, make
    /// them: with space for all of that, making data durable needs no more.
    #[must_use]
    pub fn table_end(&self) -> u64 {
        self.core().bat.region.end()
    }

    /// The image that this one differs from, with its own parents.
    #[must_use]
    pub fn parent(&self) -> Option<Image> {
        self.core().chain.parent()
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").field("geometry", &self.geometry()).finish_non_exhaustive()
    }
}

impl BlockDevice for Disk {
    fn geometry(&self) -> Geometry {
        self.behind.geometry()
    }

    fn submit(&self, request: IoRequest) {
        match self.behind.admit(request) {
            Admitted::Start(ticket, request) => start(ticket, request),
            Admitted::Waits => (),
            Admitted::Refused(error, request) => (request.done)(Err(error)),
        }
    }
}

/// Does an admitted request.
pub(crate) fn start(ticket: Ticket, request: IoRequest) {
    if let Err(error) = check_request(ticket.core().geometry(), &request.op) {
        return (request.done)(Err(error));
    }
    match request.op {
        IoOp::Read { offset, buf } => read(ticket, offset, buf, request.done),
        IoOp::Flush => ticket.core().flushes.push(FlushJob::Flush(request.done)),
        _ => submit_modifying(ticket, request),
    }
}

fn read(ticket: Ticket, offset: u64, buf: IoBuf, done: Completion) {
    let core = Arc::clone(ticket.core());
    let pin = Pin::new(ticket, offset, bytes(buf.len()), false);
    // As nearly all reads are: nothing to plan, nothing to allocate for it.
    if let Some(place) = core.one_place(offset, bytes(buf.len())) {
        let finish = move |outcome| {
            drop(pin);
            done(outcome);
        };
        let op = IoOp::Read { offset: place, buf };
        return core.file.submit(IoRequest { op, done: Box::new(finish) });
    }
    let mut plan = Plan::new(&buf);
    core.say(offset, bytes(buf.len()), &mut |source, said, len| match (source, said) {
        (Some(source), Said::Data(file_offset)) => plan.data(source, file_offset, len),
        _ => plan.zero(len),
    });
    let finish = move |outcome| {
        drop(pin);
        done(outcome);
    };
    plan.submit(Box::new(finish));
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
pub(crate) fn defer(ticket: Ticket, blocks: u64, op: IoOp, done: Completion) {
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
        Resolved::Held(ticket) => {
            return Core::park(ticket, IoRequest { op: IoOp::Write { offset, buf, fua }, done });
        }
    };
    let direct_fua = fua && guard.mapping_is_durable();
    let (mut ops, mut at) = (Vec::new(), 0);
    for WriteSegment::Data { file_offset, len } in guard.segments() {
        let part = buf.slice(at..at + index(*len));
        at += part.len();
        ops.push((&*core.file, IoOp::Write { offset: *file_offset, buf: part, fua: direct_fua }));
    }
    submit_all(ops, finish_write(guard, fua && !direct_fua, done));
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
