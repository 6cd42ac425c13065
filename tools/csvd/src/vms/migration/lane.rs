//! One memory stream of a live move with the thread that fills it.
//!
//! **Invariant:** the first failure is kept and is what every later call reports; a lane that is dropped ends its stream, so
//! that a thread that waits for the network ends too.

use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use hv::GuestRam;
use migrator::stream::{Opening, Pages, Sender, Sent, StreamError};
use tokio::sync::{mpsc, oneshot};
use wire::{Stream, StreamEnd};

/// Chunks that wait for a stream: enough to keep it busy, and few, because their pages are read only then.
const WAITING_MAX: usize = 4;

enum Work {
    Send(Pages),
    /// Everything before it has arrived.
    Settle(oneshot::Sender<()>),
    /// The end, with the state on one of the lanes.
    Finish(Option<Vec<u8>>),
}

/// What was sent so far. Rank: a leaf.
type SoFar = Arc<Mutex<Sent>>;

/// A stream and its thread.
pub(super) struct Lane {
    work: mpsc::Sender<Work>,
    sent: SoFar,
    failure: Arc<OnceLock<String>>,
    answer: Option<oneshot::Receiver<()>>,
    _end: StreamEnd,
}

impl Lane {
    /// With memory for so many bytes of what is sent; without it, all pages go whole.
    pub(super) fn start(
        stream: Stream,
        opening: Opening,
        ram: GuestRam,
        remembered_bytes: u64,
    ) -> io::Result<Self> {
        let (work, todo) = mpsc::channel(WAITING_MAX);
        let (tell, answer) = oneshot::channel();
        let (sent, failure) = (SoFar::default(), Arc::new(OnceLock::new()));
        let lane = Self {
            work,
            sent: Arc::clone(&sent),
            failure: Arc::clone(&failure),
            answer: Some(answer),
            _end: stream.ender()?,
        };
        std::thread::Builder::new().name(format!("move-out{}", opening.stream)).spawn(move || {
            // The guest stands still for the last of it.
            threads::prompt();
            let mut todo = todo;
            match carry(stream, &opening, ram, remembered_bytes, &mut todo, &sent) {
                Ok(Some(sender)) => {
                    // Whoever waited may have given up.
                    let _ = tell.send(());
                    // Giving memory back keeps a core busy, which the guest would stand still for.
                    while todo.blocking_recv().is_some() {}
                    drop(sender);
                }
                Ok(None) => {}
                Err(error) => drop(failure.set(error.to_string())),
            }
        })?;
        Ok(lane)
    }

    /// What was sent so far.
    pub(super) fn sent(&self) -> Sent {
        *self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over pages; waits for room.
    pub(super) async fn send(&self, pages: Pages, limit: Duration) -> Result<(), String> {
        match tokio::time::timeout(limit, self.work.send(Work::Send(pages))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(self.broken()),
            Err(_) => Err(stalled(limit)),
        }
    }

    /// Returns when everything has arrived, or when nothing has moved for `limit`.
    pub(super) async fn settle(&self, limit: Duration) -> Result<(), String> {
        let (tell, mut told) = oneshot::channel();
        self.work.send(Work::Settle(tell)).await.map_err(|_| self.broken())?;
        loop {
            let before = self.sent();
            match tokio::time::timeout(limit, &mut told).await {
                Ok(settled) => return settled.map_err(|_| self.broken()),
                Err(_) if self.sent() == before => return Err(stalled(limit)),
                Err(_) => {}
            }
        }
    }

    /// Hands over the end.
    pub(super) async fn finish(&self, state: Option<Vec<u8>>) -> Result<(), String> {
        self.work.send(Work::Finish(state)).await.map_err(|_| self.broken())
    }

    /// Waits for the target's answer.
    pub(super) async fn answered(&mut self) -> Result<(), String> {
        let answer = self.answer.take().ok_or("the stream is over")?;
        answer.await.map_err(|_| self.broken())
    }

    fn broken(&self) -> String {
        self.failure.get().cloned().unwrap_or_else(|| "the memory stream has ended".to_owned())
    }
}

fn stalled(limit: Duration) -> String {
    format!("nothing has moved on the memory stream for {} s", limit.as_secs())
}

/// Body of the thread; gives the sender when the target has said that it has everything.
fn carry(
    mut stream: Stream,
    opening: &Opening,
    ram: GuestRam,
    remembered_bytes: u64,
    todo: &mut mpsc::Receiver<Work>,
    sent: &Mutex<Sent>,
) -> Result<Option<Sender<Stream>>, StreamError> {
    opening.write(&mut stream)?;
    let mut sender = Sender::new(stream, ram).remembering(remembered_bytes);
    while let Some(work) = todo.blocking_recv() {
        match work {
            Work::Send(pages) => {
                sender.send(&pages)?;
                *sent.lock().unwrap_or_else(PoisonError::into_inner) = sender.sent();
            }
            Work::Settle(tell) => {
                sender.settle()?;
                let _ = tell.send(());
            }
            Work::Finish(state) => {
                sender.finish(state.as_deref())?;
                sender.await_answer()?;
                return Ok(Some(sender));
            }
        }
    }
    Ok(None)
}
