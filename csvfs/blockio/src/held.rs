//! Jobs of the blocking threads that wait for their right.
//!
//! **Invariant:** a job is held only if its right, asked under the lock, still waits: a change that comes later finds it.

use std::sync::{Mutex, PoisonError};

use crate::Permission;
use crate::job::Job;

/// See the module.
#[derive(Default)]
pub(crate) struct Held {
    /// Lock rank: above the right's own lock.
    jobs: Mutex<Vec<Job>>,
}

impl Held {
    /// Keeps the job, or gives it back because its right has changed.
    pub(crate) fn hold(&self, job: Job) -> Option<Job> {
        let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        if job.permission() != Permission::Wait {
            return Some(job);
        }
        jobs.push(job);
        None
    }

    /// Gives all of them back.
    pub(crate) fn take(&self) -> Vec<Job> {
        std::mem::take(&mut *self.jobs.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
