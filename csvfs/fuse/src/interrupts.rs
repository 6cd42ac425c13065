//! Requests that may be interrupted while they wait.
//!
//! ```text
//!   begin(unique) -> begun(unique, request) -> end(unique)
//!        interrupt(unique) at any time, also before begin: another reader may be faster
//! ```
//! **Invariant:** an interrupt is never lost: it is found by `begin` or `begun`, or gives the request to end.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Interrupts of requests that are not known (yet), of which so many are remembered.
const EARLY_MAX: usize = 64;

#[derive(Debug)]
enum Waiting {
    /// Its number is not known yet.
    Starts { interrupted: bool },
    /// The number that it has below.
    Runs(u64),
}

#[derive(Debug, Default)]
struct State {
    waiting: HashMap<u64, Waiting>,
    early: VecDeque<u64>,
}

/// See the module. Requests are named as the kernel names them.
#[derive(Debug, Default)]
pub(crate) struct Interrupts {
    /// Lock rank: leaf.
    state: Mutex<State>,
}

impl Interrupts {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request is about to wait. `false`: it was interrupted already.
    pub(crate) fn begin(&self, unique: u64) -> bool {
        let mut state = self.lock();
        if let Some(at) = state.early.iter().position(|early| *early == unique) {
            state.early.remove(at);
            return false;
        }
        state.waiting.insert(unique, Waiting::Starts { interrupted: false });
        true
    }

    /// It waits under this number. `true`: it is to be ended, an interrupt has come meanwhile.
    pub(crate) fn begun(&self, unique: u64, request: u64) -> bool {
        let mut state = self.lock();
        let Some(waiting) = state.waiting.get_mut(&unique) else { return false };
        let interrupted = matches!(waiting, Waiting::Starts { interrupted: true });
        *waiting = Waiting::Runs(request);
        interrupted
    }

    /// It waits no longer.
    pub(crate) fn end(&self, unique: u64) {
        self.lock().waiting.remove(&unique);
    }

    /// The number under which the request waits that is to be ended.
    pub(crate) fn interrupt(&self, unique: u64) -> Option<u64> {
        let mut state = self.lock();
        match state.waiting.get_mut(&unique) {
            Some(Waiting::Runs(request)) => return Some(*request),
            Some(Waiting::Starts { interrupted }) => *interrupted = true,
            None => {
                state.early.push_back(unique);
                if state.early.len() > EARLY_MAX {
                    state.early.pop_front();
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupt_is_found_whenever_it_comes() {
        let interrupts = Interrupts::default();
        assert_eq!(interrupts.interrupt(1), None);
        assert!(!interrupts.begin(1), "before");
        assert!(interrupts.begin(2));
        assert_eq!(interrupts.interrupt(2), None);
        assert!(interrupts.begun(2, 20), "meanwhile");
        assert!(interrupts.begin(3) && !interrupts.begun(3, 30));
        assert_eq!(interrupts.interrupt(3), Some(30));
        interrupts.end(3);
        assert!(!interrupts.begun(3, 31), "answered before its number was known");
    }

    #[test]
    fn interrupts_of_requests_that_nobody_waits_for_do_not_pile_up() {
        let interrupts = Interrupts::default();
        for unique in 0..1000 {
            assert_eq!(interrupts.interrupt(unique), None);
        }
        assert_eq!(interrupts.lock().early.len(), EARLY_MAX);
    }
}
