//! What NBD runs over when it is no plain socket: a stream that its owner protects, for example by TLS.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::socket::Part;
use crate::IoBuf;

/// A connected stream on which one thread sends while another one receives.
///
/// Its descriptor says when there is something to receive, unless [`Self::holds_bytes`], and when there is room to send.
/// Its receive timeout limits the waits of [`Self::receive`].
pub trait NbdTransport: AsFd + Send + Sync {
    /// Sends what `fill` puts into the buffers that it is given, until it puts nothing, as far as there is room. Gives how
    /// many bytes are on their way; nothing when there is no room. Then the next call offers the same bytes again.
    ///
    /// # Errors
    /// The stream is over.
    fn send(&self, fill: &mut dyn FnMut(&mut [u8]) -> usize) -> io::Result<Option<usize>>;

    /// Hands what has come to `take`, until that takes less than it is given. Gives how many bytes it has taken, 0 at the
    /// end of the stream; nothing when nothing has come. With `wait` it waits for the first.
    ///
    /// # Errors
    /// The stream is over.
    fn receive(&self, wait: bool, take: &mut dyn FnMut(&[u8]) -> usize) -> io::Result<Option<usize>>;

    /// Whether something waits to be received that has left the descriptor already.
    fn holds_bytes(&self) -> bool;

    /// Ends the stream: whoever waits on it returns.
    fn end(&self);
}

/// A connected stream, plain or protected.
pub enum NbdStream {
    /// A socket.
    Socket(OwnedFd),
    /// A stream that somebody protects.
    Protected(Box<dyn NbdTransport>),
}

impl From<OwnedFd> for NbdStream {
    fn from(socket: OwnedFd) -> Self {
        Self::Socket(socket)
    }
}

impl From<UnixStream> for NbdStream {
    fn from(socket: UnixStream) -> Self {
        Self::Socket(socket.into())
    }
}

impl AsFd for NbdStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Socket(socket) => socket.as_fd(),
            Self::Protected(transport) => transport.as_fd(),
        }
    }
}

impl std::fmt::Debug for NbdStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(socket) => f.debug_tuple("Socket").field(socket).finish(),
            Self::Protected(_) => f.write_str("Protected"),
        }
    }
}

/// Sends from the front of `parts`.
pub(super) fn send<'a>(
    transport: &dyn NbdTransport,
    parts: impl Iterator<Item = Part<'a>>,
) -> io::Result<Option<usize>> {
    let mut parts = parts.peekable();
    // Bytes of the first part that were copied out before.
    let mut copied = 0;
    transport.send(&mut |room| {
        let mut filled = 0;
        while let Some(part) = parts.peek().filter(|_| filled < room.len()) {
            let count = part.len().saturating_sub(copied).min(room.len() - filled);
            part.copy_to(copied, &mut room[filled..filled + count]);
            (filled, copied) = (filled + count, copied + count);
            if copied == part.len() {
                copied = 0;
                parts.next();
            }
        }
        filled
    })
}

/// Receives into `first`, and what comes after it into `rest`.
pub(super) fn receive(
    transport: &dyn NbdTransport,
    first: Option<&IoBuf>,
    rest: &mut [u8],
    wait: bool,
) -> io::Result<Option<usize>> {
    let first = first.filter(|first| !first.is_empty());
    let wanted = first.map_or(0, IoBuf::len);
    let mut taken = 0;
    transport.receive(wait, &mut |bytes| {
        let before = taken;
        let into_first = bytes.len().min(wanted.saturating_sub(taken));
        if let Some(first) = first.filter(|_| into_first > 0) {
            first.slice(taken..taken + into_first).copy_from(&bytes[..into_first]);
            taken += into_first;
        }
        if taken >= wanted {
            let at = taken - wanted;
            let count = (bytes.len() - into_first).min(rest.len() - at);
            rest[at..at + count].copy_from_slice(&bytes[into_first..into_first + count]);
            taken += count;
        }
        taken - before
    })
}
