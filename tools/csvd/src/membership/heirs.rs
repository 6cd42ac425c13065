//! Who owns what after nodes have come and gone. Pure: records in, commands out.
//!
//! | owner of a volume | then |
//! |---|---|
//! | up, in the epoch of its appointment | nothing |
//! | up, in a later epoch (it came back) | it is appointed anew, with the next term |
//! | fenced, or left in order | the node that is up with the fewest volumes is appointed |
//! | being fenced, or its fence failed | nothing yet: it may still write (A1, A4) |
//!
//! A node that is drained is appointed only when no other is left. A drained node that is down needs nobody to empty it.
//!
//! A VM that ran on a node that is gone has failed, and is given to the node that is up with the fewest VMs, which starts
//! it again (vms/ha.rs): those of high priority first. One that was halted or being saved stays where its user left it.
//!
//! **Invariant:** nobody is appointed while the former owner's incarnation may be alive.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use lockmgr::NodeId;
use lockmgr::cluster::{
    ClusterState, Command, Drain, DrainPhase, Member, MemberState, VmRecord, VmState, VolumeRecord,
    VolumeState,
};

use crate::view;
use crate::vms::{Priority, has_arrived, lost};

/// The changes that the records ask for. `retry_failed`: also let another node try a volume that could not be opened.
pub(crate) fn appoint(state: &ClusterState, retry_failed: bool) -> Vec<Command> {
    let mut load = loads(state);
    let mut commands: Vec<_> = state
        .volumes
        .values()
        .filter_map(|volume| new_owner(state, volume, retry_failed, &mut load))
        .collect();
    commands.extend(lost_vms(state));
    commands.extend(restarts(state));
    commands.extend(emptied(state));
    commands
}

/// The nodes that are up and open; if there is none, those that are up.
fn may_coordinate(state: &ClusterState) -> impl Iterator<Item = &Member> {
    let none_is_open = state.open_members().next().is_none();
    state.serving().filter(move |member| none_is_open || !state.is_closed(member.id))
}

/// Volumes per node that may have one.
fn loads(state: &ClusterState) -> BTreeMap<NodeId, usize> {
    may_coordinate(state)
        .map(|member| {
            let owned = state.volumes.values().filter(|volume| volume.owner == member.id).count();
            (member.id, owned)
        })
        .collect()
}

fn new_owner(
    state: &ClusterState,
    volume: &VolumeRecord,
    retry_failed: bool,
    load: &mut BTreeMap<NodeId, usize>,
) -> Option<Command> {
    let to = if view::is_up(state, volume.owner, volume.owner_epoch) {
        let failed = retry_failed && volume.state == VolumeState::Failed;
        if !failed {
            return None;
        }
        next_after(state, volume.owner)?
    } else if !view::is_over(state, volume.owner, volume.owner_epoch) {
        return None;
    } else {
        came_back(state, volume).or_else(|| least_loaded(state, load))?
    };
    *load.entry(to.id).or_default() += 1;
    Some(Command::MoveVolume {
        name: volume.name.clone(),
        expect_term: volume.term,
        to: to.id,
        to_epoch: to.epoch,
    })
}

fn came_back<'a>(state: &'a ClusterState, volume: &VolumeRecord) -> Option<&'a Member> {
    may_coordinate(state).find(|member| member.id == volume.owner)
}

fn least_loaded<'a>(state: &'a ClusterState, load: &BTreeMap<NodeId, usize>) -> Option<&'a Member> {
    let (node, _) = load.iter().min_by_key(|(node, owned)| (**owned, **node))?;
    state.members.get(node)
}

/// The node that is up and follows `owner` in the order of ids; itself when it is alone.
fn next_after(state: &ClusterState, owner: NodeId) -> Option<&Member> {
    may_coordinate(state).find(|member| member.id > owner).or_else(|| may_coordinate(state).next())
}

/// VMs that shall run again and wait on a node that is gone, or is drained: each gets another one.
fn restarts(state: &ClusterState) -> Vec<Command> {
    let mut waiting: Vec<_> = state
        .vms
        .values()
        .filter(|vm| {
            let elsewhere = view::is_certainly_off(state, vm.owner) || state.is_closed(vm.owner);
            vm.restarts_left > 0 && vm.state == VmState::Failed && elsewhere
        })
        .collect();
    waiting.sort_by_key(|vm| (Reverse(Priority::of(vm)), &vm.name));
    let mut load = vm_loads(state);
    let to_lightest = |vm: &VmRecord| {
        let (node, vms) = load.iter_mut().min_by_key(|(node, vms)| (**vms, **node))?;
        *vms += 1;
        let node = *node;
        Some(vm.update(|record| {
            record.owner = node;
            record.epoch += 1;
            record.peer = None;
        }))
    };
    waiting.into_iter().filter_map(to_lightest).collect()
}

/// VMs per node that is up.
fn vm_loads(state: &ClusterState) -> BTreeMap<NodeId, usize> {
    let vms = |member: &Member| state.vms.values().filter(|vm| vm.owner == member.id).count();
    state.open_members().map(|member| (member.id, vms(member))).collect()
}

/// Nodes that were being drained when they went: what they had has gone to others already.
fn emptied(state: &ClusterState) -> Vec<Command> {
    let gone = |(node, drain): &(&NodeId, &Drain)| {
        drain.phase == DrainPhase::Draining
            && view::is_certainly_off(state, **node)
            && !state.volumes.values().any(|volume| volume.owner == **node)
            && !state.vms.values().any(|vm| vm.owner == **node && ClusterState::is_active(vm))
    };
    let drained = |(node, drain): (&NodeId, &Drain)| Command::SetDrain {
        node: *node,
        expect_step: drain.step,
        to: Some(Drain { phase: DrainPhase::Drained, stuck: BTreeMap::new(), ..drain.clone() }),
    };
    state.drains.iter().filter(gone).map(drained).collect()
}

/// VMs that the records put on an incarnation that is over.
fn lost_vms(state: &ClusterState) -> Vec<Command> {
    let lost = state.vms.values().filter(|vm| {
        let owner = state.members.get(&vm.owner);
        owner.is_none_or(|member| matches!(member.state, MemberState::Fenced | MemberState::Down))
    });
    lost.filter_map(|vm| verdict(vm, &view::node_name(state, vm.owner))).collect()
}

/// What becomes of a VM whose node is gone: what ran has failed; what was saved waits, and says for what.
fn verdict(vm: &VmRecord, node: &str) -> Option<Command> {
    match vm.state {
        VmState::Starting | VmState::Running | VmState::Paused | VmState::Saving | VmState::Migrating => {
            let reason = format!("node {node}, where it ran, was cut off");
            Some(lost(vm, reason))
        }
        VmState::Saved if has_arrived(vm) => {
            Some(lost(vm, format!("node {node}, where it had just arrived, was cut off")))
        }
        VmState::Saved if vm.reason.is_empty() => Some(vm.update(|record| {
            record.reason = format!("node {node}, which was to go on with it, is gone; its memory is kept");
        })),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use api::pb;
    use lockmgr::cluster::FenceKind;
    use lockmgr::{Epoch, Term, VolumeId};
    use prost::Message;
    use uuid::Uuid;

    use super::*;

    fn state(members: &[(u16, u64, MemberState)], owner: u16, owner_epoch: u64) -> ClusterState {
        let mut state = ClusterState::default();
        for &(id, epoch, member_state) in members {
            let member = Member {
                id: NodeId(id),
                name: format!("n{id}"),
                address: String::new(),
                epoch: Epoch(epoch),
                state: member_state,
                joined_ms: 0,
            };
            state.members.insert(NodeId(id), member);
        }
        let volume = VolumeRecord {
            name: "vol1".into(),
            id: VolumeId(Uuid::nil()),
            lun_uri: String::new(),
            owner: NodeId(owner),
            owner_epoch: Epoch(owner_epoch),
            term: Term(4),
            fence_kind: FenceKind::Agent,
            state: VolumeState::Online,
            reason: String::new(),
        };
        state.volumes.insert("vol1".into(), volume);
        state
    }

    fn moved_to(state: &ClusterState) -> Option<u16> {
        match appoint(state, false).as_slice() {
            [] => None,
            [Command::MoveVolume { expect_term: Term(4), to, .. }] => Some(to.0),
            other => panic!("{other:?}"),
        }
    }

    use MemberState::{Down, FenceFailed, Fenced, Fencing, Up};

    #[test]
    fn a_living_owner_keeps_its_volume() {
        assert_eq!(moved_to(&state(&[(1, 2, Up), (2, 1, Up)], 1, 2)), None);
    }

    // Invariants A1 and A4.
    #[test]
    fn nothing_is_inherited_before_the_fence_is_confirmed() {
        for unconfirmed in [Fencing, FenceFailed] {
            assert_eq!(moved_to(&state(&[(1, 2, unconfirmed), (2, 1, Up)], 1, 2)), None);
        }
        assert_eq!(moved_to(&state(&[(1, 2, Fenced), (2, 1, Up)], 1, 2)), Some(2));
        assert_eq!(moved_to(&state(&[(1, 2, Down), (2, 1, Up)], 1, 2)), Some(2));
    }

    #[test]
    fn an_owner_that_came_back_is_appointed_anew() {
        assert_eq!(moved_to(&state(&[(1, 3, Up), (2, 1, Up)], 1, 2)), Some(1));
    }

    // The node came back, and its new incarnation is in trouble too: the old one is over, so others may inherit.
    #[test]
    fn trouble_of_a_later_incarnation_does_not_hold_the_volume() {
        assert_eq!(moved_to(&state(&[(1, 3, Fencing), (2, 1, Up)], 1, 2)), Some(2));
    }

    #[test]
    fn a_volume_that_cannot_be_opened_goes_round() {
        let mut state = state(&[(1, 2, Up), (2, 1, Up)], 2, 1);
        state.volumes.get_mut("vol1").expect("it is there").state = VolumeState::Failed;
        assert_eq!(moved_to(&state), None);
        let commands = appoint(&state, true);
        assert!(matches!(commands.as_slice(), [Command::MoveVolume { to: NodeId(1), .. }]), "{commands:?}");
    }

    // Those that matter most go first, to where the least runs; nothing is given away while its node may be alive (A1).
    #[test]
    fn vms_of_a_dead_node_are_spread_by_priority_and_only_after_its_fence() {
        let vm = |name: &str, priority: &str| VmRecord {
            name: name.into(),
            id: Uuid::nil(),
            owner: NodeId(1),
            epoch: 3,
            state: VmState::Failed,
            peer: None,
            spec: pb::VmSpec { priority: priority.into(), ..pb::VmSpec::default() }.encode_to_vec().into(),
            saved: None,
            reason: String::new(),
            restarts_left: 1,
        };
        for (fence, given) in [(Fencing, 0), (FenceFailed, 0), (Fenced, 3)] {
            let mut state = state(&[(1, 2, fence), (2, 1, Up), (3, 1, Up)], 2, 1);
            for (name, priority) in [("a", "low"), ("b", "medium"), ("c", "high")] {
                state.vms.insert(name.into(), vm(name, priority));
            }
            let commands = restarts(&state);
            assert_eq!(commands.len(), given, "{fence}");
            let order: Vec<_> = commands
                .iter()
                .map(|command| match command {
                    Command::UpdateVm(update) => {
                        (update.to.name.as_str(), update.to.owner.0, update.to.epoch)
                    }
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(order, [("c", 2, 4), ("b", 3, 4), ("a", 2, 4)][..given]);
        }
    }

    // Invariant H6: whatever became of its node, a VM says why it does not run.
    #[test]
    fn a_vm_of_a_node_that_is_gone_says_why_it_does_not_run() {
        let mut state = state(&[(1, 2, Fenced), (2, 1, Up)], 2, 1);
        let mut verdicts = |vm_state: VmState, saved: Option<&str>, reason: &str| {
            let vm = VmRecord {
                name: "web".into(),
                id: Uuid::nil(),
                owner: NodeId(1),
                epoch: 3,
                state: vm_state,
                peer: None,
                spec: Vec::new().into(),
                saved: saved.map(str::to_owned),
                reason: reason.into(),
                restarts_left: 0,
            };
            state.vms.insert("web".into(), vm);
            lost_vms(&state)
        };
        let file = Some("vol:/web");
        for (before, saved, after) in [
            (VmState::Running, None, VmState::Failed),
            (VmState::Saved, file, VmState::Saved),
            (VmState::Saved, None, VmState::Failed),
        ] {
            let commands = verdicts(before, saved, "");
            let [Command::UpdateVm(update)] = commands.as_slice() else { panic!("{commands:?}") };
            assert_eq!(update.to.state, after);
            assert!(update.to.reason.contains("n1"), "{}", update.to.reason);
        }
        // Said once, and nothing is said of a VM that is not meant to run.
        assert!(verdicts(VmState::Saved, file, "said before").is_empty());
        assert!(verdicts(VmState::Stopped, None, "").is_empty());
    }
}
