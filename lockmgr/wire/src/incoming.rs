//! What a stream of masses of data has received and nobody has taken yet.
//!
//! ```text
//!   socket -- much at once --> encrypted -- a piece at a time --> TLS
//! ```
//! The TLS library asks for 4 KiB at a time, which would be four system calls for each record.
//!
//! **Invariant:** what is kept here is bounded: what came with the hello, and one buffer.

use std::io;

use bytes::Bytes;

/// Encrypted bytes that are received at once.
const RECEIVED_BYTES: usize = 256 << 10;

/// See the module.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// Came together with the hello, decrypted already.
    pub(crate) early: Bytes,
    /// Made when the first bytes are awaited: one that only sends needs none.
    encrypted: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(crate) fn new(early: Bytes) -> Self {
        Self { early, encrypted: Box::default(), start: 0, end: 0 }
    }

    /// Whether there is something that the descriptor says nothing of.
    pub(crate) fn has_any(&self) -> bool {
        !self.early.is_empty() || self.start < self.end
    }

    /// Asks the socket, when all that came before was fed. Gives how much came.
    pub(crate) fn receive<E>(&mut self, ask: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<usize, E> {
        if self.encrypted.is_empty() {
            self.encrypted = vec![0; RECEIVED_BYTES].into();
        }
        let count = ask(&mut self.encrypted)?;
        (self.start, self.end) = (0, count);
        Ok(count)
    }

    /// Gives TLS a piece of what has come, to be processed before the next one. `false`: there is none.
    pub(crate) fn feed(&mut self, tls: &mut rustls::Connection) -> io::Result<bool> {
        let mut piece = &self.encrypted[self.start..self.end];
        if piece.is_empty() {
            return Ok(false);
        }
        self.start += tls.read_tls(&mut piece)?;
        Ok(true)
    }
}
