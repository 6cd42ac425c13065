//! The client: calls with a callback or a wait, pushes to a callback.

use std::collections::HashMap;
use std::fmt;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use bytes::{Bytes, BytesMut};
use tokio_util::codec::Encoder;

use super::{Input, greet, spawn};
use crate::frame::{FRAME_BYTES_MAX, Frame, FrameCodec, HEADER_BYTES, Kind};
use crate::{Class, Local, Peer, Refusal, RefusalCode, WireError};

/// Calls in flight; a further one fails as busy.
const CALLS_MAX: usize = 4096;
/// The writer gathers queued frames up to this size.
const BATCH_BYTES: usize = 256 << 10;

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
            spawn(threads::Kind::Frames, "wire-write", move || writer.write_all(&queued))?,
            spawn(threads::Kind::Frames, "wire-read", move || reader.run(input, callbacks))?,
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
