//! What the parts of an open disk share: the request path, the flush thread and the growth thread.
//!
//! ```text
//!   submit ----- resolve -----> file I/O ----- completion: publish
//!      |            | no fresh space, or first write of the session
//!      |            v
//!      |       growth thread: begin session, grow, zero stale space, resubmit
//!      | flush
//!      v
//!   flush thread: snapshot dirty pages -> log -> one flush -> acknowledge
//! ```
//! Locks: `space` (rank 1) and the queues (rank 2), each held for a few instructions, never across I/O.
//!
//! **Invariant:** only the flush thread writes headers and log.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use blockio::{Geometry, ImageFile, IoError, IoRequest};

use crate::bat::{Bat, Entry};
use crate::bitmap::Bitmaps;
use crate::chain::Chain;
use crate::disk::submit_modifying;
use crate::error::VhdxError;
use crate::flush::FlushJob;
use crate::format::{PAGE, index};
use crate::grow::GrowthJob;
use crate::log::Page;
use crate::metadata::DiskParams;
use crate::mutation::Mutation;
use crate::plan::Source;
use crate::resolve::{BlockPart, Layer, Said};
use crate::space::{MetaPage, Space, Unlogged};

/// Locks a mutex whose holders cannot leave it half-changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A queue with one consumer thread.
pub(crate) struct Queue<T> {
    jobs: Mutex<VecDeque<T>>,
    more: Condvar,
}

impl<T> Queue<T> {
    pub(crate) fn new() -> Self {
        Self { jobs: Mutex::new(VecDeque::new()), more: Condvar::new() }
    }

    pub(crate) fn push(&self, job: T) {
        lock(&self.jobs).push_back(job);
        self.more.notify_one();
    }

    /// Waits for work and takes all of it.
    pub(crate) fn take_all(&self) -> VecDeque<T> {
        let mut jobs = lock(&self.jobs);
        while jobs.is_empty() {
            jobs = self.more.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut *jobs)
    }
}

/// Counts the I/O in flight per block, by a small table of counters that blocks share.
///
/// Sharing only delays the reuse of freed space, it never allows it too early.
pub(crate) struct Busy(Vec<AtomicU32>);

const BUSY_SLOTS: usize = 1024;

impl Busy {
    fn new() -> Self {
        Self((0..BUSY_SLOTS).map(|_| AtomicU32::new(0)).collect())
    }

    /// Before the entry of `block` is read.
    pub(crate) fn enter(&self, block: u64) {
        self.slot(block).fetch_add(1, Ordering::SeqCst);
    }

    /// After the last byte was moved.
    pub(crate) fn leave(&self, block: u64) {
        self.slot(block).fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether no counted I/O is left that could know the place that `block` had.
    pub(crate) fn is_idle(&self, block: u64) -> bool {
        self.slot(block).load(Ordering::SeqCst) == 0
    }

    fn slot(&self, block: u64) -> &AtomicU32 {
        &self.0[index(block % BUSY_SLOTS as u64)]
    }
}

/// A request in flight.
pub(crate) struct Ticket(Arc<Core>);

impl Ticket {
    fn new(core: &Arc<Core>) -> Self {
        core.in_flight.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(core))
    }

    /// The disk.
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.0
    }
}

impl Clone for Ticket {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let core = &self.0;
        if core.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 && core.closed.load(Ordering::SeqCst) {
            // Under the lock, so that a drain between its check and its wait is not missed.
            let _guard = lock(&core.drained.0);
            core.drained.1.notify_all();
        }
    }
}

/// State of an open disk.
pub(crate) struct Core {
    pub(crate) file: Arc<dyn ImageFile>,
    pub(crate) params: DiskParams,
    pub(crate) bat: Bat,
    /// Only with a parent. Changed under the lock of the space map, read without.
    pub(crate) bitmaps: Option<Bitmaps>,
    pub(crate) chain: Arc<Chain>,
    pub(crate) busy: Busy,
    /// The same for writes alone.
    pub(crate) writing: Busy,
    /// Rank 1. Protects free space, pending blocks, dirty pages, and every change of a BAT entry.
    pub(crate) space: Mutex<Space>,
    /// Rank 0. One compaction at a time.
    pub(crate) compaction: Mutex<()>,
    /// Signalled when growth ends, and when moves end.
    pub(crate) space_changed: Condvar,
    /// The session has begun: headers name a live log, and the id that says that the guest's data changed.
    pub(crate) session: AtomicBool,
    /// Something was written since the last flush began.
    pub(crate) written: AtomicBool,
    /// Bytes that the file has; reads behind are zeros.
    pub(crate) file_bytes: AtomicU64,
    pub(crate) flushes: Queue<FlushJob>,
    pub(crate) growth: Queue<GrowthJob>,
    in_flight: AtomicUsize,
    drained: (Mutex<()>, Condvar),
    closed: AtomicBool,
    poison: OnceLock<String>,
    pub(crate) mutation: Option<Mutation>,
}

impl Core {
    pub(crate) fn new(
        file: Arc<dyn ImageFile>,
        params: DiskParams,
        (bat, bitmaps): (Bat, Option<Bitmaps>),
        chain: Chain,
        space: Space,
        file_bytes: u64,
    ) -> Self {
        Self {
            file,
            params,
            bat,
            bitmaps,
            chain: Arc::new(chain),
            busy: Busy::new(),
            writing: Busy::new(),
            space: Mutex::new(space),
            compaction: Mutex::new(()),
            space_changed: Condvar::new(),
            session: AtomicBool::new(false),
            written: AtomicBool::new(false),
            file_bytes: AtomicU64::new(file_bytes),
            flushes: Queue::new(),
            growth: Queue::new(),
            in_flight: AtomicUsize::new(0),
            drained: (Mutex::new(()), Condvar::new()),
            closed: AtomicBool::new(false),
            poison: OnceLock::new(),
            mutation: None,
        }
    }

    /// What the guest sees.
    pub(crate) fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.params.disk_bytes,
            block_bytes: self.params.logical_sector,
            can_discard: !self.params.fixed,
        }
    }

    /// Whether a test leaves this step out.
    pub(crate) fn skips(&self, step: Mutation) -> bool {
        self.mutation == Some(step)
    }

    /// Whether requests may go on.
    pub(crate) fn check_usable(&self) -> Result<(), IoError> {
        if let Some(cause) = self.poison.get() {
            return Err(IoError::Poisoned { cause: cause.clone() });
        }
        if self.closed.load(Ordering::SeqCst) { Err(IoError::Closed) } else { Ok(()) }
    }

    /// Whether the disk was poisoned.
    pub(crate) fn poisoned(&self) -> Option<VhdxError> {
        self.poison.get().map(|cause| VhdxError::Poisoned { cause: cause.clone() })
    }

    /// Stops the disk for good: what is durable is no longer known.
    pub(crate) fn poison(&self, error: &VhdxError) -> VhdxError {
        let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
        let cause = self.poison.get_or_init(|| format!("{error}{source}"));
        tracing::error!(file = %self.file.identity(), cause, "disk stopped");
        VhdxError::Poisoned { cause: cause.clone() }
    }

    /// Refuses requests from now on and waits until none is in flight.
    pub(crate) fn drain(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let mut guard = lock(&self.drained.0);
        while self.in_flight.load(Ordering::SeqCst) > 0 {
            guard = self.drained.1.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets a request in. Counted before the check, so that a drain either refuses it or waits for it.
    pub(crate) fn admit(self: &Arc<Self>) -> Result<Ticket, IoError> {
        let ticket = Ticket::new(self);
        self.check_usable()?;
        Ok(ticket)
    }

    /// Keeps a request until the moves in progress end.
    pub(crate) fn park(ticket: Ticket, request: IoRequest) {
        let core = Arc::clone(ticket.core());
        let mut space = lock(&core.space);
        // They may have ended since the request met one.
        if space.held > 0 {
            space.parked.push((ticket, request));
            return;
        }
        drop(space);
        submit_modifying(ticket, request);
    }

    /// Waits until no block is being moved.
    pub(crate) fn wait_for_moves(&self) {
        let mut space = lock(&self.space);
        while space.held > 0 {
            space = self.space_changed.wait(space).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The pages that the next log entries must carry, as they are now.
    pub(crate) fn take_unlogged(&self) -> (Unlogged, Vec<Page>) {
        let mut space = lock(&self.space);
        let unlogged = space.take_unlogged();
        let pages: Vec<Page> = unlogged.pages.iter().map(|page| self.meta_page(*page)).collect();
        debug_assert!(pages.iter().all(|page| page.content.len() == index(PAGE)), "whole pages");
        (unlogged, pages)
    }

    fn meta_page(&self, page: MetaPage) -> Page {
        match page {
            MetaPage::Bat(page) => {
                Page { file_offset: self.bat.page_offset(page), content: self.bat.page_bytes(page) }
            }
            MetaPage::Bitmap(page) => {
                let place = self.bat.bitmap_page_offset(page);
                let bitmaps = self.bitmaps.as_ref();
                Page {
                    file_offset: place.expect("a bitmap has its place before a bit changes"),
                    content: bitmaps.expect("a dirty bitmap exists").page_bytes(page),
                }
            }
        }
    }

    /// The image without its parents, as it is now.
    pub(crate) fn layer(&self) -> Layer<'_> {
        Layer {
            bat: &self.bat,
            bitmaps: self.bitmaps.as_ref(),
            file_bytes: self.file_bytes.load(Ordering::SeqCst),
            patches: None,
        }
    }

    /// Tells `each` whose file says what about a range of the disk, in order, with the number of bytes. Takes no lock.
    pub(crate) fn say<'a>(
        &'a self,
        offset: u64,
        len: u64,
        each: &mut dyn FnMut(Option<Source<'a>>, Said, u64),
    ) {
        let (layer, shape, mut at) = (self.layer(), self.bat.shape, offset);
        for part in shape.parts(offset, len) {
            let span = || shape.span(part.block);
            layer.say(&part, &mut |said, len| {
                match said {
                    Said::Nothing => self.chain.say(part.block, span, (at, len), &mut |image, said, len| {
                        each(image.map(Source::Image), said, len);
                    }),
                    said => each(Some(Source::File(&self.file)), said, len),
                }
                at += len;
            });
        }
    }

    /// Where a range lies in the image's own file, if that is one place. The blocks are pinned.
    pub(crate) fn one_place(&self, offset: u64, len: u64) -> Option<u64> {
        let mut place = None;
        let mut parts = 0;
        self.say(offset, len, &mut |source, said, _| {
            parts += 1;
            place = match (source, said) {
                (Some(Source::File(_)), Said::Data(file_offset)) if parts == 1 => Some(file_offset),
                _ => None,
            };
        });
        place
    }

    /// Whether the parent shows where this entry stands.
    pub(crate) fn shows_parent(&self, entry: Entry) -> bool {
        self.bitmaps.is_some() && entry.is_unsaid()
    }

    /// Makes a block visible at its new place, after `part` of it was written there. The rest of the place is zero.
    pub(crate) fn publish(&self, space: &mut Space, part: &BlockPart, place: u64) {
        let old = self.bat.get(part.block);
        if let Some(anchor) = old.owned_offset() {
            space.free_former(part.block, anchor);
        }
        let entry = match &self.bitmaps {
            Some(bitmaps) if old.is_unsaid() => {
                // The parent showed here, so the bytes must be durable before the log says that they count.
                space.require_barrier();
                if self.bat.shape.covers(part) {
                    Entry::present(place)
                } else {
                    // Bits of an earlier life of the block may be on disk.
                    bitmaps.clear(part.block);
                    bitmaps.set(part);
                    bitmaps.pages_of(part.block).for_each(|page| space.mark_dirty(MetaPage::Bitmap(page)));
                    Entry::partial(place)
                }
            }
            _ => Entry::present(place),
        };
        self.bat.set(part.block, entry);
        space.mark_dirty(MetaPage::Bat(self.bat.page_of(part.block)));
    }

    /// Says that a part of a partially present block is here now, if the block still lies at `place`.
    pub(crate) fn add_sectors(&self, space: &mut Space, part: &BlockPart, place: u64) {
        let Some(bitmaps) = &self.bitmaps else { return };
        let entry = self.bat.get(part.block);
        if entry.settled() != Entry::partial(place) || bitmaps.holds(part) {
            return;
        }
        space.require_barrier();
        bitmaps.set(part);
        bitmaps.pages_of_part(part).for_each(|page| space.mark_dirty(MetaPage::Bitmap(page)));
        if bitmaps.is_full(part.block, self.bat.shape.bytes_in(part.block)) {
            self.bat.set(part.block, entry.filled());
            space.mark_dirty(MetaPage::Bat(self.bat.page_of(part.block)));
        }
    }
}
