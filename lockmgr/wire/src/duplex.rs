//! A stream on which one thread sends while another receives: for requests and their replies, without a task between.
//!
//! ```text
//!   a sender    -- fill --> encrypt -> socket, as much as it takes at once
//!   a receiver  <-- take -- decrypt <- socket, all that has come
//! ```
//! Only [`Duplex::receive`] waits, and only when it is told to; whoever finds the socket full waits for its descriptor.
//!
//! **Invariant:** what is kept here is bounded: one batch on its way out, one buffer of what has come in.

use std::fmt;
use std::io::{self, BufRead, IoSlice, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Buf;
use futures::future::{Either, select};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use tokio_util::sync::CancellationToken;

use crate::incoming::Incoming;
use crate::{Partition, Peer};

/// Plain bytes that are encrypted before the socket is asked to take them.
const BATCH_BYTES: usize = 256 << 10;
/// Plain bytes that are gathered for the cipher at once: a whole number of the longest records.
const GATHERED_BYTES: usize = 32 << 10;
/// See the module.
pub struct Duplex {
    tcp: TcpStream,
    peer: Peer,
    partition: Partition,
    over: CancellationToken,
    /// Rank: a leaf. Held while bytes are encrypted or decrypted; nothing is waited for under it.
    tls: Mutex<Tls>,
    /// Rank: above `tls`. Only the receiver takes it, and waits for the peer under it.
    incoming: Mutex<Incoming>,
    /// The receiver has left something here that had come already.
    holds_bytes: AtomicBool,
}

struct Tls {
    connection: rustls::Connection,
    gathered: Box<[u8]>,
    /// Plain bytes of the batch that the socket has not taken as a whole yet.
    batch: usize,
}

/// Why no more is handed over.
enum Stopped {
    /// All that has come is handed over.
    Empty,
    /// The receiver takes no more.
    Full,
    /// The peer has closed its side in order.
    Closed,
}

impl Duplex {
    pub(crate) fn new(
        mut connection: rustls::Connection,
        tcp: TcpStream,
        incoming: Incoming,
        peer: Peer,
        partition: Partition,
    ) -> Self {
        // A batch has its own bound.
        connection.set_buffer_limit(None);
        Self {
            tcp,
            peer,
            partition,
            over: CancellationToken::new(),
            holds_bytes: AtomicBool::new(incoming.has_any()),
            tls: Mutex::new(Tls { connection, gathered: vec![0; GATHERED_BYTES].into(), batch: 0 }),
            incoming: Mutex::new(incoming),
        }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Sends what `fill` puts into the buffers that it is given, until it puts nothing. Gives how many bytes are on their
    /// way; nothing when the socket is full. Then the same bytes must be offered again, although a part has left.
    ///
    /// # Errors
    /// How the stream broke.
    pub fn send(&self, mut fill: impl FnMut(&mut [u8]) -> usize) -> io::Result<Option<usize>> {
        self.wait_until_passable();
        let mut tls = self.tls();
        if tls.batch == 0 {
            tls.encrypt(&mut fill)?;
        }
        Ok(if tls.flush(&self.tcp)? { Some(std::mem::take(&mut tls.batch)) } else { None })
    }

    /// Hands what has come to `take`, which says how much of it it has taken: less than all ends the call. Gives how many
    /// bytes were taken, 0 at the end of the stream. With `wait` it waits for the first; nothing then means that the
    /// socket's time limit is over.
    ///
    /// # Errors
    /// How the stream broke, or that the peer's bytes cannot be decrypted.
    pub fn receive(&self, wait: bool, mut take: impl FnMut(&[u8]) -> usize) -> io::Result<Option<usize>> {
        let mut incoming = self.incoming.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = 0;
        loop {
            let stopped = self.hand_over(&mut incoming, &mut take, &mut taken)?;
            self.holds_bytes.store(matches!(stopped, Stopped::Full), Ordering::Release);
            match stopped {
                Stopped::Empty => {}
                Stopped::Full => return Ok(Some(taken)),
                // The end is told again, when nothing has come before it.
                Stopped::Closed => return Ok(Some(taken)),
            }
            let flags = if wait && taken == 0 { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            self.wait_until_passable();
            match incoming.receive(|into| rustix::net::recv(&self.tcp, into, flags).map(|(_, count)| count)) {
                Ok(0) => return Ok(Some(taken)),
                Ok(_) => {}
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    return Ok((taken > 0).then_some(taken));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether something has come that waits here, so that the descriptor says nothing of it.
    #[must_use]
    pub fn holds_bytes(&self) -> bool {
        self.holds_bytes.load(Ordering::Acquire)
    }

    /// Ends the stream: whoever waits on it returns.
    pub fn end(&self) {
        self.over.cancel();
        // A socket that is closed already is what is wanted.
        let _closed = self.tcp.shutdown(Shutdown::Both);
    }

    fn tls(&self) -> MutexGuard<'_, Tls> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_over(
        &self,
        incoming: &mut Incoming,
        take: &mut impl FnMut(&[u8]) -> usize,
        taken: &mut usize,
    ) -> io::Result<Stopped> {
        if !incoming.early.is_empty() {
            let count = take(&incoming.early);
            incoming.early.advance(count);
            *taken += count;
            if !incoming.early.is_empty() {
                return Ok(Stopped::Full);
            }
        }
        loop {
            // Let go after each record: a sender waits no longer than that.
            let mut tls = self.tls();
            if let Some(stopped) = tls.take_plain(take, taken)? {
                return Ok(stopped);
            }
            if !incoming.feed(&mut tls.connection)? {
                return Ok(Stopped::Empty);
            }
            let processed = tls.connection.process_new_packets();
            // An answer of TLS itself. If the socket is full it leaves with the next batch.
            tls.flush(&self.tcp)?;
            processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    /// A node that is cut off hears and says nothing.
    fn wait_until_passable(&self) {
        if self.partition.is_set() {
            let (passable, over) = (self.partition.passable(), self.over.cancelled());
            match futures::executor::block_on(select(Box::pin(passable), Box::pin(over))) {
                Either::Left(_) | Either::Right(_) => {}
            }
        }
    }
}

impl Tls {
    /// Encrypts one batch.
    fn encrypt(&mut self, fill: &mut impl FnMut(&mut [u8]) -> usize) -> io::Result<()> {
        while self.batch < BATCH_BYTES {
            let count = fill(&mut self.gathered);
            if count == 0 {
                break;
            }
            self.connection.writer().write_all(&self.gathered[..count])?;
            self.batch += count;
        }
        Ok(())
    }

    /// `false`: the socket takes no more.
    fn flush(&mut self, tcp: &TcpStream) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut AtOnce(tcp)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Hands over what is decrypted; nothing when more must be decrypted first.
    fn take_plain(
        &mut self,
        take: &mut impl FnMut(&[u8]) -> usize,
        taken: &mut usize,
    ) -> io::Result<Option<Stopped>> {
        let mut reader = self.connection.reader();
        loop {
            let piece = match reader.fill_buf() {
                Ok([]) => return Ok(Some(Stopped::Closed)),
                Ok(piece) => piece,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            };
            let (offered, count) = (piece.len(), take(piece));
            reader.consume(count);
            *taken += count;
            if count < offered {
                return Ok(Some(Stopped::Full));
            }
        }
    }
}

/// A socket that is written to without waiting, whatever its mode.
struct AtOnce<'a>(&'a TcpStream);

impl Write for AtOnce<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::net::sendmsg(self.0, pieces, &mut SendAncillaryBuffer::default(), flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Duplex {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}

impl fmt::Debug for Duplex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Duplex").field("peer", &self.peer).finish_non_exhaustive()
    }
}
