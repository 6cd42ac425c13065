//! A connected stream. A plain socket moves bytes between the kernel and the memory of requests without a copy; what is
//! protected passes through the hands of its transport.
//!
//! Sending never blocks. Receiving waits when it is told to. During the handshake both wait, for a limited time.
#![expect(
    unsafe_code,
    reason = "transfers go to memory that is shared with others, so no slice may be made of it"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::transport::{self, NbdStream};
use crate::IoBuf;

/// Parts that one system call takes; further ones go with the next.
const PARTS_MAX: usize = 128;
/// Longest wait of a step of the handshake.
const HANDSHAKE_STEP: Duration = Duration::from_secs(10);

/// Something to send.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'a> {
    Bytes(&'a [u8]),
    Memory(&'a IoBuf),
}

impl Part<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Memory(memory) => memory.len(),
        }
    }

    /// Copies the bytes from `at` on.
    pub(super) fn copy_to(&self, at: usize, into: &mut [u8]) {
        match self {
            Self::Bytes(bytes) => into.copy_from_slice(&bytes[at..at + into.len()]),
            Self::Memory(memory) => memory.slice(at..at + into.len()).copy_to(into),
        }
    }

    fn vector(&self) -> libc::iovec {
        match self {
            Self::Bytes(bytes) => {
                libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
            }
            Self::Memory(memory) => libc::iovec { iov_base: memory.as_ptr().cast(), iov_len: memory.len() },
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: NbdStream,
}

impl Socket {
    pub(crate) fn new(stream: impl Into<NbdStream>) -> Self {
        Self { stream: stream.into() }
    }

    /// Limits the waits of the handshake.
    pub(crate) fn begin_handshake(&self) -> io::Result<()> {
        self.set_timeouts(Some(HANDSHAKE_STEP))
    }

    /// From here on a silent peer is waited for without a limit.
    pub(crate) fn end_handshake(&self) -> io::Result<()> {
        self.set_timeouts(None)
    }

    fn set_timeouts(&self, limit: Option<Duration>) -> io::Result<()> {
        set_socket_timeout(&self.stream, Timeout::Recv, limit)?;
        set_socket_timeout(&self.stream, Timeout::Send, limit)?;
        Ok(())
    }

    /// Sends all of it, waiting. Only for the handshake.
    pub(crate) fn send_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            bytes = &bytes[self.send_waiting(bytes)?..];
        }
        Ok(())
    }

    fn send_waiting(&self, bytes: &[u8]) -> io::Result<usize> {
        match &self.stream {
            NbdStream::Socket(fd) => match rustix::net::send(fd, bytes, rustix::net::SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => Ok(0),
                sent => Ok(sent?),
            },
            NbdStream::Protected(_) => match self.send(std::iter::once(Part::Bytes(bytes)))? {
                Some(sent) => Ok(sent),
                None => self.wait(false, true, None).map(|_| 0),
            },
        }
    }

    /// Sends from the front of `parts` as much as the socket takes at once; nothing when it is full.
    pub(crate) fn send<'a>(&self, parts: impl Iterator<Item = Part<'a>>) -> io::Result<Option<usize>> {
        let fd = match &self.stream {
            NbdStream::Socket(fd) => fd,
            NbdStream::Protected(transport) => return transport::send(&**transport, parts),
        };
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PARTS_MAX];
        let mut count = 0;
        for (vector, part) in vectors.iter_mut().zip(parts) {
            *vector = part.vector();
            count += 1;
        }
        let message = message(&mut vectors[..count]);
        // SAFETY: the vectors point to borrowed bytes and to memory that the parts keep alive; the kernel only reads it.
        let sent = unsafe {
            libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
        };
        moved(sent)
    }

    /// Receives into `first`, and what comes after it into `rest`. 0 is the end of the stream; nothing means that there
    /// is nothing to receive now (only when it does not wait, or in the handshake, when the time is over).
    pub(crate) fn receive(
        &self,
        first: Option<&IoBuf>,
        rest: &mut [u8],
        wait: bool,
    ) -> io::Result<Option<usize>> {
        let fd = match &self.stream {
            NbdStream::Socket(fd) => fd,
            NbdStream::Protected(transport) => return transport::receive(&**transport, first, rest, wait),
        };
        let rest = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let mut vectors = match first {
            Some(first) => [Part::Memory(first).vector(), rest],
            None => [rest, libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }],
        };
        let mut message = message(&mut vectors);
        let flags = if wait { 0 } else { libc::MSG_DONTWAIT };
        // SAFETY: `first` keeps its memory alive and may be written to; `rest` is an exclusive borrow.
        let received = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, flags) };
        moved(received)
    }

    /// Waits until there is something to receive, or room to send when `sending` is set, or `bell` was rung.
    pub(crate) fn wait(&self, receiving: bool, sending: bool, bell: Option<&OwnedFd>) -> io::Result<Ready> {
        if receiving && matches!(&self.stream, NbdStream::Protected(transport) if transport.holds_bytes()) {
            return Ok(Ready { receive: true, broken: false, rung: false });
        }
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, receiving);
        wanted.set(PollFlags::OUT, sending);
        let mut polled = [
            PollFd::new(&self.stream, wanted),
            PollFd::from_borrowed_fd(
                bell.map_or_else(|| self.stream.as_fd(), |bell| bell.as_fd()),
                PollFlags::IN,
            ),
        ];
        let count = 1 + usize::from(bell.is_some());
        match rustix::event::poll(&mut polled[..count], None::<&Timespec>) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let found = polled[0].revents();
        Ok(Ready {
            receive: found.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR),
            broken: found.intersects(PollFlags::HUP | PollFlags::ERR),
            rung: bell.is_some() && !polled[1].revents().is_empty(),
        })
    }

    /// Ends both directions: whoever waits on the socket returns.
    pub(crate) fn shut_down(&self) {
        match &self.stream {
            // It may be over already.
            NbdStream::Socket(fd) => drop(rustix::net::shutdown(fd, rustix::net::Shutdown::Both)),
            NbdStream::Protected(transport) => transport.end(),
        }
    }
}

/// What a wait has found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ready {
    /// Receiving will not block.
    pub(crate) receive: bool,
    /// The other end is gone.
    pub(crate) broken: bool,
    /// The bell was rung.
    pub(crate) rung: bool,
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all-zero is a valid `msghdr`: no name, no control data, no vectors.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

fn moved(result: isize) -> io::Result<Option<usize>> {
    match usize::try_from(result) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(_) => {
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(error),
            }
        }
    }
}
