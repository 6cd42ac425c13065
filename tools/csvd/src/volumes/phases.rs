//! How long a new coordinator took until it served, phase by phase, for the events.
//!
//! ```text
//!   appointed -- LUN at hand, sessions of the dead ended, store opened and replayed --> opened
//!             -- all clients of the former term attached or gone                    --> reclaimed
//!             -- the first call of an application answered                          --> served, told once
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The phases of the last coordinator that was opened here.
#[derive(Debug, Default)]
pub(super) struct Phases {
    /// Rank: a leaf.
    times: Mutex<Option<Times>>,
    /// The first call has not been answered yet; looked at with each call.
    due: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Times {
    appointed: Instant,
    opened: Option<Instant>,
    reclaimed: Option<Instant>,
}

impl Phases {
    /// This node is to open the coordinator.
    pub(super) fn appointed(&self) {
        *self.lock() = Some(Times { appointed: now(), opened: None, reclaimed: None });
        self.due.store(true, Ordering::Relaxed);
    }

    /// The store is open, with all that the former coordinator has committed.
    pub(super) fn opened(&self) {
        if let Some(times) = self.lock().as_mut() {
            times.opened = Some(now());
        }
    }

    /// All clients have attached or are gone.
    pub(super) fn reclaimed(&self) {
        if let Some(times) = self.lock().as_mut() {
            times.reclaimed = Some(now());
        }
    }

    /// A call was answered: after the first one, what is to be told.
    pub(super) fn answered(&self) -> Option<String> {
        if !self.due.load(Ordering::Relaxed) || !self.due.swap(false, Ordering::Relaxed) {
            return None;
        }
        let times = self.lock().take()?;
        let since = |until: Option<Instant>| {
            let until = until.unwrap_or(times.appointed);
            until.saturating_duration_since(times.appointed).as_millis()
        };
        let (opened, reclaimed, first) =
            (since(times.opened), since(times.reclaimed.or(times.opened)), since(Some(now())));
        Some(format!(
            "opened after {opened} ms, clients back after {reclaimed} ms, first call answered after {first} ms"
        ))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Times>> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::disallowed_methods, reason = "measures the phases that it reports")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_call_is_told_once_for_each_appointment() {
        let phases = Phases::default();
        assert_eq!(phases.answered(), None, "nobody was appointed");
        for _ in 0..2 {
            phases.appointed();
            phases.opened();
            phases.reclaimed();
            assert!(phases.answered().is_some_and(|told| told.contains("first call answered after")));
            assert_eq!(phases.answered(), None);
        }
    }
}
