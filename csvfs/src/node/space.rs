//! Asking the coordinator for the map and for space.

use std::sync::Arc;

use lockmgr::Mode;
use pb::request::Op;

use super::FsError;
use super::advance::Out;
use super::inode::{Inode, State};
use super::names::unexpected;
use super::session::Answered;
use crate::proto as pb;

/// Extents in one answer.
pub(super) const EXTENTS_MAX: u32 = 4096;

impl Inode {
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
            // The volume is full, or the like: it ends those who wanted something there. Others may fit elsewhere.
            Err(why) => state.fail_stalled(&why, &mut out, |op| {
                !op.is_read() && op.offset < to && op.offset + op.buf.len() as u64 > from
            }),
        }
        self.step(&mut state, &mut out);
        drop(state);
        out.carry_out(self);
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
        let (end, new_bytes) = state.map.learn(at, &map, self.core.device.geometry().size_bytes)?;
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
