//! From a verdict to certainty: the leader has a node cut off, and what it held is given to others only after that (A1).
//!
//! ```text
//!   verdict --CAS--> Fencing --fence--> confirmed --CAS--> Fenced --> heirs
//!                                  '--> failed    --CAS--> FenceFailed: quarantine, tried again (A4)
//! ```
//! Only a leader with a quorum gets the first step through (A7). If it dies on the way, the next leader finds `Fencing` in
//! the records and goes on.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use api::Error;
use lockmgr::clock::boottime_ms;
use lockmgr::cluster::{Command, MemberState};
use lockmgr::fence::{Confirmed, Fence, FenceError};
use lockmgr::{Epoch, NodeId};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

use super::{Convict, cutting, heirs};
use crate::core::Core;
use crate::messages::{self, NodeOp};
use crate::view;
use crate::{drain, forward};

/// How often a leader looks for work that a former leader left, and for fences to try again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A fence that has failed is tried again every so many looks: each attempt is an event that an operator reads.
const LOOKS_PER_RETRY: u64 = 30;

/// Carries verdicts out, one after the other.
pub(crate) async fn run(core: Arc<Core>, mut docket: mpsc::UnboundedReceiver<Convict>) {
    let mut open: Vec<Convict> = Vec::new();
    let mut looks = 0_u64;
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let leader = core.cluster.status().leader;
        tokio::select! {
            () = core.done.cancelled() => return,
            Some(convict) = docket.recv() => open.push(convict),
            // The next leader carries out at once what the last one did not come to, which may be its own verdict.
            () = core.cluster.leader_changed(leader) => open.extend(left_behind(&core)),
            _ = ticks.tick() => {
                looks += 1;
                open.extend(left_behind(&core));
            }
        }
        keep_once(&core, &mut open);
        for convict in &open {
            if is_due(&core, convict, looks) {
                see_to(&core, convict).await;
            }
        }
    }
}

/// Drops the verdicts that are carried out, those that turned out to be false in time, and doubles.
fn keep_once(core: &Core, open: &mut Vec<Convict>) {
    let state = core.state();
    let mut seen = BTreeSet::new();
    // Of two verdicts the one that does not rest on silence stays.
    open.sort_by_key(|convict| convict.seen_here);
    open.retain(|convict| {
        let Convict { node, epoch, .. } = convict;
        let counted_on = view::is_up(&state, *node, *epoch);
        let heard_again = convict.seen_here && counted_on && core.membership.hears(*node, *epoch);
        !view::is_over(&state, *node, *epoch) && !heard_again && seen.insert((*node, *epoch))
    });
}

/// A fence that has failed is not tried again at each look.
fn is_due(core: &Core, convict: &Convict, looks: u64) -> bool {
    let state = core.state();
    let quarantined = state.members.get(&convict.node).is_some_and(|it| it.state == MemberState::FenceFailed);
    !quarantined || looks.is_multiple_of(LOOKS_PER_RETRY)
}

async fn see_to(core: &Arc<Core>, convict: &Convict) {
    if convict.node == core.me {
        // Nobody fences itself from outside: it stops, and the others make certain (A8).
        super::beats::over(core, core.me);
    } else if leads(core) {
        execute(core, convict).await;
    } else {
        pass_on(core, convict).await;
    }
}

fn leads(core: &Core) -> bool {
    core.cluster.status().leader == Some(core.me)
}

/// Fences that another leader has begun, or that have failed.
fn left_behind(core: &Core) -> Vec<Convict> {
    if !leads(core) {
        return Vec::new();
    }
    let state = core.state();
    let members = state.members.values();
    let unfinished =
        members.filter(|member| matches!(member.state, MemberState::Fencing | MemberState::FenceFailed));
    unfinished
        .map(|member| Convict {
            node: member.id,
            epoch: member.epoch,
            reason: "its fence is not finished".to_owned(),
            seen_here: true,
        })
        .collect()
}

async fn execute(core: &Arc<Core>, convict: &Convict) {
    let Convict { node, epoch, reason, .. } = convict;
    let name = view::node_name(&core.state(), *node);
    let fencing = core.state().members.get(node).is_some_and(|member| member.state == MemberState::Fencing);
    if !fencing {
        let command = Command::MarkNode { node: *node, epoch: *epoch, state: MemberState::Fencing };
        if let Err(error) = core.propose(command).await {
            tracing::warn!(%node, %epoch, %error, "not fenced");
            return;
        }
        core.note("node.fencing", &name, format!("{reason}; it is being cut off"));
    }
    let began = boottime_ms();
    let state = match fence(core, *node, *epoch).await {
        Ok(confirmed) => {
            let took = boottime_ms().since(began);
            core.note("node.fence-confirmed", &name, format!("after {took} ms: {}", confirmed.how()));
            MemberState::Fenced
        }
        Err(error) => {
            tracing::error!(%node, %epoch, %error, "fence failed: nothing of this node may be reused");
            core.note("node.fence-failed", &name, error.to_string());
            MemberState::FenceFailed
        }
    };
    let command = Command::MarkNode { node: *node, epoch: *epoch, state };
    if let Err(error) = core.propose(command).await {
        tracing::warn!(%node, %epoch, %error, "outcome of the fence not recorded");
    }
}

/// Cuts the node off. Blocks for as long as the fence takes, on a thread of its own.
async fn fence(core: &Arc<Core>, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
    let fence = cutting::fence_of(core, node, epoch).await?;
    tokio::task::spawn_blocking(move || fence.fence(node, epoch)).await.unwrap_or_else(|error| {
        Err(FenceError::NotConfirmed { node, epoch, reason: format!("the fence was given up: {error}") })
    })
}

/// An operator vouches that a node in quarantine is off: what it held may be reused (A4).
pub(crate) async fn confirm_dead(
    core: &Arc<Core>,
    node: NodeId,
    epoch: Epoch,
    who: &str,
) -> Result<(), Error> {
    let confirmed = Confirmed::by_operator(node, epoch, who);
    core.propose(Command::MarkNode { node, epoch, state: MemberState::Fenced }).await?;
    core.note("node.confirmed-dead", &view::node_name(&core.state(), node), confirmed.to_string());
    super::look_again(core);
    Ok(())
}

/// Another node leads: it shall see to it.
async fn pass_on(core: &Arc<Core>, convict: &Convict) {
    let leader = core.cluster.status().leader.filter(|leader| *leader != convict.node);
    let Some(leader) = leader else { return };
    let verdict = messages::Convict {
        node: convict.node.0.into(),
        epoch: convict.epoch.0,
        reason: convict.reason.clone(),
    };
    // What this node's detector says is a testimony only: a leader that hears the node, or reads the LUN, knows better.
    let op = if convict.seen_here { NodeOp::Testify(verdict) } else { NodeOp::Convict(verdict) };
    // A leader that hangs must not keep this node from acting when it has become the leader itself.
    match tokio::time::timeout(
        Duration::from_millis(core.timing.suspect_after_ms),
        forward::ask(core, leader, op),
    )
    .await
    {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "verdict not passed on"),
        Err(_) => tracing::debug!(%leader, "the leader takes no verdict"),
    }
}

/// While this node leads: gives what was fenced nodes' to others.
pub(crate) async fn inherit(core: Arc<Core>) {
    let mut state = core.cluster.watch();
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut retry_failed = false;
    loop {
        let leader = core.cluster.status().leader;
        if leads(&core) {
            let now = core.state();
            let away = |node: NodeId| core.mesh.connection(node.0).is_err();
            let left = drain::forgotten(&now, &core.cluster.status().voters, away);
            for command in heirs::appoint(&now, retry_failed).into_iter().chain(left) {
                if let Err(error) = core.propose(command).await {
                    tracing::debug!(%error, "inheritance not carried out");
                }
            }
        }
        tokio::select! {
            () = core.done.cancelled() => return,
            Ok(()) = state.changed() => {
                state.mark_unchanged();
                retry_failed = false;
            }
            () = core.cluster.leader_changed(leader) => retry_failed = false,
            _ = ticks.tick() => retry_failed = true,
        }
    }
}
