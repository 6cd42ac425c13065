//! A move, by the source.
//!
//! ```text
//!   quick:  Preflight -> Announce -> Save ------> Prepare -----------> Commit (handoff) -> Activate -> finished
//!   live:   Preflight -> Announce -> Prepare -> Copy -> Halt (Saving) -> Commit (handoff) -> Activate -> finished
//!              |            |           |        |         |               | kept
//!              v            v           v        v         v               v
//!            failed       return: cancel the target, resume the source, say so in the record
//! ```
//! In a live move the guest runs until `Halt`, and the target has everything in memory when `Halt` is answered.
//! The daemon carries out each [`Action`] and reports with the matching [`Event`]. At most one action that has an answer is
//! under way; what comes out of turn changes nothing.
//!
//! **Invariant:** [`Action::ResumeSource`] is given only before the commit was proposed, or after the hand-off has decided
//! that the VM stays (H1).

use std::fmt;

use lockmgr::NodeId;
use lockmgr::cluster::VmState;

use crate::change::{CasReply, Change, RecordView};
use crate::handoff::{Decision, Handoff, Step};
use crate::preflight::Problem;
use crate::report::{Moments, Report, SaveFigures};

/// How often the target is asked to activate before the source stops asking. The target looks at the record by itself too.
const ACTIVATIONS_MAX: u8 = 5;

/// What is to be moved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Plan {
    /// Name of the VM.
    pub vm: String,
    /// Its record; this node is the owner.
    pub record: RecordView,
    /// Where it goes.
    pub to: NodeId,
    /// How.
    pub kind: Kind,
}

/// How a VM is moved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Memory crosses the network while the guest runs.
    Live,
    /// Memory is saved to a volume.
    Quick {
        /// Where: `volume:/path`.
        saved: String,
    },
}

impl Kind {
    /// As users call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Quick { .. } => "quick",
        }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// Begin.
    Begin,
    /// Answer to [`Action::Preflight`]: what stands against the move.
    Checked(Vec<Problem>),
    /// Answer to [`Action::Propose`].
    Cas(CasReply),
    /// Answer to [`Action::ReadRecord`]; `None`: there is none. Not older than what this node was told of its own changes.
    /// Without an answer the daemon reads again.
    Record(Option<RecordView>),
    /// Answer to [`Action::Copy`]: little is left.
    Copied,
    /// Answer to [`Action::Copy`]: it broke off, was cancelled, or does not come to an end. The guest runs.
    CopyFailed(String),
    /// Answer to [`Action::Save`] and [`Action::Halt`].
    Saved(SaveFigures),
    /// Answer to [`Action::Save`] and [`Action::Halt`]: it did not work, the VM can be resumed.
    SaveFailed(String),
    /// Answer to [`Action::PrepareTarget`]: the target has loaded everything and waits.
    Prepared,
    /// Answer to [`Action::PrepareTarget`].
    Refused(String),
    /// Answer to [`Action::ActivateTarget`]: the guest runs there.
    Activated,
    /// Answer to [`Action::ActivateTarget`]: the VM belongs to the target and cannot run there.
    ActivateFailed(String),
    /// No answer from the target: the message or its answer was lost, or the target is gone.
    TargetLost(String),
    /// Answer to [`Action::ResumeSource`].
    Resumed,
    /// Answer to [`Action::ResumeSource`]: the process is gone or cannot run.
    ResumeFailed(String),
    /// The user no longer wants it.
    Cancel,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Compare what the VM needs with what the target has.
    Preflight,
    /// Propose this change of the record.
    Propose(Change),
    /// Read the record.
    ReadRecord,
    /// Pause the guest, drain, flush and close the disks, save the rest of RAM and the state to the volume.
    Save,
    /// Send memory to the target, or in a quick move to the volume, while the guest runs, until little is left.
    Copy,
    /// Pause the guest, drain, flush and close the disks, send the rest of the memory and the state; done when the target
    /// has taken them.
    Halt,
    /// Send `PrepareTarget`.
    PrepareTarget,
    /// Send `Activate`.
    ActivateTarget,
    /// Send `Cancel`; no answer is awaited.
    CancelTarget,
    /// Undo the save if there was one and run on, under this epoch of the record.
    ResumeSource {
        /// The epoch.
        epoch: u64,
    },
    /// End the source's VM process for good.
    EndSource,
    /// The cancellation came too late.
    CancelRefused(&'static str),
    /// The move is done.
    Finished(Report),
    /// The move is over without success.
    Failed(Failure),
}

/// How a move failed, and what became of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Failure {
    /// It was not even begun.
    #[error("vm {vm} cannot move to node {to}: {}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NotPossible {
        /// The VM.
        vm: String,
        /// The target.
        to: NodeId,
        /// Each thing that stands against it.
        problems: Vec<Problem>,
    },
    /// It runs on at the source.
    #[error("vm {vm} did not move and runs on where it was: {reason}")]
    Kept {
        /// The VM.
        vm: String,
        /// Why.
        reason: String,
    },
    /// It stands still at the source.
    #[error(
        "vm {vm} did not move ({reason}) and stopped: {stopped}; start it again with `csvctl vm start {vm}`"
    )]
    Stopped {
        /// The VM.
        vm: String,
        /// Why it did not move.
        reason: String,
        /// Why it does not run on.
        stopped: String,
    },
    /// It belongs to the target, and does not run there, or nobody knows yet.
    #[error(
        "vm {vm} belongs to node {to} now, which has not started it: {reason}; see `csvctl vm show {vm}`"
    )]
    MovedNotRunning {
        /// The VM.
        vm: String,
        /// The target.
        to: NodeId,
        /// What is known.
        reason: String,
    },
    /// Somebody else changed its owner or its epoch meanwhile.
    #[error(
        "vm {vm} was taken over while it moved; it does not run here any more; see `csvctl vm show {vm}`"
    )]
    Superseded {
        /// The VM.
        vm: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    New,
    Preflight,
    /// The record is to say that the VM moves.
    Announcing,
    Copying,
    Saving,
    Preparing,
    Handoff(Handoff),
    Activating {
        tries: u8,
    },
    /// The source is told to run on.
    Resuming {
        record: RecordView,
        reason: String,
    },
    /// The record is to say what became of the source.
    Returning {
        from: RecordView,
        to: VmState,
        failure: Failure,
    },
    Ended,
}

/// One move. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Migration {
    plan: Plan,
    phase: Phase,
    /// Why it is to be given up at the next safe moment.
    cancelled: Option<String>,
    moments: Moments,
}

impl Migration {
    /// A move that has not begun.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self { plan, phase: Phase::New, cancelled: None, moments: Moments::default() }
    }

    /// Takes one event, at `now_us` on a clock of the caller's, and says what follows.
    pub fn step(&mut self, now_us: u64, event: Event) -> Vec<Action> {
        if event == Event::Cancel {
            return self.cancel();
        }
        match std::mem::replace(&mut self.phase, Phase::Ended) {
            Phase::New => self.begin(now_us, event),
            Phase::Preflight => self.checked(event),
            Phase::Announcing => self.announcing(event),
            Phase::Copying => self.copying(now_us, event),
            Phase::Saving => self.saving(event),
            Phase::Preparing => self.preparing(event),
            Phase::Handoff(handoff) => self.handing_off(handoff, event),
            Phase::Activating { tries } => self.activating(now_us, tries, event),
            Phase::Resuming { record, reason } => self.resuming(record, reason, event),
            Phase::Returning { from, to, failure } => self.returning(from, to, failure, event),
            Phase::Ended => Vec::new(),
        }
    }

    /// What it does now, for people.
    #[must_use]
    pub fn phase(&self) -> &'static str {
        match self.phase {
            Phase::New | Phase::Preflight => "preflight",
            Phase::Announcing => "announce",
            Phase::Copying => "copy",
            Phase::Saving => "save",
            Phase::Preparing => "prepare",
            Phase::Handoff(_) => "commit",
            Phase::Activating { .. } => "activate",
            Phase::Resuming { .. } | Phase::Returning { .. } => "return",
            Phase::Ended => "ended",
        }
    }

    /// Whether nothing more follows.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    fn begin(&mut self, now_us: u64, event: Event) -> Vec<Action> {
        if event != Event::Begin {
            return self.stay(Phase::New);
        }
        self.moments.begun = now_us;
        self.go(Phase::Preflight, Action::Preflight)
    }

    fn checked(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Checked(problems) if problems.is_empty() => self.announce(),
            Event::Checked(problems) => {
                let (vm, to) = (self.plan.vm.clone(), self.plan.to);
                self.fail(Failure::NotPossible { vm, to, problems })
            }
            _ => self.stay(Phase::Preflight),
        }
    }

    fn announce(&mut self) -> Vec<Action> {
        let change =
            Change { peer: Some(self.plan.to), ..Change::state(self.plan.record, VmState::Migrating) };
        self.go(Phase::Announcing, Action::Propose(change))
    }

    /// Until it is certain what the record says; the guest runs meanwhile.
    fn announcing(&mut self, event: Event) -> Vec<Action> {
        let announced = self.announced();
        match event {
            Event::Cas(CasReply::Won) => self.announced_for_certain(),
            Event::Cas(CasReply::Unknown) => self.go(Phase::Announcing, Action::ReadRecord),
            Event::Cas(CasReply::Lost(found)) | Event::Record(found) if found == Some(announced) => {
                self.announced_for_certain()
            }
            // It may still be applied later, so it is proposed again until the answer is certain.
            Event::Record(found) if found == Some(self.plan.record) => self.announce(),
            Event::Cas(CasReply::Lost(found)) | Event::Record(found) => self.out_of_turn(found),
            Event::Cas(CasReply::Refused(reason)) => self.fail_kept(reason),
            _ => self.stay(Phase::Announcing),
        }
    }

    /// The record is not what the plan says. The guest still runs, so only its process can tell; the daemon that owns it
    /// acts on the record.
    fn out_of_turn(&mut self, found: Option<RecordView>) -> Vec<Action> {
        let vm = self.plan.vm.clone();
        match found {
            Some(found) if found.owner == self.plan.record.owner && found.epoch == self.plan.record.epoch => {
                self.fail_kept(format!("it is {} now", found.state))
            }
            _ => self.end_source(Failure::Superseded { vm }),
        }
    }

    fn announced_for_certain(&mut self) -> Vec<Action> {
        if let Some(reason) = self.cancelled.clone() {
            return self.put_back(self.announced(), self.plan.record.state, self.kept(reason));
        }
        match self.plan.kind {
            Kind::Live => self.go(Phase::Preparing, Action::PrepareTarget),
            Kind::Quick { .. } => self.go(Phase::Copying, Action::Copy),
        }
    }

    fn halt(&mut self, now_us: u64, how: Action) -> Vec<Action> {
        self.moments.halted = now_us;
        self.go(Phase::Saving, how)
    }

    fn copying(&mut self, now_us: u64, event: Event) -> Vec<Action> {
        match (event, self.cancelled.clone()) {
            (Event::Copied, None) => match self.plan.kind {
                Kind::Live => self.halt(now_us, Action::Halt),
                Kind::Quick { .. } => self.halt(now_us, Action::Save),
            },
            (Event::Copied | Event::CopyFailed(_), Some(reason)) | (Event::CopyFailed(reason), None) => {
                self.give_up_before_commit(reason)
            }
            _ => self.stay(Phase::Copying),
        }
    }

    fn saving(&mut self, event: Event) -> Vec<Action> {
        match (event, self.cancelled.clone()) {
            (Event::Saved(figures), None) => {
                self.moments.saved = figures;
                match self.plan.kind {
                    Kind::Live => self.commit(None),
                    Kind::Quick { .. } => self.go(Phase::Preparing, Action::PrepareTarget),
                }
            }
            (Event::Saved(_), Some(reason)) | (Event::SaveFailed(reason), _) => {
                self.give_up_before_commit(reason)
            }
            _ => self.stay(Phase::Saving),
        }
    }

    fn preparing(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Prepared => match self.plan.kind.clone() {
                Kind::Live => self.go(Phase::Copying, Action::Copy),
                Kind::Quick { saved } => self.commit(Some(saved)),
            },
            Event::Refused(reason) | Event::TargetLost(reason) => self.give_up_before_commit(reason),
            _ => self.stay(Phase::Preparing),
        }
    }

    fn commit(&mut self, saved: Option<String>) -> Vec<Action> {
        let (handoff, step) = Handoff::begin(self.announced(), self.plan.to, saved);
        self.follow(handoff, step)
    }

    /// A target that was told nothing yet answers a cancellation all the same.
    fn give_up_before_commit(&mut self, reason: String) -> Vec<Action> {
        let mut actions = vec![Action::CancelTarget];
        actions.extend(self.resume(self.announced(), reason));
        actions
    }

    fn handing_off(&mut self, mut handoff: Handoff, event: Event) -> Vec<Action> {
        let step = match event {
            Event::Cas(reply) => handoff.reply(reply),
            Event::Record(found) => handoff.record(found),
            _ => return self.stay(Phase::Handoff(handoff)),
        };
        self.follow(handoff, step)
    }

    fn follow(&mut self, handoff: Handoff, step: Step) -> Vec<Action> {
        match step {
            Step::Propose(change) => self.go(Phase::Handoff(handoff), Action::Propose(change)),
            Step::Read => self.go(Phase::Handoff(handoff), Action::ReadRecord),
            Step::Decided(Decision::Moved) => {
                let mut actions = vec![Action::EndSource];
                actions.extend(self.go(Phase::Activating { tries: 1 }, Action::ActivateTarget));
                actions
            }
            Step::Decided(Decision::Kept(record, reason)) => {
                let mut actions = vec![Action::CancelTarget];
                actions.extend(self.resume(record, reason));
                actions
            }
            Step::Decided(Decision::Superseded) => {
                let vm = self.plan.vm.clone();
                self.end_source(Failure::Superseded { vm })
            }
        }
    }

    /// The source is over; all that is left is to see the guest run.
    fn activating(&mut self, now_us: u64, tries: u8, event: Event) -> Vec<Action> {
        let (vm, to) = (self.plan.vm.clone(), self.plan.to);
        match event {
            Event::Activated => self.finish(now_us),
            Event::ActivateFailed(reason) => self.fail(Failure::MovedNotRunning { vm, to, reason }),
            Event::TargetLost(_) => self.go(Phase::Activating { tries }, Action::ReadRecord),
            Event::Record(Some(found)) if self.runs_at_target(found) => self.finish(now_us),
            Event::Record(Some(found)) if found.owner == to && found.epoch == self.plan.record.epoch + 1 => {
                if tries >= ACTIVATIONS_MAX || found.state == VmState::Failed {
                    let reason = format!("its state is {}", found.state);
                    return self.fail(Failure::MovedNotRunning { vm, to, reason });
                }
                self.go(Phase::Activating { tries: tries + 1 }, Action::ActivateTarget)
            }
            // This node has not heard of the commit yet.
            Event::Record(Some(found)) if found.epoch == self.plan.record.epoch => {
                self.go(Phase::Activating { tries }, Action::ReadRecord)
            }
            // The cluster has already gone on with it, elsewhere or in a later epoch.
            Event::Record(_) => self.fail(Failure::Superseded { vm }),
            _ => self.stay(Phase::Activating { tries }),
        }
    }

    fn runs_at_target(&self, found: RecordView) -> bool {
        let running = matches!(found.state, VmState::Running | VmState::Paused);
        found.owner == self.plan.to && found.epoch == self.plan.record.epoch + 1 && running
    }

    fn resume(&mut self, record: RecordView, reason: String) -> Vec<Action> {
        self.go(Phase::Resuming { record, reason }, Action::ResumeSource { epoch: record.epoch })
    }

    fn resuming(&mut self, record: RecordView, reason: String, event: Event) -> Vec<Action> {
        let vm = self.plan.vm.clone();
        match event {
            Event::Resumed => self.put_back(record, self.plan.record.state, Failure::Kept { vm, reason }),
            Event::ResumeFailed(stopped) => {
                self.put_back(record, VmState::Failed, Failure::Stopped { vm, reason, stopped })
            }
            _ => self.stay(Phase::Resuming { record, reason }),
        }
    }

    /// Brings the record in line with what became of the source.
    fn put_back(&mut self, from: RecordView, to: VmState, failure: Failure) -> Vec<Action> {
        if from.state == to {
            return self.fail(failure);
        }
        let reason = if to == VmState::Failed { failure.to_string() } else { String::new() };
        let change = Change { reason, ..Change::state(from, to) };
        self.go(Phase::Returning { from, to, failure }, Action::Propose(change))
    }

    fn returning(&mut self, from: RecordView, to: VmState, failure: Failure, event: Event) -> Vec<Action> {
        match event {
            Event::Cas(CasReply::Unknown) => {
                self.go(Phase::Returning { from, to, failure }, Action::ReadRecord)
            }
            Event::Record(Some(found)) if found == from => self.put_back(from, to, failure),
            // Whatever else the record says was said by somebody after this.
            Event::Cas(_) | Event::Record(_) => self.fail(failure),
            _ => self.stay(Phase::Returning { from, to, failure }),
        }
    }

    fn cancel(&mut self) -> Vec<Action> {
        let reason = "it was cancelled".to_owned();
        match &mut self.phase {
            Phase::New | Phase::Preflight => self.fail_kept(reason),
            Phase::Announcing | Phase::Copying | Phase::Saving => {
                self.cancelled = Some(reason);
                Vec::new()
            }
            Phase::Preparing => self.give_up_before_commit(reason),
            Phase::Handoff(handoff) => {
                handoff.give_up(&reason);
                vec![Action::CancelRefused("it is being handed over; it stays only if that fails")]
            }
            Phase::Activating { .. } => vec![Action::CancelRefused("it has already moved")],
            Phase::Resuming { .. } | Phase::Returning { .. } | Phase::Ended => Vec::new(),
        }
    }

    fn announced(&self) -> RecordView {
        RecordView { state: VmState::Migrating, ..self.plan.record }
    }

    fn kept(&self, reason: String) -> Failure {
        Failure::Kept { vm: self.plan.vm.clone(), reason }
    }

    fn finish(&mut self, now_us: u64) -> Vec<Action> {
        let way = (self.plan.record.owner.0, self.plan.to.0);
        let report = self.moments.report(&self.plan.vm, self.plan.kind.name(), way, now_us);
        self.go(Phase::Ended, Action::Finished(report))
    }

    fn fail_kept(&mut self, reason: String) -> Vec<Action> {
        self.fail(self.kept(reason))
    }

    fn fail(&mut self, failure: Failure) -> Vec<Action> {
        self.go(Phase::Ended, Action::Failed(failure))
    }

    fn end_source(&mut self, failure: Failure) -> Vec<Action> {
        self.phase = Phase::Ended;
        vec![Action::EndSource, Action::Failed(failure)]
    }

    fn go(&mut self, phase: Phase, action: Action) -> Vec<Action> {
        self.phase = phase;
        vec![action]
    }

    fn stay(&mut self, phase: Phase) -> Vec<Action> {
        self.phase = phase;
        Vec::new()
    }
}

impl fmt::Display for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vm {} to node {}: {}", self.plan.vm, self.plan.to, self.phase())
    }
}
