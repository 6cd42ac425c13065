//! A device in memory, sparse: for tests and for volumes that need not survive.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::crash::Change;
use crate::queue::Workers;
use crate::{BlockDevice, Geometry, ImageFile, IoBuf, IoError, IoOp, IoRequest};

const PAGE_BYTES: usize = 4096;
type Page = [u8; PAGE_BYTES];

/// Granularity of a [`MemoryDevice`] unless said otherwise.
const BLOCK_BYTES: u32 = 512;

static NEXT_IDENTITY: AtomicU64 = AtomicU64::new(1);

/// A sparse device in memory. Pages that were never written read as zeros and take no room.
///
/// Completions run on a thread of its own, as with any device; the blocking calls are served on the caller's.
pub struct MemoryDevice {
    content: Arc<Content>,
    serving: Workers<IoRequest>,
    identity: u64,
}

struct Content {
    /// Lock rank: leaf. Protects the pages and the size against each other.
    pages: RwLock<Pages>,
    block_bytes: u32,
}

#[derive(Clone, Default)]
struct Pages {
    size_bytes: u64,
    /// Shared with the devices that were forked from this one, until one of them writes the page.
    written: HashMap<u64, Arc<Page>>,
}

impl MemoryDevice {
    /// A device of `size_bytes` zeros in blocks of 512 bytes.
    #[must_use]
    pub fn new(size_bytes: u64) -> Self {
        Self::with_block_bytes(size_bytes, BLOCK_BYTES)
    }

    /// A device of `size_bytes` zeros that takes requests in multiples of `block_bytes`.
    #[must_use]
    pub fn with_block_bytes(size_bytes: u64, block_bytes: u32) -> Self {
        Self::holding(Pages { size_bytes, written: HashMap::new() }, block_bytes.max(1))
    }

    /// A device with the given content and byte granularity, for images of any length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut pages = Pages { size_bytes: bytes.len() as u64, written: HashMap::new() };
        pages.write(0, bytes);
        Self::holding(pages, 1)
    }

    /// A new device with the content as it is now. Cheap: pages are shared until one side writes them.
    #[must_use]
    pub fn fork(&self) -> Self {
        let pages = self.content.pages.read().unwrap_or_else(PoisonError::into_inner).clone();
        Self::holding(pages, self.content.block_bytes)
    }

    /// The whole content. Only for small devices.
    ///
    /// # Panics
    /// When the device is larger than the address space.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let pages = self.content.pages.read().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = vec![0; usize::try_from(pages.size_bytes).expect("a device that fits into memory")];
        pages.read(0, &mut bytes);
        bytes
    }

    /// Bytes of memory that the content takes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let pages = self.content.pages.read().unwrap_or_else(PoisonError::into_inner);
        pages.written.len() as u64 * PAGE_BYTES as u64
    }

    /// Does a recorded change, as far as it lies inside.
    pub(crate) fn apply(&self, change: &Change) {
        let mut pages = self.content.pages.write().unwrap_or_else(PoisonError::into_inner);
        let room = |offset: u64| pages.size_bytes.saturating_sub(offset);
        match change {
            Change::Write { offset, bytes } => {
                let fits = usize::try_from(room(*offset)).unwrap_or(usize::MAX).min(bytes.len());
                pages.write(*offset, &bytes[..fits]);
            }
            Change::Zero { offset, len } => {
                let fits = room(*offset).min(*len);
                pages.clear(*offset, fits);
            }
            Change::Discard { .. } => {}
            Change::SetLen { size_bytes } => pages.resize(*size_bytes),
        }
    }

    fn holding(pages: Pages, block_bytes: u32) -> Self {
        let content = Arc::new(Content { pages: RwLock::new(pages), block_bytes });
        let served = Arc::clone(&content);
        let serving = Workers::new("io:memory", 1, move |request: IoRequest| {
            let outcome = served.serve(request.op);
            (request.done)(outcome);
        });
        Self { content, serving, identity: NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed) }
    }
}

impl BlockDevice for MemoryDevice {
    fn geometry(&self) -> Geometry {
        let size_bytes = self.content.pages.read().unwrap_or_else(PoisonError::into_inner).size_bytes;
        Geometry { size_bytes, block_bytes: self.content.block_bytes, can_discard: true }
    }

    fn submit(&self, request: IoRequest) {
        self.serving.push(request);
    }

    fn run(&self, op: IoOp) -> Result<(), IoError> {
        self.content.serve(op)
    }
}

impl ImageFile for MemoryDevice {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        let mut pages = self.content.pages.write().unwrap_or_else(PoisonError::into_inner);
        pages.resize(size_bytes);
        Ok(())
    }

    fn identity(&self) -> String {
        format!("memory:{}", self.identity)
    }

    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        let pages = self.content.pages.read().unwrap_or_else(PoisonError::into_inner);
        let first = from / PAGE_BYTES as u64;
        let here = pages.written.contains_key(&first).then_some(first);
        let page = here.or_else(|| pages.written.keys().copied().filter(|page| *page > first).min())?;
        let mut end = page + 1;
        while pages.written.contains_key(&end) {
            end += 1;
        }
        let range = (page * PAGE_BYTES as u64).max(from)..(end * PAGE_BYTES as u64).min(pages.size_bytes);
        (!range.is_empty()).then_some(range)
    }
}

impl fmt::Debug for MemoryDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryDevice").field("geometry", &self.geometry()).finish_non_exhaustive()
    }
}

impl Content {
    fn serve(&self, op: IoOp) -> Result<(), IoError> {
        match op {
            IoOp::Read { offset, buf } => {
                let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
                self.check("read", offset, buf.len() as u64, pages.size_bytes)?;
                pages.read_into(offset, &buf);
            }
            IoOp::Write { offset, buf, .. } => {
                let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
                self.check("write", offset, buf.len() as u64, pages.size_bytes)?;
                pages.write_from(offset, &buf);
            }
            IoOp::Flush => {}
            IoOp::Discard { offset, len } => self.clear("discard", offset, len)?,
            IoOp::WriteZeroes { offset, len, .. } => self.clear("write-zeroes", offset, len)?,
        }
        Ok(())
    }

    fn clear(&self, op: &'static str, offset: u64, len: u64) -> Result<(), IoError> {
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        self.check(op, offset, len, pages.size_bytes)?;
        pages.clear(offset, len);
        Ok(())
    }

    fn check(&self, op: &'static str, offset: u64, len: u64, size_bytes: u64) -> Result<(), IoError> {
        let block_bytes = self.block_bytes;
        let block = u64::from(block_bytes);
        let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
        if inside && offset.is_multiple_of(block) && len.is_multiple_of(block) {
            return Ok(());
        }
        Err(IoError::OutOfRange { op, offset, len, size_bytes, block_bytes })
    }
}

/// The parts of `offset .. offset + len`, page by page: page number, place in it, place in the request, length.
fn parts(offset: u64, len: u64) -> impl Iterator<Item = (u64, usize, u64, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let (page, within) = ((offset + at) / PAGE_BYTES as u64, (offset + at) % PAGE_BYTES as u64);
        let count = (PAGE_BYTES as u64 - within).min(len - at);
        let part = (page, small(within), at, small(count));
        at += count;
        Some(part)
    })
}

fn small(bytes: u64) -> usize {
    usize::try_from(bytes).expect("within a page or a buffer")
}

impl Pages {
    fn read(&self, offset: u64, into: &mut [u8]) {
        for (page, within, at, count) in parts(offset, into.len() as u64) {
            let part = &mut into[small(at)..small(at) + count];
            match self.written.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[within..within + count]),
                None => part.fill(0),
            }
        }
    }

    fn read_into(&self, offset: u64, buf: &IoBuf) {
        for (page, within, at, count) in parts(offset, buf.len() as u64) {
            let part = buf.slice(small(at)..small(at) + count);
            match self.written.get(&page) {
                Some(bytes) => part.copy_from(&bytes[within..within + count]),
                None => part.fill_zero(),
            }
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (page, within, at, count) in parts(offset, bytes.len() as u64) {
            self.page(page)[within..within + count].copy_from_slice(&bytes[small(at)..small(at) + count]);
        }
    }

    fn write_from(&mut self, offset: u64, buf: &IoBuf) {
        for (page, within, at, count) in parts(offset, buf.len() as u64) {
            buf.slice(small(at)..small(at) + count).copy_to(&mut self.page(page)[within..within + count]);
        }
    }

    fn clear(&mut self, offset: u64, len: u64) {
        // A range may be far larger than what was ever written: go through the smaller of the two.
        let (first, end) = (offset.div_ceil(PAGE_BYTES as u64), (offset + len) / PAGE_BYTES as u64);
        self.written.retain(|page, _| !(first..end).contains(page));
        for edge in [offset / PAGE_BYTES as u64, end] {
            let start = edge * PAGE_BYTES as u64;
            let (from, to) = (start.max(offset), start.saturating_add(PAGE_BYTES as u64).min(offset + len));
            if from < to
                && let Some(bytes) = self.written.get_mut(&edge)
            {
                let within = small(from % PAGE_BYTES as u64);
                Arc::make_mut(bytes)[within..within + small(to - from)].fill(0);
            }
        }
    }

    fn resize(&mut self, size_bytes: u64) {
        if size_bytes < self.size_bytes {
            self.clear(size_bytes, self.size_bytes - size_bytes);
        }
        self.size_bytes = size_bytes;
    }

    fn page(&mut self, page: u64) -> &mut Page {
        Arc::make_mut(self.written.entry(page).or_insert_with(|| Arc::new([0; PAGE_BYTES])))
    }
}
