//! Buffers that are used again: fresh memory costs a page fault for every 4 KiB.

use crate::{AlignedBuf, IoBuf};

/// Memory that is kept for later at most.
const KEPT_BYTES_MAX: usize = 16 << 20;
const KEPT_BUFFERS_MAX: usize = 256;

/// Buffers of a connection that are not in use.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    kept: Vec<AlignedBuf>,
    bytes: usize,
}

impl Buffers {
    /// A buffer of `len` bytes with any content.
    pub(super) fn take(&mut self, len: usize) -> IoBuf {
        match self.kept.iter().rposition(|kept| kept.len() == len) {
            Some(at) => {
                self.bytes -= len;
                self.kept.swap_remove(at).into()
            }
            None => IoBuf::zeroed(len),
        }
    }

    /// Keeps a buffer, when nobody else uses it and there is room.
    pub(super) fn give_back(&mut self, buf: IoBuf) {
        let fits = self.bytes + buf.len() <= KEPT_BYTES_MAX && self.kept.len() < KEPT_BUFFERS_MAX;
        if fits && let Ok(buf) = buf.try_into_aligned() {
            self.bytes += buf.len();
            self.kept.push(buf);
        }
    }
}
