//! Buffers of data requests, used again: fresh pages for every megabyte cost as much as copying it.

use std::sync::{Mutex, PoisonError};

use blockio::{AlignedBuf, IoBuf};

/// Sizes of buffers and how many idle ones are kept of each.
const CLASSES: [(usize, usize); 3] = [(4 << 10, 256), (128 << 10, 32), (1 << 20, 16)];

/// Idle buffers.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    /// One list per class. Lock rank: leaf.
    idle: [Mutex<Vec<AlignedBuf>>; CLASSES.len()],
}

impl Buffers {
    /// A buffer of at least `len` bytes, with any content.
    pub(crate) fn take(&self, len: usize) -> AlignedBuf {
        let Some(class) = CLASSES.iter().position(|(size, _)| len <= *size) else {
            return AlignedBuf::zeroed(len);
        };
        let idle = self.idle[class].lock().unwrap_or_else(PoisonError::into_inner).pop();
        idle.unwrap_or_else(|| AlignedBuf::zeroed(CLASSES[class].0))
    }

    /// Keeps the buffer for the next request, unless there are enough.
    pub(crate) fn give(&self, buf: AlignedBuf) {
        let Some(class) = CLASSES.iter().position(|(size, _)| buf.len() == *size) else { return };
        let mut idle = self.idle[class].lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < CLASSES[class].1 {
            idle.push(buf);
        }
    }

    /// Keeps the memory of a finished request if nothing else refers to it.
    pub(crate) fn give_back(&self, buf: IoBuf) {
        if let Ok(buf) = buf.try_into_aligned() {
            self.give(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_once_nobody_refers_to_it() {
        let buffers = Buffers::default();
        let whole = IoBuf::from(buffers.take(5000));
        assert_eq!(whole.len(), 128 << 10);
        let (address, part) = (whole.as_ptr(), whole.slice(0..5000));
        buffers.give_back(whole.clone());
        assert_ne!(IoBuf::from(buffers.take(5000)).as_ptr(), address, "still referred to");
        drop(part);
        buffers.give_back(whole);
        assert_eq!(IoBuf::from(buffers.take(100_000)).as_ptr(), address);
    }

    #[test]
    fn the_number_of_idle_buffers_is_bounded_and_odd_sizes_are_not_kept() {
        let buffers = Buffers::default();
        for _ in 0..40 {
            buffers.give(AlignedBuf::zeroed(1 << 20));
        }
        buffers.give(AlignedBuf::zeroed(12345));
        let kept: usize = buffers.idle.iter().map(|class| class.lock().expect("no panic").len()).sum();
        assert_eq!(kept, 16);
        assert_eq!(buffers.take(3 << 20).len(), 3 << 20);
    }
}
