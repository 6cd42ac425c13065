//! The server: one thread per connection.

use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio_util::codec::Encoder;

use super::{Input, greet, spawn};
use crate::frame::{FRAME_BYTES_MAX, Frame, FrameCodec, HEADER_BYTES, Kind};
use crate::{Local, Peer, Refusal, RefusalCode, WireError};

/// Local processes served at once; more are turned away.
const CONNECTIONS_MAX: usize = 64;

/// Pause after a refused accept (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that does not take its reply for so long loses the connection.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Answers a request of a local process.
pub type BlockingHandler = dyn Fn(&Peer, u16, Bytes) -> Result<Bytes, Refusal> + Send + Sync;

/// Serves local processes, one thread each. Dropping it lets requests in progress end and their replies go out, closes all
/// connections and waits for the threads.
pub struct BlockingServer {
    serving: Arc<Serving>,
    accepting: Option<JoinHandle<()>>,
}

struct Serving {
    local: Local,
    handler: Box<BlockingHandler>,
    /// Same socket as the listener; shutting it down ends `accept`.
    waker: UnixStream,
    /// Held for list operations only.
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    closing: bool,
    next: u64,
    connections: HashMap<u64, (Arc<UnixStream>, Option<JoinHandle<()>>)>,
}

impl BlockingServer {
    /// Starts to accept on `listener`, whose file permissions decide who may connect.
    pub fn serve(
        listener: UnixListener,
        local: Local,
        handler: Box<BlockingHandler>,
    ) -> Result<Self, WireError> {
        let waker = listener.try_clone().map_err(|error| WireError::io("share the listener", error))?;
        let waker = UnixStream::from(OwnedFd::from(waker));
        let serving = Arc::new(Serving { local, handler, waker, open: Mutex::default() });
        let accept = Arc::clone(&serving);
        let accepting = spawn(threads::Kind::Accept, "wire-accept", move || accept.accept_all(&listener))?;
        Ok(Self { serving, accepting: Some(accepting) })
    }
}

impl Drop for BlockingServer {
    fn drop(&mut self) {
        self.serving.open().closing = true;
        let _already = self.serving.waker.shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _panicked = accepting.join();
        }
        let open = std::mem::take(&mut self.serving.open().connections);
        for (stream, _) in open.values() {
            // Only the reading half: a reply in progress is still sent.
            let _gone = stream.shutdown(Shutdown::Read);
        }
        let me = std::thread::current().id();
        for thread in open.into_values().filter_map(|(_, thread)| thread) {
            if thread.thread().id() != me {
                let _panicked = thread.join();
            }
        }
    }
}

impl fmt::Debug for BlockingServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingServer").field("local", &self.serving.local).finish_non_exhaustive()
    }
}

impl Serving {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn accept_all(self: Arc<Self>, listener: &UnixListener) {
        loop {
            let accepted = listener.accept();
            let mut open = self.open();
            if open.closing {
                return;
            }
            let (stream, _) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    drop(open);
                    tracing::warn!(%error, "cannot accept a local connection");
                    std::thread::park_timeout(ACCEPT_PAUSE);
                    continue;
                }
            };
            if open.connections.len() >= CONNECTIONS_MAX {
                tracing::warn!(max = CONNECTIONS_MAX, "local connection turned away: too many are open");
                continue;
            }
            let id = open.next;
            open.next += 1;
            let stream = Arc::new(stream);
            open.connections.insert(id, (Arc::clone(&stream), None));
            let serving = Arc::clone(&self);
            // The thread removes its own entry under the lock that is held here, so the entry is complete before.
            let thread = spawn(threads::Kind::Control, "wire-serve", move || {
                if let Err(error) = serving.serve(&stream) {
                    tracing::warn!(error = error.explain(), "local connection closed");
                }
                serving.open().connections.remove(&id);
            });
            match thread {
                Ok(thread) => {
                    open.connections.entry(id).and_modify(|entry| entry.1 = Some(thread));
                }
                Err(error) => {
                    tracing::warn!(error = error.explain(), "local connection turned away");
                    open.connections.remove(&id);
                }
            }
        }
    }

    fn serve(&self, mut stream: &UnixStream) -> Result<(), WireError> {
        stream
            .set_write_timeout(Some(WRITE_LIMIT))
            .map_err(|error| WireError::io("limit the time of a reply", error))?;
        let mut input = Input::new(stream)?;
        let peer = greet(stream, &mut input, &self.local, None)?;
        let mut out = BytesMut::new();
        while let Some(frame) = input.next(stream)? {
            if frame.kind != Kind::Request {
                return Err(WireError::BadFrame {
                    what: format!("{:?} where a request was expected", frame.kind),
                });
            }
            let answer = (self.handler)(&peer, frame.service, frame.body);
            let (kind, body) = match answer {
                Ok(body) if body.len() > FRAME_BYTES_MAX - HEADER_BYTES => {
                    (Kind::Refusal, too_long(body.len()))
                }
                Ok(body) => (Kind::Reply, body),
                Err(refusal) => (Kind::Refusal, refusal.encode()),
            };
            let reply = Frame { id: frame.id, kind, service: frame.service, body };
            FrameCodec::default().encode(reply, &mut out)?;
            stream.write_all(&out).map_err(|error| WireError::io("write to the connection", error))?;
            out.clear();
        }
        Ok(())
    }
}

fn too_long(bytes: usize) -> Bytes {
    Refusal::new(RefusalCode::Failed, format!("the reply has {bytes} bytes, more than a frame holds"))
        .encode()
}
