//! The tasks of one connection: hello, reader, writer, end.
//!
//! The reader takes frames in their order and starts what they ask for. The writer takes all that is queued before it
//! flushes once: under load most frames share a system call and a TLS record.

use std::future::poll_fn;
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;
use tokio_util::codec::FramedRead;
use tokio_util::task::TaskTracker;

use crate::connection::{Handle, Link, Queued};
use crate::frame::{FRAME_BYTES_MAX, Frame, FrameCodec, HELLO_BYTES_MAX, Kind};
use crate::hello::{self, Hello, Proof};
use crate::{Class, Connection, Handler, Local, Partition, Peer, Refusal, RefusalCode, WireError};

/// TCP, TLS and hello together.
pub(crate) const HANDSHAKE_MS: u64 = 5_000;
/// How long the last bytes to a peer that does not read may take.
const LAST_WORDS_MS: u64 = 1_000;
/// The writer flushes at the latest when it has gathered this much.
const BATCH_BYTES: usize = 256 << 10;
/// Bodies up to this size are copied together; longer ones are written from where they are.
const COPIED_BODY_BYTES_MAX: usize = 16 << 10;

/// A stream after a successful hello.
pub(crate) struct Greeted<S> {
    frames: FramedRead<ReadHalf<S>, FrameCodec>,
    out: WriteHalf<S>,
    peer: Peer,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Greeted<S> {
    /// The stream without frames: both directions, what has come with the hello, and who it is.
    pub(crate) fn into_bytes(self) -> (ReadHalf<S>, WriteHalf<S>, BytesMut, Peer) {
        let parts = self.frames.into_parts();
        (parts.io, self.out, parts.read_buf, self.peer)
    }

    pub(crate) fn class(&self) -> Class {
        self.peer.class
    }

    /// The stream without frames, and what has already been read from it.
    pub(crate) fn into_stream(self) -> (S, Bytes, Peer) {
        let early = self.frames.read_buffer().clone().freeze();
        (self.frames.into_inner().unsplit(self.out), early, self.peer)
    }
}

/// Limits a step of the handshake in time.
pub(crate) async fn in_time<T>(
    doing: &str,
    step: impl Future<Output = Result<T, WireError>>,
) -> Result<T, WireError> {
    match tokio::time::timeout(Duration::from_millis(HANDSHAKE_MS), step).await {
        Ok(outcome) => outcome,
        Err(_) => Err(WireError::TimedOut { doing: doing.to_owned(), ms: HANDSHAKE_MS }),
    }
}

/// Exchanges hellos. On a refusal the peer is told why.
pub(crate) async fn greet<S>(
    stream: S,
    local: &Local,
    class: Class,
    proof: Proof,
) -> Result<Greeted<S>, WireError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    let (input, mut out) = tokio::io::split(stream);
    let mut frames = FramedRead::new(input, FrameCodec::new(HELLO_BYTES_MAX));
    // A peer that has refused us already may not take our hello, but its reason can still be read.
    let sent = send_frame(&mut out, &Hello::new(local, class).frame()).await;
    let first = match frames.next().await {
        Some(first) => first,
        None => Err(sent.err().unwrap_or_else(|| WireError::io("read the hello", closed_early()))),
    };
    match first.and_then(|first| hello::accept(first, local, proof)) {
        Ok(peer) => {
            frames.decoder_mut().allow(FRAME_BYTES_MAX);
            Ok(Greeted { frames, out, peer })
        }
        Err(error) => {
            tell_and_close(&mut out, frames.get_mut(), &error).await;
            Err(error)
        }
    }
}

fn closed_early() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the peer closed the connection")
}

async fn send_frame(out: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> Result<(), WireError> {
    let mut bytes = BytesMut::new();
    frame.put_header(&mut bytes)?;
    bytes.extend_from_slice(&frame.body);
    let written = async {
        out.write_all(&bytes).await?;
        out.flush().await
    };
    written.await.map_err(|error| WireError::io("send a frame", error))
}

/// Sends the reason and waits until the peer has closed: closing first could discard what it has not read yet.
async fn tell_and_close(
    out: &mut (impl AsyncWrite + Unpin),
    input: &mut (impl AsyncRead + Unpin),
    error: &WireError,
) {
    if matches!(error, WireError::Refused(_) | WireError::Io { .. }) {
        return;
    }
    let refusal =
        Refusal::new(RefusalCode::Invalid, error.to_string()).with_hint(error.hint().unwrap_or_default());
    let frame = Frame { id: 0, kind: Kind::Refusal, service: 0, body: refusal.encode() };
    let last_words = async {
        if send_frame(out, &frame).await.is_ok() && out.shutdown().await.is_ok() {
            discard(input).await;
        }
    };
    let _too_slow = tokio::time::timeout(Duration::from_millis(LAST_WORDS_MS), last_words).await;
}

/// Refuses a peer before its hello is looked at, and tells it why.
pub(crate) async fn refuse(stream: impl AsyncRead + AsyncWrite + Unpin, error: &WireError) {
    let (mut input, mut out) = tokio::io::split(stream);
    tell_and_close(&mut out, &mut input, error).await;
}

/// Reads to the end, in a fixed buffer.
pub(crate) async fn discard(input: &mut (impl AsyncRead + Unpin)) {
    let mut buffer = [0; 4096];
    while matches!(input.read(&mut buffer).await, Ok(1..)) {}
}

/// Limits [`discard`] in time, for a socket that is given up.
pub(crate) async fn discard_in_time(input: &mut (impl AsyncRead + Unpin)) {
    let _too_slow = tokio::time::timeout(Duration::from_millis(LAST_WORDS_MS), discard(input)).await;
}

/// Starts the tasks of a greeted connection.
pub(crate) fn start<S>(
    greeted: Greeted<S>,
    handler: Arc<dyn Handler>,
    partition: Partition,
    tasks: &TaskTracker,
) -> Connection
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Greeted { frames, out, peer } = greeted;
    let (link, queued) = Link::new(peer);
    let connection = Connection { handle: Arc::new(Handle { link: Arc::clone(&link) }) };
    let writer = tasks.spawn(write_all(out, queued, Arc::clone(&link), partition.clone()));
    let reader =
        Reader { link, handle: Arc::downgrade(&connection.handle), handler, partition, tasks: tasks.clone() };
    tracing::debug!(peer = %reader.link.peer, class = %reader.link.peer.class, "connection up");
    reader.handler.connected(&connection);
    tasks.spawn(reader.run(frames, writer));
    connection
}

/// The end of a connection, reached even if a handler panics: waiting callers and the handler learn it.
struct End {
    link: Arc<Link>,
    handle: Weak<Handle>,
    handler: Arc<dyn Handler>,
}

impl Drop for End {
    fn drop(&mut self) {
        self.link.finish();
        let reason = self.link.reason();
        tracing::debug!(peer = %self.link.peer, class = %self.link.peer.class, %reason, "connection over");
        // The last user may have gone, which is why it ended: then this is a new handle to the same connection.
        let handle =
            self.handle.upgrade().unwrap_or_else(|| Arc::new(Handle { link: Arc::clone(&self.link) }));
        self.handler.gone(&Connection { handle }, &reason);
    }
}

struct Reader {
    link: Arc<Link>,
    handle: Weak<Handle>,
    handler: Arc<dyn Handler>,
    partition: Partition,
    tasks: TaskTracker,
}

impl Reader {
    async fn run<R>(self, mut frames: FramedRead<R, FrameCodec>, writer: JoinHandle<()>)
    where
        R: AsyncRead + Unpin,
    {
        let _end = End {
            link: Arc::clone(&self.link),
            handle: Weak::clone(&self.handle),
            handler: Arc::clone(&self.handler),
        };
        if let Err(error) = self.read_all(&mut frames).await {
            self.refuse_connection(&error);
        }
        // The writer sends what is queued and ends because the link is closing.
        let _panicked = writer.await;
    }

    async fn read_all<R>(&self, frames: &mut FramedRead<R, FrameCodec>) -> Result<(), WireError>
    where
        R: AsyncRead + Unpin,
    {
        loop {
            let frame = tokio::select! {
                biased;
                () = self.link.closing.cancelled() => return Ok(()),
                frame = frames.next() => frame,
            };
            let Some(frame) = frame else {
                self.link.fail("closed by the peer");
                return Ok(());
            };
            tokio::select! {
                biased;
                () = self.link.closing.cancelled() => return Ok(()),
                () = self.partition.passable() => {}
            }
            self.take(frame?).await?;
        }
    }

    async fn take(&self, frame: Frame) -> Result<(), WireError> {
        match frame.kind {
            Kind::Request => {
                self.serve(frame).await;
                Ok(())
            }
            Kind::Push => {
                if let Some(connection) = self.connection() {
                    self.handler.pushed(self.link.peer.clone(), connection, frame.service, frame.body);
                }
                Ok(())
            }
            Kind::Reply => self.link.complete(frame.id, Ok(frame.body)),
            Kind::Refusal => {
                let refusal = WireError::Refused(Refusal::decode(frame.body)?);
                if frame.id == 0 { Err(refusal) } else { self.link.complete(frame.id, Err(refusal)) }
            }
            Kind::Hello => Err(WireError::BadFrame { what: "second hello".to_owned() }),
        }
    }

    /// Answers a request: at once if the handler can, else by a task.
    async fn serve(&self, frame: Frame) {
        let Frame { id, service, body, .. } = frame;
        let Ok(permit) = Arc::clone(&self.link.serving).try_acquire_owned() else {
            let busy = Refusal::new(RefusalCode::Busy, "too many requests in flight on this connection");
            self.link.answer(id, service, Err(busy));
            return;
        };
        let Some(connection) = self.connection() else { return };
        let mut answer = self.handler.handle(self.link.peer.clone(), connection, service, body);
        match poll_fn(|context| Poll::Ready(answer.as_mut().poll(context))).await {
            Poll::Ready(outcome) => self.link.answer(id, service, outcome),
            Poll::Pending => {
                let link = Arc::clone(&self.link);
                self.tasks.spawn(async move {
                    let outcome = answer.await;
                    link.answer(id, service, outcome);
                    drop(permit);
                });
            }
        }
    }

    /// The connection for a handler, unless its last user has gone: then it is about to close.
    fn connection(&self) -> Option<Connection> {
        self.handle.upgrade().map(|handle| Connection { handle })
    }

    fn refuse_connection(&self, error: &WireError) {
        let peer = &self.link.peer;
        match error {
            // The peer has said so itself, or is not there any more.
            WireError::Refused(_) | WireError::Io { .. } => {
                tracing::info!(%peer, error = error.explain(), "connection lost");
            }
            _ => {
                tracing::warn!(%peer, error = error.explain(), "connection closed because of what the peer sent");
                let hint = error.hint().unwrap_or_default();
                let refusal = Refusal::new(RefusalCode::Invalid, error.to_string()).with_hint(hint);
                let frame = Frame { id: 0, kind: Kind::Refusal, service: 0, body: refusal.encode() };
                let _ended = self.link.send_now(frame);
            }
        }
        self.link.fail(&error.explain());
    }
}

async fn write_all<W>(
    mut out: W,
    mut queued: UnboundedReceiver<Queued>,
    link: Arc<Link>,
    partition: Partition,
) where
    W: AsyncWrite + Unpin,
{
    let mut batch = BytesMut::with_capacity(COPIED_BODY_BYTES_MAX);
    loop {
        let first = tokio::select! {
            biased;
            first = queued.recv() => first,
            () = link.closing.cancelled() => None,
        };
        let Some(first) = first else { break };
        tokio::select! {
            biased;
            () = link.closing.cancelled() => {}
            () = partition.passable() => {}
        }
        let written = tokio::select! {
            written = write_batch(&mut out, &mut batch, first, &mut queued) => written,
            // Closing while the peer does not read: a short time for the rest, then the end.
            () = closing_for_long(&link) => break,
        };
        if let Err(error) = written {
            link.fail(&error.explain());
            break;
        }
    }
    queued.close();
    let _too_slow = tokio::time::timeout(Duration::from_millis(LAST_WORDS_MS), out.shutdown()).await;
}

async fn closing_for_long(link: &Link) {
    link.closing.cancelled().await;
    tokio::time::sleep(Duration::from_millis(LAST_WORDS_MS)).await;
}

/// Writes `first` and all that is queued behind it, then flushes once.
async fn write_batch<W>(
    out: &mut W,
    batch: &mut BytesMut,
    first: Queued,
    queued: &mut UnboundedReceiver<Queued>,
) -> Result<(), WireError>
where
    W: AsyncWrite + Unpin,
{
    let mut next = Some(first);
    let mut gathered = 0;
    while let Some(item) = next {
        gathered += item.frame.body.len();
        item.frame.put_header(batch)?;
        if item.frame.body.len() <= COPIED_BODY_BYTES_MAX {
            batch.extend_from_slice(&item.frame.body);
        } else {
            write_out(out, batch).await?;
            out.write_all(&item.frame.body)
                .await
                .map_err(|error| WireError::io("write to the connection", error))?;
        }
        next = if gathered < BATCH_BYTES { queued.try_recv().ok() } else { None };
    }
    write_out(out, batch).await?;
    out.flush().await.map_err(|error| WireError::io("write to the connection", error))
}

async fn write_out<W: AsyncWrite + Unpin>(out: &mut W, batch: &mut BytesMut) -> Result<(), WireError> {
    out.write_all(batch).await.map_err(|error| WireError::io("write to the connection", error))?;
    batch.clear();
    Ok(())
}
