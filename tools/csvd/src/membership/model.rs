//! Every way that ownership can go, with faults at any moment, explored to a bound.
//!
//! The world is the cluster's records (the real `ClusterState`, changed by the real commands), what each node has heard of
//! them, the proposals that are under way, and the processes. The verdicts of what follows from the records (`heirs`, `view`)
//! are the real ones too. From each state all of these can happen next, in every order: a proposal is applied, is lost, or is
//! applied although its proposer has given it up or is dead; a node hears of the records, or not yet; a node is killed, freezes,
//! wakes, starts again; a living node is taken for dead (whatever the failure detector may see, it can err no worse); a fence
//! succeeds or fails; a coordinator cannot be opened; the coordinator is moved; a VM is handed over.
//!
//! A volume and a VM have nothing to do with each other but the members they share, so each is explored in a world of its own:
//! both in one would be the product of the two, and nothing more would be seen.
//!
//! Judged in every state, for processes that have not ended, frozen ones among them:
//! - at most one coordinator is open, and never one of a lower term than the LUN has seen (A1, D5);
//! - at most one guest runs, in the epoch that the record has or had (E5, H1);
//! - what is fenced has ended (A4), and no two incarnations of a node have one epoch (A3).
//!
//! And from every state the good end stays in reach without further faults: a living node serves the volume, and the VM
//! runs in one place or says why not (H6).
//!
//! `stateright` was not taken: "from every state a good end stays in reach" is none of the properties that it can judge, and
//! it is the one that has found the most here.
//!
//! Raft is taken at its word: the records are one sequence of changes. What it does with its messages is not modelled.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use lockmgr::cluster::{
    ClusterState, Command, FenceKind, Member, MemberState, VmRecord, VmState, VolumeRecord, VolumeState,
};
use lockmgr::{ClusterId, Epoch, NodeId, Term, VolumeId};
use uuid::Uuid;

use super::heirs;
use crate::view;
use crate::vms::{has_arrived, lost, lost_with_last_epoch};

/// A number of records or of a command in [`Space`].
type Id = u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Life {
    Off,
    Frozen,
    Alive,
}

/// A node's process, with what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Node {
    life: Life,
    /// 0 until it has joined.
    epoch: u64,
    /// The records that it knows.
    view: Id,
    /// The term of the coordinator that is open here; 0 for none.
    serves: u64,
    renounced: u64,
    /// The epoch of the guest that runs here; 0 for none.
    guest: u64,
    /// The epoch of a guest that was halted to be handed over.
    halted: u64,
    /// The epoch that was asked for, to start the guest in.
    starts: u64,
    /// Whether it has recorded what was lost with its former incarnation.
    adopted: bool,
}

impl Node {
    /// A process that ended.
    fn off(view: Id) -> Self {
        Self {
            life: Life::Off,
            epoch: 0,
            view,
            serves: 0,
            renounced: 0,
            guest: 0,
            halted: 0,
            starts: 0,
            adopted: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Proposal {
    /// Whether the proposer waits for its end.
    awaited: bool,
    node: NodeId,
    epoch: u64,
    command: Id,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    records: Id,
    nodes: Vec<Node>,
    /// Proposals under way.
    pending: BTreeSet<Proposal>,
    /// The term in the LUN's owner block.
    lun_term: u64,
    faults_left: u8,
    moves_left: u8,
}

/// All records and commands that occur, each once.
#[derive(Default)]
struct Space {
    records: Vec<Arc<ClusterState>>,
    record_ids: HashMap<String, Id>,
    commands: Vec<Command>,
    command_ids: HashMap<String, Id>,
    /// What records become by a command, `None` when it is refused.
    outcomes: HashMap<(Id, Proposal), Option<Id>>,
    /// What records ask for.
    wishes: HashMap<Id, Vec<Id>>,
}

impl Space {
    fn record(&mut self, mut state: ClusterState) -> Id {
        // The timeline is for people; it would make every state another one.
        state.events.clear();
        state.applied = 0;
        let members: Vec<_> = state.members.values().map(|it| (it.epoch, it.state)).collect();
        let key = format!("{members:?} {:?} {:?}", state.volumes, state.vms);
        let next = Id::try_from(self.records.len()).expect("a small space");
        let id = *self.record_ids.entry(key).or_insert(next);
        if id == next {
            self.records.push(Arc::new(state));
        }
        id
    }

    fn command(&mut self, command: Command) -> Id {
        let next = Id::try_from(self.commands.len()).expect("a small space");
        let id = *self.command_ids.entry(format!("{command:?}")).or_insert(next);
        if id == next {
            self.commands.push(command);
        }
        id
    }

    fn records(&self, id: Id) -> Arc<ClusterState> {
        Arc::clone(&self.records[id as usize])
    }

    fn after(&mut self, records: Id, proposal: Proposal) -> Option<Id> {
        if let Some(known) = self.outcomes.get(&(records, proposal)) {
            return *known;
        }
        let command = self.commands[proposal.command as usize].clone();
        let after = self.records(records).after(command, (proposal.node, Epoch(proposal.epoch)));
        let after = after.ok().map(|after| self.record(after));
        self.outcomes.insert((records, proposal), after);
        after
    }

    fn wishes(&mut self, records: Id) -> Vec<Id> {
        if let Some(known) = self.wishes.get(&records) {
            return known.clone();
        }
        let commands = heirs::appoint(&self.records(records), true);
        let wishes: Vec<_> = commands.into_iter().map(|command| self.command(command)).collect();
        self.wishes.insert(records, wishes.clone());
        wishes
    }
}

fn volume(state: &ClusterState) -> Option<&VolumeRecord> {
    state.volumes.get("vol1")
}

fn vm(state: &ClusterState) -> Option<&VmRecord> {
    state.vms.get("web")
}

/// What there is in a world, on the first node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Of {
    AVolume,
    AVm,
}

fn number(index: usize) -> NodeId {
    NodeId(u16::try_from(index + 1).expect("few nodes"))
}

fn index_of(node: NodeId) -> usize {
    usize::from(node.0) - 1
}

/// All nodes are up, the first one serves the volume or runs the VM.
fn start(space: &mut Space, of: Of, nodes: usize, faults: u8, moves: u8) -> World {
    let mut state = ClusterState { cluster: Some(ClusterId(Uuid::nil())), ..ClusterState::default() };
    for id in (0..nodes).map(number) {
        let (name, epoch) = (format!("n{id}"), Epoch(1));
        let address = String::new();
        let member = Member { id, name, address, epoch, state: MemberState::Up, joined_ms: 0 };
        state.members.insert(id, member);
    }
    let owned = VolumeRecord {
        name: "vol1".into(),
        id: VolumeId(Uuid::nil()),
        lun_uri: String::new(),
        owner: NodeId(1),
        owner_epoch: Epoch(1),
        term: Term(1),
        fence_kind: FenceKind::Agent,
        state: VolumeState::Online,
        reason: String::new(),
    };

    let run = VmRecord {
        name: "web".into(),
        id: Uuid::nil(),
        owner: NodeId(1),
        epoch: 1,
        state: VmState::Running,
        peer: None,
        spec: Vec::new().into(),
        saved: None,
        reason: String::new(),
        restarts_left: 0,
    };
    match of {
        Of::AVolume => drop(state.volumes.insert("vol1".into(), owned)),
        Of::AVm => drop(state.vms.insert("web".into(), run)),
    }
    let records = space.record(state);
    let mut idle = Node { life: Life::Alive, epoch: 1, adopted: true, ..Node::off(records) };
    let others = vec![idle; nodes - 1];
    match of {
        Of::AVolume => idle.serves = 1,
        Of::AVm => idle.guest = 1,
    }
    let nodes = [vec![idle], others].concat();
    World { records, nodes, pending: BTreeSet::new(), lun_term: 1, faults_left: faults, moves_left: moves }
}

/// What a confirmed fence has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fence {
    Ends,
    /// A broken one.
    OnlySaysSo,
}

/// What can happen next: whether it is a fault, and the world after it.
struct Steps<'a> {
    fence: Fence,
    space: &'a mut Space,
    from: &'a World,
    found: Vec<(bool, World)>,
}

impl Steps<'_> {
    fn all(mut self) -> Vec<(bool, World)> {
        for &proposal in &self.from.pending {
            self.arrive(proposal);
        }
        for index in 0..self.from.nodes.len() {
            match self.from.nodes[index].life {
                Life::Off => self.free(|world| world.nodes[index].life = Life::Alive),
                Life::Frozen => {
                    self.free(|world| world.nodes[index].life = Life::Alive);
                    self.fault(|world| end(world, index));
                }
                Life::Alive => {
                    self.fault(|world| world.nodes[index].life = Life::Frozen);
                    self.fault(|world| end(world, index));
                    self.act(index);
                }
            }
        }
        self.found
    }

    fn free(&mut self, change: impl FnOnce(&mut World)) {
        let mut world = self.from.clone();
        change(&mut world);
        if world != *self.from {
            self.found.push((false, world));
        }
    }

    fn fault(&mut self, change: impl FnOnce(&mut World)) {
        if self.from.faults_left > 0 {
            let mut world = self.from.clone();
            world.faults_left -= 1;
            change(&mut world);
            self.found.push((true, world));
        }
    }

    /// A proposal is applied, or lost, or outlives its proposer's patience.
    fn arrive(&mut self, proposal: Proposal) {
        let after = self.space.after(self.from.records, proposal);
        let command = self.space.commands[proposal.command as usize].clone();
        self.free(|world| {
            world.pending.remove(&proposal);
            if let Some(after) = after {
                world.records = after;
            }
            if proposal.awaited {
                answered(&mut world.nodes[index_of(proposal.node)], &command, after);
            }
        });
        // Losing it costs nothing: whoever still wants it says it again.
        self.free(|world| {
            world.pending.remove(&proposal);
        });
        if self.from.pending.iter().all(|it| it.awaited) {
            self.fault(|world| {
                world.pending.remove(&proposal);
                world.pending.insert(Proposal { awaited: false, ..proposal });
            });
        }
    }

    /// What a living node does by itself.
    fn act(&mut self, index: usize) {
        let (me, node) = (number(index), self.from.nodes[index]);
        let state = self.space.records(node.view);
        self.free(|world| world.nodes[index].view = world.records);
        if node.epoch == 0 {
            let expect = state.members[&me].epoch;
            return self.propose(index, Command::BeginEpoch { node: me, expect });
        }
        if view::is_over(&state, me, Epoch(node.epoch)) {
            // It begins anew: all that it held ends with the process.
            return self.free(|world| {
                end(world, index);
                world.nodes[index].life = Life::Alive;
            });
        }
        self.judge(index, &state);
        if !node.adopted {
            return self.adopt(index);
        }
        for wish in self.space.wishes(node.view) {
            self.propose_known(false, index, wish, |_| {});
        }
        if let Some(record) = volume(&state) {
            self.host(index, &state, record);
        }
        if let Some(record) = vm(&state) {
            self.guest(index, &state, record);
        }
    }

    /// Records what was lost with the former incarnation, before anything else; the records are read as they are now.
    fn adopt(&mut self, index: usize) {
        let present = self.space.records(self.from.records);
        let lost = lost_with_last_epoch(&present, number(index), "n");
        if lost.is_empty() {
            return self.free(|world| world.nodes[index].adopted = true);
        }
        for command in lost {
            self.propose(index, command);
        }
    }

    /// Verdicts and fences of this node over the others.
    fn judge(&mut self, index: usize, state: &ClusterState) {
        for (other, member) in state.members.values().enumerate().filter(|(other, _)| *other != index) {
            let (node, epoch) = (member.id, member.epoch);
            let mark = |state| Command::MarkNode { node, epoch, state };
            match member.state {
                MemberState::Up => {
                    let it = self.from.nodes[other];
                    let wrong = it.life == Life::Alive && it.epoch == epoch.0;
                    self.propose_if(wrong, index, mark(MemberState::Fencing), |_| {});
                }
                MemberState::Fencing | MemberState::FenceFailed => {
                    // Whatever process the node has is ended. One of a later incarnation, or one that asks for it just now, by a
                    // fencer that was late, is a fault: else there would be no end of incarnations.
                    let it = self.from.nodes[other];
                    let late = it.epoch > epoch.0 || it.epoch == 0 && self.waits(other);
                    let fence = self.fence;
                    self.propose_if(late, index, mark(MemberState::Fenced), |world| {
                        if fence == Fence::Ends {
                            end(world, other);
                        }
                    });
                    if member.state == MemberState::Fencing {
                        self.propose_if(true, index, mark(MemberState::FenceFailed), |_| {});
                    }
                }
                MemberState::Down | MemberState::Fenced => {}
            }
        }
    }

    /// The volume's coordinator on this node.
    fn host(&mut self, index: usize, state: &ClusterState, record: &VolumeRecord) {
        let (me, node) = (number(index), self.from.nodes[index]);
        let mine = record.owner == me && record.owner_epoch.0 == node.epoch;
        let term = record.term.0;
        let report = |state| Command::SetVolumeState {
            name: "vol1".into(),
            expect_term: Term(term),
            state,
            reason: String::new(),
        };
        let appoint = |to: NodeId, to_epoch| Command::MoveVolume {
            name: "vol1".into(),
            expect_term: Term(term),
            to,
            to_epoch,
        };
        if node.serves > 0 && !(mine && node.serves == term) {
            return self.free(|world| world.nodes[index].serves = 0);
        }
        if !mine {
            return;
        }
        if node.serves == 0 && term <= node.renounced {
            if record.state != VolumeState::Failed {
                self.propose(index, appoint(me, Epoch(node.epoch)));
            }
        } else if node.serves == 0 {
            let failed = |world: &mut World| world.nodes[index].renounced = term;
            // A higher term on the LUN: somebody else was appointed since.
            if self.from.lun_term > term {
                return self.propose_if(false, index, report(VolumeState::Failed), failed);
            }
            self.propose_if(true, index, report(VolumeState::Failed), failed);
            self.free(|world| {
                world.lun_term = term;
                world.nodes[index].serves = term;
            });
        } else {
            if record.state != VolumeState::Online {
                self.propose(index, report(VolumeState::Online));
            }
            let up = state.members.values().filter(|it| it.state == MemberState::Up && it.id != me);
            for to in up.filter(|_| self.from.moves_left > 0).map(|it| (it.id, it.epoch)).collect::<Vec<_>>()
            {
                self.propose_if(false, index, appoint(to.0, to.1), |world| {
                    world.moves_left -= 1;
                    world.nodes[index].serves = 0;
                    world.nodes[index].renounced = term;
                });
            }
        }
    }

    /// The VM on this node.
    fn guest(&mut self, index: usize, state: &ClusterState, record: &VmRecord) {
        let (me, node) = (number(index), self.from.nodes[index]);
        if record.owner != me {
            return;
        }
        if record.state == VmState::Failed && record.restarts_left > 0 && node.guest == 0 {
            let start = record.update(|to| {
                to.state = VmState::Starting;
                to.epoch += 1;
                to.reason = String::new();
                to.restarts_left = 0;
            });
            let epoch = record.epoch + 1;
            self.propose_if(false, index, start, |world| world.nodes[index].starts = epoch);
        }
        let may_run = matches!(record.state, VmState::Starting | VmState::Running);
        if may_run && node.starts == record.epoch && node.guest == 0 {
            // Also when the answer was lost: the record is read until it is certain.
            return self.free(|world| {
                let node = &mut world.nodes[index];
                (node.guest, node.starts, node.halted) = (record.epoch, 0, 0);
            });
        }
        let ran = |to: &mut VmRecord| to.state = VmState::Running;
        let begun = matches!(record.state, VmState::Starting | VmState::Saved);
        if begun && node.guest == record.epoch {
            self.propose(index, record.update(ran));
        }
        if record.state == VmState::Saved
            && record.saved.is_none()
            && node.guest == 0
            && node.halted == record.epoch
        {
            // It has arrived, with its memory: the commit was seen.
            self.free(|world| {
                world.nodes[index].guest = record.epoch;
                world.nodes[index].halted = 0;
            });
        }
        if has_arrived(record) && node.guest == 0 && node.halted != record.epoch {
            // It was committed to a former incarnation, which had its memory.
            self.propose(index, lost(record, "its memory was lost".into()));
        }
        if record.state == VmState::Running && node.guest == record.epoch && self.from.moves_left > 0 {
            self.hand_over(index, state, record);
        }
        if record.state == VmState::Running && node.guest == 0 && node.halted == record.epoch {
            // The commit's outcome is not known: the next epoch is asked for, which that commit cannot pass.
            let (resume, epoch) = (record.update(|to| to.epoch += 1), record.epoch + 1);
            self.propose_if(false, index, resume, |world| world.nodes[index].starts = epoch);
        }
    }

    fn hand_over(&mut self, index: usize, state: &ClusterState, record: &VmRecord) {
        let me = number(index);
        let up =
            state.members.values().enumerate().filter(|(_, it)| it.state == MemberState::Up && it.id != me);
        for (other, to) in up.map(|(other, it)| (other, it.id)).collect::<Vec<_>>() {
            if self.from.nodes[other].life != Life::Alive || !self.from.nodes[other].adopted {
                continue;
            }
            let commit = record.update(|vm| {
                vm.owner = to;
                vm.epoch += 1;
                vm.state = VmState::Saved;
            });
            let epoch = record.epoch;
            self.propose_if(false, index, commit, |world| {
                world.moves_left -= 1;
                world.nodes[index].guest = 0;
                world.nodes[index].halted = epoch;
                // Its memory waits there.
                world.nodes[other].halted = epoch + 1;
            });
        }
    }

    fn propose(&mut self, index: usize, command: Command) {
        self.propose_if(false, index, command, |_| {});
    }

    /// Proposes unless the node waits for another proposal of its own.
    fn propose_if(&mut self, fault: bool, index: usize, command: Command, with: impl FnOnce(&mut World)) {
        if !self.waits(index) {
            let command = self.space.command(command);
            self.propose_known(fault, index, command, with);
        }
    }

    fn waits(&self, index: usize) -> bool {
        self.from.pending.iter().any(|it| it.awaited && it.node == number(index))
    }

    fn propose_known(&mut self, fault: bool, index: usize, command: Id, with: impl FnOnce(&mut World)) {
        if self.waits(index) {
            return;
        }
        let (node, epoch) = (number(index), self.from.nodes[index].epoch);
        let proposal = Proposal { awaited: true, node, epoch, command };
        let change = |world: &mut World| {
            with(world);
            world.pending.insert(proposal);
        };
        if fault { self.fault(change) } else { self.free(change) }
    }
}

/// A process ends with all that it held. Its proposals may still arrive.
fn end(world: &mut World, index: usize) {
    world.nodes[index] = Node::off(world.nodes[index].view);
    let orphaned = |it: Proposal| Proposal { awaited: it.awaited && it.node != number(index), ..it };
    world.pending = world.pending.iter().copied().map(orphaned).collect();
}

/// A proposer hears what became of its proposal.
fn answered(node: &mut Node, command: &Command, after: Option<Id>) {
    let Some(after) = after else { return };
    node.view = after;
    if let Command::BeginEpoch { expect, .. } = command {
        node.epoch = expect.0 + 1;
    }
}

fn judge(space: &Space, world: &World) -> Result<(), &'static str> {
    let state = space.records(world.records);
    let present = || world.nodes.iter().filter(|node| node.life != Life::Off);
    let check = |holds: bool, what| if holds { Ok(()) } else { Err(what) };
    check(present().filter(|node| node.serves > 0).count() <= 1, "two coordinators are open")?;
    check(
        present().all(|node| node.serves == 0 || node.serves == world.lun_term),
        "a term is served that is over",
    )?;
    check(present().filter(|node| node.guest > 0).count() <= 1, "two guests run")?;
    check(
        present().all(|node| vm(&state).is_none_or(|vm| node.guest <= vm.epoch)),
        "a guest runs in an epoch that was never given",
    )?;
    for (node, member) in world.nodes.iter().zip(state.members.values()) {
        check(
            node.life == Life::Off || node.epoch <= member.epoch.0,
            "a node has an epoch that was never given",
        )?;
        let same = node.life != Life::Off && node.epoch == member.epoch.0;
        check(!(same && member.state == MemberState::Fenced), "a fenced incarnation is there")?;
    }
    Ok(())
}

/// The volume is served by who the records name, and the VM runs where they say or has failed for good.
fn is_good(space: &Space, world: &World) -> bool {
    let state = space.records(world.records);
    let at = |node: NodeId| &world.nodes[index_of(node)];
    let served = volume(&state).is_none_or(|volume| {
        at(volume.owner).life == Life::Alive && at(volume.owner).serves == volume.term.0
    });
    let runs_or_told = vm(&state).is_none_or(|vm| {
        let owner = at(vm.owner);
        let runs = owner.life == Life::Alive && owner.guest == vm.epoch && vm.state == VmState::Running;
        runs || vm.state == VmState::Failed && vm.restarts_left == 0 && !vm.reason.is_empty()
    });
    served && runs_or_told
}

/// Explores everything, and gives the number of states.
///
/// # Errors
/// How the first bad state came about, or one from which no good end is in reach.
fn explore(of: Of, nodes: usize, faults: u8, moves: u8, fence: Fence) -> Result<usize, String> {
    let mut space = Space::default();
    let first = start(&mut space, of, nodes, faults, moves);
    let mut ids = HashMap::from([(first.clone(), 0_usize)]);
    let (mut worlds, mut came_from) = (vec![first], vec![0]);
    // For each state, those that lead to it without a fault.
    let mut back: Vec<Vec<usize>> = vec![Vec::new()];
    let mut queue = VecDeque::from([0]);
    while let Some(at) = queue.pop_front() {
        let from = worlds[at].clone();
        if let Err(what) = judge(&space, &from) {
            return Err(format!("{what}:\n{}", story(&space, &worlds, &came_from, at)));
        }
        for (fault, world) in (Steps { fence, space: &mut space, from: &from, found: Vec::new() }).all() {
            let next = worlds.len();
            let id = *ids.entry(world.clone()).or_insert(next);
            if id == next {
                worlds.push(world);
                came_from.push(at);
                back.push(Vec::new());
                queue.push_back(id);
            }
            if !fault {
                back[id].push(at);
            }
        }
    }
    let mut reaches: Vec<bool> = worlds.iter().map(|world| is_good(&space, world)).collect();
    let mut queue: VecDeque<_> = (0..worlds.len()).filter(|id| reaches[*id]).collect();
    while let Some(id) = queue.pop_front() {
        for &before in &back[id] {
            if !std::mem::replace(&mut reaches[before], true) {
                queue.push_back(before);
            }
        }
    }
    if let Some(stuck) = reaches.iter().position(|good| !good) {
        return Err(format!("no good end is in reach:\n{}", story(&space, &worlds, &came_from, stuck)));
    }
    Ok(worlds.len())
}

/// How a state came about.
fn story(space: &Space, worlds: &[World], came_from: &[usize], at: usize) -> String {
    let mut steps = vec![at];
    while let Some(&last) = steps.last().filter(|last| **last != 0) {
        steps.push(came_from[last]);
    }
    let told = steps.iter().rev().map(|step| {
        let world = &worlds[*step];
        let state = space.records(world.records);
        let members: Vec<_> = state.members.values().map(|it| (it.epoch.0, it.state)).collect();
        let pending: Vec<_> =
            world.pending.iter().map(|it| (it, &space.commands[it.command as usize])).collect();
        let (volume, vm) = (volume(&state), vm(&state));
        format!("members {members:?} {volume:?} {vm:?}\n   {:?}\n   {pending:?}\n", world.nodes)
    });
    told.collect()
}

/// Explores to the end, and fails with the story of the first bad state.
fn check(of: Of, nodes: usize, faults: u8, moves: u8) {
    let states = explore(of, nodes, faults, moves, Fence::Ends).unwrap_or_else(|story| panic!("{story}"));
    assert!(states > 100, "too few states: {states}");
}

// Invariants A1, A3, A4 and D5
#[test]
fn whatever_fails_a_volume_has_one_coordinator_and_gets_one_again() {
    check(Of::AVolume, 2, 1, 1);
    check(Of::AVolume, 3, 1, 0);
}

// Invariants A3, A4, E5, H1 and H6
#[test]
fn whatever_fails_a_vm_runs_once_and_runs_again_or_says_why_not() {
    check(Of::AVm, 2, 1, 1);
    check(Of::AVm, 3, 1, 0);
}

#[test]
#[ignore = "explores for minutes: cargo test --release -p csvd --bin csvd model -- --ignored"]
fn two_faults_and_three_nodes_change_nothing_of_that() {
    for of in [Of::AVolume, Of::AVm] {
        check(of, 2, 2, 1);
        check(of, 3, 1, 1);
        check(of, 3, 2, 0);
    }
}

// The exploration sees what it is there to see.
#[test]
fn a_fence_that_ends_nobody_is_seen() {
    let seen = |of| explore(of, 2, 1, 0, Fence::OnlySaysSo).expect_err("seen");
    assert!(seen(Of::AVolume).contains("a fenced incarnation is there"));
    assert!(seen(Of::AVm).contains("a fenced incarnation is there"));
}
