//! Pages of files in the kernel's memory, for shared mappings.
//!
//! ```text
//!   fault --read_page, under PR, or EX if anybody here may write to pages--> page in the kernel
//!   store by a program: nobody is asked
//!   recall --> the kernel gives up its pages, writing back what was changed --> released
//!                 meanwhile: faults and writes of pages go on under the old grant; pages that came back go again
//! ```
//! The kernel gives up a page only when no request for it is under way, so such requests must never wait for a grant that is
//! being given back (F2). **Invariant:** a grant is lowered only when the kernel has no page that was read under it (F3, F7).

use std::sync::Arc;

use lockmgr::Mode;

use super::FsError;
use super::core::{Core, Pin};
use super::inode::{Inode, State};
use super::io::{DataOp, What};

/// The kernel, as far as it keeps pages.
pub trait KernelPages: Send + Sync {
    /// Has it write back and give up all pages of a file, on a thread of its own (F1); `then` is called when it has, and does
    /// not block. Never blocks itself.
    fn give_up(&self, ino: u64, then: Box<dyn FnOnce() + Send>);
}

/// What is known of the kernel's pages of a file.
#[derive(Debug, Default)]
pub(super) struct Pages {
    /// There may be some.
    any: bool,
    /// It gives them up at the moment.
    dropping: bool,
    /// One came back meanwhile.
    again: bool,
    /// Who may write to pages without asking.
    pub(super) mappers: usize,
}

impl Pages {
    pub(super) fn must_go(&self) -> bool {
        self.any
    }

    /// Whether the kernel is to be told now.
    pub(super) fn begin_drop(&mut self) -> bool {
        !std::mem::replace(&mut self.dropping, true)
    }

    fn read(&mut self) {
        self.any = true;
        self.again |= self.dropping;
    }

    fn dropped(&mut self) {
        self.any = std::mem::take(&mut self.again);
        self.dropping = false;
    }
}

impl State {
    /// Whether a request may start.
    pub(super) fn admits_op(&self, op: &DataOp) -> bool {
        let mode = op.mode(self.pages.mappers);
        if op.page && self.pages.dropping && self.grant.release.is_none() {
            // The kernel waits for it. A page that is read now goes at once, so nobody will write to it.
            let enough = if op.what == What::Read { Mode::ProtectedRead } else { mode };
            return self.grant.mode.covers(enough) && !self.frozen;
        }
        self.admits(mode)
    }

    /// A request starts.
    pub(super) fn admitted(&mut self, op: &DataOp) {
        self.in_flight += 1;
        if op.page && op.what == What::Read {
            self.pages.read();
        }
    }
}

impl Core {
    /// Has the kernel give up its pages of a file, and goes on with the file then.
    pub(super) fn drop_pages(&self, inode: &Arc<Inode>) {
        let dropped = inode.clone();
        let then = move || {
            dropped.lock().pages.dropped();
            dropped.kick();
        };
        let kernel = self.kernel().clone();
        match kernel {
            // Requests that wait for the old grant can go on now.
            Some(kernel) => {
                inode.kick();
                kernel.give_up(inode.ino, Box::new(then));
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
        let shared = state.pages.any && state.grant.mode != Mode::Exclusive;
        drop(state);
        if shared {
            // Pages that were read to be looked at only can be written to from now on.
            drop(mapper.0.inode.hold(Mode::Exclusive, false)?);
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
        pages.read();
        assert!(pages.must_go() && pages.begin_drop());
        assert!(!pages.begin_drop(), "it is told once");
        pages.read();
        pages.dropped();
        assert!(pages.must_go() && pages.begin_drop());
        pages.dropped();
        assert!(!pages.must_go());
    }
}
