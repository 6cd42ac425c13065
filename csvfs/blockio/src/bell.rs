//! Waking a thread that sleeps in its ring: at once, or when the caller has done all that it is about to do.
//!
//! ```text
//!   hush() -> push, push, push to sleeping threads -> dropped: each of them is woken once, and finds everything
//! ```
//! A thread that is woken by the first of many requests takes that one alone, and the device is told of each by itself. So whoever
//! works through a batch holds its bells back.
//!
//! **Invariant:** a thread that waits for another owes no bell: [`ring_owed`] comes first.

use std::cell::{Cell, RefCell};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

thread_local! {
    /// Batches that the thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static OWED: RefCell<Vec<Arc<Bell>>> = const { RefCell::new(Vec::new()) };
}

/// What a sleeping thread listens to.
#[derive(Debug)]
pub struct Bell(OwnedFd);

impl Bell {
    /// A bell that nobody listens to yet.
    ///
    /// # Errors
    /// When the system has no more descriptors.
    pub fn new() -> io::Result<Arc<Self>> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Arc::new(Self(rustix::event::eventfd(0, flags)?)))
    }

    /// Wakes the listener, when the caller's batch ends.
    pub fn ring(self: &Arc<Self>) {
        if DEPTH.get() == 0 {
            return self.ring_now();
        }
        OWED.with_borrow_mut(|owed| owed.push(Arc::clone(self)));
    }

    /// Wakes the listener.
    #[expect(clippy::host_endian_bytes, reason = "an eventfd takes a number in the machine's own order")]
    pub fn ring_now(&self) {
        // The counter cannot overflow before 2^64 wake-ups, which is the only way this write can fail.
        let rung = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
        debug_assert!(rung.is_ok(), "eventfd: {rung:?}");
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Holds the bells of this thread back while it lives.
#[must_use]
#[derive(Debug)]
pub struct Hush(PhantomData<*const ()>);

/// A batch begins. What it does must not wait for other threads, except in pushes to a device.
pub fn hush() -> Hush {
    DEPTH.set(DEPTH.get() + 1);
    Hush(PhantomData)
}

impl Drop for Hush {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
        if DEPTH.get() == 0 {
            ring_owed();
        }
    }
}

/// Rings what was held back.
pub(crate) fn ring_owed() {
    OWED.with_borrow_mut(|owed| owed.drain(..).for_each(|bell| bell.ring_now()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rung(bell: &Bell) -> bool {
        rustix::io::read(bell, &mut [0; 8]).is_ok()
    }

    #[test]
    fn bells_are_rung_once_the_outermost_batch_has_ended() {
        let bell = Bell::new().expect("an eventfd");
        bell.ring();
        assert!(rung(&bell), "at once outside of a batch");
        let outer = hush();
        let inner = hush();
        bell.ring();
        drop(inner);
        assert!(!rung(&bell));
        drop(outer);
        assert!(rung(&bell));
    }

    #[test]
    fn who_has_to_wait_rings_first() {
        let bell = Bell::new().expect("an eventfd");
        let batch = hush();
        bell.ring();
        ring_owed();
        assert!(rung(&bell));
        drop(batch);
        assert!(!rung(&bell), "once");
    }
}
