//! Nodes that are being emptied, are empty, or take back what was theirs: the record of a drain, and its changes. Pure.
//!
//! ```text
//!   (none) --drain--> Draining --nothing is left--> Drained --resume--> Resuming --all is back--> (none)
//!                         '------------------- resume -----------------------^
//! ```
//! The record names what the node had, before any of it moves: whoever goes on after a crash knows what is left to do, and
//! what a resume brings back (G1). Each change expects the step that it has read, so of two that act one wins.
//!
//! **Invariant:** a node that is drained or being drained is given nothing, and it is `Drained` only when it has nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::apply::{Applied, Line, Position, conflict, invalid};
use super::command::{Given, Rejection, VMS_MAX, VOLUMES_MAX};
use super::records::{ClusterState, MemberState, VmRecord, VmState};
use crate::NodeId;

/// Reasons of what cannot be moved; more are not told.
pub const STUCK_MAX: usize = 64;

/// What a drain has come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drain {
    /// Position in the log of the last change: no two changes have the same.
    pub step: u64,
    /// How far it is.
    pub phase: DrainPhase,
    /// The node is forgotten when it is empty and has ended.
    pub for_good: bool,
    /// Volumes that it coordinated.
    pub volumes: BTreeSet<String>,
    /// VMs that ran on it.
    pub vms: BTreeSet<String>,
    /// What cannot be moved now, and why. For people.
    pub stuck: BTreeMap<String, String>,
}

/// How far a drain is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DrainPhase {
    /// What the node has moves away.
    Draining,
    /// It has nothing.
    Drained,
    /// What it had comes back.
    Resuming,
}

impl fmt::Display for DrainPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Resuming => "resuming",
        })
    }
}

impl ClusterState {
    /// Whether a node is being emptied or is empty: nothing is placed on it.
    #[must_use]
    pub fn is_closed(&self, node: NodeId) -> bool {
        self.drains.get(&node).is_some_and(|drain| drain.phase != DrainPhase::Resuming)
    }

    /// Whether a node that leaves for good has nothing and has ended: it votes no more, and is to be forgotten.
    #[must_use]
    pub fn is_leaving(&self, node: NodeId) -> bool {
        let empty = |drain: &Drain| drain.for_good && drain.phase == DrainPhase::Drained;
        let down = |member: &super::Member| member.state == MemberState::Down;
        self.drains.get(&node).is_some_and(empty) && self.members.get(&node).is_some_and(down)
    }

    /// The members that are up and may be given something.
    pub fn open_members(&self) -> impl Iterator<Item = &super::Member> {
        self.serving().filter(|member| !self.is_closed(member.id))
    }

    /// Whether a VM is at home on a node in more than name: it runs there, or is about to.
    #[must_use]
    pub fn is_active(vm: &VmRecord) -> bool {
        let arrived = vm.state == VmState::Saved && vm.saved.is_none();
        arrived || !matches!(vm.state, VmState::Stopped | VmState::Failed | VmState::Saved)
    }

    pub(super) fn set_drain(
        &mut self,
        node: NodeId,
        expect_step: u64,
        to: Option<Drain>,
        at: Position,
    ) -> Applied {
        let subject = self.member(node)?.name.clone();
        let found = self.drains.get(&node).map_or(0, |drain| drain.step);
        if found != expect_step {
            return Err(conflict(format!("drain of node {subject}"), expect_step, found));
        }
        let Some(to) = to else {
            self.drains.remove(&node);
            let text = format!("node {subject} takes part as before");
            return Ok((Given::Nothing, Line { kind: "node.resumed", subject, text }));
        };
        if to.phase == DrainPhase::Drained {
            self.check_empty(node)?;
        }
        let line = Line { kind: kind(&to), text: told(&subject, &to), subject };
        self.drains.insert(node, Drain { step: at.index, ..to });
        Ok((Given::Nothing, line))
    }

    fn check_empty(&self, node: NodeId) -> Result<(), Rejection> {
        if let Some(volume) = self.volumes.values().find(|volume| volume.owner == node) {
            return Err(conflict(format!("coordinator of volume {}", volume.name), "another node", node));
        }
        if let Some(vm) = self.vms.values().find(|vm| vm.owner == node && Self::is_active(vm)) {
            return Err(conflict(format!("node of vm {}", vm.name), "another node", node));
        }
        Ok(())
    }

    /// A coordinator may come to a node that is drained only when no other node is left to serve the volume.
    pub(super) fn check_may_coordinate(&self, node: NodeId) -> Result<(), Rejection> {
        if self.is_closed(node) && self.open_members().next().is_some() {
            return Err(self.closed(node));
        }
        Ok(())
    }

    /// A VM comes to a node, or begins to run there. One that is saved may just have come by a quick move, and goes on.
    pub(super) fn check_may_run(&self, old: &VmRecord, new: &VmRecord) -> Result<(), Rejection> {
        let starts = matches!(old.state, VmState::Stopped | VmState::Failed) && Self::is_active(new);
        let comes = new.owner != old.owner || starts;
        if comes && self.is_closed(new.owner) {
            return Err(self.closed(new.owner));
        }
        Ok(())
    }

    fn closed(&self, node: NodeId) -> Rejection {
        let name = self.members.get(&node).map_or_else(|| node.to_string(), |member| member.name.clone());
        let phase = self.drains.get(&node).map_or(DrainPhase::Draining, |drain| drain.phase);
        conflict(format!("node {name}"), "one that is not drained", phase)
    }
}

pub(super) fn check_size(drain: &Drain) -> Result<(), Rejection> {
    let fits = drain.volumes.len() <= VOLUMES_MAX && drain.vms.len() <= VMS_MAX;
    if !fits || drain.stuck.len() > STUCK_MAX {
        return Err(invalid("a drain names more than a cluster can have".to_owned()));
    }
    drain.volumes.iter().chain(&drain.vms).try_for_each(|name| super::apply::check_name("drained", name))?;
    drain
        .stuck
        .iter()
        .flat_map(|(what, why)| [what, why])
        .try_for_each(|text| super::apply::check_text("reason", text))
}

fn kind(to: &Drain) -> &'static str {
    match to.phase {
        DrainPhase::Draining => "node.draining",
        DrainPhase::Drained => "node.drained",
        DrainPhase::Resuming => "node.resuming",
    }
}

fn told(name: &str, to: &Drain) -> String {
    let why: Vec<_> = to.stuck.iter().map(|(what, why)| format!("{what}: {why}")).collect();
    let (volumes, vms) = (to.volumes.len(), to.vms.len());
    match (to.phase, why.is_empty()) {
        (DrainPhase::Draining, true) => {
            let then = if to.for_good { ", then it leaves the cluster" } else { "" };
            format!("node {name} is given nothing more; {volumes} coordinators and {vms} VMs move away{then}")
        }
        (DrainPhase::Draining, false) => format!("node {name} cannot be emptied yet: {}", why.join("; ")),
        (DrainPhase::Drained, _) => format!("node {name} is drained: it has no coordinator and no VM"),
        (DrainPhase::Resuming, true) => {
            format!("node {name} takes part again; {volumes} coordinators and {vms} VMs come back to it")
        }
        (DrainPhase::Resuming, false) => {
            format!("node {name} does not get everything back: {}", why.join("; "))
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use uuid::Uuid;

    use super::*;
    use crate::cluster::command::Command;
    use crate::cluster::records::FenceKind;
    use crate::{ClusterId, Epoch, Term, VolumeId};

    struct Log {
        state: ClusterState,
        index: u64,
    }

    impl Log {
        /// Two nodes that are up; the first one has a volume and a VM that runs.
        fn new() -> Self {
            let mut log = Self { state: ClusterState::default(), index: 0 };
            let members = (1..3).map(|id| (NodeId(id), format!("n{id}"), format!("h{id}:1"))).collect();
            let cluster = ClusterId(Uuid::nil());
            log.must(Command::CreateCluster { cluster, name: "c".into(), members });
            for id in 1..3 {
                log.must(Command::BeginEpoch { node: NodeId(id), expect: Epoch(0) });
            }
            log.must(Command::CreateVolume {
                name: "vol1".into(),
                id: VolumeId(Uuid::nil()),
                lun_uri: "file:/lun".into(),
                owner: NodeId(1),
                owner_epoch: Epoch(1),
                fence_kind: FenceKind::Agent,
            });
            let spec = Bytes::new();
            log.must(Command::CreateVm { name: "web".into(), id: Uuid::nil(), owner: NodeId(1), spec });
            log.vm(|vm| vm.state = VmState::Running).expect("runs");
            log
        }

        fn apply(&mut self, command: Command) -> Result<Given, Rejection> {
            self.index += 1;
            self.state
                .apply(command, Position { index: self.index, node: NodeId(1), epoch: Epoch(0), at_ms: 0 })
        }

        fn must(&mut self, command: Command) {
            self.apply(command).expect("applied");
        }

        fn vm(&mut self, change: impl FnOnce(&mut VmRecord)) -> Result<Given, Rejection> {
            let command = self.state.vms["web"].update(change);
            self.apply(command)
        }

        fn drain(&mut self, phase: DrainPhase) -> Result<Given, Rejection> {
            let now = self.state.drains.get(&NodeId(1)).cloned();
            let to = Drain {
                step: 0,
                phase,
                for_good: false,
                volumes: ["vol1".to_owned()].into(),
                vms: ["web".to_owned()].into(),
                stuck: BTreeMap::new(),
            };
            let expect_step = now.map_or(0, |drain| drain.step);
            self.apply(Command::SetDrain { node: NodeId(1), expect_step, to: Some(to) })
        }

        fn move_volume(&mut self, to: u16) -> Result<Given, Rejection> {
            let (to, expect_term) = (NodeId(to), self.state.volumes["vol1"].term);
            self.apply(Command::MoveVolume { name: "vol1".into(), expect_term, to, to_epoch: Epoch(1) })
        }
    }

    // Invariant G1: what the record says is so, whoever wrote it and however often it was tried.
    #[test]
    fn a_node_is_drained_only_when_it_has_nothing_and_is_given_nothing_then() {
        let mut log = Log::new();
        log.drain(DrainPhase::Draining).expect("begins");
        log.drain(DrainPhase::Drained).expect_err("it has a volume and a VM");
        log.move_volume(2).expect("moves away");
        log.drain(DrainPhase::Drained).expect_err("it has a VM");
        log.vm(|vm| (vm.owner, vm.epoch) = (NodeId(2), vm.epoch + 1)).expect("moves away");
        log.drain(DrainPhase::Drained).expect("empty");
        log.move_volume(1).expect_err("nothing is placed there");
        log.vm(|vm| (vm.owner, vm.epoch) = (NodeId(1), vm.epoch + 1)).expect_err("nothing is placed there");
        log.drain(DrainPhase::Resuming).expect("takes part again");
        log.move_volume(1).expect("comes back");
        log.vm(|vm| (vm.owner, vm.epoch) = (NodeId(1), vm.epoch + 1)).expect("comes back");
    }

    #[test]
    fn a_vm_that_is_stopped_stays_and_does_not_start_on_a_drained_node() {
        let mut log = Log::new();
        log.vm(|vm| vm.state = VmState::Stopped).expect("stops");
        log.drain(DrainPhase::Draining).expect("begins");
        log.move_volume(2).expect("moves away");
        log.drain(DrainPhase::Drained).expect("nothing runs there");
        let refused = log.vm(|vm| vm.state = VmState::Starting).expect_err("it would run there");
        assert_eq!(refused.to_string(), "node n1: expected one that is not drained, found drained");
    }

    #[test]
    fn of_two_changes_of_a_drain_one_wins_also_when_the_drain_is_another_one() {
        let mut log = Log::new();
        log.drain(DrainPhase::Draining).expect("begins");
        let stale = log.state.drains[&NodeId(1)].step;
        log.apply(Command::SetDrain { node: NodeId(1), expect_step: stale, to: None }).expect("given up");
        log.drain(DrainPhase::Draining).expect("begins anew");
        log.apply(Command::SetDrain { node: NodeId(1), expect_step: stale, to: None })
            .expect_err("of the former");
    }

    #[test]
    fn a_volume_whose_last_other_node_is_gone_is_served_by_a_drained_one() {
        let mut log = Log::new();
        log.drain(DrainPhase::Draining).expect("begins");
        log.move_volume(2).expect("moves away");
        for state in [MemberState::Fencing, MemberState::Fenced] {
            log.must(Command::MarkNode { node: NodeId(2), epoch: Epoch(1), state });
        }
        log.move_volume(1).expect("nobody else is there");
        assert_eq!(log.state.volumes["vol1"].term, Term(3));
    }

    #[test]
    fn a_record_that_names_too_much_is_refused() {
        let mut log = Log::new();
        let names = |count: usize| (0..count).map(|n| format!("v{n}")).collect::<BTreeSet<_>>();
        let to = Drain {
            step: 0,
            phase: DrainPhase::Draining,
            for_good: false,
            volumes: names(VOLUMES_MAX + 1),
            vms: BTreeSet::new(),
            stuck: BTreeMap::new(),
        };
        log.apply(Command::SetDrain { node: NodeId(1), expect_step: 0, to: Some(to) }).expect_err("too many");
    }
}
