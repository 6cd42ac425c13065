//! When space is short: what others have in their pools is asked back before anybody hears ENOSPC.
//!
//! ```text
//!   too little --PoolRecall to all who have some--> waiting --all have answered, are gone, or time is up--> last try
//! ```
//! **Invariant:** a request waits here at most once, and a client that does not answer holds nobody up for ever.

use std::collections::BTreeSet;

use lockmgr::{ClientId, Millis};

use super::core::{Core, Work};
use crate::proto::{PoolRecall, Push, push};
use crate::refusal::{OpError, errno};

/// Longest wait for what is in pools.
const PATIENCE_MS: u64 = 3_000;

/// See the module.
#[derive(Default)]
pub(super) struct Scarcity {
    waiting: Vec<Work>,
    /// Who was asked and has not answered.
    asked: BTreeSet<ClientId>,
    deadline: Option<Millis>,
}

impl Scarcity {
    pub(super) fn deadline(&self) -> Option<Millis> {
        self.deadline
    }

    /// Takes out what waits and fits.
    pub(super) fn take(&mut self, fits: impl Fn(&Work) -> bool) -> Vec<Work> {
        let (taken, kept) = std::mem::take(&mut self.waiting).into_iter().partition(fits);
        self.waiting = kept;
        taken
    }
}

impl Core {
    /// Refuses what does not fit, unless blocks are on their way or may be asked back from somebody but `but`.
    pub(super) fn check_room(&self, work: &Work, but: Option<ClientId>, blocks: u64) -> Result<(), OpError> {
        let free = self.alloc.available();
        if blocks <= free {
            return Ok(());
        }
        if self.alloc.pending() > 0 || !self.reclaimable.is_empty() {
            return Err(OpError::Later);
        }
        if !work.last_try && !self.pools.holders(but).is_empty() {
            return Err(OpError::Scarce);
        }
        Err(errno(libc::ENOSPC, format!("the volume is full: {blocks} blocks are needed, {free} are free")))
    }

    /// Lets `work` wait until everybody who has free blocks was asked for them.
    pub(super) fn wait_for_pools(&mut self, work: Work) {
        for client in self.pools.holders(None) {
            if self.scarcity.asked.insert(client) {
                let what = Some(push::What::PoolRecall(PoolRecall {}));
                let volume = bytes::Bytes::copy_from_slice(self.volume.0.as_bytes());
                self.out.pushes.push((client, Push { volume, term: self.term.0, what }));
            }
        }
        self.scarcity.waiting.push(Work { last_try: true, ..work });
        let deadline = self.now.plus(PATIENCE_MS);
        self.scarcity.deadline.get_or_insert(deadline);
        if self.scarcity.asked.is_empty() {
            self.end_scarcity();
        }
    }

    /// A client has given back what it could, or is gone.
    pub(super) fn pool_answered(&mut self, client: ClientId) {
        if self.scarcity.asked.remove(&client) && self.scarcity.asked.is_empty() {
            self.end_scarcity();
        }
    }

    pub(super) fn check_scarcity(&mut self) {
        if self.scarcity.deadline.is_some_and(|deadline| deadline <= self.now) {
            self.end_scarcity();
        }
    }

    /// What waits is tried in the next transaction: what was given back is usable then.
    fn end_scarcity(&mut self) {
        let Scarcity { waiting, .. } = std::mem::take(&mut self.scarcity);
        self.later.extend(waiting);
    }
}
