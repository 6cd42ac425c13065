//! Answers that wait to be told to the kernel, from any thread to the one of the queue.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockio::IoBuf;

use super::memory::EntryMemory;
use crate::wire::abi::OutHeader;

/// See the module.
#[derive(Debug)]
pub(super) struct Finished {
    /// Lock rank: leaf.
    state: Mutex<State>,
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    answered: Vec<Answered>,
    /// The thread goes to sleep, or sleeps: who comes first wakes it.
    asleep: bool,
}

/// An entry whose answer stands in its memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered {
    pub(super) number: u32,
    pub(super) unique: u64,
}

impl Finished {
    pub(super) fn new() -> io::Result<Self> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Self { state: Mutex::default(), bell: rustix::event::eventfd(0, flags)? })
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[expect(clippy::host_endian_bytes, reason = "an eventfd takes a number in the machine's own order")]
    fn push(&self, answered: Answered) {
        let mut state = self.lock();
        state.answered.push(answered);
        let wake = std::mem::take(&mut state.asleep);
        drop(state);
        if wake {
            // The counter cannot overflow before 2^64 wake-ups, which is the only way this write can fail.
            let rung = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
            debug_assert!(rung.is_ok(), "eventfd: {rung:?}");
        }
    }

    /// Moves over what waits. The caller goes to sleep after it.
    pub(super) fn take(&self, into: &mut Vec<Answered>) {
        let mut state = self.lock();
        into.append(&mut state.answered);
        state.asleep = true;
    }

    /// The caller looks again by itself.
    pub(super) fn awake(&self) {
        self.lock().asleep = false;
    }
}

/// An entry with a request in it, until that is answered.
#[derive(Debug)]
pub(in crate::wire) struct Entry {
    pub(super) memory: Arc<EntryMemory>,
    pub(super) number: u32,
    pub(super) finished: Arc<Finished>,
}

impl Entry {
    /// Memory for the answer. Until then it holds what came with the request.
    pub(in crate::wire) fn payload(&self) -> IoBuf {
        self.memory.payload()
    }

    /// Answers with the first `len` bytes of the payload.
    pub(in crate::wire) fn answer(&self, unique: u64, error: i32, len: usize) {
        let bytes = u32::try_from(len).expect("no longer than the payload");
        let header_bytes = u32::try_from(size_of::<OutHeader>()).expect("small");
        self.memory.answer(OutHeader { len: header_bytes + bytes, error, unique }, bytes);
        self.finished.push(Answered { number: self.number, unique });
    }

    /// Answers with these bytes.
    pub(in crate::wire) fn answer_with(&self, unique: u64, error: i32, parts: &[&[u8]]) {
        let (payload, mut at) = (self.payload(), 0);
        for part in parts {
            payload.slice(at..payload.len()).copy_from(part);
            at += part.len();
        }
        self.answer(unique, error, at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_finds_the_thread_asleep_wakes_it() {
        let finished = Finished::new().expect("an eventfd");
        let rung = || rustix::io::read(finished.bell(), &mut [0; 8]).is_ok();
        finished.push(Answered { number: 1, unique: 10 });
        assert!(!rung(), "awake");
        let mut taken = Vec::new();
        finished.take(&mut taken);
        assert_eq!(taken.iter().map(|answered| answered.unique).collect::<Vec<_>>(), [10]);
        finished.push(Answered { number: 2, unique: 11 });
        assert!(rung(), "asleep");
        finished.push(Answered { number: 3, unique: 12 });
        assert!(!rung(), "woken already");
        finished.awake();
        finished.take(&mut taken);
        assert_eq!(taken.len(), 3);
    }
}
