//! virtio-balloon: the guest gives pages back that it does not need, and takes them again.
//!
//! ```text
//!   target (config space) --> driver --inflate queue: page numbers--> discarded: the node has the memory, they read as zeros
//!                                    --deflate queue: page numbers--> nothing to do: a page is there when it is touched
//!                                    --reporting queue: free ranges-> discarded, until the guest uses them by itself
//!                                    --statistics queue: one buffer, which stays posted until newer figures are asked for
//! ```
//! A discard is a write of zeros to all who look at RAM, a move too: it marks the pages as written, so a page that was sent and then
//! given back is sent once more, as zeros. What a guest had in a page before it gave it away is gone for it everywhere.
//!
//! [VIRTIO 1.2] 5.5. Where a driver accepts no statistics, Linux gives their queue's number to the next queue; the standard leaves it
//! free. Both are understood: which queue is for what follows from its number and the features.
//!
//! **Invariants:** only whole pages of RAM are discarded, and of one request at most [`NUMBERS_MAX`] or what its parts name, so a
//! drain ends soon whatever the guest posts. Nothing is discarded while RAM is still coming from a saved state, which would bring
//! back what was there.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::queue::{Chain, Popped, RequestQueue};
use super::worker::Wakeup;
use super::{DeviceInterrupt, FEATURES_OF_ALL, VirtioDevice};
use crate::devices::Interrupt;
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::state::{self, StateError};

const KIND: u32 = 5;
const FEATURE_STATISTICS: u64 = 1 << 1;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

const QUEUES: usize = 5;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;

/// In configuration space.
const ACTUAL: u64 = 4;
/// Page numbers of one request; Linux sends 256.
const NUMBERS_MAX: usize = 4096;
const NUMBER_BYTES: usize = 4;
/// A figure: its tag and its value, not aligned.
const FIGURE_BYTES: usize = 10;
/// Figures of one buffer; the standard knows ten.
const FIGURES_MAX: usize = 64;
/// Requests of a queue before the others have their turn.
const TURN: usize = 64;

/// What a guest says of its memory, in bytes; `None` where it does not say it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// All that it has, without what it has given back.
    pub total_bytes: Option<u64>,
    /// Used for nothing.
    pub free_bytes: Option<u64>,
    /// What it could use without swapping.
    pub available_bytes: Option<u64>,
    /// Copies of what is on its disks.
    pub cached_bytes: Option<u64>,
}

/// How a guest gives memory back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// What it was asked to give.
    pub target_bytes: u64,
    /// What it has given, as it says.
    pub actual_bytes: u64,
    /// Whether it has a driver for it.
    pub has_driver: bool,
    /// What it last said of its memory.
    pub figures: MemoryFigures,
}

/// The device.
#[derive(Debug)]
pub(crate) struct Balloon {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    features: AtomicU64,
    queues: [RequestQueue; QUEUES],
    interrupt: DeviceInterrupt,
    wakeup: Arc<Wakeup>,
    ram: GuestRam,
    /// RAM is not whole yet.
    comes: AtomicBool,
    /// Somebody wants newer figures.
    asked: AtomicBool,
    /// Protects the figures only.
    figures: Mutex<MemoryFigures>,
}

impl Balloon {
    pub(crate) fn new(ram: GuestRam, line: Arc<dyn Interrupt>) -> io::Result<Self> {
        Ok(Self {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            features: AtomicU64::new(0),
            queues: std::array::from_fn(|_| RequestQueue::new()),
            interrupt: DeviceInterrupt::new(line),
            wakeup: Arc::new(Wakeup::new()?),
            ram,
            comes: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            figures: Mutex::default(),
        })
    }

    pub(crate) fn wakeup(&self) -> Arc<Wakeup> {
        Arc::clone(&self.wakeup)
    }

    /// Asks the guest to have given so many pages; less than RAM has.
    pub(crate) fn set_target(&self, pages: u32) {
        if self.target_pages.swap(pages, Ordering::SeqCst) != pages {
            self.interrupt.config_changed();
        }
    }

    /// How things are; newer figures are asked for, which the next call gives.
    pub(crate) fn status(&self) -> BalloonStatus {
        let bytes = |pages: &AtomicU32| u64::from(pages.load(Ordering::SeqCst)) * PAGE_BYTES;
        self.asked.store(true, Ordering::SeqCst);
        self.wakeup.wake();
        BalloonStatus {
            target_bytes: bytes(&self.target_pages),
            actual_bytes: bytes(&self.actual_pages).min(self.ram.bytes()),
            has_driver: self.features.load(Ordering::SeqCst) != 0,
            figures: *self.figures(),
        }
    }

    /// Whether a state without this device would lack something.
    pub(crate) fn is_known(&self) -> bool {
        self.features.load(Ordering::SeqCst) != 0 || self.target_pages.load(Ordering::SeqCst) != 0
    }

    /// RAM will come from a saved state while the guest runs.
    pub(crate) fn memory_comes(&self) {
        self.comes.store(true, Ordering::SeqCst);
    }

    /// It is there.
    pub(crate) fn memory_is_there(&self) {
        self.comes.store(false, Ordering::SeqCst);
        self.wakeup.wake();
    }

    /// One turn for each queue. Body of the device's thread.
    pub(crate) fn serve(&self) -> Option<Duration> {
        if self.comes.load(Ordering::SeqCst) {
            return None;
        }
        let inflated = self.turn(INFLATE, |chain| self.discard_listed(chain));
        let deflated = self.turn(DEFLATE, |_| {});
        let mut reported = false;
        for queue in self.reporting() {
            reported |= self.turn(queue, |chain| self.discard_parts(chain));
        }
        self.read_figures();
        (inflated || deflated || reported).then_some(Duration::ZERO)
    }

    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::SeqCst) & feature != 0
    }

    fn reporting(&self) -> std::ops::Range<usize> {
        match (self.has(FEATURE_REPORTING), self.has(FEATURE_STATISTICS)) {
            (false, _) => 0..0,
            (true, false) => STATISTICS..QUEUES,
            (true, true) => STATISTICS + 1..QUEUES,
        }
    }

    /// Takes up to a turn's requests from a queue; true when there may be more.
    fn turn(&self, queue: usize, work: impl Fn(&Chain)) -> bool {
        let queue = &self.queues[queue];
        for _ in 0..TURN {
            match queue.pop(&self.ram) {
                Popped::Empty => return false,
                Popped::Broken => {
                    self.interrupt.config_changed();
                    return false;
                }
                Popped::Chain(chain) => {
                    work(&chain);
                    queue.complete(&self.ram, chain.head, 0, &self.interrupt);
                }
            }
        }
        true
    }

    /// Discards the pages whose numbers the guest has listed. What is no page of RAM is not looked at.
    fn discard_listed(&self, chain: &Chain) {
        let bytes = self.gather(chain, NUMBERS_MAX * NUMBER_BYTES);
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        let addresses = bytes.chunks_exact(NUMBER_BYTES).map(|bytes| u64::from(number(bytes)) * PAGE_BYTES);
        let mut addresses: Vec<u64> = addresses.filter(|address| self.ram.has_page(*address)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        // In one go where they are neighbours.
        for run in addresses.chunk_by(|one, next| one + PAGE_BYTES == *next) {
            self.discard(run[0], run.len() as u64 * PAGE_BYTES);
        }
    }

    /// Discards the whole pages inside of the parts.
    fn discard_parts(&self, chain: &Chain) {
        for part in chain.parts.iter().filter(|part| part.writable) {
            let start = part.address.checked_next_multiple_of(PAGE_BYTES);
            let end = part.address.checked_add(part.len.into()).map(|end| end / PAGE_BYTES * PAGE_BYTES);
            if let (Some(start), Some(end)) = (start, end)
                && start < end
            {
                self.discard(start, end - start);
            }
        }
    }

    fn discard(&self, address: u64, bytes: u64) {
        if let Err(error) = self.ram.discard(address, bytes) {
            tracing::debug!(%error, "pages that the guest gives back stay as they are");
        }
    }

    /// The readable parts as one, up to a part that is too long or not in RAM.
    fn gather(&self, chain: &Chain, bytes_max: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for part in chain.parts.iter().filter(|part| !part.writable) {
            let (from, len) = (bytes.len(), part.len as usize);
            if len > bytes_max - from {
                break;
            }
            bytes.resize(from + len, 0);
            if self.ram.read(part.address, &mut bytes[from..]).is_err() {
                bytes.truncate(from);
                break;
            }
        }
        bytes
    }

    /// Gives the buffer back where newer figures are wanted, and notes what the driver has posted.
    fn read_figures(&self) {
        if !self.has(FEATURE_STATISTICS) {
            return;
        }
        let note = |chain: &Chain| {
            *self.figures() = parse_figures(&self.gather(chain, FIGURES_MAX * FIGURE_BYTES));
        };
        if self.asked.swap(false, Ordering::SeqCst) {
            self.turn(STATISTICS, note);
        }
        if let Some(posted) = self.queues[STATISTICS].peek(&self.ram) {
            note(&posted);
        }
    }

    fn figures(&self) -> MutexGuard<'_, MemoryFigures> {
        self.figures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse_figures(bytes: &[u8]) -> MemoryFigures {
    let mut figures = MemoryFigures::default();
    for figure in bytes.chunks_exact(FIGURE_BYTES) {
        let (tag, value) = figure.split_at(2);
        let value = Some(u64::from_le_bytes(value.try_into().expect("eight bytes")));
        match u16::from_le_bytes(tag.try_into().expect("two bytes")) {
            4 => figures.free_bytes = value,
            5 => figures.total_bytes = value,
            6 => figures.available_bytes = value,
            7 => figures.cached_bytes = value,
            _ => {}
        }
    }
    figures
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        FEATURES_OF_ALL | FEATURE_STATISTICS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
    }

    fn queues(&self) -> &[RequestQueue] {
        &self.queues
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn interrupt(&self) -> &DeviceInterrupt {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        let pages = [&self.target_pages, &self.actual_pages].map(|pages| pages.load(Ordering::SeqCst));
        let config = pages.map(u32::to_le_bytes).concat();
        for (at, byte) in (offset..).zip(into) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&self, offset: u64, bytes: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, bytes.try_into()) {
            self.actual_pages.store(u32::from_le_bytes(bytes), Ordering::SeqCst);
        }
    }

    fn activate(&self, features: u64) {
        self.features.store(features, Ordering::SeqCst);
        self.wakeup.wake();
    }

    fn notify(&self) {
        self.wakeup.wake();
    }

    fn forget(&self) {
        // All of RAM is the guest's own again, as far as it knows.
        self.actual_pages.store(0, Ordering::SeqCst);
        *self.figures() = MemoryFigures::default();
        self.activate(0);
    }

    fn save(&self, into: &mut state::Device) {
        let [target_pages, actual_pages] =
            [&self.target_pages, &self.actual_pages].map(|pages| pages.load(Ordering::SeqCst));
        into.balloon = Some(state::Balloon { target_pages, actual_pages });
    }

    fn restore(&self, saved: &state::Device) -> Result<(), StateError> {
        let saved = saved.balloon.unwrap_or_default();
        if u64::from(saved.target_pages) * PAGE_BYTES >= self.ram.bytes() {
            return Err(StateError::Invalid("the balloon is to be larger than RAM"));
        }
        self.target_pages.store(saved.target_pages, Ordering::SeqCst);
        // A driver may write what it likes; it is bounded where it is shown.
        self.actual_pages.store(saved.actual_pages, Ordering::SeqCst);
        Ok(())
    }
}
