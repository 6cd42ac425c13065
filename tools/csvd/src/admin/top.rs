//! `top`: counters of everything, gathered from all nodes; whoever asks twice gets rates.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::pb;
use lockmgr::cluster::{ClusterState, Member};

use super::{cluster, volume};
use crate::core::Core;
use crate::messages::{Loads, NodeAnswer, NodeOp};
use crate::volumes::status::unix_ms;
use crate::{forward, view};

/// Longest time that a node may take to answer; then it is shown without its numbers.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

pub(super) async fn report(core: &Arc<Core>) -> pb::TopReport {
    let state = core.state();
    let (mut nodes, mut loads) = (Vec::new(), Loads::default());
    for member in state.members.values() {
        let (node, of_node) = ask(core, &state, member).await;
        nodes.push(node);
        loads.volumes.extend(of_node.volumes);
        loads.vms.extend(of_node.vms);
    }
    let raft = core.cluster.status();
    pb::TopReport {
        time_ms: unix_ms(),
        cluster: state.name.clone(),
        leader: raft.leader.map(|leader| view::node_name(&state, leader)).unwrap_or_default(),
        nodes,
        volumes: volumes(core, &loads).await,
        vms: vms(&state, &loads),
    }
}

async fn ask(core: &Arc<Core>, state: &ClusterState, member: &Member) -> (pb::TopNode, Loads) {
    let shown = cluster::node(core, state, member, &core.cluster.status());
    let began = now();
    let asked = forward::ask(core, member.id, NodeOp::Loads(pb::Done {}));
    let loads = match tokio::time::timeout(ANSWER_WITHIN, asked).await {
        Ok(Ok(NodeAnswer::Loads(loads))) => loads,
        _ => Loads::default(),
    };
    let node = pb::TopNode {
        name: shown.name,
        state: shown.state,
        drain: shown.drain,
        volumes: shown.volumes_owned,
        vms: shown.vms,
        answer_ms: began.elapsed().as_secs_f64() * 1000.0,
    };
    (node, loads)
}

async fn volumes(core: &Arc<Core>, loads: &Loads) -> Vec<pb::TopVolume> {
    let rows = volume::states(core, pb::VolumeStateRequest::default()).await.unwrap_or_default().states;
    let listed = volume::list(core).await.unwrap_or_default().volumes;
    let each = |volume: pb::Volume| {
        let load = loads.volumes.iter().find(|load| load.volume == volume.name && load.term == volume.term);
        let load = load.cloned().unwrap_or_default();
        let indirect = rows.iter().filter(|row| row.volume == volume.name && row.state != "direct");
        pb::TopVolume {
            not_direct: indirect.map(|row| format!("{} {}", row.node, row.state)).collect(),
            name: volume.name,
            owner: volume.owner,
            state: volume.state,
            term: volume.term,
            requests: load.requests,
            commits: load.commits,
            clients: load.clients,
            size_bytes: volume.size_bytes,
            free_bytes: volume.free_bytes,
        }
    };
    listed.into_iter().map(each).collect()
}

fn vms(state: &ClusterState, loads: &Loads) -> Vec<pb::TopVm> {
    let each = |vm: &lockmgr::cluster::VmRecord| {
        let load = loads.vms.iter().find(|load| load.name == vm.name).cloned().unwrap_or_default();
        pb::TopVm {
            name: vm.name.clone(),
            owner: view::node_name(state, vm.owner),
            state: vm.state.to_string(),
            reason: vm.reason.clone(),
            reads: load.reads,
            writes: load.writes,
            flushes: load.flushes,
            errors: load.errors,
            moving: load.moving,
        }
    };
    state.vms.values().map(each).collect()
}

#[expect(clippy::disallowed_methods, reason = "measures what it reports")]
fn now() -> Instant {
    Instant::now()
}
