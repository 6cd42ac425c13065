//! What this node may do with one file: the grant, and how recalls and replies that overtake each other are told apart.
//!
//! ```text
//!            Granted(seq)                      Recall(to, seq)             drained, flushed
//!   NL ------------------------> PR / EX ------------------------> closing -----------------> ReleaseGrant -> `to`
//!        dropped if an older                 ignored if older
//!        number than a recall seen           than the grant held
//! ```
//! Numbers are ordered within a term, and terms before numbers.
//!
//! **Invariant:** a grant whose recall was seen is not kept (C6), and nothing starts while a recall is unanswered (E3).

use lockmgr::Mode;

use crate::proto as pb;

/// Orders grants and recalls: term, then number.
pub(super) type Seq = (u64, u64);

/// A ReleaseGrant without a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Release {
    pub(super) from: Mode,
    pub(super) to: Mode,
    /// Distinguishes it from earlier ones.
    pub(super) number: u64,
    /// Its request id once it is sent with a commit. A release without one needs no care: what is left is what is held.
    pub(super) committing: Option<u64>,
}

/// What a recall calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnRecall {
    /// It is older than what is held.
    Ignore,
    /// Nothing above `to` is held: say so.
    AnswerNow,
    /// Stop, drain, release.
    Drain,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub(super) struct Grant {
    pub(super) mode: Mode,
    held_at: Seq,
    newest_recall: Seq,
    /// To be answered once drained.
    pub(super) recall: Option<(Mode, Seq)>,
    /// An Acquire without a reply.
    pub(super) acquiring: Option<Mode>,
    pub(super) release: Option<Release>,
    releases: u64,
    /// A lent grant that is older was given back since.
    given_back: Seq,
}

impl Grant {
    /// Whether something that needs `mode` may start.
    pub(super) fn permits(&self, mode: Mode) -> bool {
        self.recall.is_none() && self.release.is_none() && self.mode.covers(mode)
    }

    /// An Acquire was granted. `false`: it was recalled before it arrived, and is not kept.
    pub(super) fn granted(&mut self, mode: Mode, at: Seq) -> bool {
        self.acquiring = None;
        if at < self.newest_recall {
            return false;
        }
        // The coordinator grants nothing to a holder that still owes an answer: it has had the release.
        self.release = None;
        if mode.covers(self.mode) {
            self.mode = mode;
        }
        self.held_at = self.held_at.max(at);
        true
    }

    /// A grant came along with an answer, unasked; `stamp` is the answer's. `false`: it is not kept.
    ///
    /// While a release is under way nobody can tell which of the two comes last, so what is lent then is not kept: to hold
    /// less than the coordinator believes is always right.
    pub(super) fn lent(&mut self, mode: Mode, at: Seq, stamp: Seq) -> bool {
        let stale = at < self.newest_recall || stamp <= self.given_back;
        if stale || self.release.is_some() || self.recall.is_some() {
            return false;
        }
        if mode.covers(self.mode) {
            self.mode = mode;
        }
        self.held_at = self.held_at.max(at);
        true
    }

    /// An answer of this place says what older ones do not know.
    pub(super) fn outdate(&mut self, stamp: Seq) {
        self.given_back = self.given_back.max(stamp);
    }

    /// What must not be taken for held, when this is forgotten: recalls, and answers, up to here.
    pub(super) fn floor(&self) -> (Seq, Seq) {
        (self.newest_recall, self.given_back)
    }

    /// The floor of what was here before.
    pub(super) fn above(floor: (Seq, Seq)) -> Self {
        Self { newest_recall: floor.0, given_back: floor.1, ..Self::default() }
    }

    /// A recall has arrived.
    pub(super) fn recalled(&mut self, to: Mode, at: Seq) -> OnRecall {
        if at < self.held_at {
            return OnRecall::Ignore;
        }
        self.newest_recall = self.newest_recall.max(at);
        // A release without a commit needs no care: what is left is what is held. Whoever wants the grant may have what the release
        // waits for, which goes with a request.
        let committing = self.release.is_some_and(|release| release.committing.is_some());
        if to.covers(self.mode) && !committing {
            return OnRecall::AnswerNow;
        }
        if self.release.is_some() {
            self.recall = Some((to, at));
            return OnRecall::Drain;
        }
        match self.recall {
            // Two recalls: both are answered by going as low as either wants, under the newer number.
            Some((before, _)) if !before.covers(to) => self.recall = Some((before, at)),
            _ => self.recall = Some((to, at)),
        }
        OnRecall::Drain
    }

    /// What to keep when lowered for somebody who leaves us `to`.
    pub(super) fn lowered(&self, to: Mode) -> Mode {
        match to {
            to if to.covers(self.mode) => self.mode,
            Mode::ProtectedRead if self.mode == Mode::Exclusive => Mode::ProtectedRead,
            // Concurrent writing is not used here: not to hold it is always right.
            _ => Mode::Null,
        }
    }

    /// Starts to go down to `to`: nothing starts from now on. Gives the release's number.
    pub(super) fn begin_release(&mut self, to: Mode) -> u64 {
        self.releases += 1;
        self.release = Some(Release { from: self.mode, to, number: self.releases, committing: None });
        self.releases
    }

    /// The release goes out: from now on only `to` is held. `committing`: its id, if it carries a commit.
    pub(super) fn releasing(&mut self, committing: Option<u64>) {
        if let Some(release) = &mut self.release {
            release.committing = committing;
            self.mode = release.to;
        }
    }

    /// What to claim from a new coordinator. Whether the old one has had a release is unknown until the new one looks.
    pub(super) fn claim(&self, ino: u64) -> Option<pb::Claim> {
        let in_doubt = self.release.and_then(|release| release.committing.map(|id| (release, id)));
        let (mode, release_request, release_to) = match in_doubt {
            Some((release, id)) => (release.from, id, release.to),
            None => (self.mode, 0, Mode::Null),
        };
        let wire = |mode: Mode| pb::GrantMode::from(mode).into();
        (mode != Mode::Null).then(|| pb::Claim {
            ino,
            mode: wire(mode),
            release_request,
            release_to: wire(release_to),
        })
    }

    /// The release has its reply, of this place among answers. Gives a recall that came meanwhile and is answered by what
    /// is held now.
    pub(super) fn released(&mut self, number: u64, stamp: Seq) -> Option<Seq> {
        self.given_back = self.given_back.max(stamp);
        if self.release.is_some_and(|release| release.number == number) {
            self.release = None;
        }
        let (to, at) = self.recall?;
        if self.release.is_none() && to.covers(self.mode) {
            self.recall = None;
            return Some(at);
        }
        None
    }
}

#[cfg(test)]
#[path = "grants_world.rs"]
mod world;

#[cfg(test)]
mod tests {
    use super::*;
    use Mode::{Exclusive, Null, ProtectedRead};

    // Invariant C6: a reply that raced a recall.
    #[test]
    fn a_grant_older_than_a_recall_seen_is_not_kept() {
        let mut grant = Grant { acquiring: Some(Exclusive), ..Grant::default() };
        assert_eq!(grant.recalled(Null, (1, 11)), OnRecall::AnswerNow);
        assert!(!grant.granted(Exclusive, (1, 10)));
        assert_eq!(grant.mode, Null);
        assert!(grant.granted(Exclusive, (1, 12)));
        assert_eq!(grant.mode, Exclusive);
    }

    // Invariant C6, the other way round.
    #[test]
    fn a_recall_older_than_the_grant_is_ignored() {
        let mut grant = Grant::default();
        assert!(grant.granted(ProtectedRead, (1, 20)));
        assert_eq!(grant.recalled(Null, (1, 19)), OnRecall::Ignore);
        assert!(grant.permits(ProtectedRead));
    }

    #[test]
    fn numbers_of_a_new_term_are_newer_than_all_before() {
        let mut grant = Grant::default();
        assert!(grant.granted(Exclusive, (1, 500)));
        assert_eq!(grant.recalled(Null, (2, 3)), OnRecall::Drain);
        assert!(!grant.permits(ProtectedRead));
    }

    // Invariant E3: nothing starts between the recall and the end of the release.
    #[test]
    fn a_recalled_grant_permits_nothing_until_it_is_released() {
        let mut grant = Grant::default();
        assert!(grant.granted(Exclusive, (1, 1)));
        assert_eq!(grant.recalled(ProtectedRead, (1, 2)), OnRecall::Drain);
        assert!(!grant.permits(ProtectedRead));
        grant.recall = None;
        let number = grant.begin_release(ProtectedRead);
        grant.releasing(Some(7));
        assert!(!grant.permits(ProtectedRead));
        assert_eq!(grant.released(number, (1, 9)), None);
        assert!(grant.permits(ProtectedRead) && !grant.permits(Exclusive));
    }

    #[test]
    fn a_second_recall_during_a_release_is_answered_after_it() {
        let mut grant = Grant::default();
        assert!(grant.granted(Exclusive, (1, 1)));
        let number = grant.begin_release(ProtectedRead);
        grant.releasing(Some(7));
        assert_eq!(grant.recalled(Null, (1, 5)), OnRecall::Drain);
        assert_eq!(grant.released(number, (1, 9)), None);
        assert_eq!(grant.recall, Some((Null, (1, 5))));
    }

    // Who wants the grant may have what the request waits for that a release goes with.
    #[test]
    fn a_recall_is_answered_during_a_release_that_leaves_no_more_and_carries_no_commit() {
        let mut grant = Grant::default();
        assert!(grant.granted(Exclusive, (1, 1)));
        let number = grant.begin_release(Null);
        assert_eq!(grant.recalled(Null, (1, 5)), OnRecall::Drain, "it has not gone out");
        grant.recall = None;
        grant.releasing(None);
        assert_eq!(grant.recalled(Null, (1, 6)), OnRecall::AnswerNow);
        assert_eq!((grant.released(number, (1, 9)), grant.recall), (None, None));
    }

    // Invariant C6, for grants that come with answers to other questions.
    #[test]
    fn a_lent_grant_is_kept_only_if_nothing_took_it_away_meanwhile() {
        let mut grant = Grant::default();
        assert!(grant.lent(ProtectedRead, (1, 3), (1, 30)));
        let number = grant.begin_release(Null);
        grant.releasing(None);
        assert!(!grant.lent(ProtectedRead, (1, 4), (1, 31)), "a release is under way");
        assert_eq!(grant.released(number, (1, 32)), None);
        assert!(!grant.lent(ProtectedRead, (1, 4), (1, 31)), "lent before the release");
        assert!(grant.lent(ProtectedRead, (1, 5), (1, 33)), "lent after it");
        assert_eq!(grant.recalled(Null, (1, 6)), OnRecall::Drain);
        assert!(!grant.lent(Exclusive, (1, 5), (1, 33)), "a recall waits");
        let mut next = Grant::above(grant.floor());
        assert!(!next.lent(ProtectedRead, (1, 5), (1, 40)), "older than a recall that was seen");
        assert!(next.lent(ProtectedRead, (1, 7), (1, 41)));
    }
}
