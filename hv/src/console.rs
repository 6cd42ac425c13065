//! What the guest has said on its serial port: the last part of it, with positions counted since boot.
//!
//! A boot has a number, which moves with the VM: positions of another boot are others.
//!
//! **Invariant:** the ring never holds more than its bound, whatever the guest prints.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bounded output of one VM.
#[derive(Debug)]
pub struct Console {
    /// Protects the bytes; nothing else is locked while it is held.
    ring: Mutex<Ring>,
    more: Condvar,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct Ring {
    /// Position of the first byte that is kept.
    start: u64,
    bytes: VecDeque<u8>,
    closed: bool,
    /// 0: not known.
    boot: u64,
}

/// A part of the output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsoleText {
    /// Position of the first byte; later than asked for when that was no longer kept.
    pub from: u64,
    /// The bytes.
    pub data: Vec<u8>,
    /// Position to ask for next.
    pub next: u64,
    /// The boot that positions count from; 0: not known.
    pub boot: u64,
    /// Whether nothing will come after this.
    pub last: bool,
}

impl Console {
    /// An empty console that keeps the last `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { ring: Mutex::default(), more: Condvar::new(), bytes_max: bytes_max.max(1) }
    }

    /// A boot begins; its number is not 0, and no other boot of this VM has it.
    pub fn begin(&self, boot: u64) {
        self.lock().boot = boot;
    }

    /// The number of its boot; 0: not known.
    #[must_use]
    pub fn boot(&self) -> u64 {
        self.lock().boot
    }

    /// Adds output.
    pub fn append(&self, bytes: &[u8]) {
        let mut ring = self.lock();
        ring.bytes.extend(bytes);
        while ring.bytes.len() > self.bytes_max {
            ring.bytes.pop_front();
            ring.start += 1;
        }
        drop(ring);
        self.more.notify_all();
    }

    /// What is kept from position `from` on, at most `bytes_max` bytes of it.
    #[must_use]
    pub fn read(&self, from: u64, bytes_max: usize) -> ConsoleText {
        self.lock().read(from, bytes_max)
    }

    /// As [`Console::read`], but waits until there is something, the VM has ended, or the time is over.
    #[must_use]
    pub fn read_waiting(&self, from: u64, bytes_max: usize, limit: Duration) -> ConsoleText {
        let ring = self.lock();
        let waits = |ring: &mut Ring| !ring.closed && ring.end() <= from;
        let (ring, _) =
            self.more.wait_timeout_while(ring, limit, waits).unwrap_or_else(PoisonError::into_inner);
        ring.read(from, bytes_max)
    }

    /// Number of bytes since boot.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.lock().end()
    }

    /// No more output will come: wakes those who wait.
    pub fn close(&self) {
        self.lock().closed = true;
        self.more.notify_all();
    }

    /// Whether no more output will come.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Replaces everything, as when a VM goes on here that has run elsewhere.
    pub(crate) fn restore(&self, boot: u64, start: u64, bytes: &[u8]) {
        let kept = &bytes[bytes.len().saturating_sub(self.bytes_max)..];
        let mut ring = self.lock();
        ring.start = start.saturating_add((bytes.len() - kept.len()) as u64);
        ring.bytes = kept.iter().copied().collect();
        ring.boot = boot;
    }

    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ring {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn read(&self, from: u64, bytes_max: usize) -> ConsoleText {
        let from = from.clamp(self.start, self.end());
        let skip = usize::try_from(from - self.start).expect("at most the number of bytes kept");
        let data: Vec<u8> = self.bytes.iter().skip(skip).take(bytes_max).copied().collect();
        let next = from + data.len() as u64;
        ConsoleText { from, next, data, boot: self.boot, last: self.closed && next == self.end() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_bytes_are_kept_and_positions_go_on() {
        let console = Console::new(4);
        console.append(b"abcdef");
        assert_eq!(console.read(0, 99), part(2, b"cdef", 0));
        assert_eq!(console.read(4, 1), part(4, b"e", 0));
        assert_eq!(console.read(99, 99), part(6, b"", 0));
    }

    fn part(from: u64, data: &[u8], boot: u64) -> ConsoleText {
        ConsoleText { from, data: data.to_vec(), next: from + data.len() as u64, boot, last: false }
    }

    #[test]
    fn only_the_end_of_a_closed_console_is_the_last_part() {
        let console = Console::new(64);
        console.append(b"ab");
        assert!(!console.read(0, 99).last);
        console.close();
        assert!(!console.read(0, 1).last && console.read(0, 99).last && console.read(2, 99).last);
    }

    #[test]
    fn a_waiting_reader_wakes_with_the_output_and_with_the_end() {
        let console = Console::new(64);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| console.read_waiting(0, 99, Duration::from_secs(60)));
            console.append(b"x");
            assert_eq!(reader.join().unwrap().data, b"x");
            let reader = scope.spawn(|| console.read_waiting(1, 99, Duration::from_secs(60)));
            console.close();
            assert!(reader.join().unwrap().data.is_empty());
        });
    }

    #[test]
    fn a_restored_console_continues_its_positions_and_its_boot() {
        let console = Console::new(3);
        console.begin(3);
        console.restore(2, 10, b"abcde");
        console.append(b"f");
        assert_eq!(console.read(0, 99), part(13, b"def", 2));
    }
}
