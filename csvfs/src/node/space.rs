//! Holes to be written: filled from the pool, or, without one, by the coordinator; and asking for the map.
//!
//! What is placed from the pool is known here only, until a commit or a record of the log tells it: `own` says where.
//! **Invariant:** the coordinator is never asked to fill a hole in which this client may place blocks itself.

use std::sync::Arc;

use lockmgr::Mode;
use pb::request::Op;

use super::FsError;
use super::advance::Out;
use super::core::Core;
use super::inode::{Inode, State};
use super::io::{DataOp, Need, Plan};
use super::map::{BLOCK_BYTES, FILE_BYTES_MAX, Place};
use super::names::unexpected;
use super::pool::LunRun;
use super::session::Answered;
use crate::proto as pb;

/// Extents in one answer.
pub(super) const EXTENTS_MAX: u32 = 4096;

impl Inode {
    /// Resolves `op`, filling holes from the pool as far as it goes.
    pub(super) fn plan(&self, state: &mut State, op: &mut DataOp) -> Plan {
        if state.cache_life == 0 && op.is_read() && self.core.cache.is_on() {
            state.cache_life = self.core.cache.begin_life();
        }
        loop {
            match state.plan(op, self.core.lun_unit) {
                Plan::Wait(Need::Space { from, to, beyond_end })
                    if state.place(&self.core, (from, to), beyond_end) => {}
                Plan::Wait(Need::Copies { from, bytes }) => {
                    return self.plan_copies(state, op, (from, bytes));
                }
                plan => return plan,
            }
        }
    }

    /// Resolves a write over shared blocks, which goes to blocks of the pool.
    fn plan_copies(&self, state: &mut State, op: &mut DataOp, (from, bytes): (u64, u64)) -> Plan {
        let Some(mut targets) = self.core.space.take(state.map.goal(from), bytes, bytes) else {
            return Plan::Wait(Need::Copies { from, bytes });
        };
        // The last is taken first.
        targets.reverse();
        let plan = state.plan_copies(op, self.core.lun_unit, &mut targets);
        self.core.space.put(targets);
        plan
    }

    /// Has the coordinator copy what is shared: this client has no pool.
    pub(super) fn unshare(self: &Arc<Self>, state: &mut State, (from, bytes): (u64, u64), out: &mut Out) {
        state.mapping = true;
        let op = Op::Unshare(pb::Unshare { ino: self.ino, offset: from, length: bytes });
        self.ask(op, out, move |inode, outcome| inode.unshared((from, from + bytes), outcome));
    }

    fn unshared(self: &Arc<Self>, (from, to): (u64, u64), outcome: Result<Answered, FsError>) {
        let mut out = Out::default();
        let mut state = self.lock();
        state.mapping = false;
        if let Err(why) = self.learn_copies(&mut state, from, outcome.map(|answered| answered.result)) {
            state.fail_writes(&why, (from, to), &mut out);
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    /// Waits for the pool to be filled.
    pub(super) fn want_space(
        self: &Arc<Self>,
        state: &mut State,
        (from, to, _): (u64, u64, bool),
        out: &mut Out,
    ) {
        state.mapping = true;
        let inode = self.clone();
        let done = Box::new(move |outcome| inode.space_came((from, to), outcome));
        out.space = Some((to - from, done));
    }

    fn space_came(self: &Arc<Self>, (from, to): (u64, u64), outcome: Result<(), FsError>) {
        let mut out = Out::default();
        let mut state = self.lock();
        state.mapping = false;
        match outcome {
            // Without a pool the coordinator allocates.
            Ok(()) => {}
            Err(_) if !self.core.space.may_come() => {}
            Err(why) => state.fail_writes(&why, (from, to), &mut out),
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    pub(super) fn get_map(self: &Arc<Self>, state: &mut State, at: u64, out: &mut Out) {
        state.mapping = true;
        let op = Op::GetMap(pb::GetMap { ino: self.ino, offset: at, max_extents: EXTENTS_MAX });
        self.ask(op, out, move |inode, outcome| inode.mapped(at, outcome));
    }

    fn mapped(self: &Arc<Self>, at: u64, outcome: Result<Answered, FsError>) {
        let mut out = Out::default();
        let mut state = self.lock();
        state.mapping = false;
        if let Err(why) = self.learn(&mut state, at, outcome.map(|answered| answered.result)) {
            state.fail_stalled(&why, &mut out, |_| true);
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    pub(super) fn allocate(
        self: &Arc<Self>,
        state: &mut State,
        from: u64,
        to: u64,
        beyond_end: bool,
        out: &mut Out,
    ) {
        state.mapping = true;
        let map_end = state.map.end();
        let need = to - from;
        let want = state.growth.want(from, need, beyond_end, map_end);
        let op = Op::Allocate(pb::Allocate { ino: self.ino, offset: from, need, want });
        self.ask(op, out, move |inode, outcome| inode.allocated((from, to), outcome));
    }

    fn allocated(self: &Arc<Self>, (from, to): (u64, u64), outcome: Result<Answered, FsError>) {
        let mut out = Out::default();
        let mut state = self.lock();
        state.mapping = false;
        match self.learn(&mut state, from, outcome.map(|answered| answered.result)) {
            Ok(end) => {
                let end = end.min(state.map.end());
                state.growth.allocated_to(end);
            }
            Err(why) => state.fail_writes(&why, (from, to), &mut out),
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
    }

    pub(super) fn learn_copies(
        &self,
        state: &mut State,
        from: u64,
        outcome: Result<pb::reply::Result, FsError>,
    ) -> Result<(), FsError> {
        let map = match outcome? {
            pb::reply::Result::Map(map) => map,
            other => return Err(unexpected("Unshare", &other)),
        };
        let copied = map
            .extents
            .iter()
            .map(|extent| extent.file_offset..extent.file_offset.saturating_add(extent.length));
        copied.for_each(|range| state.let_go(&self.core, range));
        state.map.learn_copies(&map, self.core.lun_bytes(last_byte(&map.extents)))?;
        match state.map.part(from, from + BLOCK_BYTES).place {
            Place::Shared(_) => Err(FsError::Protocol(format!(
                "what inode {} shares at {from} was to be copied, and was not",
                self.ino
            ))),
            _ => Ok(()),
        }
    }

    /// Takes over an answer about the map from `at` on; gives the end of what is known then.
    pub(super) fn learn(
        &self,
        state: &mut State,
        at: u64,
        outcome: Result<pb::reply::Result, FsError>,
    ) -> Result<u64, FsError> {
        let map = match outcome? {
            pb::reply::Result::Map(map) => map,
            other => return Err(unexpected("a request for the map", &other)),
        };
        if state.grant.mode == Mode::Null {
            return Err(FsError::Protocol("a map without a grant".into()));
        }
        let (end, new_bytes) = state.map.learn(at, &map, self.core.lun_bytes(last_byte(&map.extents)))?;
        if end <= at {
            return Err(FsError::Protocol(format!(
                "the map of inode {} goes on at {at} with nothing",
                self.ino
            )));
        }
        // Only space that was allocated just now is new to the attributes, which the map does not tell apart: they are
        // asked for again when somebody wants to know.
        if new_bytes > 0 {
            state.attr_asked_at = 0;
        }
        Ok(end)
    }
}

impl State {
    /// Fills the holes of `from..to`, and some of what follows, from the pool. `false` when it cannot.
    fn place(&mut self, core: &Core, (from, to): (u64, u64), beyond_end: bool) -> bool {
        // An answer of the coordinator may be on its way, and fill the same holes.
        if self.mapping || self.grant.mode != Mode::Exclusive {
            return false;
        }
        let reach = from + self.growth.reach(from, to - from, beyond_end);
        let needed = bytes_of(&self.map.holes(from..to));
        let holes = self.map.holes(from..reach.clamp(to, FILE_BYTES_MAX));
        let Some(runs) = core.space.take(self.map.goal(from), needed, bytes_of(&holes)) else { return false };
        let unused = self.fill(&holes, runs);
        core.space.put(unused);
        true
    }

    /// Puts runs into holes, in order; gives what is left of them.
    fn fill(&mut self, holes: &[std::ops::Range<u64>], runs: Vec<LunRun>) -> Vec<LunRun> {
        let mut runs: std::collections::VecDeque<LunRun> = runs.into();
        for hole in holes {
            let mut at = hole.start;
            while at < hole.end
                && let Some((lun, len)) = runs.pop_front()
            {
                let here = len.min(hole.end - at);
                self.map.place(at, here, lun);
                self.own.add(at..at + here);
                at += here;
                self.growth.allocated_to(at);
                if here < len {
                    runs.push_front((lun + here, len - here));
                }
            }
        }
        runs.into()
    }

    /// Gives blocks that were placed ahead and not written back to the pool, unless a write to them may be under way.
    pub(super) fn give_up_ahead(&mut self, core: &Core) {
        if self.own.is_empty() || self.writes.any() {
            return;
        }
        for range in self.own.all() {
            let fresh = self.map.take_fresh(range.clone());
            if fresh.is_empty() {
                continue;
            }
            core.space.put(fresh);
            for hole in self.map.holes(range) {
                self.own.remove(hole);
            }
        }
    }

    /// The volume is full, or the like: it ends those who wanted something there. Others may fit elsewhere.
    fn fail_writes(&mut self, why: &FsError, (from, to): (u64, u64), out: &mut Out) {
        self.fail_stalled(why, out, |op| {
            !op.is_read() && op.offset < to && op.offset + op.buf.len() as u64 > from
        });
    }
}

/// Where on the LUN the last of the extents ends.
pub(super) fn last_byte(extents: &[pb::Extent]) -> u64 {
    extents.iter().map(|extent| extent.lun_offset.saturating_add(extent.length)).max().unwrap_or(0)
}

fn bytes_of(ranges: &[std::ops::Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}
