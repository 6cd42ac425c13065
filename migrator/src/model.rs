//! Every way that a move can go, live and quick, explored to the end.
//!
//! The world is the two state machines, the record, and everything that can be under way between them. From each state all
//! of these can happen next, in every order: a message arrives, arrives again, arrives late, never arrives; a
//! compare-and-swap is applied and its answer lost, or applied at any later time, or never; copying, saving, loading,
//! starting or resuming fails; a process or a whole node dies; the cluster takes a dead node's VM, or gives it to the other node; the
//! user cancels.
//!
//! Judged in every state: at most one guest runs; no epoch has two runners; a guest that runs is the one that the record
//! names. And from every state the good end stays in reach without further faults: the VM runs in exactly one place, or is
//! stopped with a reason in the record.

use std::collections::{BTreeSet, HashMap};

use lockmgr::NodeId;
use lockmgr::cluster::VmState;

use crate::change::{CasReply, Change, RecordView};
use crate::phase::{Action, Event, Kind, Migration, Plan};
use crate::preflight::Problem;
use crate::report::SaveFigures;
use crate::target::{Incoming, TargetAction, TargetAnswer, TargetEvent};

const SRC: NodeId = NodeId(1);
const DST: NodeId = NodeId(2);
const EPOCH: u64 = 7;

/// A VM process on one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Process {
    None,
    /// The guest stands still.
    Halted,
    Running(u64),
}

/// Something whose answer is due.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Todo {
    Check,
    Cas(Change),
    Read,
    Copy,
    Save,
    Resume(u64),
    /// `PrepareTarget` or `Activate` was sent.
    Call,
    Load,
    Start,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Message {
    Prepare,
    Activate,
    Cancel,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    live: bool,
    source: Migration,
    source_alive: bool,
    source_process: Process,
    source_todo: Option<Todo>,
    target: Incoming,
    target_alive: bool,
    target_process: Process,
    target_todo: BTreeSet<Todo>,
    /// Whether the target's process has RAM and state.
    target_full: bool,
    /// A guest that the cluster started afresh on the target's node, after the source's death.
    restarted: Option<u64>,
    record: RecordView,
    /// Whether the record says why.
    reason: bool,
    /// All that the record ever was, and up to where the target has certainly heard of it.
    history: Vec<RecordView>,
    target_knows: usize,
    /// Whatever was sent may arrive at any time, any number of times.
    messages: BTreeSet<Message>,
    answers: BTreeSet<u8>,
    /// Proposals whose outcome their proposer does not know.
    late: BTreeSet<Change>,
    may_cancel: bool,
    /// Who ran in the epoch of the commit.
    ran_next: Option<u8>,
}

/// One thing that can happen: its name, whether it is a fault, and the world after it.
type Next = (String, bool, World);

const PREPARED: u8 = 0;
const REFUSED: u8 = 1;
const ACTIVATED: u8 = 2;
const ACTIVATE_FAILED: u8 = 3;

impl World {
    fn new(kind: Kind) -> Self {
        let record = RecordView { owner: SRC, epoch: EPOCH, state: VmState::Running };
        let live = kind == Kind::Live;
        let plan = Plan { vm: "web".to_owned(), record, to: DST, kind };
        let mut world = Self {
            live,
            source: Migration::new(plan),
            source_alive: true,
            source_process: Process::Running(EPOCH),
            source_todo: None,
            target: Incoming::new(SRC, DST, EPOCH),
            target_alive: true,
            target_process: Process::None,
            target_todo: BTreeSet::new(),
            target_full: false,
            restarted: None,
            record,
            reason: false,
            history: vec![record],
            target_knows: 0,
            messages: BTreeSet::new(),
            answers: BTreeSet::new(),
            late: BTreeSet::new(),
            may_cancel: true,
            ran_next: None,
        };
        world.tell_source(Event::Begin);
        world
    }

    fn tell_source(&mut self, event: Event) {
        for action in self.source.step(0, event) {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        let todo = match action {
            Action::Preflight => Todo::Check,
            Action::Propose(change) => Todo::Cas(change),
            Action::ReadRecord => Todo::Read,
            Action::Copy => Todo::Copy,
            Action::Save | Action::Halt => {
                self.source_process = Process::Halted;
                Todo::Save
            }
            Action::PrepareTarget => self.send(Message::Prepare),
            Action::ActivateTarget => self.send(Message::Activate),
            Action::CancelTarget => {
                self.messages.insert(Message::Cancel);
                return;
            }
            Action::ResumeSource { epoch } => Todo::Resume(epoch),
            Action::EndSource => {
                self.source_process = Process::None;
                return;
            }
            Action::CancelRefused(_) => return,
            Action::Finished(_) | Action::Failed(_) => {
                self.source_todo = None;
                return;
            }
        };
        self.source_todo = Some(todo);
    }

    fn send(&mut self, message: Message) -> Todo {
        self.messages.insert(message);
        Todo::Call
    }

    fn tell_target(&mut self, event: TargetEvent) {
        for action in self.target.step(event) {
            match action {
                TargetAction::Load => drop(self.target_todo.insert(Todo::Load)),
                TargetAction::Start => drop(self.target_todo.insert(Todo::Start)),
                TargetAction::ReadRecord => drop(self.target_todo.insert(Todo::Read)),
                TargetAction::Propose(change) => drop(self.target_todo.insert(Todo::Cas(change))),
                TargetAction::Discard => {
                    self.target_process = Process::None;
                    self.target_full = false;
                    self.target_todo.remove(&Todo::Load);
                    self.target_todo.remove(&Todo::Start);
                }
                TargetAction::Answer(answer) => self.answer(&answer),
            }
        }
    }

    fn answer(&mut self, answer: &TargetAnswer) {
        self.answers.insert(match answer {
            TargetAnswer::Prepared => PREPARED,
            TargetAnswer::Refused(_) => REFUSED,
            TargetAnswer::Activated => ACTIVATED,
            TargetAnswer::ActivateFailed(_) => ACTIVATE_FAILED,
            TargetAnswer::Cancelled => return,
        });
    }

    fn apply(&mut self, change: &Change) -> CasReply {
        if self.record != change.expect {
            return CasReply::Lost(Some(self.record));
        }
        self.set_record(change.to, !change.reason.is_empty());
        CasReply::Won
    }

    fn set_record(&mut self, to: RecordView, reason: bool) {
        self.record = to;
        self.reason = reason;
        self.history.push(to);
    }

    fn nexts(&self) -> Vec<Next> {
        let mut nexts = Vec::new();
        if self.source_alive {
            self.source_nexts(&mut nexts);
        }
        if self.target_alive {
            self.target_nexts(&mut nexts);
        }
        self.cluster_nexts(&mut nexts);
        nexts
    }

    fn with(&self, nexts: &mut Vec<Next>, name: &str, fault: bool, change: impl FnOnce(&mut Self)) {
        let mut world = self.clone();
        change(&mut world);
        nexts.push((name.to_owned(), fault, world));
    }

    fn source_nexts(&self, nexts: &mut Vec<Next>) {
        let done = |world: &mut Self, event: Event| {
            world.source_todo = None;
            world.tell_source(event);
        };
        match self.source_todo.clone() {
            None => {}
            Some(Todo::Check) => {
                self.with(nexts, "checked", false, |world| done(world, Event::Checked(Vec::new())));
                let problems = vec![Problem::Volume("vol".to_owned())];
                self.with(nexts, "check fails", true, |world| done(world, Event::Checked(problems)));
            }
            Some(Todo::Cas(change)) => self.cas_nexts(nexts, "source", &change, |world, reply| {
                done(world, Event::Cas(reply));
            }),
            Some(Todo::Read) => {
                self.with(nexts, "source reads", false, |world| {
                    done(world, Event::Record(Some(world.record)));
                });
            }
            Some(Todo::Copy) => {
                // Without a target (a quick move has none yet), or when it was cancelled, it comes to nothing by itself.
                let reaches = !self.live || self.target_process == Process::Halted;
                let wanted = self.may_cancel;
                if reaches {
                    self.with(nexts, "copied", false, |world| done(world, Event::Copied));
                }
                self.with(nexts, "copying fails", reaches && wanted, |world| {
                    done(world, Event::CopyFailed("cut".to_owned()));
                });
            }
            Some(Todo::Save) => {
                // In a live move this is the target's word that it has everything.
                let can = !self.live || self.target_process == Process::Halted;
                if can {
                    self.with(nexts, "saved", false, |world| {
                        world.target_full = world.live;
                        done(world, Event::Saved(SaveFigures::default()));
                    });
                }
                self.with(nexts, "save fails", can, |world| {
                    done(world, Event::SaveFailed("disk".to_owned()));
                });
            }
            Some(Todo::Resume(epoch)) => {
                self.with(nexts, "resumed", false, |world| {
                    world.source_process = Process::Running(epoch);
                    world.ran(epoch, 1);
                    done(world, Event::Resumed);
                });
                self.with(nexts, "resume fails", true, |world| {
                    world.source_process = Process::None;
                    done(world, Event::ResumeFailed("ended".to_owned()));
                });
            }
            Some(Todo::Call) => {
                // Also what happens without a fault when the target is gone.
                let fault = self.target_alive;
                self.with(nexts, "no answer", fault, |world| {
                    done(world, Event::TargetLost("gone".to_owned()));
                });
            }
            Some(Todo::Load | Todo::Start) => unreachable!("the target's"),
        }
        for &answer in &self.answers {
            self.with(nexts, "answer arrives", false, |world| world.deliver_answer(answer));
        }
        if self.may_cancel {
            self.with(nexts, "user cancels", true, |world| {
                world.may_cancel = false;
                world.tell_source(Event::Cancel);
            });
        }
        self.with(nexts, "source node dies", true, |world| {
            if let Some(Todo::Cas(change)) = world.source_todo.take() {
                world.late.insert(change);
            }
            world.source_alive = false;
            world.source_process = Process::None;
        });
    }

    fn deliver_answer(&mut self, answer: u8) {
        let event = match answer {
            PREPARED => Event::Prepared,
            REFUSED => Event::Refused("no".to_owned()),
            ACTIVATED => Event::Activated,
            _ => Event::ActivateFailed("broken".to_owned()),
        };
        let before = self.source.clone();
        self.tell_source(event);
        if self.source != before && self.source_todo == Some(Todo::Call) {
            self.source_todo = None;
        }
    }

    fn target_nexts(&self, nexts: &mut Vec<Next>) {
        for &message in &self.messages {
            let event = match message {
                Message::Prepare => TargetEvent::Prepare,
                Message::Activate => TargetEvent::Activate,
                Message::Cancel => TargetEvent::Cancel,
            };
            self.with(nexts, &format!("{message:?} arrives"), false, |world| world.tell_target(event));
        }
        for todo in &self.target_todo {
            self.target_todo_nexts(nexts, todo);
        }
        if self.target.is_waiting() {
            self.with(nexts, "target looks", false, |world| world.tell_target(TargetEvent::Look));
        }
        if self.target_process == Process::Halted {
            self.with(nexts, "target process dies", true, |world| {
                world.target_process = Process::None;
                world.target_full = false;
                world.target_todo.remove(&Todo::Start);
                world.tell_target(TargetEvent::ProcessEnded("killed".to_owned()));
            });
        }
        self.with(nexts, "target node dies", true, |world| {
            for todo in std::mem::take(&mut world.target_todo) {
                if let Todo::Cas(change) = todo {
                    world.late.insert(change);
                }
            }
            world.target_alive = false;
            world.target_process = Process::None;
            world.restarted = None;
        });
    }

    fn target_todo_nexts(&self, nexts: &mut Vec<Next>, todo: &Todo) {
        let done = |world: &mut Self, event: TargetEvent| {
            world.target_todo.remove(todo);
            world.tell_target(event);
        };
        match todo {
            Todo::Load => {
                // What came over the network is gone with the process that had it.
                let gone = self.live && self.target.is_owned();
                if !gone {
                    self.with(nexts, "loaded", false, |world| {
                        world.target_process = Process::Halted;
                        world.target_full = !world.live;
                        done(world, TargetEvent::Loaded);
                    });
                }
                self.with(nexts, "load fails", !gone, |world| {
                    done(world, TargetEvent::LoadFailed("no".to_owned()));
                });
            }
            Todo::Start => {
                let full = self.target_full;
                if full {
                    self.with(nexts, "started", false, |world| {
                        world.target_process = Process::Running(EPOCH + 1);
                        world.ran(EPOCH + 1, 2);
                        done(world, TargetEvent::Started);
                    });
                }
                self.with(nexts, "start fails", full, |world| {
                    done(world, TargetEvent::StartFailed("no".to_owned()));
                });
            }
            Todo::Read => {
                for at in self.target_knows..self.history.len() {
                    let fault = at + 1 < self.history.len();
                    self.with(nexts, "target reads", fault, |world| {
                        world.target_knows = at;
                        done(world, TargetEvent::Record(Some(world.history[at])));
                    });
                }
            }
            Todo::Cas(change) => {
                self.cas_nexts(nexts, "target", change, |world, reply| done(world, TargetEvent::Cas(reply)));
            }
            other => unreachable!("{other:?} is the source's"),
        }
    }

    fn cas_nexts(
        &self,
        nexts: &mut Vec<Next>,
        who: &str,
        change: &Change,
        done: impl Fn(&mut Self, CasReply),
    ) {
        self.with(nexts, &format!("{who} cas"), false, |world| {
            let reply = world.apply(change);
            done(world, reply);
        });
        self.with(nexts, &format!("{who} cas applied, answer lost"), true, |world| {
            world.apply(change);
            done(world, CasReply::Unknown);
        });
        self.with(nexts, &format!("{who} cas late or never"), true, |world| {
            world.late.insert(change.clone());
            done(world, CasReply::Unknown);
        });
        if change.to.owner == DST && change.expect.owner == SRC && !self.target_alive {
            self.with(nexts, "commit refused", true, |world| {
                done(world, CasReply::Refused("node 2 is not up".to_owned()));
            });
        }
    }

    /// What the cluster does by itself, and what it still applies.
    fn cluster_nexts(&self, nexts: &mut Vec<Next>) {
        for change in &self.late {
            self.with(nexts, "late cas", true, |world| {
                world.late.remove(change);
                world.apply(change);
            });
        }
        let next = RecordView { epoch: self.record.epoch + 1, state: VmState::Failed, ..self.record };
        let dead = |node| (node == SRC && !self.source_alive) || (node == DST && !self.target_alive);
        if dead(self.record.owner) && self.record.state != VmState::Failed {
            self.with(nexts, "cluster gives the vm up", false, |world| world.set_record(next, true));
            if self.record.owner == SRC && self.target_alive {
                let here = RecordView { owner: DST, state: VmState::Running, ..next };
                self.with(nexts, "cluster restarts the vm", false, |world| {
                    world.set_record(here, false);
                    world.restarted = Some(here.epoch);
                    world.ran(here.epoch, 3);
                });
            }
        }
    }

    fn ran(&mut self, epoch: u64, who: u8) {
        if epoch == EPOCH + 1 {
            assert!(
                self.ran_next.is_none_or(|other| other == who),
                "two runners in epoch {epoch}: {self:#?}"
            );
            self.ran_next = Some(who);
        }
    }

    /// Which guests run, as (node, epoch).
    fn running(&self) -> Vec<(NodeId, u64)> {
        let on = |node, process| match process {
            Process::Running(epoch) => Some((node, epoch)),
            _ => None,
        };
        let both = [on(SRC, self.source_process), on(DST, self.target_process)];
        both.into_iter().flatten().chain(self.restarted.map(|epoch| (DST, epoch))).collect()
    }

    // Invariants H1, E5
    fn is_safe(&self) -> bool {
        match self.running()[..] {
            [] => true,
            [runner] => runner == (self.record.owner, self.record.epoch),
            _ => false,
        }
    }

    // Invariant H6
    fn is_good_end(&self) -> bool {
        let at_rest = !self.source_alive || self.source.ended();
        let stopped = self.record.state == VmState::Failed && self.reason;
        at_rest && (self.running().len() == 1 || stopped)
    }
}

/// All states that can be reached, how each was first reached, and who leads where without a fault.
struct Graph {
    worlds: Vec<World>,
    reached_by: Vec<(usize, String)>,
    /// For each state, the states that lead to it without a fault.
    before: Vec<Vec<usize>>,
}

impl Graph {
    fn explore(kind: &Kind) -> Self {
        let begin = World::new(kind.clone());
        let mut graph = Self {
            worlds: vec![begin.clone()],
            reached_by: vec![(0, "begin".to_owned())],
            before: vec![vec![]],
        };
        let mut known = HashMap::from([(begin, 0)]);
        let mut at = 0;
        while at < graph.worlds.len() {
            for (name, fault, next) in graph.worlds[at].nexts() {
                let to = *known.entry(next).or_insert_with_key(|next| {
                    graph.worlds.push(next.clone());
                    graph.reached_by.push((at, name));
                    graph.before.push(vec![]);
                    graph.worlds.len() - 1
                });
                if !fault {
                    graph.before[to].push(at);
                }
            }
            assert!(graph.worlds[at].is_safe(), "{}", graph.story(at));
            at += 1;
        }
        graph
    }

    /// The states from which a good end can be reached without a further fault.
    fn hopeful(&self) -> Vec<bool> {
        let mut hopeful: Vec<bool> = self.worlds.iter().map(World::is_good_end).collect();
        let mut todo: Vec<usize> = (0..hopeful.len()).filter(|at| hopeful[*at]).collect();
        while let Some(at) = todo.pop() {
            for &before in &self.before[at] {
                if !std::mem::replace(&mut hopeful[before], true) {
                    todo.push(before);
                }
            }
        }
        hopeful
    }

    fn story(&self, mut at: usize) -> String {
        let end = format!("{:#?}", self.worlds[at]);
        let mut steps = Vec::new();
        while at != 0 {
            let (before, name) = &self.reached_by[at];
            steps.push(name.clone());
            at = *before;
        }
        steps.reverse();
        format!("{}\n{end}", steps.join("\n"))
    }
}

fn quick() -> Kind {
    Kind::Quick { saved: "vol/web".to_owned() }
}

// Invariants H1, H6, E5
#[test]
fn whatever_fails_the_vm_runs_in_exactly_one_place_or_is_stopped_with_a_reason() {
    for kind in [quick(), Kind::Live] {
        let graph = Graph::explore(&kind);
        let hopeful = graph.hopeful();
        if let Some(at) = hopeful.iter().position(|hopeful| !hopeful) {
            panic!("no good end from here in a {} move:\n{}", kind.name(), graph.story(at));
        }
        let states = graph.worlds.len();
        assert!(states > 10_000, "only {states} states: the model has lost its faults");
    }
}

#[test]
fn without_a_fault_the_vm_runs_at_the_target_and_the_report_says_so() {
    for kind in [quick(), Kind::Live] {
        let mut world = World::new(kind);
        for _ in 0..100 {
            let next = world.nexts().into_iter().find(|(_, fault, next)| !fault && *next != world);
            let Some((_, _, next)) = next else { break };
            world = next;
        }
        assert_eq!(world.running(), [(DST, EPOCH + 1)]);
        assert!(world.source.ended());
        assert_eq!(world.record, RecordView { owner: DST, epoch: EPOCH + 1, state: VmState::Running });
    }
}
