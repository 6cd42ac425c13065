//! Who is alive, as this node sees it. Every node judges, so that a new leader knows at once; only the leader acts.

use std::sync::Arc;
use std::time::Duration;

use lockmgr::clock::boottime_ms;
use lockmgr::cluster::{ClusterState, MemberState};
use lockmgr::detector::{Action, Detector, Event};
use lockmgr::{Epoch, NodeId};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::found_dead;
use crate::core::Core;
use crate::view;

/// Feeds the detector until the daemon ends.
pub(crate) async fn run(core: Arc<Core>, mut inbox: mpsc::UnboundedReceiver<Event>) {
    let mut detector = Detector::new(core.timing);
    let mut state = core.cluster.watch();
    let mut ticks = tokio::time::interval(Duration::from_millis(core.timing.beat_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    expect_members(&core, &core.state(), &mut detector);
    loop {
        tokio::select! {
            () = core.done.cancelled() => return,
            Some(event) = inbox.recv() => step(&core, &mut detector, event),
            Ok(()) = state.changed() => {
                let now = state.borrow_and_update().clone();
                expect_members(&core, &now, &mut detector);
            }
            _ = ticks.tick() => tick(&core, &mut detector),
        }
    }
}

fn tick(core: &Arc<Core>, detector: &mut Detector) {
    for member in core.state().members.keys() {
        // A refusal from before the node was heard last says nothing: it has started since.
        let silent_ms = detector.silence(boottime_ms(), *member).map_or(0, |(network, _)| network);
        if core.mesh.refused_for(member.0).is_some_and(|ago| ago < Duration::from_millis(silent_ms)) {
            step(core, detector, Event::Refused { node: *member });
        }
    }
    step(core, detector, Event::Tick);
}

/// Watches the incarnations that the records count on.
fn expect_members(core: &Arc<Core>, state: &ClusterState, detector: &mut Detector) {
    if state.volumes.is_empty() {
        step(core, detector, Event::LunUnwatched);
    }
    for member in state.members.values().filter(|member| member.id != core.me) {
        let counted_on = member.state == MemberState::Up;
        let event = if counted_on {
            Event::Expect { node: member.id, epoch: member.epoch }
        } else {
            core.membership.heard().remove(&member.id);
            Event::Forget { node: member.id }
        };
        step(core, detector, event);
    }
}

fn step(core: &Arc<Core>, detector: &mut Detector, event: Event) {
    if let Event::NetworkBeat { node, epoch } = event {
        heard(core, node, epoch);
    }
    for action in detector.step(boottime_ms(), event) {
        follow(core, detector, action);
    }
}

/// A leader that is silent leads nobody. Of those that are heard, the first stands for election at once; if it does not get
/// through, Raft's own time limits let others try.
fn replace_leader(core: &Arc<Core>, silent: NodeId) {
    let voters = core.cluster.status().voters;
    let first = voters
        .iter()
        .filter(|voter| **voter != silent)
        .find(|voter| **voter == core.me || core.membership.heard().contains_key(voter));
    if first == Some(&core.me) {
        let core = Arc::clone(core);
        core.runtime.clone().spawn(async move { core.cluster.stand_for_election(silent).await });
    }
}

fn heard(core: &Arc<Core>, node: NodeId, epoch: Epoch) {
    if core.membership.heard().insert(node, epoch) != Some(epoch) {
        core.pulse.beat();
    }
}

fn follow(core: &Arc<Core>, detector: &Detector, action: Action) {
    match action {
        Action::Suspect { node, epoch } => {
            core.membership.heard().remove(&node);
            core.pulse.beat();
            tracing::warn!(%node, %epoch, "silent on the network");
            replace_leader(core, node);
        }
        Action::Recovered { node, epoch } => {
            core.pulse.beat();
            tracing::info!(%node, %epoch, "heard again");
        }
        Action::Dead { node, epoch } => {
            let name = view::node_name(&core.state(), node);
            let (network, lun) = detector.silence(boottime_ms(), node).unwrap_or_default();
            let gone =
                if core.mesh.refused_for(node.0).is_some() { ", nobody listens at its address" } else { "" };
            let reason = format!(
                "node {name} is silent on the network for {network} ms and on the LUN for {lun} ms{gone}"
            );
            found_dead(core, node, epoch, reason);
        }
    }
}
