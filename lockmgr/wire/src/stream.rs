//! Connections that carry somebody else's bytes: proven by the same handshake, then handed over as they are.
//!
//! ```text
//!   TLS, hello (class `Admin`)  ->  ByteStream  -- carry -->  a Unix socket of this process
//! ```
//! A node that is cut off by the rehearsal switch is cut off here too.

use std::fmt;
use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::driver::Greeted;
use crate::{Class, Endpoint, Partition, Peer, WireError};

/// Bytes that are carried at once in one direction.
const PIECE_BYTES: usize = 256 << 10;

/// A stream of bytes to a peer that has proven who it is.
pub struct ByteStream {
    peer: Peer,
    input: Box<dyn AsyncRead + Send + Unpin>,
    output: Box<dyn AsyncWrite + Send + Unpin>,
    /// Came with the hello.
    begun: BytesMut,
    partition: Partition,
}

impl ByteStream {
    pub(crate) fn new<S>(greeted: Greeted<S>, partition: Partition) -> Self
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (input, output, begun, peer) = greeted.into_bytes();
        Self { peer, input: Box::new(input), output: Box::new(output), begun, partition }
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Carries bytes between the peer and `near`, until one of them ends. Then both have ended.
    ///
    /// # Errors
    /// How the connection broke; an end in order is none.
    pub async fn carry(self, near: UnixStream) -> io::Result<()> {
        let Self { input, mut output, begun, partition, .. } = self;
        let (mut near_in, mut near_out) = near.into_split();
        near_out.write_all(&begun).await?;
        let inwards = copy(input, &mut near_out, &partition);
        let outwards = copy(&mut near_in, &mut output, &partition);
        // Neither side goes on with half a connection.
        let ended = tokio::select! {
            ended = inwards => ended,
            ended = outwards => ended,
        };
        drop(near_out);
        // The peer learns of the end even if it does not listen any more.
        drop(output.shutdown().await);
        ended
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    partition: &Partition,
) -> io::Result<()> {
    let mut piece = BytesMut::with_capacity(PIECE_BYTES);
    loop {
        piece.clear();
        if from.read_buf(&mut piece).await? == 0 {
            return Ok(());
        }
        partition.passable().await;
        to.write_all(&piece).await?;
        to.flush().await?;
    }
}

impl fmt::Debug for ByteStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteStream").field("peer", &self.peer).finish_non_exhaustive()
    }
}

/// Opens a stream to the admin interface of whichever member listens at `address`, over mutual TLS.
///
/// # Errors
/// What went wrong, as for any connection.
pub async fn connect_admin(address: &str, endpoint: &Endpoint) -> Result<ByteStream, WireError> {
    let greeted = crate::connect::greet_tls(address, endpoint, None, Class::Admin).await?;
    Ok(ByteStream::new(greeted, endpoint.partition().clone()))
}
