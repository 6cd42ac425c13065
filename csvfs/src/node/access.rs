//! Times of access, as `relatime` keeps them: noted where a file is read, and told to the coordinator later.
//!
//! **Invariant:** a time of access is only a hint: it is told without a recall, it may be lost in a crash, and other nodes may
//! see an older one for as long as they remember the file.

use std::sync::Arc;

use pb::request::Op;

use super::advance::Out;
use super::inode::{Inode, State};
use crate::proto as pb;

/// A time of access older than this is renewed by any read.
const RENEW_SECONDS: i64 = 24 * 60 * 60;

/// Whether a read at `now` is worth noting.
fn is_due(known: &super::Attr, now: pb::Timestamp) -> bool {
    let accessed = known.atime.order();
    accessed <= known.mtime.order()
        || accessed <= known.ctime.order()
        || now.seconds.saturating_sub(known.atime.seconds) >= RENEW_SECONDS
}

impl Inode {
    /// A program has read the file.
    pub(super) fn accessed(&self) {
        let now = self.core.times.now();
        let mut state = self.lock();
        if let Some(known) = state.attr.as_mut().filter(|known| is_due(known, now)) {
            known.atime = now;
            state.accessed = true;
        }
    }

    /// Tells the coordinator, when the file is not used any more or its grant goes.
    pub(super) fn tell_access(self: &Arc<Self>, state: &mut State, out: &mut Out) {
        let idle = state.is_unused() || state.grant.recall.is_some();
        if !idle || !std::mem::take(&mut state.accessed) {
            return;
        }
        let atime = state.attr.map(|known| known.atime);
        // Nobody waits for the outcome.
        self.ask(Op::Access(pb::Access { ino: self.ino, atime }), out, |_, _| {});
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_is_noted_after_a_change_and_once_a_day() {
        let at = |seconds| pb::Timestamp { seconds, nanos: 0 };
        let wire = pb::Attr {
            ino: 1,
            kind: pb::FileKind::Regular.into(),
            atime: Some(at(100)),
            mtime: Some(at(50)),
            ctime: Some(at(60)),
            ..pb::Attr::default()
        };
        let known = super::super::Attr::checked(&wire).expect("a file");
        assert!(!is_due(&known, at(200)));
        assert!(is_due(&super::super::Attr { mtime: at(100), ..known }, at(200)));
        assert!(is_due(&super::super::Attr { ctime: at(101), ..known }, at(200)));
        assert!(is_due(&known, at(100 + RENEW_SECONDS)));
    }
}
