//! Open files, and files that lost their last name.
//!
//! ```text
//!   unlink: nlink 0 --> orphan --last close of any client--> reclaimable --all blocks freed--> gone
//! ```
//! Opens are kept in memory: clients say them again when they attach. Orphans are in the store, so that a crash between
//! the two loses no space. **Invariant:** an orphan's blocks are freed only when nobody has it open or holds a grant on
//! it, and are reusable only after the transaction that freed them (C7).

use lockmgr::engine::Event;
use lockmgr::{ClientId, Mode, ResourceId};

use super::clones::blocks_of;
use super::core::{Core, Errand, Work, stand_in};
use crate::extents::{Extent, Run, State, without};
use crate::meta::{StoreError, Tables};
use crate::namespace::existing;
use crate::proto::request::Op;
use crate::proto::{Done, reply};
use crate::refusal::{OpError, errno};

/// Most extents, and counts of references, that are given up in one transaction.
const RECLAIM_EXTENTS: usize = 2048;
/// Longest wait for another change to free blocks along with.
const RECLAIM_DELAY_MS: u64 = 20;

impl Core {
    pub(super) fn open(
        &mut self,
        tables: &Tables<'_>,
        client: ClientId,
        request_id: u64,
        ino: u64,
    ) -> Result<reply::Result, OpError> {
        let inode = existing(tables, ino)?;
        if inode.nlink == 0 && self.open_count(ino) == 0 && self.grace.is_none() {
            // Only its blocks are still to be freed.
            return Err(errno(libc::ENOENT, format!("inode {ino} was removed")));
        }
        self.count_open(client, ino, request_id);
        Ok(reply::Result::Attr(inode.attr(ino)))
    }

    /// Counts an open once, however often its request comes.
    pub(super) fn count_open(&mut self, client: ClientId, ino: u64, request_id: u64) {
        let Some(session) = self.sessions.get_mut(&client) else { return };
        if session.counted.insert(request_id) {
            *session.opens.entry(ino).or_insert(0) += 1;
            *self.open_counts.entry(ino).or_insert(0) += 1;
            self.reclaimable.remove(&ino);
        }
    }

    /// Closing what is not open is done already.
    pub(super) fn close(&mut self, client: ClientId, request_id: u64, ino: u64) -> reply::Result {
        if let Some(session) = self.sessions.get_mut(&client)
            && session.counted.insert(request_id)
        {
            self.close_times(client, ino, 1);
        }
        reply::Result::Done(Done {})
    }

    fn close_times(&mut self, client: ClientId, ino: u64, times: u32) {
        let Some(session) = self.sessions.get_mut(&client) else { return };
        let Some(count) = session.opens.get_mut(&ino) else { return };
        let times = times.min(*count);
        *count -= times;
        if *count == 0 {
            session.opens.remove(&ino);
        }
        self.closed(ino, times.into());
    }

    /// Takes what the client gives up along with a request, once, however often that comes.
    pub(super) fn part(&mut self, work: &Work) {
        let parting = match &work.request.op {
            Some(Op::Unlink(op)) => &op.parting,
            Some(Op::Rename(op)) => &op.parting,
            _ => &None,
        };
        let (Some(parting), Some(session)) = (parting, self.sessions.get_mut(&work.client)) else { return };
        if session.counted.insert(work.request.request_id) {
            let (holder, resource) = (work.client, ResourceId(parting.ino));
            self.lock_event(Event::Lower { holder, resource, to: Mode::Null, recall_seq: 0 });
            self.close_times(holder, parting.ino, parting.opens);
        }
    }

    fn closed(&mut self, ino: u64, times: u64) {
        if let Some(count) = self.open_counts.get_mut(&ino) {
            *count = count.saturating_sub(times);
            if *count == 0 {
                self.open_counts.remove(&ino);
            }
        }
        if self.orphans.contains(&ino) && self.open_count(ino) == 0 && self.grace.is_none() {
            self.reclaimable.insert(ino);
        }
    }

    /// Drops all opens of a client.
    pub(super) fn forget_opens(&mut self, client: ClientId) {
        let opens = self.sessions.get_mut(&client).map(|s| std::mem::take(&mut s.opens)).unwrap_or_default();
        for (ino, count) in opens {
            self.closed(ino, u64::from(count));
        }
    }

    /// An inode has lost its last name.
    pub(super) fn orphaned(&mut self, ino: Option<u64>) {
        let Some(ino) = ino else { return };
        self.orphans.insert(ino);
        if self.open_count(ino) == 0 {
            self.reclaimable.insert(ino);
        }
    }

    /// Frees blocks of orphans in a transaction that is committed anyway, or when they have waited, or somebody needs them: who
    /// removes one file after the other shall not wait for two commits each.
    pub(super) fn reclaim_in_time(&mut self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        let due = self.reclaim_at.is_some_and(|at| at <= self.now);
        if tables.changed() || due || !self.later.is_empty() {
            self.reclaim_some(tables)?;
            // What did not fit in this transaction goes into the next one.
            self.reclaim_at = (!self.reclaimable.is_empty()).then_some(self.now);
        } else if !self.reclaimable.is_empty() {
            self.reclaim_at.get_or_insert(self.now.plus(RECLAIM_DELAY_MS));
        }
        Ok(())
    }

    /// Frees blocks of orphans, a bounded number in one transaction.
    fn reclaim_some(&mut self, tables: &mut Tables<'_>) -> Result<(), StoreError> {
        let mut budget = RECLAIM_EXTENTS;
        while budget > 0 {
            let Some(&ino) = self.reclaimable.first() else { return Ok(()) };
            if self.open_count(ino) > 0 {
                self.reclaimable.remove(&ino);
            } else if self.is_quiet(ino) {
                budget = self.reclaim(tables, ino, budget)?;
            } else {
                // Somebody may still have I/O in flight on these blocks: wait until the grant is lowered.
                self.reclaimable.remove(&ino);
                let id = self.park(Errand::Reclaim(ino));
                self.wait_for(id, (ino, Mode::Exclusive));
            }
        }
        Ok(())
    }

    fn is_quiet(&self, ino: u64) -> bool {
        let own = self.reclaimer(ino).map(stand_in);
        self.engine.holders(ResourceId(ino)).iter().all(|h| Some(h.client) == own)
    }

    fn reclaimer(&self, ino: u64) -> Option<u64> {
        self.parked
            .iter()
            .find(|(_, p)| matches!(p.what, Errand::Reclaim(of) if of == ino))
            .map(|(id, _)| *id)
    }

    /// Frees up to `budget` extents of one orphan; gives what is left of the budget.
    fn reclaim(&mut self, tables: &mut Tables<'_>, ino: u64, budget: usize) -> Result<usize, StoreError> {
        let extents = tables.extents(ino, 0, u64::MAX, budget)?;
        let (end, cost) = affordable(tables, &extents, budget)?;
        let (kept, gone) = without(&extents, &(0..end), |_| true);
        tables.replace_extents(ino, &extents, &kept)?;
        self.release_blocks(tables, &gone)?;
        if !kept.is_empty() || extents.len() == budget {
            if let Some(mut inode) = tables.inode(ino)? {
                inode.blocks = inode.blocks.saturating_sub(blocks_of(&gone));
                tables.put_inode(ino, &inode)?;
            }
            return Ok(0);
        }
        tables.remove_inode(ino)?;
        tables.remove_orphan(ino)?;
        self.globals.inodes = self.globals.inodes.saturating_sub(1);
        self.globals_changed = true;
        self.orphans.remove(&ino);
        self.reclaimable.remove(&ino);
        if let Some(id) = self.reclaimer(ino) {
            self.release(id);
        }
        Ok(budget.saturating_sub(cost + 1))
    }

    pub(super) fn free_runs(&mut self, runs: &[Run]) {
        for run in runs {
            self.alloc.free(*run);
        }
    }
}

/// Up to which block of the file `extents` may be given up with `budget` changes of the tables, and how many that takes: a
/// shared extent may have many counts.
fn affordable(tables: &Tables<'_>, extents: &[Extent], budget: usize) -> Result<(u64, usize), StoreError> {
    let mut cost = 0;
    for extent in extents {
        cost += 1;
        if extent.state != State::Shared {
            continue;
        }
        let most = budget.saturating_sub(cost).max(1);
        let rows = tables.shared_runs(&(extent.lun..extent.lun + extent.blocks), most + 1)?;
        cost += rows.len();
        if let Some(beyond) = rows.get(most).filter(|row| row.start > extent.lun) {
            return Ok((extent.file + (beyond.start - extent.lun).min(extent.blocks), cost));
        }
        if cost >= budget {
            return Ok((extent.end(), cost));
        }
    }
    Ok((u64::MAX, cost))
}
