//! One connection as its users see it: calls, pushes, the end.
//!
//! ```text
//!   call ─► slot, room ─► pending[id] ─► queue ─► writer task ─► peer
//!                             ▲                                   │
//!   reply ◄───────────────────┴───────── reader task ◄────────────┘
//! ```
//!
//! **Invariants:** every call ends, with a reply or with an error, at the latest when the connection ends. What is
//! queued for a slow peer never exceeds [`QUEUE_BYTES_MAX`]: calls wait for room, and a connection whose replies and
//! pushes find none is closed.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::frame::{FRAME_BYTES_MAX, Frame, HEADER_BYTES, Kind};
use crate::{Peer, Refusal, RefusalCode, WireError};

/// Calls of one side in flight on one connection; further ones wait.
pub(crate) const CALLS_MAX: usize = 1024;
/// Requests of the peer being answered at once; further ones are refused as busy. Above [`CALLS_MAX`], so that only a
/// peer that breaks the rule meets it.
pub(crate) const REQUESTS_MAX: usize = 2 * CALLS_MAX;
/// Bytes waiting for the writer.
pub(crate) const QUEUE_BYTES_MAX: usize = 64 << 20;

/// A connection to a peer. Clones are the same connection; it closes when the last clone is dropped.
#[derive(Clone)]
pub struct Connection {
    pub(crate) handle: Arc<Handle>,
}

/// Ends the connection when nobody can use it any more.
pub(crate) struct Handle {
    pub(crate) link: Arc<Link>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.link.fail("closed by this side");
    }
}

/// A frame on its way to the writer, with the room that it occupies.
pub(crate) struct Queued {
    pub(crate) frame: Frame,
    pub(crate) _room: OwnedSemaphorePermit,
}

type Answer = Result<Bytes, WireError>;

/// What the connection's tasks and its users share.
pub(crate) struct Link {
    pub(crate) peer: Peer,
    next_id: AtomicU64,
    /// Calls that wait for their replies; `None` after the end. Held for map operations only.
    pending: Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>,
    /// Why the connection ended; set once. Held for an assignment only.
    reason: Mutex<Option<Arc<str>>>,
    queue: mpsc::UnboundedSender<Queued>,
    room: Arc<Semaphore>,
    slots: Arc<Semaphore>,
    pub(crate) serving: Arc<Semaphore>,
    pub(crate) closing: CancellationToken,
    ended: watch::Sender<bool>,
}

/// Locks even after a panic elsewhere: the guarded values are whole at every moment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Link {
    pub(crate) fn new(peer: Peer) -> (Arc<Self>, mpsc::UnboundedReceiver<Queued>) {
        let (queue, queued) = mpsc::unbounded_channel();
        let link = Self {
            peer,
            next_id: AtomicU64::new(1),
            pending: Mutex::new(Some(HashMap::new())),
            reason: Mutex::new(None),
            queue,
            room: Arc::new(Semaphore::new(QUEUE_BYTES_MAX)),
            slots: Arc::new(Semaphore::new(CALLS_MAX)),
            serving: Arc::new(Semaphore::new(REQUESTS_MAX)),
            closing: CancellationToken::new(),
            ended: watch::Sender::new(false),
        };
        (Arc::new(link), queued)
    }

    /// Starts the end; the first reason counts.
    pub(crate) fn fail(&self, reason: &str) {
        lock(&self.reason).get_or_insert_with(|| Arc::from(reason));
        self.closing.cancel();
    }

    pub(crate) fn reason(&self) -> Arc<str> {
        lock(&self.reason).clone().unwrap_or_else(|| Arc::from("ended"))
    }

    fn closed_error(&self) -> WireError {
        WireError::Closed { peer: Arc::from(self.peer.to_string()), reason: self.reason() }
    }

    /// The tasks are done: whoever still waits learns it.
    pub(crate) fn finish(&self) {
        self.fail("its tasks ended");
        let waiting = lock(&self.pending).take().unwrap_or_default();
        for answer in waiting.into_values() {
            // A caller that has gone away needs no answer.
            let _gone = answer.send(Err(self.closed_error()));
        }
        self.slots.close();
        self.room.close();
        self.ended.send_replace(true);
    }

    /// Hands a reply to its caller. A caller that gave up is no error; an id that was never used is.
    pub(crate) fn complete(&self, id: u64, answer: Answer) -> Result<(), WireError> {
        if id == 0 || id >= self.next_id.load(Ordering::Relaxed) {
            return Err(WireError::BadFrame { what: format!("reply to request {id}, which was never sent") });
        }
        let waiting = lock(&self.pending).as_mut().and_then(|pending| pending.remove(&id));
        if let Some(waiting) = waiting {
            let _gave_up = waiting.send(answer);
        }
        Ok(())
    }

    /// Queues the answer to a request of the peer.
    pub(crate) fn answer(&self, id: u64, service: u16, answer: Result<Bytes, Refusal>) {
        let too_long = |body: &Bytes| body.len() > FRAME_BYTES_MAX - HEADER_BYTES;
        let (kind, body) = match answer {
            Ok(body) if too_long(&body) => (Kind::Refusal, reply_too_long(body.len()).encode()),
            Ok(body) => (Kind::Reply, body),
            Err(refusal) => (Kind::Refusal, refusal.encode()),
        };
        // A connection that has ended in the meantime has nobody left to answer.
        let _ended = self.send_now(Frame { id, kind, service, body });
    }

    /// Queues a frame without waiting; a peer so slow that there is no room loses the connection.
    pub(crate) fn send_now(&self, frame: Frame) -> Result<(), WireError> {
        let Ok(room) = Arc::clone(&self.room).try_acquire_many_owned(room_of(&frame)?) else {
            self.fail("the peer reads too slowly");
            return Err(self.closed_error());
        };
        self.queue.send(Queued { frame, _room: room }).map_err(|_| self.closed_error())
    }

    fn register(&self, answer: oneshot::Sender<Answer>) -> Result<u64, WireError> {
        let mut pending = lock(&self.pending);
        let Some(pending) = pending.as_mut() else { return Err(self.closed_error()) };
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        pending.insert(id, answer);
        Ok(id)
    }
}

fn room_of(frame: &Frame) -> Result<u32, WireError> {
    let bytes = HEADER_BYTES + frame.body.len();
    match u32::try_from(bytes) {
        Ok(room) if bytes <= FRAME_BYTES_MAX => Ok(room),
        _ => Err(WireError::TooLong { bytes: bytes as u64, max: FRAME_BYTES_MAX }),
    }
}

fn reply_too_long(bytes: usize) -> Refusal {
    Refusal::new(RefusalCode::Failed, format!("the reply has {bytes} bytes, more than a frame holds"))
        .with_hint("ask for a smaller piece")
}

/// Forgets a call whose caller stopped waiting.
struct Waiting<'a> {
    link: &'a Link,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(pending) = lock(&self.link.pending).as_mut() {
            pending.remove(&self.id);
        }
    }
}

impl Connection {
    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.link().peer
    }

    /// Sends a request and waits for its reply. Dropping the future abandons the wait, not what the peer does.
    /// There is no time limit; the caller knows how long a reply may take.
    pub async fn call(&self, service: u16, body: Bytes) -> Result<Bytes, WireError> {
        let link = self.link();
        let mut frame = Frame { id: 0, kind: Kind::Request, service, body };
        let bytes = room_of(&frame)?;
        let _slot = Arc::clone(&link.slots).acquire_owned().await.map_err(|_| link.closed_error())?;
        let room = Arc::clone(&link.room).acquire_many_owned(bytes).await.map_err(|_| link.closed_error())?;
        let (answer, answered) = oneshot::channel();
        frame.id = link.register(answer)?;
        let _waiting = Waiting { link, id: frame.id };
        link.queue.send(Queued { frame, _room: room }).map_err(|_| link.closed_error())?;
        answered.await.unwrap_or_else(|_| Err(link.closed_error()))
    }

    /// Sends a message that wants no answer; never waits. Pushes of one thread arrive in their order.
    pub fn push(&self, service: u16, body: Bytes) -> Result<(), WireError> {
        self.link().send_now(Frame { id: 0, kind: Kind::Push, service, body })
    }

    /// Starts closing: what is queued is still sent, calls in flight fail.
    pub fn close(&self) {
        self.link().fail("closed by this side");
    }

    /// Whether the connection is closing or closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.link().closing.is_cancelled()
    }

    /// Waits until the connection is over and its tasks have ended; returns why.
    pub async fn closed(&self) -> Arc<str> {
        let mut ended = self.link().ended.subscribe();
        // The sender lives as long as `self`.
        let _ended = ended.wait_for(|ended| *ended).await;
        self.link().reason()
    }

    /// Whether both are the same connection.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.handle.link, &other.handle.link)
    }

    pub(crate) fn link(&self) -> &Link {
        &self.handle.link
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("peer", self.peer())
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}
