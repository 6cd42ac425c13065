//! Blocks of the LUN in memory, for reads that come again: many readers of one image, or of its clones.
//!
//! ```text
//!   read, resolved --> all blocks here? --yes--> copied, no I/O
//!                            '--no--> LUN --> kept, unless something there was written or let go in the meantime
//! ```
//!
//! | what happens | what is kept of its blocks |
//! |---|---|
//! | a write of this node begins | goes, and nothing is kept or answered until it has ended |
//! | a file lets go of them: cut, punched, replaced by a copy, cloned over | goes |
//! | the grant goes under which they were read | goes |
//! | another node writes, or the file changes there | had gone before, with the grant |
//!
//! Blocks are found by their place on the LUN, so files that share a block share what is kept of it.
//!
//! **Invariants:** a block that is kept is one that a file maps whose grant is held, from when it was read until now: so
//! nobody else writes to it (C6, E3). What is answered is what a read of the LUN would give now, and a node that may not
//! read the LUN answers nothing from memory either (B3).

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockio::{IoBuf, Permission, WriteRight};

use super::map::{BLOCK_BYTES, block_ceil};

const BLOCK: usize = 4096;
/// Longer reads are passed by: what reads a whole file once would push everything else out.
const READ_BYTES_MAX: usize = 256 << 10;
/// Counters of changes. Blocks that share one only keep less.
const MARKS: usize = 4096;
/// Neighbours that share a counter.
const MARK_BLOCKS: u64 = 16;
/// Memory of a block beside its bytes, about.
const OVERHEAD_BYTES: u64 = 128;

/// Numbers of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// What it may take; 0 when it is off.
    pub limit_bytes: u64,
    /// What it has.
    pub used_bytes: u64,
    /// Reads that were answered from it.
    pub hits: u64,
    /// Reads that went to the LUN, and could have been answered.
    pub misses: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct ReadCache {
    on: AtomicBool,
    /// Writes under way that began while it was off.
    uncounted: AtomicUsize,
    hits: AtomicU64,
    misses: AtomicU64,
    /// Rank: leaf.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    right: Option<Arc<dyn WriteRight>>,
    limit_blocks: usize,
    blocks: HashMap<u64, Block>,
    /// Blocks in the order in which they came or were found used.
    order: VecDeque<u64>,
    /// Grants that are held.
    lives: HashSet<u64>,
    next_life: u64,
    marks: Marks,
}

struct Block {
    bytes: Arc<[u8; BLOCK]>,
    /// So many of them are known: a read may end before its last block does.
    known: usize,
    /// The grant under which it was read.
    life: u64,
    used: bool,
}

/// What changes on the LUN, by place.
struct Marks {
    /// Changes so far, and writes under way.
    places: Vec<(u64, u32)>,
    /// Changes of everything.
    all: u64,
}

impl Default for Marks {
    fn default() -> Self {
        Self { places: vec![(0, 0); MARKS], all: 0 }
    }
}

/// A read on its way: what may have changed until it is there.
#[derive(Debug)]
pub(super) struct Fill {
    range: Range<u64>,
    life: u64,
    marks: Vec<(usize, u64)>,
    all: u64,
}

/// A write on its way.
#[derive(Debug)]
#[must_use = "nothing is kept there until it has ended"]
pub(super) struct Change {
    lun: u64,
    len: u64,
    counted: bool,
}

fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

impl Marks {
    /// Where the blocks are counted, each place once.
    fn places(blocks: &Range<u64>) -> impl Iterator<Item = usize> {
        let (first, end) = (blocks.start / MARK_BLOCKS, blocks.end.div_ceil(MARK_BLOCKS));
        let end = end.min(first + MARKS as u64);
        (first..end).map(|place| usize::try_from(place % MARKS as u64).expect("below a small number"))
    }

    fn changed(&mut self, blocks: &Range<u64>) {
        if blocks.end - blocks.start > MARKS as u64 * MARK_BLOCKS {
            self.all += 1;
            return;
        }
        Self::places(blocks).for_each(|at| self.places[at].0 += 1);
    }
}

impl ReadCache {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it keeps anything.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    /// Changes how much it may take; 0 turns it off. `right`: who knows whether this node may do I/O.
    pub(super) fn resize(&self, limit_bytes: u64, right: Option<Arc<dyn WriteRight>>) {
        let mut kept = self.lock();
        let blocks = limit_bytes / (BLOCK_BYTES + OVERHEAD_BYTES);
        kept.limit_blocks = usize::try_from(blocks).unwrap_or(usize::MAX);
        kept.right = right;
        self.on.store(kept.limit_blocks > 0, Ordering::SeqCst);
        kept.shrink();
        if kept.limit_blocks == 0 {
            (kept.blocks, kept.order) = (HashMap::new(), VecDeque::new());
            // Changes are not counted from now on: no read that is on its way may be kept later.
            kept.marks.all += 1;
        }
    }

    pub(super) fn stats(&self) -> CacheStats {
        let kept = self.lock();
        let bytes = |blocks: usize| blocks as u64 * (BLOCK_BYTES + OVERHEAD_BYTES);
        CacheStats {
            limit_bytes: bytes(kept.limit_blocks),
            used_bytes: bytes(kept.blocks.len()),
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
        }
    }

    /// A grant begins to be read under: its number, never 0.
    pub(super) fn begin_life(&self) -> u64 {
        let mut kept = self.lock();
        kept.next_life += 1;
        let life = kept.next_life;
        kept.lives.insert(life);
        life
    }

    /// A grant goes, and with it all that was read under it.
    pub(super) fn end_life(&self, life: u64) {
        if life != 0 {
            self.lock().lives.remove(&life);
        }
    }

    /// Fills `buf` with what lies at `lun`, if all of it is here. `Some` within: it may be kept when it has been read.
    pub(super) fn read(&self, lun: u64, buf: &IoBuf, life: u64) -> Result<(), Option<Fill>> {
        if !self.is_on() || buf.len() > READ_BYTES_MAX || buf.is_empty() {
            return Err(None);
        }
        let range = lun..lun + buf.len() as u64;
        let mut kept = self.lock();
        if let Some(found) = kept.find(&range) {
            drop(kept);
            copy_out(&range, &found, buf);
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(());
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        if self.uncounted.load(Ordering::SeqCst) > 0 {
            return Err(None);
        }
        let mut marks = Vec::new();
        for at in Marks::places(&blocks(&range)) {
            match kept.marks.places[at] {
                (changes, 0) => marks.push((at, changes)),
                _ => return Err(None),
            }
        }
        let all = kept.marks.all;
        Err(Some(Fill { range, life, marks, all }))
    }

    /// A read has ended well: keeps its blocks, unless something has changed there since it began.
    pub(super) fn keep(&self, fill: &Fill, buf: &IoBuf) {
        // Before the lock: each block is copied once, under nothing.
        let mut found = Vec::new();
        for at in (block_ceil(fill.range.start)..fill.range.end).step_by(BLOCK) {
            let index = |at: u64| usize::try_from(at - fill.range.start).expect("an offset into a buffer");
            let (from, to) = (index(at), index(fill.range.end.min(at + BLOCK_BYTES)));
            let mut bytes = [0; BLOCK];
            buf.slice(from..to).copy_to(&mut bytes[..to - from]);
            let block = Block { bytes: Arc::new(bytes), known: to - from, life: fill.life, used: false };
            found.push((at / BLOCK_BYTES, block));
        }
        let mut kept = self.lock();
        let unchanged = |&(at, mark): &(usize, u64)| kept.marks.places[at] == (mark, 0);
        let valid = kept.limit_blocks > 0
            && kept.marks.all == fill.all
            && kept.lives.contains(&fill.life)
            && fill.marks.iter().all(unchanged);
        if valid {
            found.into_iter().for_each(|(number, block)| kept.put(number, block));
        }
    }

    /// A write begins: what is kept there goes, and nothing new comes before [`ReadCache::end_change`].
    pub(super) fn begin_change(&self, lun: u64, len: u64) -> Change {
        // Counted before it is looked whether anything is kept: who turns the cache on sees one or the other.
        self.uncounted.fetch_add(1, Ordering::SeqCst);
        if !self.is_on() {
            return Change { lun, len, counted: false };
        }
        let range = blocks(&(lun..lun + len));
        let mut kept = self.lock();
        self.uncounted.fetch_sub(1, Ordering::SeqCst);
        Marks::places(&range).for_each(|at| kept.marks.places[at].1 += 1);
        kept.drop_blocks(&range);
        Change { lun, len, counted: true }
    }

    /// The write has ended, well or not.
    pub(super) fn end_change(&self, change: &Change) {
        let range = blocks(&(change.lun..change.lun + change.len));
        if change.counted {
            let mut kept = self.lock();
            Marks::places(&range).for_each(|at| kept.marks.places[at].1 -= 1);
            kept.marks.changed(&range);
            return;
        }
        // Reads that began in the meantime see the change before the write is not counted any more.
        if self.is_on() {
            self.lock().drop_blocks(&range);
        }
        self.uncounted.fetch_sub(1, Ordering::SeqCst);
    }

    /// A file lets go of these bytes: who has them next writes there without this node's knowledge.
    pub(super) fn forget(&self, lun: u64, len: u64) {
        if len > 0 && self.is_on() {
            self.lock().drop_blocks(&blocks(&(lun..lun.saturating_add(len))));
        }
    }
}

/// Copies what was found, which is the bytes of `range`.
fn copy_out(range: &Range<u64>, found: &[Arc<[u8; BLOCK]>], buf: &IoBuf) {
    for (block, bytes) in blocks(range).zip(found) {
        let (from, to) = (range.start.max(block * BLOCK_BYTES), range.end.min((block + 1) * BLOCK_BYTES));
        let index = |at: u64| usize::try_from(at).expect("an offset into a buffer");
        let part = &bytes[index(from % BLOCK_BYTES)..][..index(to - from)];
        buf.slice(index(from - range.start)..index(to - range.start)).copy_from(part);
    }
}

impl Kept {
    /// All blocks of `range`, if they are here and may be told.
    fn find(&mut self, range: &Range<u64>) -> Option<Vec<Arc<[u8; BLOCK]>>> {
        let mut found = Vec::new();
        for number in blocks(range) {
            let wanted = range.end.min((number + 1) * BLOCK_BYTES) - number * BLOCK_BYTES;
            let block = self.blocks.get_mut(&number)?;
            if (block.known as u64) < wanted || !self.lives.contains(&block.life) {
                return None;
            }
            block.used = true;
            found.push(block.bytes.clone());
        }
        let may_read = self.right.as_ref().is_none_or(|right| right.check() == Permission::Granted);
        may_read.then_some(found)
    }

    /// Also what is on its way from there is not kept.
    fn drop_blocks(&mut self, range: &Range<u64>) {
        self.marks.changed(range);
        if range.end - range.start > self.blocks.len() as u64 {
            self.blocks.retain(|block, _| !range.contains(block));
            return;
        }
        for block in range.clone() {
            self.blocks.remove(&block);
        }
    }

    fn put(&mut self, number: u64, block: Block) {
        if self.blocks.insert(number, block).is_none() {
            self.order.push_back(number);
        }
        self.shrink();
    }

    /// Drops what was not used for the longest time.
    fn shrink(&mut self) {
        while self.blocks.len() > self.limit_blocks || self.order.len() > 2 * self.limit_blocks.max(1) {
            let Some(number) = self.order.pop_front() else { return };
            match self.blocks.get_mut(&number) {
                // A second chance, unless its grant has gone.
                Some(block) if block.used && self.lives.contains(&block.life) => {
                    block.used = false;
                    self.order.push_back(number);
                }
                _ => drop(self.blocks.remove(&number)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn buf(byte: u8, len: usize) -> IoBuf {
        let buf = IoBuf::zeroed(len);
        buf.copy_from(&vec![byte; len]);
        buf
    }

    fn on() -> (ReadCache, u64) {
        let cache = ReadCache::default();
        cache.resize(1 << 20, None);
        let life = cache.begin_life();
        (cache, life)
    }

    fn fill(cache: &ReadCache, lun: u64, life: u64) -> Fill {
        cache.read(lun, &IoBuf::zeroed(BLOCK), life).expect_err("not here").expect("it may be kept")
    }

    fn hit(cache: &ReadCache, lun: u64) -> Option<u8> {
        let buf = IoBuf::zeroed(BLOCK);
        cache.read(lun, &buf, 0).ok().map(|()| buf.to_vec()[0])
    }

    // Invariant C6: nothing that was read under a grant outlives it.
    #[test]
    fn what_was_read_under_a_grant_goes_with_it() {
        let (cache, one) = on();
        let other = cache.begin_life();
        for (lun, life) in [(0, one), (1 << 20, other)] {
            cache.keep(&fill(&cache, lun, life), &buf(7, BLOCK));
        }
        cache.end_life(one);
        assert_eq!((hit(&cache, 0), hit(&cache, 1 << 20)), (None, Some(7)));
        // One that ends while a read is under way too.
        let late = fill(&cache, 2 << 20, other);
        cache.end_life(other);
        cache.keep(&late, &buf(7, BLOCK));
        assert_eq!(hit(&cache, 2 << 20), None);
    }

    #[test]
    fn nothing_is_answered_or_kept_while_a_write_is_under_way() {
        let (cache, life) = on();
        let before = fill(&cache, 0, life);
        cache.keep(&fill(&cache, 0, life), &buf(1, BLOCK));
        let write = cache.begin_change(512, 512);
        assert_eq!(hit(&cache, 0), None, "a write has begun");
        assert!(cache.read(0, &IoBuf::zeroed(BLOCK), life).expect_err("not here").is_none());
        cache.keep(&before, &buf(1, BLOCK));
        assert_eq!(hit(&cache, 0), None, "it was read before the write");
        cache.end_change(&write);
        cache.keep(&before, &buf(1, BLOCK));
        assert_eq!(hit(&cache, 0), None, "it was read before the write");
        cache.keep(&fill(&cache, 0, life), &buf(2, BLOCK));
        assert_eq!(hit(&cache, 0), Some(2));
    }

    // What a file lets go of may be written by another node at once, under a grant that this one knows nothing of.
    #[test]
    fn what_a_file_lets_go_of_is_not_kept_by_a_read_under_way() {
        for len in [4096, 1 << 40] {
            let (cache, life) = on();
            let late = fill(&cache, 8192, life);
            cache.keep(&fill(&cache, 8192, life), &buf(1, BLOCK));
            cache.forget(8192, len);
            assert_eq!(hit(&cache, 8192), None);
            cache.keep(&late, &buf(1, BLOCK));
            assert_eq!(hit(&cache, 8192), None);
        }
    }

    #[test]
    fn changes_that_happened_while_it_was_off_count() {
        let (cache, life) = on();
        let late = fill(&cache, 0, life);
        cache.resize(0, None);
        let write = cache.begin_change(0, 4096);
        cache.end_change(&write);
        cache.resize(1 << 20, None);
        cache.keep(&late, &buf(1, BLOCK));
        assert_eq!(hit(&cache, 0), None, "the write was not counted");
        // A write that began before it was turned on.
        cache.resize(0, None);
        let write = cache.begin_change(0, 4096);
        cache.resize(1 << 20, None);
        assert!(cache.read(0, &IoBuf::zeroed(BLOCK), life).expect_err("not here").is_none());
        cache.end_change(&write);
        cache.keep(&fill(&cache, 0, life), &buf(2, BLOCK));
        assert_eq!(hit(&cache, 0), Some(2));
    }

    #[test]
    fn it_takes_no_more_than_it_may_and_nothing_when_it_is_off() {
        let (cache, life) = on();
        cache.resize(40 * (BLOCK_BYTES + OVERHEAD_BYTES), None);
        for at in 0..200_u64 {
            cache.keep(&fill(&cache, at * BLOCK_BYTES, life), &buf(3, BLOCK));
            // The first one is used all the time, and stays.
            assert_eq!(hit(&cache, 0), Some(3));
        }
        let stats = cache.stats();
        assert!(stats.used_bytes <= stats.limit_bytes && stats.used_bytes > 0, "{stats:?}");
        cache.resize(0, None);
        assert_eq!((cache.stats().used_bytes, hit(&cache, 0)), (0, None));
    }

    // Invariant B3: a node whose lease is over does not answer from memory.
    #[test]
    fn without_the_right_to_do_io_nothing_is_answered() {
        struct Over(AtomicBool);
        impl WriteRight for Over {
            fn check(&self) -> Permission {
                if self.0.load(Ordering::SeqCst) { Permission::Wait } else { Permission::Granted }
            }
        }
        let (cache, life) = on();
        let right = Arc::new(Over(AtomicBool::new(false)));
        cache.resize(1 << 20, Some(right.clone()));
        cache.keep(&fill(&cache, 0, life), &buf(5, BLOCK));
        assert_eq!(hit(&cache, 0), Some(5));
        right.0.store(true, Ordering::SeqCst);
        assert_eq!(hit(&cache, 0), None);
    }
}
