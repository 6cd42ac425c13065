//! One memory stream of a live move with the thread that fills it.
//!
//! **Invariant:** the first failure is kept and is what every later call reports; a lane that is dropped ends its stream, so
//! that a thread that waits for the network ends too.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hv::GuestRam;
use migrator::stream::{Opening, Pages, Sender, StreamError, await_answer};
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

/// A stream and its thread.
pub(super) struct Lane {
    work: mpsc::Sender<Work>,
    sent_bytes: Arc<AtomicU64>,
    failure: Arc<OnceLock<String>>,
    answer: Option<oneshot::Receiver<()>>,
    _end: StreamEnd,
}

impl Lane {
    pub(super) fn start(stream: Stream, opening: Opening, ram: GuestRam) -> io::Result<Self> {
        let (work, todo) = mpsc::channel(WAITING_MAX);
        let (tell, answer) = oneshot::channel();
        let (sent_bytes, failure) = (Arc::new(AtomicU64::new(0)), Arc::new(OnceLock::new()));
        let lane = Self {
            work,
            sent_bytes: Arc::clone(&sent_bytes),
            failure: Arc::clone(&failure),
            answer: Some(answer),
            _end: stream.ender()?,
        };
        std::thread::Builder::new().name(format!("move-out{}", opening.stream)).spawn(move || {
            match carry(stream, &opening, ram, todo, &sent_bytes) {
                // Whoever waited may have given up.
                Ok(true) => {
                    let _ = tell.send(());
                }
                Ok(false) => {}
                Err(error) => drop(failure.set(error.to_string())),
            }
        })?;
        Ok(lane)
    }

    /// Bytes sent so far.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
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
            let before = self.sent_bytes();
            match tokio::time::timeout(limit, &mut told).await {
                Ok(settled) => return settled.map_err(|_| self.broken()),
                Err(_) if self.sent_bytes() == before => return Err(stalled(limit)),
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

/// Body of the thread; `true` when the target has said that it has everything.
fn carry(
    mut stream: Stream,
    opening: &Opening,
    ram: GuestRam,
    mut todo: mpsc::Receiver<Work>,
    sent_bytes: &AtomicU64,
) -> Result<bool, StreamError> {
    opening.write(&mut stream)?;
    let mut sender = Sender::new(stream, ram);
    while let Some(work) = todo.blocking_recv() {
        match work {
            Work::Send(pages) => {
                sender.send(&pages)?;
                sent_bytes.store(sender.bytes(), Ordering::Relaxed);
            }
            Work::Settle(tell) => {
                sender.settle()?;
                let _ = tell.send(());
            }
            Work::Finish(state) => {
                let mut stream = sender.finish(state.as_deref())?;
                await_answer(&mut stream)?;
                return Ok(true);
            }
        }
    }
    Ok(false)
}
