//! Workers for calls that wait for the coordinator.
//!
//! ```text
//!   Lane::Names    lookup, create, getattr, ...   at most 56 threads: may all be blocked by a recall
//!   Lane::Closing  release                        at most 8 threads of its own: closing never waits behind the others
//! ```
//!
//! A thread is started when a job finds no idle one, and ends when it was idle for a while. Each waiting job is a program
//! blocked in the kernel, so the queue is as long as there are such programs; beyond a bound the call fails.
//!
//! **Invariant:** a job of one lane never waits for a thread of the other (F9).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use threads::Kind;

/// Kinds of calls that must not wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Names and attributes.
    Names,
    /// The end of a file's use.
    Closing,
}

const NAMES_THREADS_MAX: usize = 56;
const CLOSING_THREADS_MAX: usize = 8;
/// Calls that may wait for a thread.
const WAITING_MAX: usize = 16 << 10;
/// How long a thread waits for the next job before it ends.
const IDLE: Duration = Duration::from_secs(10);

type Job = Box<dyn FnOnce() + Send>;

/// The threads of a mount.
#[derive(Clone)]
pub(crate) struct Pool {
    names: Arc<Crew>,
    closing: Arc<Crew>,
}

struct Crew {
    name: &'static str,
    threads_max: usize,
    idle_for: Duration,
    /// Lock rank: leaf.
    state: Mutex<State>,
    arrived: Condvar,
    left: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Pool {
    pub(crate) fn new() -> Self {
        Self {
            names: Crew::new("fuse-names", NAMES_THREADS_MAX, IDLE),
            closing: Crew::new("fuse-closing", CLOSING_THREADS_MAX, IDLE),
        }
    }

    /// Runs the job on a thread of the lane. When far too many wait, or after `close`, it is dropped: the reply that it
    /// owns then tells the caller `EIO`.
    pub(crate) fn run(&self, lane: Lane, job: impl FnOnce() + Send + 'static) {
        match lane {
            Lane::Names => self.names.run(Box::new(job)),
            Lane::Closing => self.closing.run(Box::new(job)),
        }
    }

    /// Waits until all jobs are done and all threads have ended.
    pub(crate) fn close(&self) {
        self.names.close();
        self.closing.close();
    }
}

impl Crew {
    fn new(name: &'static str, threads_max: usize, idle_for: Duration) -> Arc<Self> {
        let (state, arrived, left) = (Mutex::default(), Condvar::new(), Condvar::new());
        Arc::new(Self { name, threads_max, idle_for, state, arrived, left })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.lock();
        if state.closed || state.waiting.len() >= WAITING_MAX {
            drop(state);
            tracing::warn!(crew = self.name, "a call was refused: too many wait, or the mount ends");
            return;
        }
        state.waiting.push_back(job);
        if state.idle >= state.waiting.len() {
            return self.arrived.notify_one();
        }
        if state.threads < self.threads_max {
            self.start_thread(&mut state);
        }
    }

    fn start_thread(self: &Arc<Self>, state: &mut State) {
        let crew = self.clone();
        match threads::spawn(Kind::Tasks, Builder::new().name(self.name.to_owned()), move || crew.work()) {
            Ok(_) => state.threads += 1,
            // The threads that exist take the job later. Without any, it fails and its caller is told.
            Err(error) if state.threads == 0 => {
                tracing::warn!(crew = self.name, %error, "no thread for a call");
                state.waiting.clear();
            }
            Err(_) => {}
        }
    }

    fn work(&self) {
        let _leaving = Leaving(self);
        while let Some(job) = self.next() {
            job();
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        state.idle += 1;
        let nothing = |state: &mut State| state.waiting.is_empty() && !state.closed;
        let waited = self.arrived.wait_timeout_while(state, self.idle_for, nothing);
        state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.idle -= 1;
        state.waiting.pop_front()
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.arrived.notify_all();
        drop(self.left.wait_while(state, |state| state.threads > 0).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Counts a thread out, also when its job panics.
struct Leaving<'a>(&'a Crew);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    // Invariant F9: with every thread for names blocked, closing still goes on.
    #[test]
    fn closing_goes_on_while_all_other_threads_are_blocked() {
        let pool = Pool::new();
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        let (begun, begins) = mpsc::channel();
        for _ in 0..NAMES_THREADS_MAX + 10 {
            let (blocked, begun) = (Arc::clone(&blocked), begun.clone());
            pool.run(Lane::Names, move || {
                begun.send(()).expect("the test waits");
                blocked
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .recv()
                    .expect_err("nothing is ever sent");
            });
        }
        assert_eq!(begins.iter().take(NAMES_THREADS_MAX).count(), NAMES_THREADS_MAX);
        assert_eq!(pool.names.lock().threads, NAMES_THREADS_MAX, "bounded");
        let (tell, told) = mpsc::channel();
        pool.run(Lane::Closing, move || tell.send(()).expect("the test waits"));
        told.recv().expect("closing is not starved");
        drop(release);
        pool.close();
        assert_eq!(begins.try_iter().count(), 10, "the others ran in the end");
    }

    #[test]
    fn idle_threads_end_and_new_ones_come_when_needed() {
        let crew = Crew::new("test", 4, Duration::from_millis(1));
        let (tell, told) = mpsc::channel();
        for round in 0..3 {
            let tell = tell.clone();
            crew.run(Box::new(move || tell.send(round).expect("the test waits")));
            assert_eq!(told.recv(), Ok(round));
            let state = crew.left.wait_while(crew.lock(), |state| state.threads > 0);
            drop(state.expect("no panic"));
        }
    }

    #[test]
    fn a_job_that_panics_costs_its_thread_only() {
        let crew = Crew::new("test", 1, IDLE);
        crew.run(Box::new(|| std::panic::panic_any(())));
        let state = crew.left.wait_while(crew.lock(), |state| state.threads > 0);
        drop(state.expect("no panic under the lock"));
        let (tell, told) = mpsc::channel();
        crew.run(Box::new(move || tell.send(()).expect("the test waits")));
        told.recv().expect("the next job runs");
        crew.close();
    }
}
