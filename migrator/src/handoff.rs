//! The hand-off: the only place where a VM changes its owner.
//!
//! ```text
//!   Commit: (source, e) -> (target, e + 1) --Won--------------------------------> Moved
//!      |                                   --Lost, Refused, none before in doubt -> Kept at e
//!      | Unknown
//!      v
//!   read the record: (target, e + 1) ----------------------------------------> Moved
//!                    (source, e): Commit again, a few times; then
//!                    Reclaim: (source, e) -> (source, e + 1) --Won-------------> Kept at e + 1
//!                    anything else ---------------------------------------------> Superseded
//! ```
//! Reading (source, e) decides nothing while a commit is in doubt: it may still be applied after the reading. Only another
//! compare-and-swap at epoch e can rule that out, and exactly one of the two wins.
//!
//! **Invariant:** `Kept` is decided only when no commit of this hand-off can be applied any more (H1, H6).

use lockmgr::NodeId;
use lockmgr::cluster::VmState;

use crate::change::{CasReply, Change, RecordView};

/// How often a commit in doubt is sent before the source takes the VM back.
const COMMITS_MAX: u8 = 3;

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Step {
    /// Propose this change, and say what became of it.
    Propose(Change),
    /// Read the record, and say what it is.
    Read,
    /// It is decided.
    Decided(Decision),
}

/// Where the VM belongs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Decision {
    /// To the target: the source never runs again.
    Moved,
    /// Still to the source, with this record.
    Kept(RecordView, String),
    /// To neither side of this move: the source never runs again.
    Superseded,
}

/// One hand-off, by the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Handoff {
    from: RecordView,
    to: NodeId,
    saved: Option<String>,
    commits: u8,
    /// A proposal was answered with `Unknown`.
    in_doubt: bool,
    reclaiming: bool,
    /// Why the source takes the VM back.
    why: String,
}

impl Handoff {
    /// Begins with the commit. `saved` is where the state lies, unless the target has it in memory. `from` is the record as it was announced.
    pub(crate) fn begin(from: RecordView, to: NodeId, saved: Option<String>) -> (Self, Step) {
        let mut handoff =
            Self { from, to, saved, commits: 0, in_doubt: false, reclaiming: false, why: String::new() };
        let step = handoff.commit();
        (handoff, step)
    }

    /// The answer to the proposal.
    pub(crate) fn reply(&mut self, reply: CasReply) -> Step {
        match reply {
            CasReply::Won if self.reclaiming => Step::Decided(self.kept(self.reclaimed())),
            CasReply::Won => Step::Decided(Decision::Moved),
            CasReply::Unknown => {
                self.in_doubt = true;
                Step::Read
            }
            CasReply::Lost(found) => {
                self.note("the VM's record was changed by somebody else");
                self.not_applied(found)
            }
            CasReply::Refused(reason) => {
                self.note(&reason);
                if self.in_doubt { Step::Read } else { Step::Decided(self.kept(self.from)) }
            }
        }
    }

    /// What the record was when it was read, `None` when there is none.
    pub(crate) fn record(&mut self, found: Option<RecordView>) -> Step {
        match self.judge(found) {
            Some(decision) => Step::Decided(decision),
            None if self.reclaiming || self.commits >= COMMITS_MAX || !self.why.is_empty() => {
                self.note("the cluster did not confirm the hand-off");
                self.reclaim(found.map_or(self.from.state, |found| found.state))
            }
            None => self.commit(),
        }
    }

    /// The user no longer wants the move. Takes effect only where the hand-off is still in doubt.
    pub(crate) fn give_up(&mut self, why: &str) {
        self.note(why);
    }

    /// This proposal was not applied; earlier ones in doubt may yet be.
    fn not_applied(&mut self, found: Option<RecordView>) -> Step {
        match (self.judge(found), found) {
            (Some(decision), _) => Step::Decided(decision),
            (None, Some(found)) if self.in_doubt => self.reclaim(found.state),
            (None, found) => Step::Decided(self.kept(found.unwrap_or(self.from))),
        }
    }

    fn judge(&self, found: Option<RecordView>) -> Option<Decision> {
        let Some(found) = found else { return Some(Decision::Superseded) };
        let next = self.from.epoch + 1;
        match (found.owner, found.epoch) {
            (owner, epoch) if owner == self.from.owner && epoch == self.from.epoch => None,
            (owner, epoch) if owner == self.to && epoch == next => Some(Decision::Moved),
            (owner, epoch) if owner == self.from.owner && epoch == next && self.reclaiming => {
                Some(self.kept(found))
            }
            _ => Some(Decision::Superseded),
        }
    }

    /// The commit point.
    fn commit(&mut self) -> Step {
        self.commits += 1;
        let to = RecordView { owner: self.to, epoch: self.from.epoch + 1, state: VmState::Saved };
        Step::Propose(Change {
            expect: self.from,
            to,
            peer: None,
            saved: self.saved.clone(),
            reason: String::new(),
        })
    }

    fn reclaim(&mut self, state: VmState) -> Step {
        self.reclaiming = true;
        let expect = RecordView { state, ..self.from };
        Step::Propose(Change { to: self.reclaimed(), ..Change::state(expect, VmState::Migrating) })
    }

    fn reclaimed(&self) -> RecordView {
        RecordView { epoch: self.from.epoch + 1, state: VmState::Migrating, ..self.from }
    }

    fn kept(&self, record: RecordView) -> Decision {
        Decision::Kept(record, self.why.clone())
    }

    fn note(&mut self, why: &str) {
        if self.why.is_empty() {
            self.why = why.to_owned();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SRC: NodeId = NodeId(1);
    const DST: NodeId = NodeId(2);

    fn view(owner: NodeId, epoch: u64) -> RecordView {
        RecordView { owner, epoch, state: VmState::Migrating }
    }

    fn begun() -> Handoff {
        let (handoff, step) = Handoff::begin(view(SRC, 7), DST, Some("vol/state".to_owned()));
        let Step::Propose(change) = step else { panic!("begins with the commit") };
        assert_eq!((change.expect, change.to.owner, change.to.epoch), (view(SRC, 7), DST, 8));
        handoff
    }

    // Invariant H1
    #[test]
    fn a_commit_that_was_won_moves_the_vm() {
        assert_eq!(begun().reply(CasReply::Won), Step::Decided(Decision::Moved));
    }

    #[test]
    fn a_commit_that_was_refused_for_certain_leaves_it_at_its_epoch() {
        let kept = begun().reply(CasReply::Refused("node 2 is not up".to_owned()));
        assert_eq!(kept, Step::Decided(Decision::Kept(view(SRC, 7), "node 2 is not up".to_owned())));
    }

    // Invariant H6
    #[test]
    fn a_lost_reply_is_answered_by_the_record() {
        let mut handoff = begun();
        assert_eq!(handoff.reply(CasReply::Unknown), Step::Read);
        assert_eq!(handoff.record(Some(view(DST, 8))), Step::Decided(Decision::Moved));
    }

    // Invariant H6
    #[test]
    fn reading_the_old_record_never_lets_the_source_run_on() {
        let mut handoff = begun();
        for _ in 1..COMMITS_MAX {
            assert_eq!(handoff.reply(CasReply::Unknown), Step::Read);
            let Step::Propose(again) = handoff.record(Some(view(SRC, 7))) else { panic!("asks again") };
            assert_eq!(again.to.owner, DST);
        }
        assert_eq!(handoff.reply(CasReply::Unknown), Step::Read);
        let Step::Propose(back) = handoff.record(Some(view(SRC, 7))) else { panic!("takes it back") };
        assert_eq!((back.to.owner, back.to.epoch), (SRC, 8));
        // The commit was applied after all: the reclaim loses, and the source stays down.
        assert_eq!(handoff.reply(CasReply::Lost(Some(view(DST, 8)))), Step::Decided(Decision::Moved));
    }

    #[test]
    fn a_refusal_decides_nothing_while_an_earlier_commit_is_in_doubt() {
        let mut handoff = begun();
        handoff.reply(CasReply::Unknown);
        handoff.record(Some(view(SRC, 7)));
        assert_eq!(handoff.reply(CasReply::Refused("no".to_owned())), Step::Read);
        let Step::Propose(back) = handoff.record(Some(view(SRC, 7))) else { panic!("takes it back") };
        assert_eq!((back.to.owner, back.to.epoch), (SRC, 8));
        let Step::Decided(Decision::Kept(kept, _)) = handoff.reply(CasReply::Won) else { panic!("kept") };
        assert_eq!((kept.owner, kept.epoch), (SRC, 8));
    }

    #[test]
    fn a_vm_that_others_took_is_not_run_by_the_source() {
        for found in [None, Some(view(NodeId(3), 8)), Some(view(DST, 9)), Some(view(SRC, 8))] {
            assert_eq!(
                begun().reply(CasReply::Lost(found)),
                Step::Decided(Decision::Superseded),
                "{found:?}"
            );
        }
    }
}
