//! The fence that a node needs: all kinds that the volumes of the cluster have.
//!
//! | kind of a volume | what is done |
//! |---|---|
//! | `reservation` | this node takes the key off the LUN, or a node that reaches the LUN does |
//! | `lease` | enough voters refuse to renew the lease from now on, then it is waited out |
//! | `agent` | the program of the configuration, or the built-in kill |
//!
//! A witness has no volume, so nothing is done to it.
//!
//! **Invariant:** whoever takes a key off has seen in its own copy of the records that the node is being fenced (A7).

use std::sync::Arc;
use std::time::Duration;

use api::Error;
use api::config::FenceConfig;
use lockmgr::clock::boottime_ms;
use lockmgr::cluster::{ClusterState, FenceKind, VolumeRecord};
use lockmgr::fence::{
    AgentFence, Cutter, EveryFence, Fence, FenceError, LeaseFence, LocalKill, NothingToCut, OperatorFence,
    OwnPath, ReservationFence, refusals_needed,
};
use lockmgr::{Epoch, Millis, NodeId, VolumeId};
use uuid::Uuid;

use crate::core::Core;
use crate::messages::{Barred, CutOff, NodeOp};
use crate::{forward, view};

/// Longest wait for one node's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Pause before another attempt.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Longest time in which a LUN must have been asked through somebody, before the fence counts as failed.
const CUT_WITHIN_MS: u64 = 10_000;

/// What cuts `node` in `epoch` off for certain, on every volume that it may have written to.
pub(super) async fn fence_of(core: &Arc<Core>, node: NodeId, epoch: Epoch) -> Result<EveryFence, FenceError> {
    let state = core.state();
    if state.witnesses.contains(&node) {
        return Ok(EveryFence::new(vec![Box::new(NothingToCut)]));
    }
    let of_kind = |kind| state.volumes.values().filter(move |record| record.fence_kind == kind);
    let mut ways: Vec<Box<dyn Fence>> = Vec::new();
    let devices: Vec<Box<dyn Cutter>> = of_kind(FenceKind::Reservation)
        .map(|record| Box::new(AnyPath::new(core, record)) as Box<dyn Cutter>)
        .collect();
    if !devices.is_empty() {
        ways.push(Box::new(ReservationFence::new(devices)));
    }
    // Without a volume there is nothing to protect but what the agent was configured for.
    if of_kind(FenceKind::Agent).next().is_some() || state.volumes.is_empty() {
        ways.push(agent(core));
    }
    if of_kind(FenceKind::Lease).next().is_some() {
        let begun = bar(core, node, epoch).await?;
        let lease_ms = core.membership.advertised_lease_ms(node);
        ways.push(Box::new(LeaseFence::new(&core.timing, lease_ms, begun)));
    }
    Ok(EveryFence::new(ways))
}

fn agent(core: &Core) -> Box<dyn Fence> {
    let limit = Duration::from_millis(core.timing.fence_limit_ms);
    match &core.config.fence {
        FenceConfig::Operator => Box::new(OperatorFence),
        FenceConfig::LocalKill => {
            let files = core
                .config
                .members
                .iter()
                .filter_map(|member| member.pid_file.clone().map(|file| (NodeId(member.id), file)));
            Box::new(LocalKill::new(files.collect(), limit))
        }
        FenceConfig::Agent { program, timeout_ms } => {
            Box::new(AgentFence::new(program.clone(), Duration::from_millis(*timeout_ms)))
        }
    }
}

/// Makes sure that no majority renews the node's lease any more, and gives a moment after that (B1).
async fn bar(core: &Arc<Core>, node: NodeId, epoch: Epoch) -> Result<Millis, FenceError> {
    let not_confirmed = |reason| FenceError::NotConfirmed { node, epoch, reason };
    let order = Barred { node: node.0.into(), epoch: epoch.0, applied: core.state().applied };
    let voters: Vec<_> = core.cluster.status().voters.into_iter().filter(|voter| *voter != node).collect();
    let needed = refusals_needed(voters.len());
    let answers = voters.iter().map(|voter| {
        let asked = forward::ask(core, *voter, NodeOp::Barred(order));
        async { matches!(tokio::time::timeout(ANSWER_WITHIN, asked).await, Ok(Ok(_))) }
    });
    let refusing = futures::future::join_all(answers).await.into_iter().filter(|refuses| *refuses).count();
    if refusing < needed {
        let why = format!("{refusing} of {needed} nodes refuse to renew its lease; the others do not answer");
        return Err(not_confirmed(why));
    }
    Ok(boottime_ms())
}

/// Answers when this node renews the lease of an incarnation no more.
pub(crate) async fn barred(core: &Arc<Core>, asked: Barred) -> Result<(), Error> {
    let state = records_of(core, asked.applied).await?;
    let node = node_id(asked.node)?;
    if view::is_up(&state, node, Epoch(asked.epoch)) {
        return Err(Error::conflict(format!("node {node} is in good standing")));
    }
    Ok(())
}

/// Takes the key of a node that is being fenced off a LUN which this node reaches.
pub(crate) async fn cut_off(core: &Arc<Core>, asked: CutOff) -> Result<(), Error> {
    let state = records_of(core, asked.applied).await?;
    let (node, epoch) = (node_id(asked.node)?, Epoch(asked.epoch));
    if view::is_up(&state, node, epoch) {
        return Err(Error::conflict(format!("node {node} is in good standing: nobody is to cut it off")));
    }
    let volume = Uuid::from_slice(&asked.volume).map_err(|_| Error::usage("no such volume"))?;
    let core = Arc::clone(core);
    let cutting = move || own_path(&core, VolumeId(volume)).and_then(|path| path.cut(node, epoch));
    let cut = tokio::task::spawn_blocking(cutting).await.map_err(Error::failed)?;
    cut.map(drop).map_err(Error::failed)
}

async fn records_of(core: &Arc<Core>, applied: u64) -> Result<Arc<ClusterState>, Error> {
    let mut records = core.cluster.watch();
    let seen = records.wait_for(|state| state.applied >= applied).await.map_err(Error::failed)?;
    Ok(Arc::clone(&seen))
}

fn node_id(number: u32) -> Result<NodeId, Error> {
    u16::try_from(number).map(NodeId).map_err(|_| Error::usage("no such node"))
}

/// The LUN as this node reaches it.
pub(crate) fn own_path(core: &Arc<Core>, volume: VolumeId) -> Result<OwnPath, String> {
    let road = core.volumes.get(volume).and_then(|volume| volume.road());
    let road = road.ok_or("the volume is not open here")?;
    let (key, device) = road.reservations()?;
    Ok(OwnPath::new(key, road.name().to_owned(), device))
}

/// A LUN by whichever node reaches it.
struct AnyPath {
    core: Arc<Core>,
    volume: VolumeId,
    name: String,
}

impl AnyPath {
    fn new(core: &Arc<Core>, record: &VolumeRecord) -> Self {
        Self { core: Arc::clone(core), volume: record.id, name: record.name.clone() }
    }

    /// Here, or by way of a peer.
    fn try_all(&self, node: NodeId, epoch: Epoch) -> Result<String, String> {
        let here = own_path(&self.core, self.volume).and_then(|path| path.cut(node, epoch));
        let mut refusals = match here {
            Ok(how) => return Ok(how),
            Err(why) => vec![format!("{}: {why}", self.core.config.name)],
        };
        let state = self.core.state();
        let order = CutOff {
            volume: self.volume.0.as_bytes().to_vec(),
            node: node.0.into(),
            epoch: epoch.0,
            applied: state.applied,
        };
        let peers = state.members.values().filter(|member| {
            member.id != self.core.me && member.id != node && view::is_up(&state, member.id, member.epoch)
        });
        for peer in peers {
            let asked = forward::ask(&self.core, peer.id, NodeOp::CutOff(order.clone()));
            let answer =
                self.core.runtime.block_on(async { tokio::time::timeout(ANSWER_WITHIN, asked).await });
            match answer {
                Ok(Ok(_)) => return Ok(format!("by {}", peer.name)),
                Ok(Err(error)) => refusals.push(format!("{}: {}", peer.name, error.message)),
                Err(_) => refusals.push(format!("{}: no answer", peer.name)),
            }
        }
        Err(refusals.join("; "))
    }
}

impl Cutter for AnyPath {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn cut(&self, node: NodeId, epoch: Epoch) -> Result<String, String> {
        let end = boottime_ms().plus(CUT_WITHIN_MS);
        loop {
            let outcome = self.try_all(node, epoch);
            if outcome.is_ok() || boottime_ms() >= end || self.core.done.is_cancelled() {
                return outcome;
            }
            self.core.runtime.block_on(tokio::time::sleep(AGAIN_AFTER));
        }
    }
}
