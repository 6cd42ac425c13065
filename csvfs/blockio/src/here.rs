//! Carrying a request out on the thread that submits it, for who waits for its outcome anyway.
//!
//! ```text
//!   submit ----------------> device's thread: woken, calls --> woken: completion --> whoever waits is woken
//!   submit under a `Here` -> calls, completion
//! ```
//! A thread that has to be woken first costs as much as a fast disk takes for a short transfer, and on a small machine more.
//!
//! **Invariant:** what a completion submits goes to the device's own thread, so a chain of requests never piles up here, unless the
//! completion wishes otherwise itself: for what whoever waits cannot do without ([`inside`]).

use std::cell::Cell;
use std::marker::PhantomData;

/// Longest transfer that a thread carries out for itself only because the device has nothing else to do, in bytes. A longer one takes
/// so long that a wake-up does not count, and more of it may follow at once.
const ALONE_BYTES_MAX: u64 = 64 << 10;
/// Jobs in a row that must have been alone at the device before one is taken to stay so: of many at once, too, one is the first.
const ALONE_IN_A_ROW_MIN: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Nothing,
    /// Whatever it is.
    All,
    /// One short transfer that is alone at its device.
    Alone,
}

thread_local! {
    /// Completions run inside of their submission on this thread now.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
    static WISH: Cell<Wish> = const { Cell::new(Wish::Nothing) };
}

/// While this lives, its thread carries out what it submits.
#[must_use]
#[derive(Debug)]
pub struct Here {
    before: Wish,
    /// Of one thread.
    _here: PhantomData<*const ()>,
}

/// What this thread submits from now on it carries out itself where a system call does it, and blocks until it is done: for who
/// would wait for the outcome, and only that. The completion runs inside of the submission.
pub fn here() -> Here {
    Here::begin(Wish::All)
}

/// The same for a short read or write of a device that has one request at a time. All others it submits as ever.
pub fn here_if_alone() -> Here {
    Here::begin(Wish::Alone)
}

impl Here {
    fn begin(wish: Wish) -> Self {
        Self { before: WISH.replace(wish), _here: PhantomData }
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        WISH.set(self.before);
    }
}

/// Whether the calling thread is to carry out a job itself: `transfer`, its bytes if it moves some and is not forced;
/// `alone_in_a_row`, how many jobs up to this one have found no other one at the device.
pub(crate) fn wanted(transfer: Option<u64>, alone_in_a_row: usize) -> bool {
    match WISH.get() {
        Wish::Nothing => false,
        Wish::All => true,
        Wish::Alone => {
            alone_in_a_row >= ALONE_IN_A_ROW_MIN && transfer.is_some_and(|bytes| bytes <= ALONE_BYTES_MAX)
        }
    }
}

/// Whether the completion that asks runs inside of its submission, on a thread that waits for it: what follows may be done at once.
#[must_use]
pub fn inside() -> bool {
    INSIDE.get()
}

/// Does what carries a job out, and what its completion does, which submits as before [`here`].
pub(crate) fn carry_out(job: impl FnOnce()) {
    let _elsewhere = Here::begin(Wish::Nothing);
    let _inside = Inside(INSIDE.replace(true));
    job();
}

/// Restores what was before.
struct Inside(bool);

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_carries_out_what_it_wished_for_and_only_while_it_does() {
        const LONG: usize = ALONE_IN_A_ROW_MIN;
        assert!(!wanted(Some(512), LONG), "nobody asked");
        let all = here();
        assert!(wanted(None, 0) && wanted(Some(1 << 30), 0));
        let short = here_if_alone();
        assert!(wanted(Some(ALONE_BYTES_MAX), LONG));
        for (transfer, alone) in [(Some(512), LONG - 1), (Some(ALONE_BYTES_MAX + 1), LONG), (None, LONG)] {
            assert!(!wanted(transfer, alone), "{transfer:?}, {alone} in a row alone");
        }
        assert!(!inside());
        carry_out(|| {
            assert!(inside() && !wanted(Some(512), LONG), "what a completion submits");
            carry_out(|| {});
            assert!(inside());
        });
        assert!(!inside());
        assert!(wanted(Some(512), LONG));
        drop(short);
        assert!(wanted(None, 0), "as before");
        drop(all);
        assert!(!wanted(Some(512), LONG));
    }
}
