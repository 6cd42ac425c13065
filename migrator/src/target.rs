//! A move, by the target.
//!
//! ```text
//!            Prepare          loaded           record says (me, e + 1, saved)   runs
//!   Idle -------------> Loading -----> Ready ------------------------> Starting -----> Running
//!    ^                     |             |                                |
//!    +---------------------+-------------+--- Cancel, or the record says otherwise: discard
//! ```
//! The target starts the guest only after it has read in the record that the VM is its own; a message is only a reason to
//! look. While it waits it looks by itself from time to time, so that a lost message delays the VM and loses nothing. A
//! target that has lost what it had loaded (it was restarted, its process died) loads the saved state again; in a live move
//! there is none, and the VM is `failed` with that reason. `Ready` also while the memory of a live move is still coming: the
//! source commits only after the target has said that it is complete.
//!
//! **Invariant:** [`TargetAction::Start`] follows only on a record of (this node, e + 1, saved), which only the commit makes (H1).

use lockmgr::NodeId;
use lockmgr::cluster::VmState;

use crate::change::{CasReply, Change, RecordView};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetEvent {
    /// `PrepareTarget` came.
    Prepare,
    /// `Activate` came.
    Activate,
    /// `Cancel` came.
    Cancel,
    /// It is time to look at the record. To be sent every second or so while [`Incoming::is_waiting`].
    Look,
    /// Answer to [`TargetAction::Load`].
    Loaded,
    /// Answer to [`TargetAction::Load`].
    LoadFailed(String),
    /// Answer to [`TargetAction::ReadRecord`]. It may be old: then the next look shows more.
    Record(Option<RecordView>),
    /// Answer to [`TargetAction::Start`]: the guest runs.
    Started,
    /// Answer to [`TargetAction::Start`].
    StartFailed(String),
    /// Answer to [`TargetAction::Propose`].
    Cas(CasReply),
    /// The process that had loaded the state has ended.
    ProcessEnded(String),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Start a VM process that loads the saved state (in a live move: waits for it) and opens the disks inactive.
    Load,
    /// Read the record.
    ReadRecord,
    /// Let the process re-read the disks' metadata, open them for writing, and run the guest.
    Start,
    /// End the process that has loaded the state.
    Discard,
    /// Propose this change of the record.
    Propose(Change),
    /// Answer the message that is unanswered, if there is one.
    Answer(TargetAnswer),
}

/// Answers to the source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TargetAnswer {
    /// Everything is loaded.
    Prepared,
    /// Nothing was done.
    Refused(String),
    /// The guest runs here.
    Activated,
    /// The VM belongs here and cannot run.
    ActivateFailed(String),
    /// Nothing of the move is left here.
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    /// Nothing is loaded.
    Idle,
    /// Nothing is loaded, and the record is being read whether something should be.
    IdleAsking,
    /// `owned`: the record was seen to name this node.
    Loading {
        owned: bool,
    },
    Ready,
    Asking,
    Starting,
    Running {
        recorded: bool,
    },
    /// Belongs here, cannot run; the reason goes into the record.
    Broken {
        reason: String,
        recorded: bool,
    },
}

/// The target's side of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Incoming {
    from: NodeId,
    own: NodeId,
    epoch: u64,
    phase: Phase,
}

impl Incoming {
    /// For a move from `from` to `own` of a VM whose record is at `epoch` before the commit.
    #[must_use]
    pub fn new(from: NodeId, own: NodeId, epoch: u64) -> Self {
        Self { from, own, epoch, phase: Phase::Idle }
    }

    /// Takes one event and says what follows.
    pub fn step(&mut self, event: TargetEvent) -> Vec<TargetAction> {
        match event {
            TargetEvent::Prepare => self.prepare(),
            TargetEvent::Activate => self.activate(),
            TargetEvent::Cancel => self.cancel(),
            TargetEvent::Look => self.look(),
            TargetEvent::Loaded => self.loaded(),
            TargetEvent::LoadFailed(reason) => self.load_failed(reason),
            TargetEvent::Record(found) => self.record(found),
            TargetEvent::Started => self.started(),
            TargetEvent::StartFailed(reason) => self.start_failed(reason),
            TargetEvent::Cas(reply) => self.recorded(&reply),
            TargetEvent::ProcessEnded(reason) => self.process_ended(reason),
        }
    }

    /// Whether it waits for the source, or for the record to say something.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        matches!(
            self.phase,
            Phase::Ready | Phase::Running { recorded: false } | Phase::Broken { recorded: false, .. }
        )
    }

    /// Whether nothing of the move is here, so that the attempt can be forgotten.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Whether the record was seen to name this node, so that what is loaded now is loaded for good.
    #[must_use]
    pub fn is_owned(&self) -> bool {
        matches!(self.phase, Phase::Loading { owned: true } | Phase::Starting | Phase::Running { .. })
    }

    /// Whether the guest runs here.
    #[must_use]
    pub fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running { .. })
    }

    fn prepare(&mut self) -> Vec<TargetAction> {
        match self.phase {
            Phase::Idle => {
                self.phase = Phase::Loading { owned: false };
                vec![TargetAction::Load]
            }
            Phase::Ready | Phase::Asking => answer(TargetAnswer::Prepared),
            Phase::Running { .. } | Phase::Starting | Phase::Broken { .. } => {
                refuse("the vm belongs here already")
            }
            // The answer follows when it is loaded.
            Phase::Loading { .. } | Phase::IdleAsking => Vec::new(),
        }
    }

    fn activate(&mut self) -> Vec<TargetAction> {
        match &self.phase {
            Phase::Idle => self.ask(Phase::IdleAsking),
            Phase::Ready => self.ask(Phase::Asking),
            Phase::Running { .. } => answer(TargetAnswer::Activated),
            Phase::Broken { reason, .. } => answer(TargetAnswer::ActivateFailed(reason.clone())),
            Phase::Loading { .. } | Phase::IdleAsking | Phase::Asking | Phase::Starting => Vec::new(),
        }
    }

    fn cancel(&mut self) -> Vec<TargetAction> {
        match self.phase {
            Phase::Idle | Phase::IdleAsking => {
                self.phase = Phase::Idle;
                answer(TargetAnswer::Cancelled)
            }
            Phase::Loading { owned: false } | Phase::Ready | Phase::Asking => {
                self.discard(TargetAnswer::Cancelled)
            }
            // The record has said that the VM is here. A source that cancels has not heard of it: it will read it.
            _ => refuse("the vm belongs here already"),
        }
    }

    fn look(&mut self) -> Vec<TargetAction> {
        match self.phase {
            Phase::Ready => self.ask(Phase::Asking),
            Phase::Running { recorded: false } | Phase::Broken { recorded: false, .. } => {
                vec![TargetAction::ReadRecord]
            }
            _ => Vec::new(),
        }
    }

    fn loaded(&mut self) -> Vec<TargetAction> {
        match self.phase {
            Phase::Loading { owned: false } => {
                self.phase = Phase::Ready;
                answer(TargetAnswer::Prepared)
            }
            Phase::Loading { owned: true } => self.start(),
            // It was cancelled meanwhile; the process was discarded then.
            _ => Vec::new(),
        }
    }

    fn load_failed(&mut self, reason: String) -> Vec<TargetAction> {
        match self.phase {
            Phase::Loading { owned: false } => self.discard(TargetAnswer::Refused(reason)),
            Phase::Loading { owned: true } => self.broken(reason),
            _ => Vec::new(),
        }
    }

    fn process_ended(&mut self, reason: String) -> Vec<TargetAction> {
        match self.phase {
            Phase::Ready => {
                self.phase = Phase::Idle;
                Vec::new()
            }
            Phase::Asking => {
                self.phase = Phase::IdleAsking;
                Vec::new()
            }
            Phase::Loading { .. } => self.load_failed(reason),
            Phase::Starting => self.start_failed(reason),
            _ => Vec::new(),
        }
    }

    fn record(&mut self, found: Option<RecordView>) -> Vec<TargetAction> {
        match self.phase {
            Phase::Asking => self.judge_ready(found),
            Phase::IdleAsking => self.judge_idle(found),
            Phase::Running { recorded: false } | Phase::Broken { recorded: false, .. } => {
                self.judge_recorded(found)
            }
            _ => Vec::new(),
        }
    }

    fn judge_ready(&mut self, found: Option<RecordView>) -> Vec<TargetAction> {
        if self.is_to_be_started(found) {
            return self.start();
        }
        if found.is_some_and(|found| self.is_not_committed(found) && found.state == VmState::Migrating) {
            self.phase = Phase::Ready;
            return Vec::new();
        }
        self.discard(TargetAnswer::Refused("the vm does not belong here".to_owned()))
    }

    fn judge_idle(&mut self, found: Option<RecordView>) -> Vec<TargetAction> {
        if self.is_to_be_started(found) {
            self.phase = Phase::Loading { owned: true };
            return vec![TargetAction::Load];
        }
        self.phase = Phase::Idle;
        refuse("the vm does not belong here, or is not to be started from its saved state")
    }

    fn judge_recorded(&mut self, found: Option<RecordView>) -> Vec<TargetAction> {
        if self.is_to_be_started(found) {
            return vec![TargetAction::Propose(self.outcome())];
        }
        if let Phase::Running { recorded } | Phase::Broken { recorded, .. } = &mut self.phase {
            *recorded = true;
        }
        Vec::new()
    }

    fn start(&mut self) -> Vec<TargetAction> {
        self.phase = Phase::Starting;
        vec![TargetAction::Start]
    }

    fn started(&mut self) -> Vec<TargetAction> {
        if self.phase != Phase::Starting {
            return Vec::new();
        }
        self.phase = Phase::Running { recorded: false };
        vec![TargetAction::Propose(self.outcome()), TargetAction::Answer(TargetAnswer::Activated)]
    }

    fn start_failed(&mut self, reason: String) -> Vec<TargetAction> {
        if self.phase == Phase::Starting { self.broken(reason) } else { Vec::new() }
    }

    fn broken(&mut self, reason: String) -> Vec<TargetAction> {
        let told = TargetAction::Answer(TargetAnswer::ActivateFailed(reason.clone()));
        self.phase = Phase::Broken { reason, recorded: false };
        vec![TargetAction::Discard, TargetAction::Propose(self.outcome()), told]
    }

    fn recorded(&mut self, reply: &CasReply) -> Vec<TargetAction> {
        match &mut self.phase {
            // Unknown: the next look shows it.
            Phase::Running { recorded } | Phase::Broken { recorded, .. } if *reply != CasReply::Unknown => {
                *recorded = true;
            }
            _ => {}
        }
        Vec::new()
    }

    /// What the record is to say of the end of this move.
    fn outcome(&self) -> Change {
        let mine = RecordView { owner: self.own, epoch: self.epoch + 1, state: VmState::Saved };
        match &self.phase {
            // Who proposes it adds the saved state, if the record still names one: then the guest has not run.
            Phase::Broken { reason, .. } => {
                Change { reason: reason.clone(), ..Change::state(mine, VmState::Failed) }
            }
            _ => Change::state(mine, VmState::Running),
        }
    }

    /// Whether the record is what the commit made it. In another state somebody else is at work with the VM: after the
    /// death of the source the cluster may have given it to this very node, to be started afresh.
    fn is_to_be_started(&self, found: Option<RecordView>) -> bool {
        found == Some(RecordView { owner: self.own, epoch: self.epoch + 1, state: VmState::Saved })
    }

    fn is_not_committed(&self, found: RecordView) -> bool {
        found.owner == self.from && found.epoch == self.epoch
    }

    fn ask(&mut self, phase: Phase) -> Vec<TargetAction> {
        self.phase = phase;
        vec![TargetAction::ReadRecord]
    }

    fn discard(&mut self, told: TargetAnswer) -> Vec<TargetAction> {
        self.phase = Phase::Idle;
        vec![TargetAction::Discard, TargetAction::Answer(told)]
    }
}

fn answer(told: TargetAnswer) -> Vec<TargetAction> {
    vec![TargetAction::Answer(told)]
}

fn refuse(why: &str) -> Vec<TargetAction> {
    answer(TargetAnswer::Refused(why.to_owned()))
}
