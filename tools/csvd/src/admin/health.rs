//! `health`, and waiting for it.

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use lockmgr::cluster::{ClusterState, VmRecord, VmState, VolumeState};

use super::{cluster, volume};
use crate::core::Core;
use crate::membership;
use crate::vms;
use crate::volumes::status::{Code, State};

/// One line per problem, as this node sees the cluster.
pub(super) async fn report(core: &Arc<Core>) -> pb::HealthReport {
    let state = core.state();
    let mut problems = Vec::new();
    quorum(core, &mut problems);
    nodes(core, &state, &mut problems);
    volumes(core, &state, &mut problems).await;
    halted_and_failed(&state, &mut problems);
    let status = if problems.is_empty() { "ok" } else { "degraded" };
    pb::HealthReport { status: status.to_owned(), problems }
}

fn problem(subject: String, message: impl Into<String>, hint: impl Into<String>) -> pb::Problem {
    pb::Problem { subject, message: message.into(), hint: hint.into() }
}

fn quorum(core: &Core, problems: &mut Vec<pb::Problem>) {
    let raft = core.cluster.status();
    if !raft.quorum || raft.leader.is_none() {
        problems.push(problem(
            "cluster".to_owned(),
            "there is no quorum: nothing can be changed, and nodes without a lease stop writing",
            "start more nodes: a majority must be connected",
        ));
    }
    if !core.membership.lease.is_held() {
        problems.push(problem(
            format!("node {}", core.config.name),
            "its lease has run out: its I/O waits",
            "it is renewed as soon as a majority answers",
        ));
    }
}

fn nodes(core: &Core, state: &ClusterState, problems: &mut Vec<pb::Problem>) {
    for member in state.members.values() {
        if let Some(drain) = state.drains.get(&member.id) {
            let why: Vec<_> = drain.stuck.iter().map(|(what, why)| format!("; {what}: {why}")).collect();
            problems.push(problem(
                format!("node {}", member.name),
                format!("is {}: nothing is placed on it{}", drain.phase, why.concat()),
                format!("`csvctl node resume {}` lets it take part again", member.name),
            ));
        }
        let (message, hint) = match cluster::standing(core, member) {
            "up" => continue,
            "unreachable" => ("does not answer", "is it running? Is the network whole?"),
            "fencing" => ("is being cut off", "wait for the fence to be confirmed"),
            "fence_failed" => (
                "could not be cut off: nothing that it held is reused",
                "make sure that it is powered off; the fence is tried again",
            ),
            "fenced" => ("was cut off", "start it again"),
            "joining" => ("is joining", "wait a moment"),
            _ => ("is not there", "start it"),
        };
        problems.push(problem(format!("node {}", member.name), message, hint));
    }
}

async fn volumes(core: &Arc<Core>, state: &ClusterState, problems: &mut Vec<pb::Problem>) {
    for record in state.volumes.values().filter(|record| record.state != VolumeState::Online) {
        let reason = if record.reason.is_empty() { "no coordinator serves yet" } else { &record.reason };
        problems.push(problem(
            format!("volume {}", record.name),
            format!("{}: {reason}", record.state),
            "the cluster tries again, on another node when it must",
        ));
    }
    let rows = volume::states(core, pb::VolumeStateRequest::default()).await.unwrap_or_default();
    for row in rows.states.into_iter().filter(|row| row.state != "direct" && row.state != "available") {
        problems.push(problem(
            format!("volume {} on {}", row.volume, row.node),
            format!("{}: {}", row.state, row.reason),
            "",
        ));
    }
}

fn halted_and_failed(state: &ClusterState, problems: &mut Vec<pb::Problem>) {
    let waits = |vm: &VmRecord| vm.state == VmState::Saved && !vm.reason.is_empty();
    for vm in state.vms.values().filter(|vm| vm.state == VmState::Failed || waits(vm)) {
        problems.push(problem(
            format!("vm {}", vm.name),
            format!("{}: {}", vm.state, vm.reason),
            format!("`csvctl vm start {}` starts it again", vm.name),
        ));
    }
    for vm in state.vms.values().filter(|vm| vms::is_halted(vm)) {
        problems.push(problem(
            format!("vm {}", vm.name),
            format!("its node has halted it: {}", vm.reason),
            "it goes on by itself when that is over",
        ));
    }
}

/// Returns when this node has what was asked for.
pub(super) async fn wait(core: &Arc<Core>, request: pb::WaitRequest) -> Result<pb::Done, Error> {
    let limit = Duration::from_millis(request.timeout_ms.min(600_000));
    let waited = tokio::time::timeout(limit, until_there(core, &request)).await;
    match waited {
        Ok(outcome) => outcome.map(|()| pb::Done {}),
        Err(_) => Err(Error::failed(format!(
            "not there after {} ms: {}",
            request.timeout_ms,
            missing(core, &request).unwrap_or_else(|| "it came just now".to_owned())
        ))
        .hint("`csvctl health` tells more")),
    }
}

async fn until_there(core: &Arc<Core>, request: &pb::WaitRequest) -> Result<(), Error> {
    let (mut state, mut pulse) = (core.cluster.watch(), core.pulse.watch());
    loop {
        state.borrow_and_update();
        pulse.borrow_and_update();
        if missing(core, request).is_none() {
            return Ok(());
        }
        if let Some(why) = foreign(core) {
            return Err(Error::failed(why).hint(
                "end it with `csvctl dev fault NODE kill`, give it back the certificate of this cluster, start it again",
            ));
        }
        if let Some(why) = hopeless(core, request) {
            return Err(Error::failed(why).hint("`csvctl health` tells more"));
        }
        let gone = Error::unreachable("the daemon is ending");
        tokio::select! {
            () = core.stop.cancelled() => return Err(gone),
            changed = state.changed() => changed.map_err(|_| gone)?,
            changed = pulse.changed() => changed.map_err(|_| gone)?,
            // Leaders come and go without a trace in the records.
            () = tokio::time::sleep(Duration::from_millis(core.timing.beat_ms)) => {}
        }
    }
}

/// What is still missing, in words.
fn missing(core: &Arc<Core>, request: &pb::WaitRequest) -> Option<String> {
    if core.cluster.status().leader.is_none() {
        return Some("the cluster has no leader".to_owned());
    }
    if core.epoch().is_none() {
        return Some("this node has not joined yet".to_owned());
    }
    if !core.membership.lease.is_held() {
        return Some("this node has no lease yet".to_owned());
    }
    let state = core.state();
    let up = membership::nodes_up(core, &state);
    if up < usize::try_from(request.nodes_up).unwrap_or(usize::MAX) {
        return Some(format!("{up} of {} nodes are up", request.nodes_up));
    }
    request.volumes.iter().find_map(|name| {
        let Some(record) = state.volumes.get(name) else {
            return Some(format!("volume {name} is not in the records"));
        };
        let status = core.volumes.get(record.id).map(|volume| volume.status.get());
        match status {
            Some(status) if status.state == State::Direct && record.state == VolumeState::Online => None,
            Some(status) => Some(format!("volume {name} is {}: {}", status.state.word(), status.reason)),
            None => Some(format!("volume {name} has not been opened yet")),
        }
    })
}

/// A node that has not joined, and whose certificate no other node accepts (or that accepts none of theirs), never will.
fn foreign(core: &Core) -> Option<String> {
    let peers = core.mesh.status();
    if core.epoch().is_some() || peers.is_empty() || !peers.iter().all(|peer| peer.foreign) {
        return None;
    }
    let why = peers.first()?.down.clone()?;
    Some(format!("node {} is foreign to all other nodes: {why}", core.config.name))
}

/// A LUN that is not what it must be does not become so by waiting.
fn hopeless(core: &Arc<Core>, request: &pb::WaitRequest) -> Option<String> {
    let state = core.state();
    request.volumes.iter().find_map(|name| {
        let status = core.volumes.get(state.volumes.get(name)?.id)?.status.get();
        (status.state == State::Paused(Code::NoLun)).then(|| format!("volume {name}: {}", status.reason))
    })
}
