//! Frames over a Unix socket without an asynchronous runtime, for processes that have none.
//!
//! A [`BlockingConnection`] has two threads: one reads and runs the callbacks, one writes what is queued. A
//! [`BlockingServer`] has one thread per connection and answers its requests in their order. Neither reconnects.

mod client;
mod server;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use bytes::BytesMut;
use tokio_util::codec::{Decoder, Encoder};

pub use client::{BlockingCallbacks, BlockingConnection};
pub use server::{BlockingHandler, BlockingServer};

use crate::driver::HANDSHAKE_MS;
use crate::frame::{FRAME_BYTES_MAX, Frame, FrameCodec, HELLO_BYTES_MAX, Kind};
use crate::hello::{self, Hello, Proof};
use crate::{Class, Local, Peer, Refusal, RefusalCode, Via, WireError};

/// Bytes asked from the socket at once.
const READ_BYTES: usize = 64 << 10;

/// Received bytes and the frames in them.
struct Input {
    codec: FrameCodec,
    received: BytesMut,
    buffer: Vec<u8>,
}

impl Input {
    fn new(stream: &UnixStream) -> Result<Self, WireError> {
        stream
            .set_read_timeout(Some(Duration::from_millis(HANDSHAKE_MS)))
            .map_err(|error| WireError::io("limit the handshake in time", error))?;
        Ok(Self {
            codec: FrameCodec::new(HELLO_BYTES_MAX),
            received: BytesMut::new(),
            buffer: vec![0; READ_BYTES],
        })
    }

    /// The next frame; nothing at the end of the stream.
    fn next(&mut self, mut stream: &UnixStream) -> Result<Option<Frame>, WireError> {
        loop {
            if let Some(frame) = self.codec.decode(&mut self.received)? {
                return Ok(Some(frame));
            }
            match stream.read(&mut self.buffer) {
                Ok(0) => return self.codec.decode_eof(&mut self.received),
                Ok(bytes) => self.received.extend_from_slice(&self.buffer[..bytes]),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(WireError::TimedOut {
                        doing: "the hello of the peer".to_owned(),
                        ms: HANDSHAKE_MS,
                    });
                }
                Err(error) => return Err(WireError::io("read from the connection", error)),
            }
        }
    }

    /// The peer is known now: frames of full length, and silence is allowed.
    fn greeted(&mut self, stream: &UnixStream) -> Result<(), WireError> {
        self.codec.allow(FRAME_BYTES_MAX);
        stream.set_read_timeout(None).map_err(|error| WireError::io("wait for the peer", error))
    }
}

fn greet(
    mut stream: &UnixStream,
    input: &mut Input,
    local: &Local,
    class: Option<Class>,
) -> Result<Peer, WireError> {
    let credentials = rustix::net::sockopt::socket_peercred(stream)
        .map_err(|error| WireError::io("ask who is at the other end", error.into()))?;
    let via = Via::Unix {
        uid: credentials.uid.as_raw(),
        pid: credentials.pid.as_raw_nonzero().get().unsigned_abs(),
    };
    let mut bytes = BytesMut::new();
    FrameCodec::default().encode(Hello::new(local, Class::Control).frame(), &mut bytes)?;
    let sent = stream.write_all(&bytes);
    let Some(first) = input.next(stream)? else {
        sent.map_err(|error| WireError::io("send the hello", error))?;
        return Err(WireError::BadFrame { what: "the peer closed before its hello".to_owned() });
    };
    match hello::accept(first, local, Proof { via, node: None, class }) {
        Ok(peer) => input.greeted(stream).map(|()| peer),
        Err(error) => {
            let refusal = Refusal::new(RefusalCode::Invalid, error.to_string());
            bytes.clear();
            let frame = Frame { id: 0, kind: Kind::Refusal, service: 0, body: refusal.encode() };
            FrameCodec::default().encode(frame, &mut bytes)?;
            // Told as a courtesy; the peer may be gone.
            let _gone = stream.write_all(&bytes);
            Err(error)
        }
    }
}

fn spawn(
    kind: threads::Kind,
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, WireError> {
    threads::spawn(kind, Builder::new().name(name.to_owned()), run)
        .map_err(|error| WireError::io("start a thread", error))
}
