//! Giving up what is held of an inode along with the request that is likely to take its last name.
//!
//! ```text
//!   Unlink { parting: inode, opens } -----> lowered and closed, then removed   instead of   Unlink, ReleaseGrant, Close
//! ```
//! A file without a name cannot be asked for again, and what is held of it keeps its blocks from being freed.
//!
//! **Invariant:** what is given up counts once. Made and sent under one attach, it is news to the coordinator; an attach that comes
//! after it claims only what is left, and it goes without it then.

use std::sync::Arc;

use lockmgr::Mode;
use pb::request::Op;

use super::FsError;
use super::core::Core;
use super::grants::Seq;
use super::inode::{Inode, State};
use super::session::Answered;
use crate::proto as pb;

/// What is given up by a request under way.
struct Parting {
    inode: Arc<Inode>,
    /// The release's.
    number: u64,
    wrote: bool,
}

impl Core {
    /// As [`Core::ask_then`], of a request that is likely to take the last name of the inode `nameless`.
    pub(super) fn ask_parting(
        self: &Arc<Self>,
        nameless: Option<u64>,
        op: impl FnOnce(Option<pb::Parting>) -> Op,
        done: impl FnOnce(Result<Answered, FsError>) + Send + 'static,
    ) {
        let inode = nameless.and_then(|ino| self.peek(ino));
        let Some(inode) = inode else { return self.ask_then(op(None), done) };
        let mut state = inode.lock();
        if !state.may_lose_last_name() || !state.may_part(self) || !self.session.parts() {
            drop(state);
            return self.ask_then(op(None), done);
        }
        let opens = std::mem::take(&mut state.registered);
        let wrote = state.grant.mode == Mode::Exclusive;
        let number = state.grant.begin_release(Mode::Null);
        state.grant.releasing(None);
        state.know_nothing(self);
        let parting = Parting { inode: inode.clone(), number, wrote };
        let (core, asked_at) = (self.clone(), self.names_now());
        let id = self.session.keep(op(Some(pb::Parting { ino: inode.ino, opens })), move |outcome| {
            let stamp = outcome.as_ref().map_or_else(|_| core.session.newest_answer(), Answered::stamp);
            parting.ended(&core, stamp);
            if let Ok(answered) = &outcome {
                core.absorb(answered, asked_at);
            }
            done(outcome);
        });
        drop(state);
        self.session.dispatch(id);
    }
}

impl State {
    fn may_lose_last_name(&self) -> bool {
        self.attr.is_some_and(|attr| attr.nlink <= 1 || attr.kind == super::FileKind::Directory)
    }
}

impl Parting {
    /// The request has its answer, of this place among answers.
    fn ended(&self, core: &Core, stamp: Seq) {
        if self.wrote {
            core.memory.raise_written(self.inode.ino, stamp);
        }
        let mut state = self.inode.lock();
        let answer = state.grant.released(self.number, stamp);
        let answer = answer.and_then(|at| core.answer(self.inode.ino, state.grant.mode, at));
        // Whoever has begun to use it meanwhile waits for this.
        let awaited = state.users > 1 || !state.waiting.is_empty() || state.grant.recall.is_some();
        drop(state);
        if let Some(id) = answer {
            core.session.dispatch(id);
        }
        if awaited {
            self.inode.kick();
        }
    }
}
