//! Holding a move or a snapshot at a step, for rehearsals of what happens when a side dies right there; and losing messages
//! of a move.
//!
//! ```text
//!   dev fault n1 hold --at copy     the next move that comes to this step on this node waits there
//!   dev fault n1 held               returns when one does: now kill, cut off, cancel ...
//!   dev fault n1 release            it goes on
//!   dev fault n1 lose --at prepare-answer      the next such message of a move is lost
//! ```

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// The steps of a move on this node.
#[derive(Debug, Default)]
pub(crate) struct Rehearsal {
    hold_at: watch::Sender<Option<String>>,
    held: watch::Sender<bool>,
    /// Messages that will be lost, each once. Rank: a leaf.
    losing: Mutex<BTreeSet<String>>,
}

impl Rehearsal {
    /// The next move that comes to this step waits; with `None` whatever waits goes on.
    pub(crate) fn hold(&self, step: Option<&str>) {
        self.hold_at.send_replace(step.map(ToOwned::to_owned));
    }

    /// Returns when a move waits.
    pub(crate) async fn held(&self) {
        let mut held = self.held.subscribe();
        // The sender lives in `self`.
        drop(held.wait_for(|held| *held).await);
    }

    /// The next message of this name is lost on its way.
    pub(crate) fn lose(&self, message: &str) {
        self.losing.lock().unwrap_or_else(PoisonError::into_inner).insert(message.to_owned());
    }

    /// Whether this message is lost. The next one like it is not.
    pub(super) fn is_lost(&self, message: &str) -> bool {
        let lost = self.losing.lock().unwrap_or_else(PoisonError::into_inner).remove(message);
        if lost {
            tracing::warn!(message, "a message of a move is lost, for a rehearsal");
        }
        lost
    }

    /// A move comes to this step.
    pub(crate) async fn pass(&self, step: &str) {
        let mut hold_at = self.hold_at.subscribe();
        if hold_at.borrow().as_deref() != Some(step) {
            return;
        }
        tracing::warn!(step, "a move is held here, for a rehearsal");
        self.held.send_replace(true);
        drop(hold_at.wait_for(|at| at.as_deref() != Some(step)).await);
        self.held.send_replace(false);
    }
}
