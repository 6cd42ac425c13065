//! Attributes that the kernel may tell by itself for a while, without asking.
//!
//! ```text
//!   asked --> answered without, twice the same to one thread
//!     ^         |
//!     |         v
//!     |       answered with a promise --> the kernel tells them itself, for as long as it was told at most
//!     |                                      |
//!     |                                      | a change is to begin, or the grant to go: taken back
//!     |                                      v
//!     '-- it has to ask <-- forgotten: the change begins, the grant goes
//! ```
//! **Invariants:** attributes that are promised are not changed, by any node, before the kernel has forgotten them, except by what the
//! kernel itself writes to pages and then forgets by itself (F3). Nothing is promised that the kernel has yet to take over: it does
//! that beside who reads, who would see some of the past with the promise. A promise ends before others may suspect this node (F5).
//! Nothing that the kernel may wait for waits for a promise to be taken back: pages that are written back do not (F1, F2).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lockmgr::Mode;

use super::advance::Out;
use super::core::Core;
use super::inode::{Inode, State};
use super::rank;
use super::{Attr, FileKind};
use crate::proto as pb;

/// Longest promise. Whoever looks again after it asks once.
const PROMISE_MAX: Duration = Duration::from_secs(1);
/// How often the thread that gets a promise has been told the same without. The first time it may have asked before the change: the
/// kernel drops that answer then.
const SHOWN_MIN: u8 = 2;
/// Looks in a row that are answered without a promise, at most, when each promise before was taken back for a change at once.
const PAUSE_MAX: u8 = 127;

/// Inodes that are remembered to have lost one of several names.
const PARTED_MAX: usize = 256;

type Then = Box<dyn FnOnce() + Send>;

/// Inodes that have lost one of several names by a call of this node, latest last. The kernel counts a name down when it comes to the
/// answer, from whatever it was told last: a promise that it came to before would have it count twice.
#[derive(Debug, Default)]
pub(super) struct Parted {
    /// Rank 3.
    inos: Mutex<VecDeque<u64>>,
}

impl Parted {
    pub(super) fn note(&self, attr: &Attr) {
        if attr.nlink == 0 || attr.kind == FileKind::Directory {
            return;
        }
        let _rank = rank::Held::enter(rank::MEMORY);
        let mut inos = self.inos.lock().unwrap_or_else(PoisonError::into_inner);
        if inos.len() == PARTED_MAX {
            inos.pop_front();
        }
        inos.push_back(attr.ino);
    }

    fn has(&self, ino: u64) -> bool {
        let _rank = rank::Held::enter(rank::MEMORY);
        self.inos.lock().unwrap_or_else(PoisonError::into_inner).contains(&ino)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Promise {
    /// The kernel was told it, and not since to forget it.
    given: bool,
    /// The kernel is forgetting it.
    going: bool,
    /// The attributes are not what was promised.
    outdated: bool,
    /// What happens next with the file waits until it has gone.
    steps: bool,
    /// Changes that wait until it has gone.
    waiting: Vec<Then>,
    /// Looks that are answered without one before it is given again.
    pause: u8,
    /// The length of the next pause.
    next_pause: u8,
    /// What was told last without a promise.
    shown: Option<Box<Shown>>,
}

/// Attributes that a thread was told so often in a row.
struct Shown {
    attr: Attr,
    asker: u32,
    times: u8,
}

impl Promise {
    /// Whether the kernel may still tell something.
    pub(super) fn is_out(&self) -> bool {
        self.given || self.going
    }

    pub(super) fn is_outdated(&self) -> bool {
        self.outdated
    }

    /// The attributes are to change, or have, without a change that waits. Whether that concerns anybody.
    pub(super) fn outdate(&mut self) -> bool {
        self.outdated |= self.given;
        self.outdated
    }

    /// Whether one is given to the thread `asker`, which looks. What is looked at but once or twice from change to change costs more to
    /// take back than a look saves.
    ///
    /// The kernel reads attributes without the lock under which it takes others over, so who looks meanwhile may see some of the
    /// past with a promise of now. So it has taken them over before they are promised: as the thread that was told them asks again.
    fn give(&mut self, attr: &Attr, asker: u32) -> bool {
        if self.going || self.outdated || asker == 0 {
            return false;
        }
        if self.given {
            self.next_pause = 0;
            return true;
        }
        if self.pause > 0 {
            self.pause -= 1;
            return false;
        }
        match &mut self.shown {
            Some(shown) if shown.asker == asker && shown.attr == *attr => {
                if shown.times >= SHOWN_MIN {
                    (self.given, self.shown) = (true, None);
                    return true;
                }
                shown.times += 1;
            }
            shown => *shown = Some(Box::new(Shown { attr: *attr, asker, times: 1 })),
        }
        false
    }

    /// It is to be taken back: whether the kernel is to be told so now.
    fn begin(&mut self) -> bool {
        self.outdated = false;
        let begins = std::mem::take(&mut self.given);
        if begins {
            // What comes next may be the same again, and the kernel was told something else in between.
            self.shown = None;
            self.going = true;
            self.next_pause = self.next_pause.saturating_mul(2).saturating_add(1).min(PAUSE_MAX);
            self.pause = self.next_pause;
        }
        begins
    }

    /// The kernel has forgotten it: whether the file goes on, and which changes do.
    fn ended(&mut self) -> (bool, Vec<Then>) {
        self.going = false;
        (std::mem::take(&mut self.steps), std::mem::take(&mut self.waiting))
    }
}

impl State {
    /// Takes the promise back, if there is one, and goes on with the file then. Whether there is.
    pub(super) fn take_back(&mut self, out: &mut Out) -> bool {
        let is_out = self.promise.is_out();
        if is_out {
            self.promise.steps = true;
            out.forget_attr |= self.promise.begin();
        }
        is_out
    }

    /// Whether nothing is under way that changes attributes, or gives the grant back.
    fn is_still(&self) -> bool {
        let stays = self.users > 0 || self.grant.mode != Mode::Exclusive || self.is_clean();
        let asked_for = self.in_flight > 0 || !self.waiting.is_empty();
        stays && !asked_for && !self.leaving && !self.unwanted
    }
}

impl Inode {
    /// Attributes, if they are known here without a message, and how long the kernel may tell them without asking. Zero: not at
    /// all. Only for who knows the kernel that this node was given, and which of its threads asks.
    pub(super) fn promise(&self, asker: u32) -> Option<(Attr, Duration)> {
        let longest = self.core.tells_for().min(PROMISE_MAX);
        let mut state = self.lock();
        state.used = true;
        let attr = self.cached_attr(&mut state)?;
        let may_be = attr.nlink > 0 && !longest.is_zero() && state.is_still();
        let given = may_be && !self.core.parted.has(self.ino) && state.promise.give(&attr, asker);
        Some((attr, if given { longest } else { Duration::ZERO }))
    }

    /// Calls `then` when the kernel tells no attributes of the inode any more: at once, or on the kernel's thread.
    pub(super) fn when_taken_back(self: &Arc<Self>, then: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if !state.promise.is_out() {
            drop(state);
            return then();
        }
        state.promise.waiting.push(Box::new(then));
        let begins = state.promise.begin();
        drop(state);
        if begins {
            self.core.forget_attr(self);
        }
    }

    fn taken_back(self: &Arc<Self>) {
        let (steps, waiting) = self.lock().promise.ended();
        for then in waiting {
            then();
        }
        if steps {
            self.kick();
        }
    }
}

impl Core {
    /// An inode may have lost one of several names, by a call whose answer the kernel has yet to come to.
    pub(super) fn has_parted(&self, attr: Option<&pb::Attr>) {
        if let Some(Ok(attr)) = attr.map(Attr::checked) {
            self.parted.note(&attr);
        }
    }

    /// Has the kernel forget what it may tell of an inode.
    pub(super) fn forget_attr(&self, inode: &Arc<Inode>) {
        let concerned = inode.clone();
        let then = move || concerned.taken_back();
        let kernel = self.kernel().clone();
        match kernel {
            Some(kernel) => kernel.forget_attributes(inode.ino, Box::new(then)),
            None => then(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Threads of programs.
    const THREAD: u32 = 7;
    const OTHER: u32 = 8;

    fn of_size(size_bytes: u64) -> Attr {
        let kind = pb::FileKind::Regular.into();
        Attr::checked(&pb::Attr { ino: 2, kind, nlink: 1, size_bytes, ..pb::Attr::default() })
            .expect("a file")
    }

    /// Looks until there is a promise: how many had none.
    fn looks(promise: &mut Promise, attr: &Attr) -> usize {
        (0..1000).position(|_| promise.give(attr, THREAD)).expect("a promise")
    }

    // Invariant F3: what is being taken back is out until the kernel has forgotten it, and not given again meanwhile.
    #[test]
    fn a_promise_is_out_until_the_kernel_has_forgotten_it() {
        let (mut promise, attr) = (Promise::default(), of_size(1));
        assert!(!promise.is_out() && !promise.begin(), "nothing was promised");
        looks(&mut promise, &attr);
        assert!(promise.is_out() && promise.give(&attr, OTHER));
        assert!(promise.begin() && promise.is_out() && !promise.begin(), "the kernel is told once");
        assert!((0..1000).all(|_| !promise.give(&attr, THREAD)));
        promise.steps = true;
        promise.waiting.push(Box::new(|| {}));
        let (steps, waiting) = promise.ended();
        assert!(steps && waiting.len() == 1 && !promise.is_out());
        looks(&mut promise, &attr);
    }

    #[test]
    fn what_is_outdated_is_not_promised_again_before_it_was_taken_back() {
        let (mut promise, attr) = (Promise::default(), of_size(1));
        assert!(!promise.outdate(), "nobody was promised anything");
        looks(&mut promise, &attr);
        assert!(promise.outdate() && (0..1000).all(|_| !promise.give(&attr, THREAD)));
        assert!(promise.begin() && !promise.is_outdated());
        promise.ended();
    }

    // Invariant F3: who looks while the kernel takes an answer over sees nothing of the past.
    #[test]
    fn what_is_promised_the_thread_that_asks_was_told_before() {
        let (mut promise, old, new) = (Promise::default(), of_size(1), of_size(2));
        assert!(!promise.give(&old, THREAD) && !promise.give(&old, THREAD));
        assert!(!promise.give(&new, THREAD) && !promise.give(&new, THREAD) && promise.give(&new, THREAD));
        promise.begin();
        promise.ended();
        promise.pause = 0;
        assert!(!promise.give(&new, THREAD), "the kernel has forgotten it");
        assert!((0..1000).all(|_| !promise.give(&new, OTHER) && !promise.give(&new, THREAD)));
        assert!((0..1000).all(|_| !promise.give(&new, 0)), "it may be any thread");
    }

    #[test]
    fn what_is_looked_at_but_once_from_change_to_change_is_promised_ever_more_rarely() {
        let (mut promise, attr) = (Promise::default(), of_size(1));
        let promised = (0..1000).filter(|size| promise.give(&of_size(*size), THREAD));
        assert_eq!(promised.count(), 0, "nobody looks twice");
        let mut most = 0;
        for _ in 0..20 {
            most = most.max(looks(&mut promise, &attr));
            promise.begin();
            promise.ended();
        }
        assert!(most >= usize::from(PAUSE_MAX));
        // What is looked at again and again is promised soon after a change.
        looks(&mut promise, &attr);
        assert!(promise.give(&attr, THREAD) && promise.begin());
        promise.ended();
        assert!(looks(&mut promise, &attr) <= usize::from(SHOWN_MIN) + 1);
    }
}
