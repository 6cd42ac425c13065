//! A bare stream of bytes between two nodes, for memory and other masses of data: no frames, no tasks, threads that block.
//!
//! ```text
//!   TCP -> mutual TLS -> hello of class Stream or Blocks  ==>  Stream: Read + Write, by the thread that owns it
//!                                                              Duplex: one thread sends while another receives
//! ```
//! **Invariant:** a stream exists only after TLS and hello have proved which node is at the other end: not a byte of its
//! content is looked at before that.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};

use bytes::{Buf, Bytes};
use tokio_rustls::{client, server};

use crate::driver::Greeted;
use crate::incoming::Incoming;
use crate::{Duplex, Partition, Peer, WireError};

/// Plain bytes that are gathered before they are encrypted and sent.
const GATHERED_BYTES: usize = 256 << 10;

/// An authenticated stream.
#[derive(Debug)]
pub struct Stream {
    tls: rustls::Connection,
    tcp: TcpStream,
    incoming: Incoming,
    peer: Peer,
    partition: Partition,
}

/// Ends a stream from another thread: its reads and writes fail at once.
#[derive(Debug)]
pub struct StreamEnd(TcpStream);

impl StreamEnd {
    /// Ends it.
    pub fn end(&self) {
        // A socket that is closed already is what is wanted.
        let _closed = self.0.shutdown(Shutdown::Both);
    }
}

impl Drop for StreamEnd {
    fn drop(&mut self) {
        self.end();
    }
}

impl Stream {
    pub(crate) fn of_client(
        greeted: Greeted<client::TlsStream<tokio::net::TcpStream>>,
        partition: Partition,
    ) -> Result<Self, WireError> {
        let (stream, early, peer) = greeted.into_stream();
        let (tcp, tls) = stream.into_inner();
        Self::new(tls.into(), tcp, early, peer, partition)
    }

    pub(crate) fn of_server(
        greeted: Greeted<server::TlsStream<tokio::net::TcpStream>>,
        partition: Partition,
    ) -> Result<Self, WireError> {
        let (stream, early, peer) = greeted.into_stream();
        let (tcp, tls) = stream.into_inner();
        Self::new(tls.into(), tcp, early, peer, partition)
    }

    fn new(
        mut tls: rustls::Connection,
        tcp: tokio::net::TcpStream,
        early: Bytes,
        peer: Peer,
        partition: Partition,
    ) -> Result<Self, WireError> {
        tls.set_buffer_limit(Some(GATHERED_BYTES));
        let blocking = tcp.into_std().and_then(|tcp| tcp.set_nonblocking(false).map(|()| tcp));
        let tcp = blocking.map_err(|error| WireError::io("take over a stream", error))?;
        Ok(Self { tls, tcp, incoming: Incoming::new(early), peer, partition })
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The stream for a thread that sends and another one that receives.
    #[must_use]
    pub fn into_duplex(self) -> Duplex {
        let Self { tls, tcp, incoming, peer, partition } = self;
        Duplex::new(tls, tcp, incoming, peer, partition)
    }

    /// A handle that ends this stream from elsewhere.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn ender(&self) -> io::Result<StreamEnd> {
        self.tcp.try_clone().map(StreamEnd)
    }

    /// A node that is cut off hears and says nothing.
    fn wait_until_passable(&self) {
        if self.partition.is_set() {
            futures::executor::block_on(self.partition.passable());
        }
    }

    fn send_all(&mut self) -> io::Result<()> {
        self.wait_until_passable();
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.tcp)?;
        }
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let early = &mut self.incoming.early;
        if !early.is_empty() {
            let bytes = early.len().min(into.len());
            early.copy_to_slice(&mut into[..bytes]);
            return Ok(bytes);
        }
        loop {
            match self.tls.reader().read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            self.wait_until_passable();
            if !self.incoming.feed(&mut self.tls)? {
                if self.incoming.receive(|into| self.tcp.read(into))? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            self.tls
                .process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.send_all()?;
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.tls.writer().write(bytes)?;
        if taken == bytes.len() {
            return Ok(taken);
        }
        self.send_all()?;
        // There is room now: nothing taken would mean that nothing more can be written.
        if taken > 0 { Ok(taken) } else { self.tls.writer().write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_all()
    }
}
