//! Heartbeats over the network: "I am here", answered by "I still believe you".

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use lockmgr::clock::boottime_ms;
use lockmgr::detector::Event;
use lockmgr::{Epoch, NodeId};
use prost::Message;
use tokio::time::MissedTickBehavior;
use wire::service;

use crate::core::Core;
use crate::messages::{Beat, BeatReply};
use crate::view;

/// Sends heartbeats until the daemon ends.
pub(crate) async fn run(core: Arc<Core>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(core.timing.beat_ms));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = core.done.cancelled() => return,
            _ = ticks.tick() => {}
        }
        core.membership.lease.set_voters(&core.cluster.status().voters);
        core.membership.lease.tick();
        for member in core.state().members.values().filter(|member| member.id != core.me) {
            core.runtime.spawn(beat(Arc::clone(&core), member.id));
        }
    }
}

/// One heartbeat to one node. An answer that takes longer than the lease would prolong nothing.
async fn beat(core: Arc<Core>, to: NodeId) {
    let Some(epoch) = core.epoch() else { return };
    let sent_at = boottime_ms();
    let body = Beat { epoch: epoch.0, leaving: core.stop.is_cancelled() }.encode_to_vec().into();
    let limit = Duration::from_millis(core.timing.lease_ms);
    let call = core.mesh.call(to.0, service::HEARTBEAT, body);
    let Ok(Ok(reply)) = tokio::time::timeout(limit, call).await else { return };
    let Ok(reply) = BeatReply::decode(reply) else { return };
    if reply.over {
        over(&core, to);
        return;
    }
    // A node that is being fenced must not hold out for ever: nobody renews its lease any more (B1).
    if !reply.barred {
        core.membership.lease.answered(to, sent_at);
    }
    if reply.epoch > 0 {
        core.membership.observe(Event::NetworkBeat { node: to, epoch: Epoch(reply.epoch) });
    }
}

/// The others have moved on without this incarnation: whatever it holds is not its own any more (A3).
pub(super) fn over(core: &Arc<Core>, told_by: NodeId) {
    if !core.stop.is_cancelled() {
        tracing::error!(%told_by, "this incarnation was declared over: all I/O is stopped, the node begins anew");
    }
    begin_anew(core);
}

/// Ends this incarnation at once; the next one follows, unless the daemon is to end.
pub(super) fn begin_anew(core: &Arc<Core>) {
    core.membership.lease.revoke();
    core.vms.kill_all();
    if !core.stop.is_cancelled() {
        core.begin_anew.store(true, Ordering::Release);
        core.stop.cancel();
    }
}

/// Answers a heartbeat of `from`.
pub(crate) fn answer(core: &Arc<Core>, from: NodeId, body: Bytes) -> Result<Bytes, prost::DecodeError> {
    let beat = Beat::decode(body)?;
    let epoch = Epoch(beat.epoch);
    let over = view::is_over(&core.state(), from, epoch);
    if !over {
        core.membership.observe(Event::NetworkBeat { node: from, epoch });
        core.membership.note_leaving(from, epoch, beat.leaving);
    }
    let barred = view::is_being_cut_off(&core.state(), from, epoch);
    let own = core.epoch().map_or(0, |epoch| epoch.0);
    Ok(BeatReply { epoch: own, over, barred }.encode_to_vec().into())
}
