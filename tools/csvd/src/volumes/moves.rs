//! The planned move of a coordinator, driven by the node that has it.
//!
//! ```text
//!   old owner                                          new owner                     clients
//!   close: drain, commit, answer the rest  ----.
//!   CAS: owner, term + 1                        |      record seen: open, serve      record seen: attach, send again
//!   ask the new owner to tell when it serves ---+--->  serves
//!   pause = close .. serves
//! ```
//! When the compare-and-swap is refused, the old owner opens again in its old term: nothing has happened. When its outcome
//! is not known, the old owner appoints itself with the next term (host.rs). A new owner that cannot serve says so in the
//! record, and one that is dead is cut off: in both cases whoever leads the cluster appoints another (heirs.rs).
//!
//! **Invariant:** once it is proposed, the old owner opens only with a term of its own; the term of a living new owner is
//! ended by nobody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::Error;
use api::pb;
use lockmgr::Term;
use lockmgr::cluster::{ClusterState, Command, Given, Member, Outcome, ProposeError, VolumeRecord};

use super::Host;
use crate::core::{Core, refused};
use crate::forward;
use crate::messages::{AwaitCoordinator, NodeAnswer, NodeOp, Serving};
use crate::{membership, view};

/// Longest time that the new owner may take to serve.
const SERVES_WITHIN: Duration = Duration::from_secs(15);

/// Hands the coordinator of a volume over, at its owner.
pub(crate) async fn hand_over(
    core: &Arc<Core>,
    request: pb::VolumeMoveRequest,
) -> Result<pb::VolumeMoved, Error> {
    let state = core.state();
    let record = view::volume(&state, &request.name)?;
    let volume = core
        .volumes
        .get(record.id)
        .ok_or_else(|| Error::conflict(format!("volume {} is not open on this node", record.name)))?;
    let to = target(core, &state, record, &request.to)?;
    let reason = if request.reason.is_empty() { "as asked".to_owned() } else { request.reason };
    let move_ = Move { core, host: &volume.host, from: record.clone(), to: to.clone(), reason };
    move_.run().await
}

/// Where to: the named node, or the one that is up with the fewest volumes. A node that is drained is given nothing.
fn target(core: &Arc<Core>, state: &ClusterState, record: &VolumeRecord, to: &str) -> Result<Member, Error> {
    let usable =
        |member: &Member| state.can_serve(member) && core.membership.can_take(member.id, member.epoch);
    if !to.is_empty() {
        let member = view::member(state, to)?;
        if member.id == record.owner {
            return Err(Error::conflict(format!("volume {} is already owned by {to}", record.name))
                .hint("name another node with --to"));
        }
        if !usable(member) {
            return Err(Error::conflict(format!(
                "volume move {}: node {to} is {} or not reachable",
                record.name, member.state
            ))
            .hint("`csvctl node list` shows which nodes are up"));
        }
        if state.is_closed(member.id) {
            return Err(Error::conflict(format!("volume move {}: node {to} is drained", record.name))
                .hint(format!("`csvctl node resume {to}` lets it take part again")));
        }
        return Ok(member.clone());
    }
    let others = state.open_members().filter(|member| member.id != record.owner && usable(member));
    let owned = |member: &Member| state.volumes.values().filter(|other| other.owner == member.id).count();
    others.min_by_key(|member| (owned(member), member.id)).cloned().ok_or_else(|| {
        Error::conflict(format!("volume move {}: no other node is up that is not drained", record.name))
            .hint("start another node first")
    })
}

struct Move<'a> {
    core: &'a Arc<Core>,
    host: &'a Arc<Host>,
    from: VolumeRecord,
    to: Member,
    /// Why it moves, for the events.
    reason: String,
}

impl Move<'_> {
    async fn run(&self) -> Result<pb::VolumeMoved, Error> {
        let _work = self.host.begin_work().await;
        if self.host.term() != Some(self.from.term) {
            return Err(Error::conflict(format!(
                "volume move {}: its coordinator is not serving on {} now",
                self.from.name, self.core.config.name
            ))
            .hint("`csvctl volume show` tells where it is; try again"));
        }
        self.host.take_held();
        let start = now();
        let closed = match self.host.shut("it moves").await {
            Some(Ok(report)) => report,
            Some(Err(error)) => return Err(self.reopen(error)),
            None => return Err(Error::conflict("the coordinator has just been closed")),
        };
        let term = match self.appoint().await {
            Ok(term) => term,
            Err(error) => return Err(self.reopen(error)),
        };
        let serving = match self.await_new_owner(term).await {
            Ok(serving) => serving,
            Err(error) => return Err(self.not_taken_over(term, error)),
        };
        let pause_ms = start.elapsed().as_secs_f64() * 1000.0;
        let moved = pb::VolumeMoved {
            volume: self.from.name.clone(),
            from: self.core.config.name.clone(),
            to: self.to.name.clone(),
            term: term.0,
            pause_ms,
            held_ops: closed.held_ops + self.host.take_held() + serving.held_ops,
        };
        self.core.note(
            "volume.move",
            &moved.volume,
            format!(
                "coordinator of {} moved from {} to {} {}; metadata paused {pause_ms:.1} ms, {} operations held",
                moved.volume, moved.from, moved.to, self.reason, moved.held_ops
            ),
        );
        Ok(moved)
    }

    /// The commit point of the move.
    async fn appoint(&self) -> Result<Term, Error> {
        let Self { core, host, from, to, .. } = self;
        let (name, expect_term) = (from.name.clone(), from.term);
        let command = Command::MoveVolume { name, expect_term, to: to.id, to_epoch: to.epoch };
        host.renounce(from.term);
        match core.cluster.propose(command).await {
            Ok(Outcome { given: Given::Term(term), .. }) => Ok(term),
            Ok(_) => Err(Error::failed("the cluster gave no term")),
            Err(error) => {
                if is_undone(&error) {
                    host.keep(from.term);
                }
                Err(refused(&error))
            }
        }
    }

    async fn await_new_owner(&self, term: Term) -> Result<Serving, Error> {
        let op = NodeOp::AwaitCoordinator(AwaitCoordinator { volume: self.from.name.clone(), term: term.0 });
        let asked = forward::ask(self.core, self.to.id, op);
        match tokio::time::timeout(SERVES_WITHIN, asked).await {
            Ok(Ok(NodeAnswer::Serving(serving))) => Ok(serving),
            Ok(Ok(_)) => Err(Error::failed("the new owner's answer cannot be read")),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::failed(format!(
                "node {} did not open the coordinator within {} s",
                self.to.name,
                SERVES_WITHIN.as_secs()
            ))),
        }
    }

    /// The record may be unchanged: then this node goes on. If it is not, settling finds that out.
    fn reopen(&self, why: Error) -> Error {
        tracing::warn!(volume = self.from.name, error = %why, "move undone");
        self.host.settle_soon();
        why.during(format!("volume move {}: it stays on {}", self.from.name, self.core.config.name))
    }

    /// The new owner does not serve (yet). Only itself or the leader may end its term: it may be serving a moment later.
    fn not_taken_over(&self, term: Term, why: Error) -> Error {
        tracing::error!(volume = self.from.name, %term, error = %why, "the new owner does not serve");
        membership::look_again(self.core);
        why.during(format!("volume move {}", self.from.name)).hint(
            "`csvctl volume show` tells who owns it; the cluster appoints another node if that one cannot",
        )
    }
}

/// Whether a proposal that failed has certainly changed nothing, and never will.
fn is_undone(error: &ProposeError) -> bool {
    match error {
        ProposeError::Conflict { .. } | ProposeError::Invalid { .. } | ProposeError::NoQuorum { .. } => true,
        ProposeError::OutcomeUnknown { .. } | ProposeError::Stopped { .. } => false,
    }
}

/// At the new owner: returns when the coordinator of `term` serves here, or says why it does not.
pub(crate) async fn await_coordinator(core: &Arc<Core>, asked: AwaitCoordinator) -> Result<Serving, Error> {
    let term = Term(asked.term);
    let mut state = core.cluster.watch();
    loop {
        let now = state.borrow_and_update().clone();
        let record = view::volume(&now, &asked.volume).ok();
        match record {
            Some(record) if record.term > term || (record.term == term && record.owner != core.me) => {
                return Err(Error::conflict("another node was appointed in the meantime"));
            }
            Some(record) if record.term == term && record.state == lockmgr::cluster::VolumeState::Failed => {
                return Err(Error::failed(&record.reason));
            }
            _ => {}
        }
        let host = record.and_then(|record| core.volumes.host(record.id));
        tokio::select! {
            () = serves(host.as_ref(), term) => {
                let held_ops = host.map_or(0, |host| host.take_held());
                return Ok(Serving { held_ops });
            }
            changed = state.changed() => changed.map_err(|_| Error::failed("the daemon is ending"))?,
        }
    }
}

async fn serves(host: Option<&Arc<Host>>, term: Term) {
    match host {
        Some(host) => host.serves(term).await,
        None => std::future::pending().await,
    }
}

#[expect(clippy::disallowed_methods, reason = "measures the pause that it reports")]
fn now() -> Instant {
    Instant::now()
}
