//! The flush thread: the only writer of headers and log.
//!
//! ```text
//! first write   header A: new file write id, no log + empty log entry + cut and grow -> flush -> header B: log id -> flush
//! guest flush   [flush, if bytes of a child uncover something] -> log entries -> flush -> acknowledge all who asked before
//!               (with a generation end before an entry for which the half-ring has no room)
//! gen. end      logged pages in place + empty entry in the other half -> flush -> header: its id -> flush
//! close         guest flush -> pages in place -> flush -> header: no log -> flush -> other header -> flush -> cut
//! ```
//! Callers that ask while a flush runs wait together for the next one.
//!
//! **Invariant:** nothing is acknowledged before the flush that covers it succeeded; after a failure nothing is acknowledged
//! any more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

use blockio::{Completion, ImageFile};
use uuid::Uuid;

use crate::core::{Core, lock};
use crate::error::{VhdxError, doing};
use crate::format::MIB;
use crate::grow;
use crate::header::CurrentHeader;
use crate::log::{Encoded, LogWriter, PAGES_PER_ENTRY, Page};
use crate::mutation::Mutation;
use crate::recover::clear_log_id;
use crate::space::Extent;

/// What the flush thread is asked to do.
pub(crate) enum FlushJob {
    /// Make what is complete durable.
    Flush(Completion),
    /// Begin the session, then tell.
    Begin(For, SyncSender<Result<(), VhdxError>>),
    /// Leave a clean file behind, then tell.
    Close(SyncSender<Result<Closed, VhdxError>>),
    /// End without touching the file.
    Stop,
}

/// For whom a session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// The guest will see changes: the id that children refer to changes too.
    TheGuest,
    /// Blocks move; the guest sees nothing of it.
    Housekeeping,
}

/// What a closed disk left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closed {
    /// The file write id, for the one who opens it next in a planned hand-over.
    pub file_write_id: Uuid,
    /// Size of the file.
    pub file_bytes: u64,
}

/// State of the session, owned by the flush thread.
pub(crate) struct Session {
    core: Arc<Core>,
    header: CurrentHeader,
    /// End of what was in use at open.
    used_end: u64,
    /// End of everything but the blocks: they may move or go.
    areas_end: u64,
    /// The id that says that the guest's data changed, if it was chosen beforehand.
    data_write_id: Option<Uuid>,
    /// Other metadata pages that go into the log with the first entry.
    amendments: Vec<Page>,
    log: Option<LogWriter>,
    /// Pages of this generation that are durable in the log and not yet in place.
    logged: BTreeMap<u64, Vec<u8>>,
    /// Pages that were written to the log since its last flush.
    appended: Vec<Page>,
    /// The other header is one update behind.
    header_behind: bool,
    closed: Option<Closed>,
}

impl Session {
    pub(crate) fn new(
        core: Arc<Core>,
        header: CurrentHeader,
        (used_end, areas_end): (u64, u64),
        data_write_id: Option<Uuid>,
    ) -> Self {
        Self {
            core,
            header,
            used_end,
            areas_end,
            data_write_id,
            amendments: Vec::new(),
            log: None,
            logged: BTreeMap::new(),
            appended: Vec::new(),
            header_behind: false,
            closed: None,
        }
    }

    /// The same with pages that go into the log with the first entry that is needed anyway.
    pub(crate) fn with_amendments(self, amendments: Vec<Page>) -> Self {
        Self { amendments, ..self }
    }

    /// Body of the flush thread.
    pub(crate) fn run(mut self) {
        loop {
            let mut flushes = Vec::new();
            let mut stop = false;
            for job in self.core.flushes.take_all() {
                match job {
                    FlushJob::Flush(done) => flushes.push(done),
                    FlushJob::Begin(whom, tell) => drop(tell.send(self.begin(whom))),
                    FlushJob::Close(tell) => drop(tell.send(self.close())),
                    FlushJob::Stop => stop = true,
                }
            }
            if !flushes.is_empty() {
                let outcome = self.guarded(Self::flush).map_err(VhdxError::into_io);
                for done in flushes {
                    done(outcome.clone());
                }
            }
            if stop {
                return;
            }
        }
    }

    /// Runs a step whose failure stops the disk.
    fn guarded<T>(&mut self, step: impl FnOnce(&mut Self) -> Result<T, VhdxError>) -> Result<T, VhdxError> {
        if let Some(error) = self.core.poisoned() {
            return Err(error);
        }
        // What a step submits it waits for.
        let _here = blockio::here();
        step(self).map_err(|error| self.core.poison(&error))
    }

    fn file(&self) -> &dyn ImageFile {
        &*self.core.file
    }

    fn begin(&mut self, whom: For) -> Result<(), VhdxError> {
        if self.log.is_none() {
            self.guarded(|session| session.begin_session(whom))?;
        } else if whom == For::TheGuest && !self.core.session.load(Ordering::SeqCst) {
            self.guarded(Self::announce_changes)?;
        }
        if whom == For::TheGuest {
            self.core.session.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    fn begin_session(&mut self, whom: For) -> Result<(), VhdxError> {
        let (ring_offset, ring_bytes) = self.header.log_area();
        self.header.update(&*self.core.file, |header| header.file_write_id = Uuid::new_v4().to_bytes_le())?;
        let fresh = self.cut_and_grow()?;
        let mut log = LogWriter::new(ring_offset, ring_bytes);
        let first = log.append(&[], fresh.offset + fresh.len);
        self.write(first)?;
        self.flush_before(Mutation::HeaderBeforeLog, "the first log entry")?;
        let (id, data_write_id) = (log.id, self.data_write_id());
        self.header.update(&*self.core.file, |header| {
            if whom == For::TheGuest {
                header.data_write_id = data_write_id;
            }
            header.log_id = id.to_bytes_le();
            header.log_version = 0.into();
        })?;
        self.flush_file("the header")?;
        (self.log, self.header_behind) = (Some(log), true);
        self.publish(fresh);
        Ok(())
    }

    fn data_write_id(&self) -> [u8; 16] {
        self.data_write_id.unwrap_or_else(Uuid::new_v4).to_bytes_le()
    }

    /// The session began for housekeeping, and now the guest writes.
    fn announce_changes(&mut self) -> Result<(), VhdxError> {
        let data_write_id = self.data_write_id();
        self.header.update(&*self.core.file, |header| header.data_write_id = data_write_id)?;
        self.flush_file("the header")?;
        self.header_behind = true;
        Ok(())
    }

    /// Cuts off what a crashed session left at the end, which need not be zero, and adds space that is.
    fn cut_and_grow(&self) -> Result<Extent, VhdxError> {
        let set_len =
            |size| self.file().set_len(size).map_err(doing(format!("setting the file's size to {size}")));
        let has_tail = self.core.file_bytes.load(Ordering::SeqCst) != self.used_end;
        if has_tail && !self.core.skips(Mutation::TrustTail) {
            set_len(self.used_end)?;
        }
        let wanted = grow::next_step(&mut lock(&self.core.space));
        // No room is no reason to fail here: the first allocation will say so.
        let grown = wanted > 0 && set_len(self.used_end + wanted).is_ok();
        Ok(Extent { offset: self.used_end, len: if grown { wanted } else { 0 }, former_block: None })
    }

    fn publish(&self, fresh: Extent) {
        let mut space = lock(&self.core.space);
        space.file_end = fresh.offset + fresh.len;
        self.core.file_bytes.store(space.file_end, Ordering::SeqCst);
        space.add_fresh(fresh);
    }

    /// Makes everything durable that was complete when this began.
    fn flush(&mut self) -> Result<(), VhdxError> {
        if self.log.is_none() {
            return Ok(());
        }
        // Before the snapshot: what is written after this sets it again.
        let written = self.core.written.swap(false, Ordering::SeqCst);
        let (unlogged, mut pages) = self.core.take_unlogged();
        if pages.is_empty() && !written {
            return Ok(());
        }
        if self.header_behind {
            self.header.catch_up(&*self.core.file)?;
            self.header_behind = false;
        }
        if !pages.is_empty() {
            pages.append(&mut self.amendments);
        }
        let growth = if pages.is_empty() { None } else { grow::extend_ahead(&self.core) };
        let outcome = self.make_durable(&pages, unlogged.barrier);
        if let Some(growth) = growth {
            // Also after a failure: those who wait for the growth must learn that it is over.
            grow::finish(&self.core, outcome.is_ok().then_some(growth));
        }
        outcome?;
        lock(&self.core.space).logged(unlogged);
        Ok(())
    }

    /// Logs the pages and flushes: payload, size of the file and log at once, unless payload must come first.
    fn make_durable(&mut self, pages: &[Page], barrier: bool) -> Result<(), VhdxError> {
        if barrier {
            self.flush_before(Mutation::SkipBarrier, "the payload")?;
        }
        for pages in pages.chunks(PAGES_PER_ENTRY) {
            self.log(pages)?;
        }
        self.flush_log()
    }

    /// Appends one entry; ends the generation first if its half of the ring is full.
    fn log(&mut self, pages: &[Page]) -> Result<(), VhdxError> {
        let log = self.log.as_ref().expect("the session has begun");
        if !log.fits(pages.len()) {
            // What this flush has logged so far must be in place too when its generation ends.
            if !self.appended.is_empty() && !self.core.skips(Mutation::SplitFlush) {
                self.flush_log()?;
            }
            self.end_generation()?;
        }
        let file_bytes = lock(&self.core.space).file_end;
        let log = self.log.as_mut().expect("the session has begun");
        let entry = log.append(pages, file_bytes);
        self.appended.extend_from_slice(pages);
        self.write(entry)
    }

    /// Makes the log durable, and everything else in the file that was complete.
    fn flush_log(&mut self) -> Result<(), VhdxError> {
        self.flush_before(Mutation::AcknowledgeUnflushed, "the log")?;
        self.logged.extend(self.appended.drain(..).map(|page| (page.file_offset, page.content)));
        Ok(())
    }

    fn end_generation(&mut self) -> Result<(), VhdxError> {
        self.write_in_place()?;
        let file_bytes = lock(&self.core.space).file_end;
        let log = self.log.as_mut().expect("the session has begun");
        let same_half = self.core.skips(Mutation::SameHalf);
        let mut next = if same_half { log.restarted() } else { log.successor() };
        let first = next.append(&[], file_bytes);
        self.write(first)?;
        self.flush_before(Mutation::HeaderBeforeLog, "the end of a log generation")?;
        let id = next.id;
        self.header.update(&*self.core.file, |header| header.log_id = id.to_bytes_le())?;
        self.flush_file("the header")?;
        (self.log, self.header_behind) = (Some(next), true);
        Ok(())
    }

    /// Writes the pages that are durable in the log to their places.
    fn write_in_place(&mut self) -> Result<(), VhdxError> {
        for (offset, content) in std::mem::take(&mut self.logged) {
            self.file()
                .write_at(offset, &content)
                .map_err(doing(format!("writing the BAT at {offset:#x}")))?;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<Closed, VhdxError> {
        if let Some(closed) = self.closed {
            return Ok(closed);
        }
        let closed = self.guarded(Self::close_session)?;
        self.closed = Some(closed);
        Ok(closed)
    }

    fn close_session(&mut self) -> Result<Closed, VhdxError> {
        grow::stop(&self.core);
        if self.log.is_some() {
            self.flush()?;
            self.write_in_place()?;
            self.flush_before(Mutation::UnflushedClose, "the BAT")?;
            clear_log_id(&*self.core.file, &mut self.header, self.core.mutation)?;
            self.log = None;
            self.core.session.store(false, Ordering::SeqCst);
            self.cut_surplus()?;
        }
        Ok(Closed {
            file_write_id: Uuid::from_bytes_le(self.header.header.file_write_id),
            file_bytes: self.core.file.geometry().size_bytes,
        })
    }

    /// Gives back what was grown and not used. No log names it any more.
    fn cut_surplus(&self) -> Result<(), VhdxError> {
        let end = self.core.bat.owned_end().max(self.areas_end);
        debug_assert!(end.is_multiple_of(MIB), "everything is 1 MiB aligned");
        if end < self.core.file_bytes.load(Ordering::SeqCst) {
            self.file().set_len(end).map_err(doing(format!("cutting the file to {end} bytes")))?;
        }
        Ok(())
    }

    fn write(&self, entry: Encoded) -> Result<(), VhdxError> {
        let at = entry.file_offset;
        self.file().write_at(at, &entry.content).map_err(doing(format!("writing a log entry at {at:#x}")))
    }

    /// A flush that the next step relies on, unless a test leaves it out.
    fn flush_before(&self, unless: Mutation, what: &str) -> Result<(), VhdxError> {
        if self.core.skips(unless) { Ok(()) } else { self.flush_file(what) }
    }

    fn flush_file(&self, what: &str) -> Result<(), VhdxError> {
        self.file().flush().map_err(doing(format!("flushing the file for {what}")))
    }
}
