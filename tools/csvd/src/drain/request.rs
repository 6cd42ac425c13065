//! What a user asks for: the record of a drain is written, and its progress told until it has come to something.
//!
//! The record is what counts. A user who stops looking, or a node that dies, changes nothing about it.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;

use api::{Error, pb};
use futures::{Stream, stream};
use lockmgr::NodeId;
use lockmgr::cluster::{ClusterState, Command, Drain, DrainPhase, Member, MemberState};
use tokio::sync::watch;

use super::carry;
use crate::core::{Core, refused};
use crate::view;

/// Progress, message by message.
pub(crate) type Progress = Pin<Box<dyn Stream<Item = Result<pb::NodeDrainProgress, Error>> + Send>>;

/// Empties a node and keeps it empty.
pub(crate) async fn begin(core: &Arc<Core>, name: &str, dry_run: bool) -> Result<Progress, Error> {
    drain(core, name, false, dry_run).await.map_err(|error| error.during(format!("node drain {name}")))
}

/// Empties this node, which then leaves the cluster.
pub(crate) async fn begin_leave(core: &Arc<Core>, dry_run: bool) -> Result<Progress, Error> {
    drain(core, &core.config.name, true, dry_run).await.map_err(|error| error.during("node leave"))
}

async fn drain(core: &Arc<Core>, name: &str, for_good: bool, dry_run: bool) -> Result<Progress, Error> {
    core.all_speak(2, "a drain")?;
    let state = core.cluster.read().await.map_err(|error| refused(&error))?;
    let member = view::member(&state, name)?;
    check_others(&state, member)?;
    let now = state.drains.get(&member.id);
    let to = wanted(&state, member.id, now, for_good);
    if dry_run {
        let goal = Goal { dry_run, ..Goal::of(core, member, true) };
        let mut rehearsed = (*state).clone();
        rehearsed.drains.insert(member.id, to);
        let shown = goal.progress(&rehearsed);
        return Ok(Box::pin(stream::iter([Ok(pb::NodeDrainProgress { done: true, dry_run, ..shown })])));
    }
    if now.is_none_or(|now| now.phase != DrainPhase::Drained || now.for_good != for_good) {
        let expect_step = now.map_or(0, |drain| drain.step);
        core.propose(Command::SetDrain { node: member.id, expect_step, to: Some(to) }).await?;
    }
    Ok(follow(core, Goal::of(core, member, true)))
}

/// Somebody must be there to take what the node has.
fn check_others(state: &ClusterState, member: &Member) -> Result<(), Error> {
    if state.open_members().any(|other| other.id != member.id) {
        return Ok(());
    }
    Err(Error::conflict("no other node is up that could take what it has")
        .hint("start another node, or let a drained one take part again with `csvctl node resume`"))
}

/// The record of a drain that begins, or goes on. What an earlier one has moved away comes back too.
fn wanted(state: &ClusterState, node: NodeId, now: Option<&Drain>, for_good: bool) -> Drain {
    let (mut volumes, mut vms) = now.map(|now| (now.volumes.clone(), now.vms.clone())).unwrap_or_default();
    volumes.extend(state.volumes.values().filter(|it| it.owner == node).map(|it| it.name.clone()));
    let runs = |vm: &&lockmgr::cluster::VmRecord| vm.owner == node && ClusterState::is_active(vm);
    vms.extend(state.vms.values().filter(runs).map(|vm| vm.name.clone()));
    Drain { step: 0, phase: DrainPhase::Draining, for_good, volumes, vms, stuck: BTreeMap::new() }
}

/// Lets a node take part again, and gives it back what it had.
pub(crate) async fn resume(core: &Arc<Core>, name: &str) -> Result<Progress, Error> {
    let during = |error: Error| error.during(format!("node resume {name}"));
    let state = core.cluster.read().await.map_err(|error| refused(&error))?;
    let member = view::member(&state, name)?;
    let Some(now) = state.drains.get(&member.id) else {
        return Err(during(
            Error::conflict("it is not drained").hint("`csvctl node list` shows which nodes are"),
        ));
    };
    if member.state != MemberState::Up {
        return Err(during(Error::conflict(format!("it is {}", member.state)).hint("start it first")));
    }
    if now.phase != DrainPhase::Resuming {
        let stuck = BTreeMap::new();
        let to = Drain { phase: DrainPhase::Resuming, for_good: false, stuck, ..now.clone() };
        let command = Command::SetDrain { node: member.id, expect_step: now.step, to: Some(to) };
        core.propose(command).await.map_err(during)?;
    }
    Ok(follow(core, Goal::of(core, member, false)))
}

/// What somebody waits for.
struct Goal {
    node: NodeId,
    name: String,
    dir: String,
    /// Empty; otherwise: everything is back.
    away: bool,
    dry_run: bool,
}

impl Goal {
    fn of(core: &Core, member: &Member, away: bool) -> Self {
        let here = member.id == core.me;
        let dir = if here { core.config.dir.display().to_string() } else { String::new() };
        Self { node: member.id, name: member.name.clone(), dir, away, dry_run: false }
    }

    fn progress(&self, state: &ClusterState) -> pb::NodeDrainProgress {
        let drain = state.drains.get(&self.node);
        let (volumes, vms) = carry::left(state, self.node, self.away);
        let count = |all: usize, left: usize| u32::try_from(all.saturating_sub(left)).unwrap_or(u32::MAX);
        pb::NodeDrainProgress {
            node: self.name.clone(),
            phase: drain.map_or_else(|| "resumed".to_owned(), |drain| drain.phase.to_string()),
            volumes_moved: drain.map_or(0, |drain| count(drain.volumes.len(), volumes.len())),
            vms_moved: drain.map_or(0, |drain| count(drain.vms.len(), vms.len())),
            volumes,
            vms,
            stuck: drain.map(carry::stuck).unwrap_or_default(),
            done: match drain {
                Some(drain) => self.away && drain.phase == DrainPhase::Drained,
                None => !self.away || !state.members.contains_key(&self.node),
            },
            dry_run: self.dry_run,
            dir: self.dir.clone(),
        }
    }

    /// Why it will not come to that without help.
    fn failed(&self, state: &ClusterState) -> Option<Error> {
        let drain = state.drains.get(&self.node);
        if self.away
            && state.members.contains_key(&self.node)
            && drain.is_none_or(|drain| drain.phase == DrainPhase::Resuming)
        {
            return Some(Error::conflict(format!("the drain of node {} was given up", self.name)));
        }
        let drain = drain.filter(|drain| !drain.stuck.is_empty() && self.away)?;
        let why: Vec<_> = drain.stuck.iter().map(|(what, why)| format!("{what}: {why}")).collect();
        Some(Error::conflict(format!("node {} is not empty: {}", self.name, why.join("; "))).hint(format!(
            "put that right: the drain goes on by itself; `csvctl node resume {}` gives it up",
            self.name
        )))
    }
}

/// Somebody who looks at a drain.
struct Follower {
    goal: Goal,
    records: watch::Receiver<Arc<ClusterState>>,
    shown: Option<pb::NodeDrainProgress>,
}

fn follow(core: &Arc<Core>, goal: Goal) -> Progress {
    let follower = Follower { goal, records: core.cluster.watch(), shown: None };
    Box::pin(stream::unfold(Some(follower), |follower| async move {
        let mut follower = follower?;
        match follower.next().await {
            Ok(news) => {
                let more = (!news.done).then_some(follower);
                Some((Ok(news), more))
            }
            Err(error) => Some((Err(error), None)),
        }
    }))
}

impl Follower {
    async fn next(&mut self) -> Result<pb::NodeDrainProgress, Error> {
        loop {
            let state = self.records.borrow_and_update().clone();
            let news = self.goal.progress(&state);
            if self.shown.as_ref() != Some(&news) {
                self.shown = Some(news.clone());
                return Ok(news);
            }
            if let Some(error) = self.goal.failed(&state) {
                return Err(error);
            }
            self.records.changed().await.map_err(|_| Error::unreachable("the daemon is ending"))?;
        }
    }
}
