//! How many streams processes may have at once: each its share, and all together.
//!
//! **Invariant:** a process that opens streams without end keeps no other process out and starts a bounded number of threads.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug)]
pub(super) struct Places {
    /// Streams of all processes at most.
    all_max: usize,
    /// Streams of one process at most.
    each_max: usize,
    /// Rank: a leaf. Streams of each process.
    taken: Mutex<HashMap<u32, usize>>,
}

/// The place of one stream. Dropping it makes room.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    pid: u32,
}

impl Places {
    pub(super) fn new(all_max: usize, each_max: usize) -> Arc<Self> {
        Arc::new(Self { all_max, each_max, taken: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for a stream of the process `pid`, or a sentence for it that says why there is none.
    pub(super) fn take(self: &Arc<Self>, pid: u32) -> Result<Place, String> {
        let mut taken = self.lock();
        let all: usize = taken.values().sum();
        if all >= self.all_max {
            return Err(format!(
                "{all} ways of processes go through the daemon, no more are served: end some VMs"
            ));
        }
        let own = taken.entry(pid).or_default();
        if *own >= self.each_max {
            return Err(format!(
                "this process has {own} ways through the daemon, no more are served: close some"
            ));
        }
        *own += 1;
        Ok(Place { places: Arc::clone(self), pid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        if let Some(own) = taken.get_mut(&self.pid) {
            *own -= 1;
            if *own == 0 {
                taken.remove(&self.pid);
            }
        }
    }
}
