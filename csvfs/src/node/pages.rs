//! Pages of files in the kernel's memory, for shared mappings.
//!
//! ```text
//!   fault --read_page, under PR, or EX if anybody here may write to pages--> page in the kernel
//!   store by a program: nobody is asked
//!   recall --> the kernel gives up its pages, writing back what was changed --> released
//!                 meanwhile: faults and writes of pages go on under the old grant; pages that came back go again
//!   write(2) where the kernel may have pages --> it gives those up --> written; faults there wait until it is
//! ```
//! A program may write to a page's one part in a mapping and to another with a call. The page would be written back over
//! what the call wrote if it were read before and changed after: so there is none while the call's bytes are on their way.
//!
//! The kernel gives up a page only when no request for it is under way, so such requests must never wait for a grant that is
//! being given back (F2); nor must a new size, before whose answer it writes no page back. **Invariant:** a grant is lowered only when the kernel has no page that was read under it (F3, F7).

use std::ops::Range;
use std::sync::Arc;

use lockmgr::Mode;

use super::FsError;
use super::core::{Core, Pin};
use super::inode::{Holding, Inode, State};
use super::io::{DataOp, What};
use super::ranges::RangeSet;

/// Separate ranges with pages that are told apart; with more, all of the file counts, and all pages go for a write.
const RANGES_MAX: usize = 4096;
/// All of a file.
const WHOLE: Range<u64> = 0..u64::MAX;

/// The kernel, as far as it keeps pages and attributes of files.
pub trait KernelCache: Send + Sync {
    /// Has it write back and give up the pages of a file in `range`, in bytes, on a thread of its own (F1); `then` is called
    /// when it has, and does not block. Never blocks itself. A range that ends at `u64::MAX` has no end.
    fn give_up(&self, ino: u64, range: Range<u64>, then: Box<dyn FnOnce() + Send>);

    /// Has it forget the attributes of an inode that it was promised, also those in answers on their way, on a thread that waits for no
    /// page (F2); `then` is called when it has, and does not block. Never blocks itself.
    fn forget_attributes(&self, ino: u64, then: Box<dyn FnOnce() + Send>);
}

/// What is known of the kernel's pages of a file.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// Where some were read that were not given up since.
    read: RangeSet,
    /// It gives all of them up at the moment.
    dropping: bool,
    /// It gives some up at the moment, for a write.
    clearing: bool,
    /// Who may write to pages without asking.
    pub(super) mappers: usize,
}

impl Pages {
    /// Whether the kernel may have any.
    pub(super) fn must_go(&self) -> bool {
        self.dropping || self.clearing || !self.read.is_empty()
    }

    /// Whether the kernel is to be told now to give up all. Those that come back from now on have to go again.
    pub(super) fn begin_drop(&mut self) -> bool {
        let begins = !std::mem::replace(&mut self.dropping, true);
        if begins {
            self.read.clear();
        }
        begins
    }

    /// Whether the kernel may have pages in `range`, or is about to give up some.
    pub(super) fn are_in(&self, range: &Range<u64>) -> bool {
        let some = !self.read.is_empty() && !self.read.parts_in(range).is_empty();
        self.dropping || self.clearing || some
    }

    /// The first part of `range` where a program may have stored something that nobody has written yet.
    pub(super) fn changed_in(&self, range: Range<u64>) -> Option<Range<u64>> {
        if self.mappers == 0 {
            return None;
        }
        if self.dropping || self.clearing {
            // They are no longer in `read`, and may be on their way.
            return Some(range);
        }
        self.read.parts_in(&range).into_iter().next()
    }

    /// What the kernel is to be told now to give up, for a write to `range`.
    pub(super) fn begin_clear(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        if self.dropping || self.clearing {
            return None;
        }
        self.clearing = true;
        self.read.remove(range.clone());
        if self.read.len() <= RANGES_MAX {
            return Some(range);
        }
        self.read.clear();
        Some(WHOLE)
    }

    fn read(&mut self, range: Range<u64>) {
        self.read.add(range);
        if self.read.len() > RANGES_MAX {
            self.read.add(WHOLE);
        }
    }

    fn dropped(&mut self) {
        self.dropping = false;
    }

    fn cleared(&mut self) {
        self.clearing = false;
    }
}

impl State {
    /// Whether a request may start.
    pub(super) fn admits_op(&self, op: &DataOp) -> bool {
        let mode = op.mode(self.pages.mappers);
        let going = self.pages.dropping || self.pages.clearing;
        if op.page && going && self.grant.release.is_none() {
            // The kernel waits for it. Where all go, a page that is read now goes at once, so nobody will write to it.
            let looks = op.what == What::Read && self.pages.dropping;
            let enough = if looks { Mode::ProtectedRead } else { mode };
            return self.grant.mode.covers(enough) && !self.frozen;
        }
        if op.page { self.admits_page(mode) } else { self.admits(mode) }
    }

    /// Whether the size may change although all pages go, for a grant that is to go: they do not go before the kernel has its answer.
    /// The grant under which they go is enough.
    pub(super) fn admits_size(&self) -> bool {
        let held = self.grant.mode == Mode::Exclusive && self.grant.release.is_none();
        self.pages.dropping && held && !self.promise.is_out() && !self.frozen && !self.leaving
    }

    /// A request starts.
    pub(super) fn admitted(&mut self, op: &DataOp) {
        self.in_flight += 1;
        if op.page && op.what == What::Read {
            self.pages.read(op.blocks());
        }
    }
}

impl Core {
    /// Has the kernel give up all its pages of a file, and goes on with the file then.
    pub(super) fn drop_pages(&self, inode: &Arc<Inode>) {
        self.give_up_pages(inode, WHOLE, Pages::dropped);
    }

    /// The same with the pages in `range`.
    pub(super) fn clear_pages(&self, inode: &Arc<Inode>, range: Range<u64>) {
        self.give_up_pages(inode, range, Pages::cleared);
    }

    fn give_up_pages(&self, inode: &Arc<Inode>, range: Range<u64>, note: fn(&mut Pages)) {
        let concerned = inode.clone();
        let then = move || {
            note(&mut concerned.lock().pages);
            concerned.kick();
        };
        let kernel = self.kernel().clone();
        match kernel {
            // Requests of pages that waited can go on now.
            Some(kernel) => {
                inode.kick();
                kernel.give_up(inode.ino, range, Box::new(then));
            }
            None => then(),
        }
    }
}

/// Somebody who may write to pages of a file without asking.
pub struct Mapper(Pin);

impl std::fmt::Debug for Mapper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mapper").field(&self.0.inode.ino).finish()
    }
}

impl Mapper {
    pub(super) fn new(core: &Arc<Core>, ino: u64) -> Result<Self, FsError> {
        let mapper = Self(core.pin(ino));
        let mut state = mapper.0.inode.lock();
        state.pages.mappers += 1;
        let shared = state.pages.must_go() && state.grant.mode != Mode::Exclusive;
        drop(state);
        if shared {
            // Pages that were read to be looked at only can be written to from now on.
            drop(mapper.0.inode.hold(Mode::Exclusive, Holding::Shared)?);
        }
        Ok(mapper)
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.0.inode.lock().pages.mappers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Invariant F2: what comes back while the kernel gives up its pages goes in the next round.
    #[test]
    fn a_page_that_comes_back_while_pages_go_is_not_forgotten() {
        let mut pages = Pages::default();
        assert!(!pages.must_go());
        pages.read(0..4096);
        assert!(pages.must_go() && pages.begin_drop());
        pages.read(0..4096);
        assert!(!pages.begin_drop(), "it is told once");
        pages.dropped();
        assert!(pages.must_go() && pages.begin_drop());
        pages.dropped();
        assert!(!pages.must_go());
    }

    #[test]
    fn a_write_has_only_the_pages_go_that_it_would_meet() {
        let mut pages = Pages::default();
        pages.read(0..8192);
        pages.read(1 << 20..2 << 20);
        assert!(!pages.are_in(&(8192..65536)));
        assert!(pages.are_in(&(4096..8192)) && pages.begin_clear(4096..8192) == Some(4096..8192));
        assert_eq!(pages.begin_clear(0..4096), None, "one after the other");
        assert!(pages.are_in(&(4096..8192)), "they are not gone yet");
        pages.cleared();
        assert!(!pages.are_in(&(4096..8192)) && pages.are_in(&(0..4096)) && pages.must_go());
    }

    // Invariant F3: while some go, a grant is not lowered as if they were gone.
    #[test]
    fn pages_that_are_about_to_go_count_until_they_are_gone() {
        let mut pages = Pages::default();
        pages.read(0..4096);
        assert!(pages.begin_clear(0..4096).is_some());
        assert!(pages.must_go());
        pages.cleared();
        assert!(!pages.must_go());
    }

    #[test]
    fn what_may_have_been_stored_is_told_until_it_is_written_back_and_only_where_somebody_may_store() {
        let mut pages = Pages::default();
        pages.read(8192..16384);
        assert_eq!(pages.changed_in(0..65536), None, "nobody may store");
        pages.mappers = 1;
        assert_eq!(pages.changed_in(0..65536), Some(8192..16384));
        assert_eq!(pages.changed_in(12288..65536), Some(12288..16384));
        assert_eq!(pages.changed_in(16384..65536), None);
        assert!(pages.begin_clear(8192..12288).is_some());
        assert_eq!(pages.changed_in(4096..12288), Some(4096..12288), "it is not written yet");
        pages.cleared();
        assert_eq!(pages.changed_in(4096..12288), None);
        assert!(pages.begin_drop());
        assert_eq!(pages.changed_in(4096..65536), Some(4096..65536), "nor are all others");
        pages.dropped();
        assert_eq!(pages.changed_in(4096..65536), None);
    }

    #[test]
    fn however_scattered_pages_are_what_is_known_of_them_is_bounded() {
        let mut pages = Pages::default();
        for page in 0..=RANGES_MAX as u64 {
            pages.read(page * 8192..page * 8192 + 4096);
        }
        assert_eq!(pages.read.len(), 1);
        assert!(pages.are_in(&(4096..8192)));
        // Nor do writes that each leave a gap make it more.
        for page in 0..RANGES_MAX as u64 {
            assert!(pages.begin_clear(page * 8192 + 4096..page * 8192 + 8192).is_some());
            pages.cleared();
            assert!(pages.read.len() <= RANGES_MAX);
        }
        assert!(!pages.must_go(), "all went at last");
    }
}
