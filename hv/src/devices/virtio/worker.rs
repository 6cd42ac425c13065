//! A device's thread: works when the guest notifies, when something it listens to is readable, or when a time is over.
//!
//! **Invariant:** a wake-up is never lost: it is counted, and the thread looks at its work after it has taken the count.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use threads::Kind;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// A worker's calls are shallow; the depth is in the layers below a disk.
const STACK_BYTES: usize = 256 << 10;

/// What wakes a thread.
#[derive(Debug)]
pub(crate) struct Wakeup {
    event: EventFd,
    poll: Epoll,
}

impl Wakeup {
    pub(crate) fn new() -> io::Result<Self> {
        let wakeup =
            Self { event: EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)?, poll: Epoll::new()? };
        wakeup.listen(wakeup.event.as_raw_fd())?;
        Ok(wakeup)
    }

    /// Wakes also when `fd`, which the caller keeps open, becomes readable.
    pub(crate) fn listen(&self, fd: RawFd) -> io::Result<()> {
        self.poll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0))
    }

    /// What KVM writes to when the guest notifies.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    pub(crate) fn wake(&self) {
        // Fails only when the counter is about to overflow, and then the thread has been woken anyway.
        drop(self.event.write(1));
    }

    fn wait(&self, limit: Option<Duration>) {
        let milliseconds = limit.map_or(-1, |limit| match i32::try_from(limit.as_millis()) {
            // Less than a millisecond is waited for as one, nothing as nothing.
            Ok(0) => i32::from(!limit.is_zero()),
            whole => whole.unwrap_or(i32::MAX),
        });
        // A signal ends the wait early, which is harmless.
        drop(self.poll.wait(milliseconds, &mut [EpollEvent::default(); 2]));
        drop(self.event.read());
    }
}

/// A running thread; ends when dropped.
#[derive(Debug)]
pub(crate) struct Worker {
    wakeup: Arc<Wakeup>,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that does `work` again and again; the work says when it wants to be called without a wake-up.
    pub(crate) fn spawn(
        name: String,
        wakeup: Arc<Wakeup>,
        mut work: impl FnMut() -> Option<Duration> + Send + 'static,
    ) -> io::Result<Self> {
        let stopped = Arc::new(AtomicBool::new(false));
        let (ends, wakes) = (Arc::clone(&stopped), Arc::clone(&wakeup));
        let thread =
            threads::spawn(Kind::Device, Builder::new().name(name).stack_size(STACK_BYTES), move || {
                while !ends.load(Ordering::SeqCst) {
                    let limit = work();
                    wakes.wait(limit);
                }
            })?;
        Ok(Self { wakeup, stopped, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.wakeup.wake();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
