//! This node as a member: its epoch, its lease, and what it thinks of the others.
//!
//! ```text
//!   certificates.rs  this node's own, and its renewal
//!   desk.rs        lets nodes join that have a token
//!   peers.rs       who is talked to and who votes follow from the records
//!   join.rs        BeginEpoch: from here on this incarnation counts
//!   beats.rs       network heartbeats: each answer of a majority prolongs the lease (B1)
//!   lun_beats.rs   LUN heartbeats, on a thread and a queue of their own (B4)
//!   lease.rs       the page that every writer of this node reads before each submit
//!   judge.rs       detector: silence -> verdict; the leader has the node fenced
//!   fencing.rs     Fencing -> fence -> Fenced, and only then anything of it is given to others (A1)
//!   cutting.rs     which fence that is: reservations, leases, agents
//!   place.rs       this node's key on a LUN with reservations
//!   forgotten.rs   what follows when the key is gone and nobody has fenced the node
//!   heirs.rs       pure: who owns what after that
//! ```
//!
//! **Invariant:** a lease ends by itself; everything else here is only about ending it early and for certain.

mod beats;
pub(crate) mod certificates;
mod cutting;
mod desk;
mod fencing;
mod forgotten;
mod heirs;
mod join;
mod judge;
mod lease;
mod lun_beats;
#[cfg(test)]
mod model;
mod peers;
mod place;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api::config::NodeConfig;
use lockmgr::cluster::{ClusterState, MemberState};
use lockmgr::detector::Event;
use lockmgr::timing::Timing;
use lockmgr::{Epoch, NodeId};
use tokio::sync::mpsc;

pub(crate) use beats::answer as answer_beat;
pub(crate) use cutting::{barred, cut_off, own_path};
pub(crate) use desk::let_join;
pub(crate) use fencing::confirm_dead;
pub(crate) use join::begin as begin_epoch;
pub(crate) use lease::Unsuspected;
pub(crate) use lun_beats::LunBeats;
pub(crate) use place::Place;

use crate::core::Core;
use beats::begin_anew;
use lease::LeaseKeeper;

/// This node's view of the members.
#[derive(Debug)]
pub(crate) struct Membership {
    pub(crate) lease: LeaseKeeper,
    /// To the judge. Bounded by the rate of heartbeats; nobody else sends.
    events: mpsc::UnboundedSender<Event>,
    inbox: Mutex<Option<mpsc::UnboundedReceiver<Event>>>,
    /// To the fencing task.
    convicts: mpsc::UnboundedSender<Convict>,
    docket: Mutex<Option<mpsc::UnboundedReceiver<Convict>>>,
    /// The epochs of the nodes that are heard over the network now. Rank: a leaf.
    heard: Mutex<BTreeMap<NodeId, Epoch>>,
    /// The longest lease that each node has advertised on a LUN. Rank: a leaf.
    advertised_ms: Mutex<BTreeMap<NodeId, u64>>,
    /// The incarnations that have said that they are about to leave. Rank: a leaf.
    leaving: Mutex<BTreeSet<(NodeId, Epoch)>>,
}

/// A node's incarnation that must end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Convict {
    pub(crate) node: NodeId,
    pub(crate) epoch: Epoch,
    pub(crate) reason: String,
    /// This node's own detector says so. The leader has one too, so only other verdicts are passed on to it.
    pub(crate) seen_here: bool,
}

impl Membership {
    pub(crate) fn new(config: &NodeConfig, timing: &Timing) -> Self {
        let (events, inbox) = mpsc::unbounded_channel();
        let (convicts, docket) = mpsc::unbounded_channel();
        Self {
            lease: LeaseKeeper::new(config, timing),
            events,
            inbox: Mutex::new(Some(inbox)),
            convicts,
            docket: Mutex::new(Some(docket)),
            heard: Mutex::default(),
            advertised_ms: Mutex::default(),
            leaving: Mutex::default(),
        }
    }

    /// Tells the judge; ignored when the daemon is ending.
    pub(crate) fn observe(&self, event: Event) {
        let _ending = self.events.send(event);
    }

    /// Whether this incarnation of a node is heard over the network.
    pub(crate) fn hears(&self, node: NodeId, epoch: Epoch) -> bool {
        self.heard().get(&node) == Some(&epoch)
    }

    /// A node's heartbeat on a LUN says how long its lease is.
    fn note_lease(&self, node: NodeId, lease_ms: u64) {
        let mut advertised = self.advertised_ms.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = advertised.entry(node).or_default();
        *longest = lease_ms.max(*longest);
    }

    /// The longest lease that a node has advertised; 0 when it was never seen.
    fn advertised_lease_ms(&self, node: NodeId) -> u64 {
        let advertised = self.advertised_ms.lock().unwrap_or_else(PoisonError::into_inner);
        advertised.get(&node).copied().unwrap_or_default()
    }

    fn note_leaving(&self, node: NodeId, epoch: Epoch, leaving: bool) {
        if leaving {
            self.leaving.lock().unwrap_or_else(PoisonError::into_inner).insert((node, epoch));
        }
    }

    /// Whether something can be given to this incarnation of a node: it is heard, and is not about to leave.
    pub(crate) fn can_take(&self, node: NodeId, epoch: Epoch) -> bool {
        let leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner).contains(&(node, epoch));
        !leaving && self.hears(node, epoch)
    }

    fn heard(&self) -> MutexGuard<'_, BTreeMap<NodeId, Epoch>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the tasks of a node that has its epoch.
pub(crate) fn start(core: &Arc<Core>) {
    let take = |slot: &Mutex<Option<_>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(inbox) = take(&core.membership.inbox) {
        core.runtime.spawn(judge::run(Arc::clone(core), inbox));
    }
    let docket = core.membership.docket.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(docket) = docket {
        core.runtime.spawn(fencing::run(Arc::clone(core), docket));
    }
    core.runtime.spawn(beats::run(Arc::clone(core)));
    core.runtime.spawn(peers::align_voters(Arc::clone(core)));
    core.runtime.spawn(fencing::inherit(Arc::clone(core)));
}

/// Follows the records with the addresses of the peers; needed before this node has its epoch.
pub(crate) fn meet_peers(core: &Arc<Core>) {
    core.runtime.spawn(peers::follow(Arc::clone(core)));
    core.runtime.spawn(certificates::follow(Arc::clone(core)));
}

/// Demands that this incarnation of a node is ended; whoever leads the cluster sees to it.
pub(crate) fn convict(core: &Arc<Core>, node: NodeId, epoch: Epoch, reason: String) {
    drop(core.membership.convicts.send(Convict { node, epoch, reason, seen_here: false }));
}

/// Another node's detector holds an incarnation for dead. That counts where this node cannot tell itself: it does not hear
/// the node either, and reaches no LUN directly on which the node's heartbeats would show.
pub(crate) fn testify(core: &Arc<Core>, node: NodeId, epoch: Epoch, reason: String) {
    let reads_a_lun = core.volumes.all().iter().any(|volume| volume.is_direct());
    if !reads_a_lun && !core.membership.hears(node, epoch) {
        convict(core, node, epoch, reason);
    }
}

/// This node's detector holds an incarnation for dead.
fn found_dead(core: &Arc<Core>, node: NodeId, epoch: Epoch, reason: String) {
    drop(core.membership.convicts.send(Convict { node, epoch, reason, seen_here: true }));
}

/// Makes the leader look at the records again; it does so by itself from time to time.
pub(crate) fn look_again(core: &Arc<Core>) {
    core.pulse.beat();
}

/// The members that are up, as this node sees it: in the records, and heard (or this node itself).
pub(crate) fn nodes_up(core: &Core, state: &ClusterState) -> usize {
    let up = state.members.values().filter(|member| member.state == MemberState::Up);
    up.filter(|member| {
        if member.id == core.me {
            core.epoch() == Some(member.epoch)
        } else {
            core.membership.hears(member.id, member.epoch)
        }
    })
    .count()
}
