//! Hand-over of requests to the threads that serve them.
//!
//! ```text
//!   any thread -- push --> Intake (bounded) -- take --> the device's own thread(s)
//! ```
//!
//! A push blocks while the intake is full, except on a serving thread: there it would wait for itself.
//!
//! **Invariant:** whatever was pushed before `close` is served; a push after it gives the item back.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use threads::Kind;

/// Requests that may wait in an intake before `push` blocks.
const WAITING_MAX: usize = 1024;

thread_local! {
    /// Address of the intake that this thread serves; 0 for all others.
    static SERVES: Cell<usize> = const { Cell::new(0) };
}

/// What a push needs from its caller.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Pushed {
    /// The serving thread is awake and will find the item.
    Seen,
    /// The serving thread said that it goes to sleep: wake it.
    Wake,
}

/// A bounded queue from many threads to the serving ones.
pub(crate) struct Intake<T> {
    /// Lock rank: leaf. Protects the queue and the sleeper's state; held for a few instructions only.
    state: Mutex<State<T>>,
    arrived: Condvar,
    room: Condvar,
}

struct State<T> {
    waiting: VecDeque<T>,
    asleep: bool,
    closed: bool,
}

impl<T> Intake<T> {
    pub(crate) fn new() -> Arc<Self> {
        let state = State { waiting: VecDeque::new(), asleep: false, closed: false };
        Arc::new(Self { state: Mutex::new(state), arrived: Condvar::new(), room: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the calling thread serves this intake from now on.
    pub(crate) fn serve_here(self: &Arc<Self>) {
        SERVES.set(Arc::as_ptr(self).addr());
    }

    /// Whether the calling thread serves this intake.
    pub(crate) fn served_here(&self) -> bool {
        SERVES.get() == std::ptr::from_ref(self).addr()
    }

    /// Adds an item; blocks while the intake is full. Gives it back when the intake is closed.
    pub(crate) fn push(&self, item: T) -> Result<Pushed, T> {
        let mut state = self.lock();
        if state.waiting.len() >= WAITING_MAX && !self.served_here() {
            state = self
                .room
                .wait_while(state, |state| state.waiting.len() >= WAITING_MAX && !state.closed)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(item);
        }
        state.waiting.push_back(item);
        let wake = std::mem::take(&mut state.asleep);
        Ok(if wake { Pushed::Wake } else { Pushed::Seen })
    }

    /// Moves up to `most` items over without waiting. When there are none and `sleepy` is set, notes that the caller
    /// goes to sleep, so that the next push asks for a wake-up. Tells whether the intake is closed and empty.
    pub(crate) fn take(&self, into: &mut VecDeque<T>, most: usize, sleepy: bool) -> bool {
        let mut state = self.lock();
        let was_full = state.waiting.len() >= WAITING_MAX;
        let count = most.min(state.waiting.len());
        into.extend(state.waiting.drain(..count));
        state.asleep = sleepy && count == 0 && !state.closed;
        let ended = state.closed && state.waiting.is_empty();
        drop(state);
        if was_full {
            self.room.notify_all();
        }
        ended
    }

    /// Waits for one item; `None` when the intake is closed and empty.
    fn wait_one(&self) -> Option<T> {
        let mut state = self
            .arrived
            .wait_while(self.lock(), |state| state.waiting.is_empty() && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        let was_full = state.waiting.len() >= WAITING_MAX;
        let item = state.waiting.pop_front();
        drop(state);
        if was_full {
            self.room.notify_all();
        }
        item
    }

    /// Whether items are refused.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Refuses further items. What waits is still served.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
        self.room.notify_all();
    }
}

/// Threads that serve an intake with one function. They start with the first item and end with the value.
pub(crate) struct Workers<T: Send + 'static> {
    intake: Arc<Intake<T>>,
    serve: Arc<dyn Fn(T) + Send + Sync>,
    name: String,
    kind: Kind,
    count: usize,
    threads: OnceLock<Vec<JoinHandle<()>>>,
}

impl<T: Send + 'static> Workers<T> {
    pub(crate) fn new(name: &str, count: usize, serve: impl Fn(T) + Send + Sync + 'static) -> Self {
        Self::of_kind(Kind::Tasks, name, count, serve)
    }

    /// For what needs more than memory and the open devices.
    pub(crate) fn of_kind(
        kind: Kind,
        name: &str,
        count: usize,
        serve: impl Fn(T) + Send + Sync + 'static,
    ) -> Self {
        let name = name.to_owned();
        Self { intake: Intake::new(), serve: Arc::new(serve), name, kind, count, threads: OnceLock::new() }
    }

    /// Hands an item over. Where the system refuses every thread, it is served on the caller's.
    pub(crate) fn push(&self, item: T) {
        if self.threads.get_or_init(|| self.start()).is_empty() {
            return (self.serve)(item);
        }
        match self.intake.push(item) {
            Ok(_) => self.intake.arrived.notify_one(),
            Err(item) => (self.serve)(item),
        }
    }

    fn start(&self) -> Vec<JoinHandle<()>> {
        let spawn = |_| {
            let (intake, serve) = (Arc::clone(&self.intake), Arc::clone(&self.serve));
            let work = move || {
                intake.serve_here();
                while let Some(item) = intake.wait_one() {
                    serve(item);
                }
            };
            threads::spawn(self.kind, Builder::new().name(self.name.clone()), work).ok()
        };
        (0..self.count).filter_map(spawn).collect()
    }
}

impl<T: Send + 'static> Drop for Workers<T> {
    fn drop(&mut self) {
        self.intake.close();
        // The last handle of a device may go inside a completion, on the very thread that would be waited for.
        if self.intake.served_here() {
            return;
        }
        for thread in self.threads.take().unwrap_or_default() {
            drop(thread.join());
        }
    }
}
