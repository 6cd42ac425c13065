//! How far a move is, for whoever asks, and the wish to give it up.

use std::sync::{Mutex, MutexGuard, PoisonError};

use api::pb;
use migrator::Precopy;
use tokio_util::sync::CancellationToken;

/// A move in progress as others see it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Rank: a leaf.
    now: Mutex<pb::MigrateProgress>,
    /// Cancelled when the user no longer wants the move.
    pub(crate) cancel: CancellationToken,
}

impl Progress {
    /// What it is now.
    pub(crate) fn now(&self) -> pb::MigrateProgress {
        self.lock().clone()
    }

    pub(super) fn phase(&self, phase: &str) {
        phase.clone_into(&mut self.lock().phase);
    }

    pub(super) fn throttled(&self, percent: u8) {
        self.lock().throttle_percent = percent.into();
    }

    pub(super) fn passed(&self, precopy: &Precopy, left_bytes: u64) {
        let mut now = self.lock();
        now.round = precopy.passes();
        now.memory_bytes_sent = precopy.sent_bytes();
        now.memory_bytes_left = left_bytes;
        now.bytes_per_second = precopy.rate();
        now.blackout_ms_expected = precopy.estimate_us(left_bytes).div_ceil(1000);
    }

    fn lock(&self) -> MutexGuard<'_, pb::MigrateProgress> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
