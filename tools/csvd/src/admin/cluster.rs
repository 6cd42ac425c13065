//! `cluster` and `node`.

use std::sync::Arc;

use api::{Error, pb};
use lockmgr::cluster::{ClusterState, Member, MemberState, RaftStatus};

use crate::core::Core;
use crate::redirect::orders;
use crate::view;
use crate::vms::publish_processor;

pub(super) fn show(core: &Arc<Core>) -> pb::Cluster {
    let (state, raft) = (core.state(), core.cluster.status());
    pb::Cluster {
        name: if state.name.is_empty() { core.config.cluster.clone() } else { state.name.clone() },
        id: core.config.cluster_id.to_string(),
        leader: raft.leader.map(|leader| view::node_name(&state, leader)).unwrap_or_default(),
        raft_term: raft.raft_term,
        quorum: raft.quorum,
        last_applied: state.applied,
        nodes: nodes(core),
        volumes: u32::try_from(state.volumes.len()).unwrap_or(u32::MAX),
        vms: u32::try_from(state.vms.len()).unwrap_or(u32::MAX),
    }
}

pub(super) fn nodes(core: &Arc<Core>) -> Vec<pb::Node> {
    let state = core.state();
    let raft = core.cluster.status();
    state.members.values().map(|member| node(core, &state, member, &raft)).collect()
}

pub(super) fn node(core: &Core, state: &ClusterState, member: &Member, raft: &RaftStatus) -> pb::Node {
    let volumes = state.volumes.values().filter(|volume| volume.owner == member.id).count();
    let vms = state.vms.values().filter(|vm| vm.owner == member.id).count();
    pb::Node {
        name: member.name.clone(),
        id: member.id.0.into(),
        address: member.address.clone(),
        state: standing(core, member).to_owned(),
        epoch: member.epoch.0,
        leader: raft.leader == Some(member.id),
        this_node: member.id == core.me,
        volumes_owned: u32::try_from(volumes).unwrap_or(u32::MAX),
        vms: u32::try_from(vms).unwrap_or(u32::MAX),
        voter: raft.voters.contains(&member.id),
        protocol: protocol(core, member),
        drain: state.drains.get(&member.id).map(|drain| drain.phase.to_string()).unwrap_or_default(),
        role: if state.witnesses.contains(&member.id) { "witness" } else { "node" }.to_owned(),
    }
}

fn protocol(core: &Core, member: &Member) -> u32 {
    if member.id == core.me {
        return wire::spoken_max();
    }
    let peers = core.mesh.status();
    peers.into_iter().find(|peer| peer.node == member.id.0).and_then(|peer| peer.version).unwrap_or(0)
}

/// What the records say, and `unreachable` for a member that they count on but this node does not hear.
pub(super) fn standing(core: &Core, member: &Member) -> &'static str {
    let here = member.id == core.me;
    match member.state {
        MemberState::Up if here && core.epoch() != Some(member.epoch) => "joining",
        MemberState::Up if here || core.membership.hears(member.id, member.epoch) => "up",
        MemberState::Up => "unreachable",
        MemberState::Down => "down",
        MemberState::Fencing => "fencing",
        MemberState::Fenced => "fenced",
        MemberState::FenceFailed => "fence_failed",
    }
}

pub(super) async fn fault(core: &Arc<Core>, action: &str) -> Result<pb::Done, Error> {
    match action.split_once(':').unwrap_or((action, "")) {
        ("partition", _) => core.mesh.set_partitioned(true),
        ("heal", _) => core.mesh.set_partitioned(false),
        ("lun-fail", _) => orders::cut(core, true),
        ("lun-heal", _) => orders::cut(core, false),
        ("hold", step) => core.vms.rehearsal.hold(Some(step)),
        ("held", _) => core.vms.rehearsal.held().await,
        ("release", _) => core.vms.rehearsal.hold(None),
        ("lose", message) => core.vms.rehearsal.lose(message),
        ("cpu", without) => {
            let without = (!without.is_empty()).then(|| without.parse().map_err(Error::usage)).transpose()?;
            core.vms.processors.rehearse(without);
            publish_processor(core).await?;
        }
        _ => {
            return Err(Error::usage(format!("`{action}` is not a fault of this node"))
                .hint("it knows partition, heal, lun-fail, lun-heal, hold, held, release, lose and cpu"));
        }
    }
    tracing::warn!(action, "fault rehearsal");
    Ok(pb::Done {})
}
