//! Balancing, carried out: while this node leads, it asks all nodes what their coordinators have to do, and has one moved when
//! balance.rs says so. Off by the setting `balance.volumes`.

use std::sync::Arc;
use std::time::Duration;

use api::pb::VolumeMoveRequest;
use lockmgr::clock::boottime_ms;
use tokio::time::MissedTickBehavior;

use super::balance::{Balance, Counted, LOOK_MS, Proposal};
use crate::core::Core;
use crate::messages::{Loads, NodeAnswer, NodeOp, VolumeLoad};
use crate::{forward, settings, view, vms};

/// Longest time that a node may take to answer. One that does not has no load that is known.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Looks again and again until the daemon ends.
pub(crate) async fn run(core: Arc<Core>) {
    let mut balance = Balance::default();
    let mut ticks = tokio::time::interval(Duration::from_millis(LOOK_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = core.stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let leads = core.cluster.status().leader == Some(core.me);
        if !leads || !settings::BALANCE_VOLUMES.is_on(&core.state()) || core.state().volumes.len() < 2 {
            // What was seen long ago is nothing to go by.
            balance = Balance::default();
            continue;
        }
        let counted = ask_all(&core).await;
        if let Some(proposal) = balance.look(boottime_ms().0, &core.state(), &counted) {
            carry_out(&core, proposal).await;
        }
    }
}

async fn ask_all(core: &Arc<Core>) -> Vec<Counted> {
    let mut counted = Vec::new();
    for member in core.state().open_members() {
        let asked = forward::ask(core, member.id, NodeOp::Loads(api::pb::Done {}));
        if let Ok(Ok(NodeAnswer::Loads(loads))) = tokio::time::timeout(ANSWER_WITHIN, asked).await {
            let each =
                |load: VolumeLoad| Counted { volume: load.volume, term: load.term, requests: load.requests };
            counted.extend(loads.volumes.into_iter().map(each));
        }
    }
    counted
}

async fn carry_out(core: &Arc<Core>, proposal: Proposal) {
    let Proposal { volume, to, reason } = proposal;
    let Ok(owner) = view::volume(&core.state(), &volume).map(|record| record.owner) else { return };
    let request = VolumeMoveRequest { name: volume.clone(), to, reason };
    if let Err(error) = forward::ask(core, owner, NodeOp::VolumeMove(request)).await {
        tracing::warn!(volume, %error, "not moved to balance the load");
    }
}

/// What the coordinators and the VMs of this node have done.
pub(crate) async fn loads_here(core: &Core) -> Loads {
    let each = |volume: Arc<super::LocalVolume>| {
        let (term, coordinator) = (volume.host.term()?, volume.host.serving()?);
        let stats = coordinator.stats();
        let (requests, commits, clients) = (stats.requests, stats.commits, stats.clients);
        Some(VolumeLoad { volume: volume.name.clone(), term: term.0, requests, commits, clients })
    };
    Loads { volumes: core.volumes.all().into_iter().filter_map(each).collect(), vms: vms::loads(core).await }
}
