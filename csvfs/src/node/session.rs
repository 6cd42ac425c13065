//! The conversation with whoever is the coordinator now.
//!
//! ```text
//!              first reply to Attach
//!   Attaching ----------------------> Attached ---- Lost / NOT_COORDINATOR / WRONG_TERM / NOT_ATTACHED ---.
//!       ^                                                                                                 v
//!       '----------------- NewCoordinator, a higher term in a reply, or a timer ----------------------- Lost
//! ```
//! Each request is kept until it has a reply. After an Attach all kept requests are sent again with their ids, and the
//! coordinator knows by the id what it has done already (C4).
//!
//! **Invariant:** a call gets exactly one outcome, and losing a coordinator is none.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use pb::request::Op;

use super::grants::Seq;
use super::rank::{self, Ranked};
use super::workers::Workers;
use super::{CoordinatorLink, FsError, LinkError};
use crate::proto as pb;

const RETRY_MS_MIN: u64 = 10;
const RETRY_MS_MAX: u64 = 200;

/// Called with the outcome of a request, on the link's thread: hands over, no more.
pub(super) type Done = Box<dyn FnOnce(Result<Answered, FsError>) + Send>;

/// A reply that is no failure.
#[derive(Debug)]
pub(super) struct Answered {
    /// Of who gave it.
    pub(super) term: u64,
    /// The attach under which it was asked for, see [`Session::is_current`].
    pub(super) attempt: u64,
    /// Orders it among all answers of the term; 0: not known.
    pub(super) at: u64,
    /// Attributes of further inodes.
    pub(super) known: Vec<pb::Attr>,
    /// Grants that came along.
    pub(super) held: Vec<pb::Held>,
    pub(super) result: pb::reply::Result,
}

impl Answered {
    /// Its place among all answers.
    pub(super) fn stamp(&self) -> Seq {
        (self.term, self.at)
    }
}

/// Called with the outcome of the first attach.
type FirstDone = Box<dyn FnOnce(Result<pb::Attached, FsError>) + Send>;

/// What the node holds, for an Attach.
#[derive(Default)]
pub(super) struct Holdings {
    pub(super) claims: Vec<pb::Claim>,
    pub(super) opens: Vec<pb::OpenClaim>,
    pub(super) locks: Vec<pb::RangeLock>,
    /// Inodes that are remembered in PR and not used.
    pub(super) readers: Vec<u64>,
}

/// Who uses the session: says what is held, and hears of the end.
pub(super) trait Holder: Send + Sync {
    /// What is held now, for the Attach of this number. Takes the locks of files: called with no lock held.
    fn holdings(&self, attempt: u64) -> Holdings;
    /// The coordinator refused the claims: nothing that is held is valid.
    fn refused(&self, why: &FsError);
}

pub(super) struct Session {
    link: Arc<dyn CoordinatorLink>,
    client: pb::ClientId,
    volume: Bytes,
    name: String,
    workers: Arc<Workers>,
    holder: OnceLock<Weak<dyn Holder>>,
    /// Rank 5: taken under a file's lock, never held while sending or calling out.
    state: Mutex<State>,
    requests_sent: AtomicU64,
}

struct State {
    term: u64,
    phase: Phase,
    /// Counts Attach attempts. A request's outcome is judged by the attempt under which it was sent.
    attempt: u64,
    next_id: u64,
    kept: BTreeMap<u64, Kept>,
    retry_ms: u64,
    retry_armed: bool,
    /// A coordinator was announced while an Attach was under way, and may not have seen it.
    attach_again: bool,
    /// The coordinator takes what is given up along with a request.
    parts: bool,
    /// The latest place among answers, refusals included, that any had.
    newest: Seq,
    /// Waits for the first Attach.
    first: Option<FirstDone>,
}

enum Phase {
    Lost,
    Attaching,
    Attached,
    Closed(FsError),
}

struct Kept {
    op: Op,
    done: Done,
    /// The attempt under which it is under way; 0: it waits.
    sent_under: u64,
    /// The term in which it was made, for what has a meaning only in that term.
    first_term: u64,
    /// The attempt under which it was made; 0: of none, no coordinator was attached to. A Close is always of the latest.
    made_under: u64,
}

impl Session {
    pub(super) fn new(
        link: Arc<dyn CoordinatorLink>,
        (client, volume, name): (pb::ClientId, Bytes, String),
        term: u64,
        workers: Arc<Workers>,
    ) -> Arc<Self> {
        let state = State {
            term,
            phase: Phase::Lost,
            attempt: 0,
            next_id: 1,
            kept: BTreeMap::new(),
            retry_ms: RETRY_MS_MIN,
            retry_armed: false,
            attach_again: false,
            parts: false,
            newest: Seq::default(),
            first: None,
        };
        Arc::new(Self {
            link,
            client,
            volume,
            name,
            workers,
            holder: OnceLock::new(),
            state: Mutex::new(state),
            requests_sent: AtomicU64::new(0),
        })
    }

    /// Attaches for the first time; `first` hears the outcome.
    pub(super) fn start(
        self: &Arc<Self>,
        holder: Weak<dyn Holder>,
        first: impl FnOnce(Result<pb::Attached, FsError>) + Send + 'static,
    ) {
        if self.holder.set(holder).is_err() {
            return first(Err(FsError::Protocol("a session starts once".into())));
        }
        self.lock().first = Some(Box::new(first));
        self.attach();
    }

    /// Sends `op`, now or as soon as there is a coordinator.
    pub(super) fn call(
        self: &Arc<Self>,
        op: Op,
        done: impl FnOnce(Result<Answered, FsError>) + Send + 'static,
    ) {
        let id = self.keep(op, done);
        self.dispatch(id);
    }

    /// Whether a request may carry what is given up along with it. Under the lock of the file that this is about, until the
    /// request is kept: an attach that follows says what is left then.
    pub(super) fn parts(&self) -> bool {
        let state = self.lock();
        state.parts && matches!(state.phase, Phase::Attached)
    }

    /// The latest place among answers so far: a refusal that is here has this one at most.
    pub(super) fn newest_answer(&self) -> Seq {
        self.lock().newest
    }

    /// Gives `op` its id without sending it: may be called under a file's lock, so that the file's state and what is
    /// claimed for it change as one. [`Session::dispatch`] must follow.
    pub(super) fn keep(&self, op: Op, done: impl FnOnce(Result<Answered, FsError>) + Send + 'static) -> u64 {
        self.keep_for(0, op, done)
    }

    /// The same for what has a meaning only in `term`, which may be one that this node has yet to hear of.
    pub(super) fn keep_for(
        &self,
        term: u64,
        op: Op,
        done: impl FnOnce(Result<Answered, FsError>) + Send + 'static,
    ) -> u64 {
        let mut state = self.lock();
        let id = state.next_id;
        state.next_id += 1;
        let first_term = term.max(state.term);
        let made_under = if matches!(state.phase, Phase::Attached) { state.attempt } else { 0 };
        let kept = Kept { op, done: Box::new(done), sent_under: 0, first_term, made_under };
        state.kept.insert(id, kept);
        id
    }

    /// Keeps a Close of an inode that was last claimed in the Attach `claimed_in`, under the lock of the file. None where no coordinator
    /// counts what is closed: the next claim goes without it. One that is kept means something to the coordinator of this attach alone.
    pub(super) fn keep_close(&self, ino: u64, claimed_in: u64) -> Option<u64> {
        let mut state = self.lock();
        let counted = match state.phase {
            Phase::Attached => true,
            Phase::Attaching => claimed_in == state.attempt,
            Phase::Lost | Phase::Closed(_) => false,
        };
        let (id, made_under) = (state.next_id, state.attempt);
        counted.then(|| {
            state.next_id += 1;
            let (op, done) = (Op::Close(pb::Close { ino }), Box::new(|_| {}));
            let kept = Kept { op, done, sent_under: 0, first_term: state.term, made_under };
            state.kept.insert(id, kept);
            id
        })
    }

    /// Sends a kept request, unless an attach did so already.
    pub(super) fn dispatch(self: &Arc<Self>, id: u64) {
        let mut state = self.lock();
        if let Phase::Closed(why) = &state.phase {
            let why = why.clone();
            let kept = state.kept.remove(&id);
            drop(state);
            if let Some(kept) = kept {
                (kept.done)(Err(why));
            }
            return;
        }
        let waits = state.kept.get(&id).is_some_and(|kept| kept.sent_under == 0);
        if !waits || !matches!(state.phase, Phase::Attached) {
            return;
        }
        let ready = self.take_for_sending(&mut state, id);
        drop(state);
        if let Some((request, attempt)) = ready {
            self.send(request, attempt);
        }
    }

    /// Sends `op` and waits for its outcome, no longer than `patience`. A later outcome goes nowhere.
    pub(super) fn call_within(
        self: &Arc<Self>,
        op: Op,
        patience: Duration,
    ) -> Result<pb::reply::Result, FsError> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        self.call(op, move |outcome| drop(tell.send(outcome)));
        let why = || format!("no coordinator answered within {} s", patience.as_secs());
        told.recv_timeout(patience)
            .unwrap_or_else(|_| Err(FsError::Unreachable { why: why() }))
            .map(|answered| answered.result)
    }

    /// Sends `op` and waits for its outcome.
    pub(super) fn call_blocking(self: &Arc<Self>, op: Op) -> Result<Answered, FsError> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        self.call(op, move |outcome| drop(tell.send(outcome)));
        told.recv().unwrap_or(Err(FsError::Detached))
    }

    /// There is a coordinator of `term`: a new one, or the way to the old one is open again.
    pub(super) fn new_coordinator(self: &Arc<Self>, term: u64) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Closed(_)) || term < state.term {
            return;
        }
        // Also of the term that is known: whoever passes messages on may have forgotten this client.
        if matches!(state.phase, Phase::Attaching) && term == state.term {
            state.attach_again = true;
            return;
        }
        state.term = term;
        state.phase = Phase::Lost;
        state.retry_ms = RETRY_MS_MIN;
        drop(state);
        self.attach_soon();
    }

    /// Ends everything: waiting calls and all later ones fail with `why`.
    pub(super) fn close(&self, why: &FsError) {
        let mut state = self.lock();
        if matches!(state.phase, Phase::Closed(_)) {
            return;
        }
        state.phase = Phase::Closed(why.clone());
        let kept = std::mem::take(&mut state.kept);
        let first = state.first.take();
        drop(state);
        if let Some(first) = first {
            first(Err(why.clone()));
        }
        for request in kept.into_values() {
            (request.done)(Err(why.clone()));
        }
    }

    /// Whether no attach was begun since. A grant of an older attach is not among what was claimed then, so it does not
    /// count; asked under the lock of the file, under which its claim is made too.
    pub(super) fn is_current(&self, answered: &Answered) -> bool {
        self.is_attempt(answered.attempt)
    }

    /// The same, of an answer under this attach.
    pub(super) fn is_attempt(&self, attempt: u64) -> bool {
        self.lock().attempt == attempt
    }

    /// Who this is.
    pub(super) fn client(&self) -> pb::ClientId {
        self.client
    }

    pub(super) fn term(&self) -> u64 {
        self.lock().term
    }

    /// Requests sent so far, counting each time.
    pub(super) fn requests_sent(&self) -> u64 {
        self.requests_sent.load(Ordering::Relaxed)
    }

    fn lock(&self) -> Ranked<MutexGuard<'_, State>> {
        Ranked::take(rank::SESSION, || self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn holder(&self) -> Option<Arc<dyn Holder>> {
        self.holder.get().and_then(Weak::upgrade)
    }

    fn take_for_sending(&self, state: &mut State, id: u64) -> Option<(pb::Request, u64)> {
        let completed_below = state.kept.keys().next().copied().unwrap_or(id);
        let (term, attempt) = (state.term, state.attempt);
        let kept = state.kept.get_mut(&id)?;
        if kept.first_term < term {
            forget_old_term(&mut kept.op);
        }
        if kept.made_under < attempt {
            forget_given_up(&mut kept.op);
        }
        kept.sent_under = attempt;
        let op = Some(kept.op.clone());
        Some((self.request(term, id, completed_below, op), attempt))
    }

    fn request(&self, term: u64, request_id: u64, completed_below: u64, op: Option<Op>) -> pb::Request {
        pb::Request {
            volume: self.volume.clone(),
            term,
            client: Some(self.client),
            request_id,
            completed_below,
            op,
        }
    }

    fn send(self: &Arc<Self>, request: pb::Request, attempt: u64) {
        self.requests_sent.fetch_add(1, Ordering::Relaxed);
        let session = self.clone();
        let id = request.request_id;
        self.link.send(request, Box::new(move |outcome| session.answered(id, attempt, outcome)));
    }

    fn answered(self: &Arc<Self>, id: u64, attempt: u64, outcome: Result<pb::Reply, LinkError>) {
        let at = outcome.as_ref().map_or((0, 0), |reply| (reply.term, reply.at));
        match judge(outcome, attempt) {
            Verdict::Answer(outcome) => {
                let mut state = self.lock();
                state.newest = state.newest.max(at);
                let kept = state.kept.remove(&id);
                drop(state);
                // Of a request that was sent twice the first reply counts.
                if let Some(kept) = kept {
                    (kept.done)(outcome);
                }
            }
            Verdict::Later => self.postpone(id, attempt, false, 0),
            Verdict::Gone { term } => self.postpone(id, attempt, true, term),
        }
    }

    /// The request got no outcome: it waits for the next attach, or for a better moment.
    fn postpone(self: &Arc<Self>, id: u64, attempt: u64, gone: bool, seen_term: u64) {
        let mut state = self.lock();
        let Some(kept) = state.kept.get_mut(&id) else { return };
        if kept.sent_under == attempt {
            kept.sent_under = 0;
        }
        if gone && attempt == state.attempt && matches!(state.phase, Phase::Attached) {
            state.phase = Phase::Lost;
        }
        let newer = seen_term > state.term;
        state.term = state.term.max(seen_term);
        if newer {
            state.phase = Phase::Lost;
        }
        drop(state);
        if newer {
            self.attach_soon();
        } else {
            self.arm_retry();
        }
    }

    fn attach_soon(self: &Arc<Self>) {
        let session = self.clone();
        self.workers.run(move || session.attach());
    }

    fn arm_retry(self: &Arc<Self>) {
        let mut state = self.lock();
        if state.retry_armed || matches!(state.phase, Phase::Closed(_)) {
            return;
        }
        state.retry_armed = true;
        let wait = state.retry_ms;
        state.retry_ms = (wait * 2).min(RETRY_MS_MAX);
        drop(state);
        let session = self.clone();
        self.workers.after(Duration::from_millis(wait), move || session.retry());
    }

    fn retry(self: &Arc<Self>) {
        let mut state = self.lock();
        state.retry_armed = false;
        match state.phase {
            Phase::Attached => {
                drop(state);
                self.send_waiting();
            }
            Phase::Lost => {
                drop(state);
                self.attach();
            }
            Phase::Attaching | Phase::Closed(_) => {}
        }
    }

    /// Tells the coordinator who this is and what it holds. Not on a thread that holds a lock.
    fn attach(self: &Arc<Self>) {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Lost) {
            return;
        }
        state.phase = Phase::Attaching;
        state.attempt += 1;
        let attempt = state.attempt;
        let id = state.next_id;
        state.next_id += 1;
        drop(state);
        let Some(holder) = self.holder() else { return };
        let Holdings { claims, opens, locks, mut readers } = holder.holdings(attempt);
        into_distances(&mut readers);
        let state = self.lock();
        let below = state.kept.keys().next().copied().unwrap_or(id).min(id);
        let term = state.term;
        drop(state);
        let op = Op::Attach(pb::Attach { claims, opens, locks, readers, name: self.name.clone() });
        let session = self.clone();
        self.requests_sent.fetch_add(1, Ordering::Relaxed);
        let request = self.request(term, id, below, Some(op));
        self.link.send(
            request,
            Box::new(move |outcome| {
                let again = session.clone();
                session.workers.run(move || again.attach_answered(attempt, term, outcome));
            }),
        );
    }

    fn attach_answered(self: &Arc<Self>, attempt: u64, asked: u64, outcome: Result<pb::Reply, LinkError>) {
        match judge(outcome, attempt) {
            Verdict::Answer(Ok(Answered { result: pb::reply::Result::Attached(attached), .. })) => {
                self.attach_done(attempt, asked, attached);
            }
            Verdict::Answer(Ok(other)) => {
                self.attach_refused(&FsError::Protocol(format!("{:?} to an Attach", other.result)));
            }
            Verdict::Answer(Err(why)) => self.attach_refused(&why),
            Verdict::Later => self.attach_failed(attempt, asked, 0),
            Verdict::Gone { term } => self.attach_failed(attempt, asked, term),
        }
    }

    fn attach_done(self: &Arc<Self>, attempt: u64, asked: u64, attached: pb::Attached) {
        let mut state = self.lock();
        if state.attempt != attempt || !matches!(state.phase, Phase::Attaching) {
            return;
        }
        let again = std::mem::take(&mut state.attach_again);
        if again || state.term > asked.max(attached.term) {
            // A coordinator was announced meanwhile.
            state.phase = Phase::Lost;
            drop(state);
            return self.attach();
        }
        state.term = attached.term.max(asked);
        state.retry_ms = RETRY_MS_MIN;
        state.parts = attached.parts;
        let term = state.term;
        state.phase = Phase::Attached;
        let first = state.first.take();
        drop(state);
        tracing::debug!(client = %self.name, term, "attached to the coordinator");
        self.send_waiting();
        if let Some(first) = first {
            first(Ok(attached));
        }
    }

    fn attach_failed(self: &Arc<Self>, attempt: u64, asked: u64, seen_term: u64) {
        let mut state = self.lock();
        if state.attempt != attempt || !matches!(state.phase, Phase::Attaching) {
            return;
        }
        state.phase = Phase::Lost;
        state.term = state.term.max(seen_term);
        let newer = state.term > asked;
        drop(state);
        if newer { self.attach() } else { self.arm_retry() }
    }

    fn attach_refused(self: &Arc<Self>, why: &FsError) {
        tracing::error!(client = %self.name, error = %why, "the coordinator refuses this client");
        self.close(why);
        if let Some(holder) = self.holder() {
            holder.refused(why);
        }
    }

    /// Sends what waits, in the order of ids.
    fn send_waiting(self: &Arc<Self>) {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Attached) {
            return;
        }
        let attempt = state.attempt;
        let waiting: Vec<u64> =
            state.kept.iter().filter(|(_, kept)| kept.sent_under != attempt).map(|(id, _)| *id).collect();
        let ready: Vec<_> =
            waiting.into_iter().filter_map(|id| self.take_for_sending(&mut state, id)).collect();
        drop(state);
        for (request, attempt) in ready {
            self.send(request, attempt);
        }
    }
}

/// What was given up before an attach was not claimed in it. To give it up again would take away what was got since.
fn forget_given_up(op: &mut Op) {
    match op {
        // Nothing has this number, and to close what is not open is done already.
        Op::Close(op) => op.ino = 0,
        Op::Unlink(op) => op.parting = None,
        Op::Rename(op) => op.parting = None,
        _ => {}
    }
}

/// Sorts numbers and turns each into the distance from the one before: there may be many, and small ones are short.
fn into_distances(numbers: &mut [u64]) {
    numbers.sort_unstable();
    let mut last = 0;
    for number in numbers {
        let distance = *number - last;
        last = std::mem::replace(number, distance);
    }
}

/// The number of a recall means nothing to another coordinator. Without a commit the release itself means nothing either: the
/// claim has said what is held since, and what is lowered now may be what was granted after it.
fn forget_old_term(op: &mut Op) {
    if let Op::ReleaseGrant(release) = op {
        release.recall_seq = 0;
        if release.commit.is_none() {
            release.to = pb::GrantMode::from(lockmgr::Mode::Exclusive).into();
        }
    }
}

#[expect(clippy::large_enum_variant, reason = "it lives for one call, and nearly always it is an answer")]
enum Verdict {
    /// The outcome of the call.
    Answer(Result<Answered, FsError>),
    /// Nothing was done; this coordinator will do it later.
    Later,
    /// The coordinator is another one, or cannot be reached, or does not know this client.
    Gone { term: u64 },
}

fn judge(outcome: Result<pb::Reply, LinkError>, attempt: u64) -> Verdict {
    use pb::FailureKind::{InGrace, NotAttached, NotCoordinator, Stopped, WrongTerm};
    let reply = match outcome {
        Err(LinkError::Lost(_)) => return Verdict::Gone { term: 0 },
        Ok(reply) => reply,
    };
    let mut reply = reply;
    match reply.result.take() {
        None => Verdict::Answer(Err(FsError::Protocol("an empty reply".into()))),
        Some(pb::reply::Result::Failure(failure)) => match failure.kind() {
            InGrace => Verdict::Later,
            // One that has stopped leaves the volume to its successor, as one that was closed.
            NotCoordinator | WrongTerm | NotAttached | Stopped => Verdict::Gone { term: reply.term },
            _ => Verdict::Answer(Err(FsError::from_failure(failure))),
        },
        Some(result) => {
            let pb::Reply { term, at, known, held, .. } = reply;
            Verdict::Answer(Ok(Answered { term, attempt, at, known, held, result }))
        }
    }
}

#[cfg(test)]
mod tests {
    use lockmgr::Mode;

    use super::*;

    fn for_the_next_coordinator(commit: Option<pb::Commit>) -> pb::ReleaseGrant {
        let release =
            pb::ReleaseGrant { ino: 7, to: pb::GrantMode::from(Mode::Null).into(), recall_seq: 5, commit };
        let mut op = Op::ReleaseGrant(release);
        forget_old_term(&mut op);
        let Op::ReleaseGrant(release) = op else { unreachable!("it is still a release") };
        release
    }

    // Invariant C6: what a new coordinator has granted is not taken away by an answer to the old one.
    #[test]
    fn an_answer_to_a_former_coordinator_lowers_nothing_that_was_granted_since() {
        let answer = for_the_next_coordinator(None);
        assert_eq!(
            (Mode::from(answer.to()), answer.recall_seq),
            (Mode::Exclusive, 0),
            "nothing can be above that"
        );
        let carrying = for_the_next_coordinator(Some(pb::Commit::default()));
        assert_eq!(
            (Mode::from(carrying.to()), carrying.recall_seq),
            (Mode::Null, 0),
            "claimed as what it was"
        );
    }
}
