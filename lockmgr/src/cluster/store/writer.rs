//! The thread that writes. It takes all that is queued into one transaction: many callers share one flush.
//!
//! After a failed write nothing is written any more: what the disk holds since is unknown (invariant D6).

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use openraft::storage::LogFlushed;
use tokio::sync::oneshot;

use super::disk::{Change, Disk, StoreError};
use crate::cluster::raft_types::Types;

/// Requests of one transaction; bounds the time that the first one waits for the last one.
const GROUP_MAX: usize = 512;

/// Who wants to know that a change is on disk.
pub(super) enum Done {
    Nobody,
    Log(LogFlushed<Types>),
    Caller(oneshot::Sender<std::io::Result<()>>),
}

struct Request {
    change: Change,
    done: Done,
}

/// Handle to the thread.
pub(super) struct Writer {
    /// `None` after closing. Held for a send or an assignment only.
    queue: Mutex<Option<Sender<Request>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    pub(super) fn start(disk: Disk) -> Result<Self, StoreError> {
        let (queue, queued) = channel();
        let thread =
            std::thread::Builder::new().name("cluster-write".to_owned()).spawn(move || run(&disk, &queued));
        let thread = thread.map_err(|error| StoreError::Io {
            doing: "start the writer of",
            path: std::path::PathBuf::from("the cluster's log"),
            source: error.into(),
        })?;
        Ok(Self { queue: Mutex::new(Some(queue)), thread: Mutex::new(Some(thread)) })
    }

    /// Queues a change; `done` is told when it is on disk.
    pub(super) fn queue(&self, change: Change, done: Done) {
        let queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let request = Request { change, done };
        let refused = match queue.as_ref() {
            Some(queue) => queue.send(request).err().map(|refused| refused.0),
            None => Some(request),
        };
        drop(queue);
        if let Some(request) = refused {
            request.done.tell(Err(closed()));
        }
    }

    /// Queues a change; the future waits until it is on disk.
    pub(super) fn write(&self, change: Change) -> impl Future<Output = std::io::Result<()>> + Send + use<> {
        let (done, written) = oneshot::channel();
        self.queue(change, Done::Caller(done));
        async move { written.await.unwrap_or_else(|_| Err(closed())) }
    }

    pub(super) fn close(&self) {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let thread = self.thread.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic of the writer has failed all its requests already.
            let _panicked = thread.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

fn closed() -> std::io::Error {
    std::io::Error::other("the cluster's log is closed")
}

impl Done {
    fn tell(self, outcome: std::io::Result<()>) {
        match self {
            Self::Nobody => {}
            Self::Log(flushed) => flushed.log_io_completed(outcome),
            Self::Caller(caller) => {
                // A caller that was cancelled does not ask any more.
                let _cancelled = caller.send(outcome);
            }
        }
    }
}

fn run(disk: &Disk, queued: &Receiver<Request>) {
    // A VM that moves stands still for what is written here.
    threads::prompt();
    let mut failed: Option<String> = None;
    let mut group = Vec::new();
    while let Ok(first) = queued.recv() {
        group.push(first);
        while group.len() < GROUP_MAX
            && let Ok(next) = queued.try_recv()
        {
            group.push(next);
        }
        if failed.is_none()
            && let Err(error) = disk.commit(group.iter().map(|request| &request.change))
        {
            tracing::error!(%error, "the cluster's log cannot be written; this node stops taking part");
            failed = Some(error.to_string());
        }
        for request in group.drain(..) {
            request.done.tell(match &failed {
                None => Ok(()),
                Some(error) => Err(std::io::Error::other(error.clone())),
            });
        }
    }
}
