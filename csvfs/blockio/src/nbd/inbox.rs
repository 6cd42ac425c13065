//! Bytes that have come in and were not looked at yet.
//!
//! Small messages arrive many at a time, in one call. The data of a large one is received right into the memory where it
//! belongs, and in the same call whatever follows it.
//!
//! **Invariant:** the buffer never grows; the far end decides nothing about how much memory is taken.

use std::io;

use super::socket::Socket;
use crate::IoBuf;

/// Room for small messages.
const BUFFER_BYTES: usize = 128 << 10;

/// See the module.
pub(crate) struct Inbox {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        Self { buffer: vec![0; BUFFER_BYTES].into(), start: 0, end: 0 }
    }

    /// What is there.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// The first `N` bytes, when they are there.
    pub(crate) fn peek<const N: usize>(&self) -> Option<&[u8; N]> {
        self.bytes().first_chunk()
    }

    /// Takes `count` bytes, which are there, off the front.
    pub(crate) fn consume(&mut self, count: usize) {
        assert!(count <= self.end - self.start, "only what has come in can be taken");
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Takes up to `most` bytes off the front; gives how many there were.
    pub(crate) fn skip(&mut self, most: usize) -> usize {
        let count = most.min(self.bytes().len());
        self.consume(count);
        count
    }

    /// Moves bytes from the front into `memory`, as many as there are and fit; gives how many.
    pub(crate) fn move_into(&mut self, memory: &IoBuf) -> usize {
        let count = memory.len().min(self.bytes().len());
        memory.copy_from(&self.bytes()[..count]);
        self.consume(count);
        count
    }

    /// Receives more. With `first`, while the inbox is empty, the bytes go there before they go here.
    pub(crate) fn fill(&mut self, socket: &Socket, first: Option<&IoBuf>, wait: bool) -> io::Result<Filled> {
        debug_assert!(first.is_none() || self.bytes().is_empty(), "bytes overtake those that wait");
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let wanted = first.map_or(0, IoBuf::len);
        match socket.receive(first, &mut self.buffer[self.end..], wait)? {
            None => Ok(Filled::Nothing),
            Some(0) => Ok(Filled::Ended),
            Some(received) => {
                let into_first = received.min(wanted);
                self.end += received - into_first;
                Ok(Filled::Bytes { into_first })
            }
        }
    }

    /// As if `bytes` had been received; gives how many there was room for.
    #[cfg(test)]
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> usize {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let count = bytes.len().min(self.buffer.len() - self.end);
        self.buffer[self.end..self.end + count].copy_from_slice(&bytes[..count]);
        self.end += count;
        count
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Inbox({} bytes)", self.bytes().len())
    }
}

/// What came of [`Inbox::fill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// Nothing came without waiting, or within the time of the handshake.
    Nothing,
    /// The far end has closed.
    Ended,
    /// Something came; so much of it went to `first`.
    Bytes { into_first: usize },
}
