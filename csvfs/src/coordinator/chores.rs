//! What a batch does beside its requests: growth of the store, old replies, the table of free space.
//!
//! **Invariant:** the store's tables of free space and of chunks change in the same transaction as the blocks' owners.

use super::core::Core;
use crate::extents::Run;
use crate::meta::{Store, StoreError, Tables};

/// The store grows by at least this many blocks at once.
const GROWTH_BLOCKS_MIN: u64 = 256;
/// In as many pieces at most.
const GROWTH_RUNS_MAX: usize = 32;

impl Core {
    /// Takes blocks for the store when its reserve is used up. They are listed in the store first, and put into use after
    /// the commit: a crash between the two is finished by the next opener.
    pub(super) fn grow_store(
        &mut self,
        store: &Store,
        tables: &mut Tables<'_>,
    ) -> Result<Vec<Run>, StoreError> {
        let wanted = store.blocks_wanted();
        if wanted == 0 {
            self.tight = false;
            return Ok(Vec::new());
        }
        let runs_max = GROWTH_RUNS_MAX.min(store.chunk_slots_free());
        self.growable = runs_max > 0;
        let runs = self.alloc.take_held_back(wanted.max(GROWTH_BLOCKS_MIN), runs_max);
        for run in &runs {
            tables.put_chunk(run.start, run.blocks)?;
        }
        let got: u64 = runs.iter().map(|run| run.blocks).sum();
        self.tight = store.is_tight(got);
        Ok(runs)
    }

    /// Forgets replies that their clients know. Rides along with a transaction that is written anyway.
    pub(super) fn prune_replies(&mut self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        if !tables.changed() {
            return Ok(());
        }
        for (client, session) in &mut self.sessions {
            let below = session.forget_below();
            if session.stored.first().is_none_or(|first| *first >= below) {
                continue;
            }
            let kept = session.stored.split_off(&below);
            for id in std::mem::replace(&mut session.stored, kept) {
                tables.remove_reply(*client, id)?;
            }
        }
        for session in self.sessions.values_mut() {
            let below = session.completed_below;
            if session.counted.first().is_some_and(|first| *first < below) {
                session.counted = session.counted.split_off(&below);
            }
        }
        Ok(())
    }

    /// Brings the tables up to what was taken and freed.
    pub(super) fn store_space(&mut self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        let twice = |error: crate::alloc::FreeTwice| StoreError::Damaged { what: error.to_string() };
        for (start, blocks) in self.alloc.settle().map_err(twice)? {
            match blocks {
                Some(blocks) => tables.put_free(start, blocks)?,
                None => tables.remove_free(start)?,
            }
        }
        if std::mem::take(&mut self.globals_changed) && tables.changed() {
            tables.put_globals(self.globals)?;
        }
        Ok(())
    }
}
