//! The planned move of a coordinator, driven by the node that has it.
//!
//! ```text
//!   old owner                                          new owner                     clients
//!   close: drain, commit, answer the rest  ----.
//!   CAS: owner, term + 1                        |      record seen: open, serve      record seen: attach, send again
//!   ask the new owner to tell when it serves ---+--->  serves
//!   pause = close .. serves
//! ```
//! When the compare-and-swap fails, the old owner opens again in its old term: nothing has happened. When the new owner
//! does not serve in time, the old one appoints itself with the next term; if that fails too, whoever leads the cluster
//! finds the volume without a serving coordinator and appoints one (heirs.rs).
//!
//! **Invariant:** after the compare-and-swap the old owner opens only with a term of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::Error;
use api::pb;
use lockmgr::Term;
use lockmgr::cluster::{ClusterState, Command, Given, Member, MemberState, VolumeRecord};

use super::Host;
use crate::core::Core;
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
    let move_ = Move { core, host: &volume.host, from: record.clone(), to: to.clone() };
    move_.run().await
}

/// Where to: the named node, or the one that is up with the fewest volumes.
fn target(core: &Arc<Core>, state: &ClusterState, record: &VolumeRecord, to: &str) -> Result<Member, Error> {
    let usable =
        |member: &Member| member.state == MemberState::Up && core.membership.hears(member.id, member.epoch);
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
        return Ok(member.clone());
    }
    let others = state.members.values().filter(|member| member.id != record.owner && usable(member));
    let owned = |member: &Member| state.volumes.values().filter(|other| other.owner == member.id).count();
    others.min_by_key(|member| (owned(member), member.id)).cloned().ok_or_else(|| {
        Error::conflict(format!("volume move {}: no other node is up", record.name))
            .hint("start another node first")
    })
}

struct Move<'a> {
    core: &'a Arc<Core>,
    host: &'a Arc<Host>,
    from: VolumeRecord,
    to: Member,
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
            Some(Err(error)) => return Err(self.reopen(error).await),
            None => return Err(Error::conflict("the coordinator has just been closed")),
        };
        let term = match self.appoint(self.from.term, &self.to).await {
            Ok(term) => term,
            Err(error) => return Err(self.reopen(error).await),
        };
        let serving = match self.await_new_owner(term).await {
            Ok(serving) => serving,
            Err(error) => return Err(self.take_back(term, error).await),
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
                "coordinator of {} moved from {} to {} as asked; metadata paused {pause_ms:.1} ms, {} operations held",
                moved.volume, moved.from, moved.to, moved.held_ops
            ),
        );
        Ok(moved)
    }

    async fn appoint(&self, expect_term: Term, to: &Member) -> Result<Term, Error> {
        let command =
            Command::MoveVolume { name: self.from.name.clone(), expect_term, to: to.id, to_epoch: to.epoch };
        match self.core.propose(command).await?.given {
            Given::Term(term) => Ok(term),
            _ => Err(Error::failed("the cluster gave no term")),
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

    /// The record may be unchanged: then this node goes on in its term. If it is not, settling finds that out.
    async fn reopen(&self, why: Error) -> Error {
        tracing::warn!(volume = self.from.name, error = %why, "move undone");
        self.host.settle_soon();
        why.during(format!("volume move {}: it stays on {}", self.from.name, self.core.config.name))
    }

    /// The new owner does not serve: this node appoints itself again.
    async fn take_back(&self, term: Term, why: Error) -> Error {
        let own = self.core.state().members.get(&self.core.me).cloned();
        let back = match own {
            Some(own) => self.appoint(term, &own).await,
            None => Err(Error::failed("this node is no member any more")),
        };
        self.host.settle_soon();
        match back {
            Ok(_) => {
                why.during(format!("volume move {}: it is back on {}", self.from.name, self.core.config.name))
            }
            Err(error) => {
                // The new owner's incarnation may be in trouble: the detector decides, and the leader appoints an heir.
                tracing::error!(volume = self.from.name, %error, "the volume could not be taken back");
                membership::look_again(self.core);
                why.during(format!("volume move {}", self.from.name)).hint(
                    "`csvctl volume show` tells who owns it; the cluster appoints a living node by itself",
                )
            }
        }
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
