//! Free space of the file, and what happens to a block between its first write and the log.
//!
//! ```text
//!            grown and flushed                 first write in flight         written            log entry durable
//!   (file) ------------------> fresh --------> pending ------------> dirty page ------------> (mapped)
//!                                ^                |  aborted                                     | discarded
//!                                |                v                                              v
//!                                +--- zeroed --- stale <---- drop durable, no I/O left ------- freed
//! ```
//! **Invariant:** what is handed out reads as zeros, durably, and lies below a size of the file that is durable. That is why
//! an allocation needs no flush of its own.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use blockio::IoRequest;

use crate::bitmap::BITMAP_BYTES;
use crate::core::Ticket;
use crate::format::MIB;

/// A page of metadata that the log carries.
///
/// The order is the one in which pages are logged. Several entries may be needed for one flush, and a crash may leave the
/// first of them only; so a page comes before those that rely on it. A block in state 7 relies on its bits and on the BAT
/// entry of its bitmap, which stands behind it in the table, hence bitmaps first, then the table from its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MetaPage {
    /// A page of a sector bitmap, counted over all chunks.
    Bitmap(u64),
    /// A page of the BAT.
    Bat(u64),
}

impl MetaPage {
    fn rank(self) -> (bool, Reverse<u64>) {
        match self {
            Self::Bitmap(page) => (false, Reverse(page)),
            Self::Bat(page) => (true, Reverse(page)),
        }
    }
}

impl Ord for MetaPage {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl PartialOrd for MetaPage {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// A free part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    /// First byte.
    pub(crate) offset: u64,
    /// Number of bytes.
    pub(crate) len: u64,
    /// The block that it belonged to, whose last I/O may still be in flight.
    pub(crate) former_block: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    offset: u64,
    writers: usize,
}

/// Free space and unlogged changes.
pub(crate) struct Space {
    /// Blocks whose content is being moved.
    pub(crate) held: usize,
    /// Requests that wait for the end of a move.
    pub(crate) parked: Vec<(Ticket, IoRequest)>,
    block_bytes: u64,
    fresh: VecDeque<Extent>,
    stale: Vec<Extent>,
    freed: Vec<Extent>,
    pending: BTreeMap<u64, Pending>,
    dirty: BTreeSet<MetaPage>,
    logging: BTreeSet<MetaPage>,
    /// Payload must be durable before what is dirty may be logged.
    barrier: bool,
    /// Blocks of the disk that have no place in the file.
    unplaced: u64,
    /// End of the file, durable.
    pub(crate) file_end: u64,
    /// Somebody is growing the file right now.
    pub(crate) growing: bool,
    /// The disk is being closed: nobody may grow the file any more.
    pub(crate) stopped: bool,
    /// Bytes of the next growth step, and of the one before it.
    step: u64,
    last_step: u64,
    /// Steps do not double.
    pub(crate) fixed_step: bool,
}

/// What a flush has to log.
#[derive(Debug, Default)]
pub(crate) struct Unlogged {
    /// Pages, in the order in which they must be logged.
    pub(crate) pages: Vec<MetaPage>,
    /// Payload must be durable before they are.
    pub(crate) barrier: bool,
    /// Space that these pages give up.
    pub(crate) freed: Vec<Extent>,
}

impl Space {
    /// Space of an image in which `unplaced` blocks have no place yet, with `gaps` of unknown content.
    pub(crate) fn new(block_bytes: u64, unplaced: u64, gaps: Vec<Extent>, step: u64) -> Self {
        Self {
            held: 0,
            parked: Vec::new(),
            block_bytes,
            fresh: VecDeque::new(),
            stale: gaps,
            freed: Vec::new(),
            pending: BTreeMap::new(),
            dirty: BTreeSet::new(),
            logging: BTreeSet::new(),
            barrier: false,
            unplaced,
            file_end: 0,
            growing: false,
            stopped: false,
            step,
            last_step: step,
            fixed_step: false,
        }
    }

    /// Whole blocks that can be handed out now.
    pub(crate) fn fresh_blocks(&self) -> u64 {
        self.fresh.iter().map(|extent| extent.len / self.block_bytes).sum()
    }

    /// Bytes that are worth adding: no more than the disk still lacks.
    pub(crate) fn wanted_bytes(&self) -> u64 {
        self.unplaced.saturating_sub(self.fresh_blocks()).saturating_mul(self.block_bytes)
    }

    /// Whether the next flush should bring more space with it, which costs no flush of its own.
    pub(crate) fn runs_low(&self) -> bool {
        self.is_below(self.last_step / 2)
    }

    /// Whether more space is worth a flush of its own, because no flush of the guest came in time.
    pub(crate) fn runs_out(&self) -> bool {
        self.is_below(self.last_step / 4)
    }

    fn is_below(&self, bytes: u64) -> bool {
        !self.growing
            && !self.stopped
            && self.wanted_bytes() > 0
            && self.fresh_blocks() * self.block_bytes < bytes
    }

    /// The size of the growth step that begins now, and twice as much for the next, up to `max` or 32 blocks.
    pub(crate) fn begin_step(&mut self, max: u64) -> u64 {
        self.last_step = self.step;
        if !self.fixed_step {
            self.step = self.step.saturating_mul(2).min(max.max(32 * self.block_bytes)).max(self.step);
        }
        self.last_step
    }

    /// Adds durable, zero space.
    pub(crate) fn add_fresh(&mut self, extent: Extent) {
        match self.fresh.back_mut() {
            Some(last) if last.offset + last.len == extent.offset => last.len += extent.len,
            _ => self.fresh.push_back(extent),
        }
    }

    /// Takes up to `max` bytes of space that must be zeroed before it is fresh, as far as `idle` says that no I/O is left.
    pub(crate) fn take_stale(&mut self, max: u64, idle: impl Fn(u64) -> bool) -> Vec<Extent> {
        let (mut taken, mut total) = (Vec::new(), 0);
        self.stale.retain(|extent| {
            let take = total < max && extent.former_block.is_none_or(&idle);
            if take {
                total += extent.len;
                taken.push(*extent);
            }
            !take
        });
        taken
    }

    /// Treats what blocks gave up as if the log had dropped it.
    pub(crate) fn reuse_early(&mut self) {
        self.stale.append(&mut self.freed);
    }

    /// Puts space back that could not be zeroed.
    pub(crate) fn put_stale(&mut self, extents: impl IntoIterator<Item = Extent>) {
        self.stale.extend(extents);
    }

    /// Takes the lowest free place for a whole block that ends at `limit` or before, whatever bytes lie there, as far as
    /// `idle` says that no I/O is left.
    pub(crate) fn take_lowest(&mut self, limit: u64, idle: impl Fn(u64) -> bool) -> Option<u64> {
        let block_bytes = self.block_bytes;
        let usable = |extent: &&mut Extent| {
            extent.len >= block_bytes
                && extent.offset + block_bytes <= limit
                && extent.former_block.is_none_or(&idle)
        };
        let free = self.stale.iter_mut().chain(self.fresh.iter_mut());
        let lowest = free.filter(usable).min_by_key(|extent| extent.offset)?;
        let place = lowest.offset;
        lowest.offset += block_bytes;
        lowest.len -= block_bytes;
        self.stale.retain(|extent| extent.len > 0);
        self.fresh.retain(|extent| extent.len > 0);
        Some(place)
    }

    /// A block gave up the place at `offset` because it has, or will have, another: it was moved, or it was an anchor.
    pub(crate) fn free_former(&mut self, block: u64, offset: u64) {
        self.freed.push(Extent { offset, len: self.block_bytes, former_block: Some(block) });
    }

    /// A place that was taken and written, but became nobody's.
    pub(crate) fn put_back(&mut self, offset: u64) {
        self.stale.push(Extent { offset, len: self.block_bytes, former_block: None });
    }

    /// The place of a block whose first write is in flight; the caller becomes one of its writers.
    pub(crate) fn join(&mut self, block: u64) -> u64 {
        let pending = self.pending.get_mut(&block).expect("a block in transition is pending");
        pending.writers += 1;
        pending.offset
    }

    /// Hands out a place for `block`.
    pub(crate) fn allocate(&mut self, block: u64) -> Option<u64> {
        while let Some(first) = self.fresh.front_mut() {
            if first.len < self.block_bytes {
                self.fresh.pop_front();
                continue;
            }
            let offset = first.offset;
            first.offset += self.block_bytes;
            first.len -= self.block_bytes;
            self.unplaced = self.unplaced.saturating_sub(1);
            self.pending.insert(block, Pending { offset, writers: 1 });
            return Some(offset);
        }
        None
    }

    /// Hands out a place for a sector bitmap; from a rest that is too small for a block if there is one.
    pub(crate) fn allocate_bitmap(&mut self) -> Option<u64> {
        let block_bytes = self.block_bytes;
        let rest = self.fresh.iter_mut().find(|extent| extent.len % block_bytes >= BITMAP_BYTES);
        let extent = match rest {
            Some(rest) => rest,
            None => self.fresh.iter_mut().find(|extent| extent.len >= BITMAP_BYTES)?,
        };
        // From the end, so that a rest stays a rest.
        extent.len -= BITMAP_BYTES;
        Some(extent.offset + extent.len)
    }

    /// A writer of a pending block is done. True for the first one: it publishes the block.
    pub(crate) fn settle(&mut self, block: u64, offset: u64) -> bool {
        let ours = self.pending.get(&block).is_some_and(|pending| pending.offset == offset);
        if ours {
            self.pending.remove(&block);
        }
        ours
    }

    /// A writer of a pending block failed. True for the last one: nobody wrote the block, its place is free again.
    pub(crate) fn abort(&mut self, block: u64, offset: u64) -> bool {
        let Some(pending) = self.pending.get_mut(&block).filter(|pending| pending.offset == offset) else {
            return false;
        };
        pending.writers -= 1;
        if pending.writers > 0 {
            return false;
        }
        self.pending.remove(&block);
        self.unplaced += 1;
        // Some of the failed write may have reached it.
        self.stale.push(Extent { offset, len: self.block_bytes, former_block: Some(block) });
        true
    }

    /// A page of metadata changed.
    pub(crate) fn mark_dirty(&mut self, page: MetaPage) {
        self.dirty.insert(page);
    }

    /// What was made dirty uncovers payload where something else than zeros was seen before.
    pub(crate) fn require_barrier(&mut self) {
        self.barrier = true;
    }

    /// A block gave up its place; reusable when the log says so, durably.
    pub(crate) fn free(&mut self, block: u64, offset: u64) {
        self.unplaced += 1;
        self.freed.push(Extent { offset, len: self.block_bytes, former_block: Some(block) });
    }

    /// Whether what this page says is durable.
    pub(crate) fn is_durable(&self, page: MetaPage) -> bool {
        !self.dirty.contains(&page) && !self.logging.contains(&page)
    }

    /// Takes everything that the next log entries must say.
    pub(crate) fn take_unlogged(&mut self) -> Unlogged {
        self.logging = std::mem::take(&mut self.dirty);
        Unlogged {
            pages: self.logging.iter().copied().collect(),
            barrier: std::mem::take(&mut self.barrier),
            freed: std::mem::take(&mut self.freed),
        }
    }

    /// What was taken is durable.
    pub(crate) fn logged(&mut self, unlogged: Unlogged) {
        self.logging.clear();
        self.stale.extend(unlogged.freed);
    }
}

/// The gaps between what is used, in whole blocks: their content is unknown.
///
/// `used` are (offset, length) of everything that belongs to somebody.
pub(crate) fn gaps(mut used: Vec<(u64, u64)>, block_bytes: u64) -> Vec<Extent> {
    used.sort_unstable();
    let mut gaps = Vec::new();
    let mut at = MIB;
    for (offset, len) in used {
        if offset > at && offset - at >= block_bytes {
            let len = (offset - at) / block_bytes * block_bytes;
            gaps.push(Extent { offset: at, len, former_block: None });
        }
        at = at.max(offset + len);
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        let mut space = Space::new(2 * MIB, 10, Vec::new(), 64 * MIB);
        space.add_fresh(Extent { offset: 8 * MIB, len: 5 * MIB, former_block: None });
        space
    }

    #[test]
    fn pages_are_logged_before_those_that_rely_on_them() {
        let mut space = space();
        for page in [MetaPage::Bat(3), MetaPage::Bitmap(9), MetaPage::Bat(7), MetaPage::Bitmap(2)] {
            space.mark_dirty(page);
        }
        let wanted = [MetaPage::Bitmap(9), MetaPage::Bitmap(2), MetaPage::Bat(7), MetaPage::Bat(3)];
        assert_eq!(space.take_unlogged().pages, wanted);
    }

    #[test]
    fn bitmaps_fit_into_rests_and_cost_at_most_one_block_otherwise() {
        let mut space = space();
        assert_eq!(space.allocate_bitmap(), Some(12 * MIB), "five MiB are two blocks and a rest");
        assert_eq!(space.fresh_blocks(), 2);
        assert_eq!(space.allocate_bitmap(), Some(11 * MIB));
        assert_eq!(space.fresh_blocks(), 1);
    }

    #[test]
    fn a_rest_smaller_than_a_block_is_not_handed_out() {
        let mut space = space();
        assert_eq!(space.allocate(0), Some(8 * MIB));
        assert_eq!(space.allocate(1), Some(10 * MIB));
        assert_eq!(space.allocate(2), None);
    }

    #[test]
    fn space_of_a_failed_first_write_must_be_zeroed_before_reuse() {
        let mut space = space();
        let offset = space.allocate(3).expect("there is room");
        assert_eq!(space.join(3), offset);
        assert!(!space.abort(3, offset), "another writer is left");
        assert!(space.abort(3, offset));
        assert_eq!(space.fresh_blocks(), 1);
        assert_eq!(space.take_stale(u64::MAX, |_| false), [], "I/O may be left");
        assert_eq!(space.take_stale(u64::MAX, |_| true).len(), 1);
    }

    #[test]
    fn freed_space_is_stale_only_after_the_log_dropped_it() {
        let mut space = space();
        space.free(1, 20 * MIB);
        assert_eq!(space.take_stale(u64::MAX, |_| true), []);
        let unlogged = space.take_unlogged();
        space.logged(unlogged);
        assert_eq!(space.take_stale(u64::MAX, |_| true)[0].offset, 20 * MIB);
    }

    #[test]
    fn gaps_are_whole_blocks_between_what_is_used() {
        let used = vec![(4 * MIB, MIB), (0, 2 * MIB), (12 * MIB, 2 * MIB)];
        let found = gaps(used, 2 * MIB);
        assert_eq!(
            found.iter().map(|gap| (gap.offset, gap.len)).collect::<Vec<_>>(),
            [(2 * MIB, 2 * MIB), (5 * MIB, 6 * MIB)]
        );
    }
}
