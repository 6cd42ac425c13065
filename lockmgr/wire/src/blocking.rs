//! Frames over a Unix socket without an asynchronous runtime, for processes that have none.
//!
//! A [`BlockingConnection`] has two threads: one reads and runs the callbacks, one writes what is queued. A
//! [`BlockingServer`] has one thread per connection and answers its requests in their order. Neither reconnects.

use std::collections::HashMap;
use std::fmt;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use crate::driver::HANDSHAKE_MS;
use crate::frame::{FRAME_BYTES_MAX, Frame, FrameCodec, HEADER_BYTES, HELLO_BYTES_MAX, Kind};
use crate::hello::{self, Hello, Proof};
use crate::{Class, Local, Peer, Refusal, RefusalCode, Via, WireError};

/// Calls in flight; a further one fails as busy.
const CALLS_MAX: usize = 4096;
/// Bytes asked from the socket at once.
const READ_BYTES: usize = 64 << 10;
/// The writer gathers queued frames up to this size.
const BATCH_BYTES: usize = 256 << 10;
/// Local processes served at once; more are turned away.
const CONNECTIONS_MAX: usize = 64;

type Done = Box<dyn FnOnce(Result<Bytes, WireError>) + Send>;

/// What to do with what comes unasked. Called on the reader thread; must not wait for a call of the same connection.
pub struct BlockingCallbacks {
    /// A push of the server: service and body.
    pub pushed: Box<dyn Fn(u16, Bytes) + Send>,
    /// The connection is over, why. Called once, after all calls in flight have failed.
    pub closed: Box<dyn FnOnce(WireError) + Send>,
}

impl fmt::Debug for BlockingCallbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingCallbacks").finish_non_exhaustive()
    }
}

/// A client's connection. Dropping it closes it and waits for its threads, unless a callback drops it.
pub struct BlockingConnection {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    peer: Peer,
    stream: UnixStream,
    /// Held for map operations and for queueing, never while calling back or writing.
    calls: Mutex<Calls>,
}

struct Calls {
    next_id: u64,
    pending: HashMap<u64, Done>,
    queue: Option<Sender<Frame>>,
    reason: Option<WireError>,
}

impl BlockingConnection {
    /// Connects and exchanges hellos.
    pub fn connect(path: &Path, local: &Local, callbacks: BlockingCallbacks) -> Result<Self, WireError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| WireError::io(format!("connect to {}", path.display()), error))?;
        let mut input = Input::new(&stream)?;
        let peer = greet(&stream, &mut input, local, Some(Class::Control))?;
        let (queue, queued) = channel();
        let calls = Calls { next_id: 1, pending: HashMap::new(), queue: Some(queue), reason: None };
        let shared = Arc::new(Shared { peer, stream, calls: Mutex::new(calls) });
        let writer = Arc::clone(&shared);
        let reader = Arc::clone(&shared);
        let threads = vec![
            spawn("wire-write", move || writer.write_all(&queued))?,
            spawn("wire-read", move || reader.run(input, callbacks))?,
        ];
        Ok(Self { shared, threads })
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.shared.peer
    }

    /// Sends a request; `done` gets the reply on the reader thread, or an error here or there. Never blocks.
    pub fn send(&self, service: u16, body: Bytes, done: Done) {
        let mut calls = self.shared.calls();
        let refused = if let Some(reason) = &calls.reason {
            Some(reason.clone())
        } else if body.len() > FRAME_BYTES_MAX - HEADER_BYTES {
            Some(WireError::TooLong { bytes: (body.len() + HEADER_BYTES) as u64, max: FRAME_BYTES_MAX })
        } else if calls.pending.len() >= CALLS_MAX {
            Some(WireError::Refused(Refusal::new(RefusalCode::Busy, "too many calls in flight")))
        } else {
            None
        };
        if let Some(error) = refused {
            drop(calls);
            done(Err(error));
            return;
        }
        let id = calls.next_id;
        calls.next_id += 1;
        calls.pending.insert(id, done);
        calls.queue(Frame { id, kind: Kind::Request, service, body });
    }

    /// Sends a request and waits for the reply. Not for callbacks: they run on the thread that reads the reply.
    pub fn call(&self, service: u16, body: Bytes) -> Result<Bytes, WireError> {
        let (answer, answered) = channel();
        self.send(
            service,
            body,
            Box::new(move |outcome| {
                // The receiver waits below.
                let _received = answer.send(outcome);
            }),
        );
        answered.recv().unwrap_or_else(|_| Err(self.shared.closed_error("the call was dropped")))
    }

    /// Sends a message that wants no answer.
    pub fn push(&self, service: u16, body: Bytes) -> Result<(), WireError> {
        if body.len() > FRAME_BYTES_MAX - HEADER_BYTES {
            return Err(WireError::TooLong {
                bytes: (body.len() + HEADER_BYTES) as u64,
                max: FRAME_BYTES_MAX,
            });
        }
        let mut calls = self.shared.calls();
        if let Some(reason) = &calls.reason {
            return Err(reason.clone());
        }
        calls.queue(Frame { id: 0, kind: Kind::Push, service, body });
        Ok(())
    }

    /// Starts closing; the `closed` callback tells when it is done.
    pub fn close(&self) {
        self.shared.close(self.shared.closed_error("closed by this side"));
    }
}

impl Drop for BlockingConnection {
    fn drop(&mut self) {
        self.close();
        let me = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != me) {
            // A panic of a callback was reported when it happened.
            let _panicked = thread.join();
        }
    }
}

impl fmt::Debug for BlockingConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockingConnection").field("peer", &self.shared.peer).finish_non_exhaustive()
    }
}

impl Calls {
    fn queue(&mut self, frame: Frame) {
        // A writer that is gone has closed the socket: the reader fails the calls.
        if self.queue.as_ref().is_some_and(|queue| queue.send(frame).is_err()) {
            self.queue = None;
        }
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn closed_error(&self, reason: &str) -> WireError {
        WireError::Closed { peer: Arc::from(self.peer.to_string()), reason: Arc::from(reason) }
    }

    /// Notes the first reason, lets the writer end and wakes the reader.
    fn close(&self, reason: WireError) {
        let mut calls = self.calls();
        calls.reason.get_or_insert(reason);
        calls.queue = None;
        drop(calls);
        // Fails only if the peer was faster.
        let _gone = self.stream.shutdown(Shutdown::Both);
    }

    fn write_all(&self, queued: &Receiver<Frame>) {
        let mut batch = BytesMut::new();
        while let Ok(first) = queued.recv() {
            let mut next = Some(first);
            while let Some(frame) = next {
                // Lengths were checked when the frame was queued.
                if FrameCodec::default().encode(frame, &mut batch).is_err() {
                    break;
                }
                next = if batch.len() < BATCH_BYTES { queued.try_recv().ok() } else { None };
            }
            if let Err(error) = (&self.stream).write_all(&batch) {
                self.close(WireError::io("write to the connection", error));
                return;
            }
            batch.clear();
        }
    }

    fn run(&self, input: Input, callbacks: BlockingCallbacks) {
        let end = self.read_all(input, &callbacks.pushed);
        let end = match end {
            Ok(()) => self.closed_error("closed by the peer"),
            Err(error) => error,
        };
        self.close(end);
        let mut calls = self.calls();
        let waiting = std::mem::take(&mut calls.pending);
        let reason = calls.reason.clone().unwrap_or_else(|| self.closed_error("ended"));
        drop(calls);
        for done in waiting.into_values() {
            done(Err(reason.clone()));
        }
        (callbacks.closed)(reason);
    }

    fn read_all(&self, mut input: Input, pushed: &dyn Fn(u16, Bytes)) -> Result<(), WireError> {
        while let Some(frame) = input.next(&self.stream)? {
            match frame.kind {
                Kind::Reply => self.complete(frame.id, Ok(frame.body))?,
                Kind::Refusal if frame.id == 0 => {
                    return Err(WireError::Refused(Refusal::decode(frame.body)?));
                }
                Kind::Refusal => {
                    self.complete(frame.id, Err(WireError::Refused(Refusal::decode(frame.body)?)))?;
                }
                Kind::Push => pushed(frame.service, frame.body),
                Kind::Request => {
                    let refusal = Refusal::unsupported(frame.service).encode();
                    self.calls().queue(Frame { kind: Kind::Refusal, body: refusal, ..frame });
                }
                Kind::Hello => return Err(WireError::BadFrame { what: "second hello".to_owned() }),
            }
        }
        Ok(())
    }

    fn complete(&self, id: u64, outcome: Result<Bytes, WireError>) -> Result<(), WireError> {
        let done = self.calls().pending.remove(&id);
        let done = done.ok_or_else(|| WireError::BadFrame {
            what: format!("reply to request {id}, which is not open"),
        })?;
        done(outcome);
        Ok(())
    }
}

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

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, WireError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .map_err(|error| WireError::io("start a thread", error))
}

/// Answers a request of a local process.
pub type BlockingHandler = dyn Fn(&Peer, u16, Bytes) -> Result<Bytes, Refusal> + Send + Sync;

/// Serves local processes, one thread each. Dropping it closes all connections and waits for the threads.
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
        let accepting = spawn("wire-accept", move || accept.accept_all(&listener))?;
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
            // Only reading ends: a request that is being answered still gets its answer.
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
        while let Ok((stream, _)) = listener.accept() {
            let mut open = self.open();
            if open.closing {
                return;
            }
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
            let thread = spawn("wire-serve", move || {
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
                Ok(body) => (Kind::Reply, body),
                Err(refusal) => (Kind::Refusal, refusal.encode()),
            };
            FrameCodec::default()
                .encode(Frame { kind, body, ..frame_head(frame.id, frame.service) }, &mut out)?;
            stream.write_all(&out).map_err(|error| WireError::io("write to the connection", error))?;
            out.clear();
        }
        Ok(())
    }
}

fn frame_head(id: u64, service: u16) -> Frame {
    Frame { id, kind: Kind::Reply, service, body: Bytes::new() }
}
