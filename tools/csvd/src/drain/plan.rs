//! What is next in the drain of a node. Pure: records in, one step out.
//!
//! | phase | there is still | then |
//! |---|---|---|
//! | draining | something that the record does not name | it is named first |
//! | draining | a coordinator, or a VM that runs | it moves away |
//! | draining | only what could not be moved | the record says why; it is tried again later |
//! | draining | nothing | drained |
//! | drained | | a node that leaves for good ends |
//! | resuming | something of what it had that is elsewhere | it comes back |
//! | resuming | nothing, or only what does not come after several rounds | the record goes |
//!
//! **Invariant:** a step that was carried out, also by somebody else or in part, is not given again.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use lockmgr::NodeId;
use lockmgr::cluster::{ClusterState, Drain, DrainPhase, STUCK_MAX, VmRecord, VmState};

use crate::vms::Priority;

/// Rounds after which a resume no longer waits for what does not come back.
const ROUNDS_MAX: u32 = 5;

/// What is next.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Step {
    /// The record changes, if it is still at `step`.
    Write {
        step: u64,
        to: Option<Drain>,
    },
    VolumeAway(String),
    VmAway(String),
    VolumeBack(String),
    VmBack(String),
    /// The daemon ends for good.
    Leave,
}

/// The next step for `me`; nothing when only a change or time can help. `tried` names what was tried in this round in vain,
/// `arriving` says that a VM may be on its way here.
pub(super) fn next(
    state: &ClusterState,
    me: NodeId,
    tried: &BTreeMap<String, String>,
    round: u32,
    arriving: bool,
) -> Option<Step> {
    let drain = state.drains.get(&me)?;
    match drain.phase {
        DrainPhase::Draining => away(state, me, drain, tried, arriving),
        DrainPhase::Drained => drain.for_good.then_some(Step::Leave),
        DrainPhase::Resuming => back(state, me, drain, tried, round),
    }
}

fn away(
    state: &ClusterState,
    me: NodeId,
    drain: &Drain,
    tried: &BTreeMap<String, String>,
    arriving: bool,
) -> Option<Step> {
    let volumes: Vec<_> =
        state.volumes.values().filter(|volume| volume.owner == me).map(|volume| &volume.name).collect();
    let mut vms: Vec<_> =
        state.vms.values().filter(|vm| vm.owner == me && ClusterState::is_active(vm)).collect();
    vms.sort_by_key(|vm| (Reverse(Priority::of(vm)), vm.name.clone()));
    let named = |vm: &&VmRecord| drain.vms.contains(&vm.name);
    if !volumes.iter().all(|name| drain.volumes.contains(*name)) || !vms.iter().all(named) {
        let mut to = drain.clone();
        to.volumes.extend(volumes.into_iter().cloned());
        to.vms.extend(vms.into_iter().map(|vm| vm.name.clone()));
        return Some(Step::Write { step: drain.step, to: Some(to) });
    }
    if let Some(name) = volumes.iter().find(|name| !tried.contains_key(&format!("volume {name}"))) {
        return Some(Step::VolumeAway((*name).clone()));
    }
    let untried = |vm: &&&VmRecord| !is_busy(vm) && !tried.contains_key(&format!("vm {}", vm.name));
    if let Some(vm) = vms.iter().find(untried) {
        return Some(Step::VmAway(vm.name.clone()));
    }
    if volumes.is_empty() && vms.is_empty() {
        let to = Drain { phase: DrainPhase::Drained, stuck: BTreeMap::new(), ..drain.clone() };
        return (!arriving).then_some(Step::Write { step: drain.step, to: Some(to) });
    }
    if vms.iter().any(|vm| is_busy(vm)) {
        return None;
    }
    let stuck: BTreeMap<_, _> =
        tried.iter().take(STUCK_MAX).map(|(what, why)| (what.clone(), why.clone())).collect();
    let to = Drain { stuck, ..drain.clone() };
    (to.stuck != drain.stuck).then_some(Step::Write { step: drain.step, to: Some(to) })
}

fn back(
    state: &ClusterState,
    me: NodeId,
    drain: &Drain,
    tried: &BTreeMap<String, String>,
    round: u32,
) -> Option<Step> {
    let elsewhere = |name: &&String| state.volumes.get(*name).is_some_and(|volume| volume.owner != me);
    let untried = |what: &str, name: &str| !tried.contains_key(&format!("{what} {name}"));
    if let Some(name) = drain.volumes.iter().filter(elsewhere).find(|name| untried("volume", name)) {
        return Some(Step::VolumeBack(name.clone()));
    }
    let vms = || drain.vms.iter().filter_map(|name| state.vms.get(name)).filter(|vm| vm.owner != me);
    if let Some(vm) = vms().find(|vm| vm.state == VmState::Running && untried("vm", &vm.name)) {
        return Some(Step::VmBack(vm.name.clone()));
    }
    let waits = !tried.is_empty() || vms().any(is_busy);
    if waits && round < ROUNDS_MAX {
        return None;
    }
    Some(Step::Write { step: drain.step, to: None })
}

/// It will soon be something else.
fn is_busy(vm: &VmRecord) -> bool {
    matches!(vm.state, VmState::Starting | VmState::Saving | VmState::Saved | VmState::Migrating)
        && ClusterState::is_active(vm)
}

#[cfg(test)]
mod tests {
    use lockmgr::cluster::{FenceKind, VolumeRecord, VolumeState};
    use lockmgr::{Epoch, Term, VolumeId};
    use uuid::Uuid;

    use super::*;

    const ME: NodeId = NodeId(1);
    const OTHER: NodeId = NodeId(2);

    fn volume(name: &str, owner: NodeId) -> VolumeRecord {
        VolumeRecord {
            name: name.into(),
            id: VolumeId(Uuid::nil()),
            lun_uri: String::new(),
            owner,
            owner_epoch: Epoch(1),
            term: Term(1),
            fence_kind: FenceKind::Agent,
            state: VolumeState::Online,
            reason: String::new(),
        }
    }

    fn vm(name: &str, owner: NodeId, vm_state: VmState) -> VmRecord {
        VmRecord {
            name: name.into(),
            id: Uuid::nil(),
            owner,
            epoch: 3,
            state: vm_state,
            peer: None,
            spec: Vec::new().into(),
            saved: None,
            reason: String::new(),
            restarts_left: 0,
        }
    }

    /// One volume and two VMs on this node, which is being drained.
    fn draining() -> ClusterState {
        let mut state = ClusterState::default();
        state.volumes.insert("vol1".into(), volume("vol1", ME));
        for name in ["a", "b"] {
            state.vms.insert(name.into(), vm(name, ME, VmState::Running));
        }
        state.vms.insert("idle".into(), vm("idle", ME, VmState::Stopped));
        let drain = Drain {
            step: 7,
            phase: DrainPhase::Draining,
            for_good: false,
            volumes: Default::default(),
            vms: Default::default(),
            stuck: BTreeMap::new(),
        };
        state.drains.insert(ME, drain);
        state
    }

    fn step(state: &ClusterState) -> Option<Step> {
        next(state, ME, &BTreeMap::new(), 0, false)
    }

    fn written(state: &mut ClusterState, step: Option<Step>) -> Option<Drain> {
        let Some(Step::Write { step: 7, to }) = step else { panic!("{step:?}") };
        match &to {
            Some(drain) => drop(state.drains.insert(ME, drain.clone())),
            None => drop(state.drains.remove(&ME)),
        }
        to
    }

    // Invariant G1: from any state of the records the drain goes on, and what has happened is not done again.
    #[test]
    fn a_drain_goes_on_from_whatever_the_records_say_and_comes_to_an_end() {
        let mut state = draining();
        let first = step(&state);
        let named = written(&mut state, first).expect("a record");
        assert!(named.volumes.contains("vol1") && named.vms.len() == 2, "all of it is named before it moves");
        assert_eq!(step(&state), Some(Step::VolumeAway("vol1".into())));
        state.volumes.get_mut("vol1").expect("there").owner = OTHER;
        for name in ["a", "b"] {
            assert_eq!(step(&state), Some(Step::VmAway(name.into())));
            state.vms.get_mut(name).expect("there").owner = OTHER;
        }
        assert_eq!(next(&state, ME, &BTreeMap::new(), 0, true), None, "a VM may be on its way here");
        let last = step(&state);
        assert_eq!(written(&mut state, last).map(|drain| drain.phase), Some(DrainPhase::Drained));
        assert_eq!(step(&state), None);

        state.drains.get_mut(&ME).expect("there").phase = DrainPhase::Resuming;
        assert_eq!(step(&state), Some(Step::VolumeBack("vol1".into())));
        state.volumes.get_mut("vol1").expect("there").owner = ME;
        assert_eq!(step(&state), Some(Step::VmBack("a".into())));
        state.vms.get_mut("a").expect("there").owner = ME;
        state.vms.get_mut("b").expect("there").state = VmState::Stopped;
        let last = step(&state);
        assert_eq!(written(&mut state, last), None, "what does not run does not come back");
    }

    #[test]
    fn what_cannot_be_moved_is_said_once_and_tried_again() {
        let mut state = draining();
        let first = step(&state);
        written(&mut state, first);
        let tried: BTreeMap<String, String> =
            ["volume vol1", "vm a", "vm b"].map(|what| (what.into(), "no".into())).into();
        let stuck = next(&state, ME, &tried, 0, false);
        assert_eq!(written(&mut state, stuck).map(|drain| drain.stuck), Some(tried.clone()));
        assert_eq!(next(&state, ME, &tried, 0, false), None);
        assert_eq!(step(&state), Some(Step::VolumeAway("vol1".into())), "the next round");
    }

    #[test]
    fn a_vm_that_is_on_its_way_is_waited_for() {
        let mut state = draining();
        let first = step(&state);
        written(&mut state, first);
        state.volumes.clear();
        for name in ["a", "b"] {
            state.vms.get_mut(name).expect("there").state = VmState::Starting;
        }
        assert_eq!(step(&state), None);
    }

    #[test]
    fn a_resume_ends_also_when_something_does_not_come_back() {
        let mut state = draining();
        let first = step(&state);
        written(&mut state, first);
        state.drains.get_mut(&ME).expect("there").phase = DrainPhase::Resuming;
        state.vms.clear();
        state.volumes.get_mut("vol1").expect("there").owner = OTHER;
        let tried: BTreeMap<String, String> = [("volume vol1".into(), "no".into())].into();
        assert_eq!(next(&state, ME, &tried, 0, false), None);
        assert_eq!(next(&state, ME, &tried, ROUNDS_MAX, false), Some(Step::Write { step: 7, to: None }));
    }

    #[test]
    fn a_node_that_leaves_for_good_ends_when_it_is_empty() {
        let mut state = draining();
        let drain = state.drains.get_mut(&ME).expect("there");
        (drain.phase, drain.for_good) = (DrainPhase::Drained, true);
        assert_eq!(step(&state), Some(Step::Leave));
    }
}
