//! The node's own threads: everything that a completion hands over, recalls, and timers.
//!
//! ```text
//!   device's I/O thread --.
//!   link's thread       --+--> queue --> up to 2 threads, started when there is work
//!   timers              --'
//! ```
//!
//! **Invariant:** a task never waits for the device or the coordinator, so two threads serve any number of files and a
//! recall never waits behind a blocked call (F9).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use threads::Kind;

use super::rank::{self, Held};

const THREADS_MAX: usize = 2;
const STACK_BYTES: usize = 256 << 10;

pub(super) type Task = Box<dyn FnOnce() + Send>;

/// The queue and its threads. Dropping it, or [`Workers::close`], ends the threads after what is queued.
pub(super) struct Workers {
    shared: Arc<Shared>,
}

struct Shared {
    /// Rank 9, a leaf: nothing else is locked under it.
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    timers: Vec<(Duration, Task)>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl Workers {
    pub(super) fn new() -> Self {
        Self { shared: Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() }) }
    }

    /// Runs `task` on one of the threads, soon. Never blocks.
    pub(super) fn run(&self, task: impl FnOnce() + Send + 'static) {
        let _rank = Held::enter(rank::WORKERS);
        let mut queue = self.shared.lock();
        queue.tasks.push_back(Box::new(task));
        self.wake(queue);
    }

    /// Runs `task` in `delay`.
    pub(super) fn after(&self, delay: Duration, task: impl FnOnce() + Send + 'static) {
        let _rank = Held::enter(rank::WORKERS);
        let mut queue = self.shared.lock();
        queue.timers.push((monotonic() + delay, Box::new(task)));
        self.wake(queue);
    }

    fn wake(&self, mut queue: MutexGuard<'_, Queue>) {
        if queue.idle > 0 || queue.threads == THREADS_MAX {
            drop(queue);
            self.shared.changed.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let shared = self.shared.clone();
        let builder = thread::Builder::new().name("csvfs-node".into()).stack_size(STACK_BYTES);
        let started = threads::spawn(Kind::Tasks, builder, move || shared.serve());
        if let Err(error) = started {
            let mut queue = self.shared.lock();
            queue.threads -= 1;
            assert!(queue.threads > 0, "the system refuses the node's first worker thread: {error}");
        }
    }

    /// Ends the threads once the queue is empty; timers are dropped.
    pub(super) fn close(&self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        queue.timers.clear();
        drop(queue);
        self.shared.changed.notify_all();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        while let Some(task) = self.next() {
            task();
        }
    }

    fn next(&self) -> Option<Task> {
        let mut queue = self.lock();
        loop {
            let wait = queue.fire_timers();
            if let Some(task) = queue.tasks.pop_front() {
                return Some(task);
            }
            if queue.closed {
                queue.threads -= 1;
                return None;
            }
            queue.idle += 1;
            queue = match wait {
                None => self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner),
                Some(wait) => {
                    self.changed.wait_timeout(queue, wait).unwrap_or_else(PoisonError::into_inner).0
                }
            };
            queue.idle -= 1;
        }
    }
}

impl Queue {
    /// Queues the timers that are due; says how long until the next one.
    fn fire_timers(&mut self) -> Option<Duration> {
        if self.timers.is_empty() {
            return None;
        }
        let now = monotonic();
        let due = self.timers.extract_if(.., |(at, _)| *at <= now).map(|(_, task)| task);
        self.tasks.extend(due);
        self.timers.iter().map(|(at, _)| at.saturating_sub(now)).min()
    }
}

fn monotonic() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    Duration::new(u64::try_from(now.tv_sec).unwrap_or(0), u32::try_from(now.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn what_is_queued_runs_although_the_queue_is_dropped() {
        let (tell, told) = mpsc::channel();
        let workers = Workers::new();
        for n in 0..100 {
            let tell = tell.clone();
            workers.run(move || tell.send(n).expect("the test waits"));
        }
        drop((workers, tell));
        let mut seen: Vec<_> = told.iter().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_timer_fires_while_other_work_is_done() {
        let (tell, told) = mpsc::channel();
        let workers = Workers::new();
        let later = tell.clone();
        workers.after(Duration::from_millis(5), move || later.send("timer").expect("the test waits"));
        workers.run(move || tell.send("task").expect("the test waits"));
        assert_eq!(told.recv(), Ok("task"));
        assert_eq!(told.recv(), Ok("timer"));
    }
}
