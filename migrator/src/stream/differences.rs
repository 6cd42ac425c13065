//! Which pages of a run go as differences: what was sent of them is known, and little has changed.
//!
//! ```text
//!   page --> known? --> compared with what is known --> unchanged: nothing | little: an entry | much: whole
//!                 `---------------------------------------------------------------------------------> whole
//!            and then remembered as it is now
//! ```
//! **Invariant:** the page is compared, remembered and sent from one copy, which the guest cannot write; the copy is remembered
//! only if it goes out, in whichever way, and a stream on which something fails sends nothing more.

use super::choice::{Compared, Differing};
use super::delta::{Difference, Entries};
use super::record::PAGE;
use super::remembered::Remembered;

/// How a page goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// With all its content.
    Whole,
    /// As a zero page.
    Zero,
    /// As an entry that waits for its record.
    Entry,
    /// Not at all: the target has it.
    Unchanged,
}

/// What has been saved.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Saved {
    pub(super) pages: u64,
    pub(super) bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Differences {
    remembered: Remembered,
    choice: Differing,
    pub(super) always: bool,
    run: Compared,
    pub(super) entries: Entries,
    pub(super) saved: Saved,
}

impl Differences {
    /// With memory for so many bytes of pages.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            remembered: Remembered::new(bytes_max),
            choice: Differing::default(),
            always: false,
            run: Compared::default(),
            entries: Entries::default(),
            saved: Saved::default(),
        }
    }

    /// Pages that go without being looked at: zeros, and those that are not worth it now.
    pub(super) fn forget_others(&mut self, first: u64, ways: &[Way]) {
        for (page, way) in (first..).zip(ways) {
            if *way == Way::Zero || !self.takes(page) {
                self.remembered.forget(page);
            }
        }
    }

    /// How the other pages go; they were sent before, or are sent `fresh`. There must be room for their entries.
    pub(super) fn look(&mut self, first: u64, content: &[u8], fresh: bool, ways: &mut [Way]) {
        for ((page, content), way) in (first..).zip(content.chunks_exact(PAGE)).zip(ways) {
            if *way != Way::Zero && self.takes(page) {
                *way = self.way(page, content, fresh);
            }
        }
    }

    fn takes(&self, page: u64) -> bool {
        self.choice.takes(page) || self.always
    }

    fn way(&mut self, page: u64, content: &[u8], fresh: bool) -> Way {
        let way = match self.remembered.get(page) {
            None => Way::Whole,
            Some(before) => {
                let found = self.entries.add(page, before, content);
                self.compared(found)
            }
        };
        self.run.handled_bytes += PAGE as u64;
        if way != Way::Unchanged {
            self.remembered.put(page, content, !fresh);
        }
        way
    }

    fn compared(&mut self, found: Difference) -> Way {
        let (way, left) = match found {
            Difference::None => (Way::Unchanged, 0),
            Difference::Entry(bytes) => (Way::Entry, bytes),
            Difference::Large => (Way::Whole, PAGE),
        };
        self.run.compared_bytes += PAGE as u64;
        self.run.left_bytes += left as u64;
        if way != Way::Whole {
            self.saved.pages += 1;
            self.saved.bytes += (PAGE - left) as u64;
        }
        way
    }

    /// Looking at a run took so long; whole pages take `whole_ns` for each MiB.
    pub(super) fn looked(&mut self, handling_ns: u64, whole_ns: Option<u64>) {
        self.run.handling_ns = handling_ns;
        self.choice.after(std::mem::take(&mut self.run), whole_ns);
    }
}
