//! The cluster's records: who is a member, who coordinates a volume, who runs a VM.
//!
//! Every node holds a copy; the copies differ only in how far they have come. Records are small truths on which
//! authority rests, so they change only by compare-and-swap ([`super::Command`]).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::command::{Command, VmUpdate};
use super::drain::Drain;
use crate::{ClusterId, Epoch, NodeId, Term, VolumeId};

/// Events that are kept; older ones are dropped.
pub const EVENTS_MAX: usize = 1024;

/// All records, as of one moment of the log.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterState {
    /// The cluster; nothing until it was created.
    pub cluster: Option<ClusterId>,
    /// Its name.
    pub name: String,
    /// Members by id.
    pub members: BTreeMap<NodeId, Member>,
    /// Members that vote and do nothing else: they have no volumes and run no VMs.
    pub witnesses: BTreeSet<NodeId>,
    /// Join tickets that are open: digest of the secret, and when it expires in ms since 1970.
    pub tickets: BTreeMap<[u8; 32], u64>,
    /// Highest node number that was ever given out.
    pub nodes_given: u16,
    /// Volumes by name.
    pub volumes: BTreeMap<String, VolumeRecord>,
    /// Virtual machines by name.
    pub vms: BTreeMap<String, VmRecord>,
    /// Nodes that are being emptied, are empty, or get back what they had.
    pub drains: BTreeMap<NodeId, Drain>,
    /// The last renewal of the members' certificates.
    pub renewal: Renewal,
    /// What was set for the whole cluster; what is not here has its default.
    pub settings: BTreeMap<String, String>,
    /// What nodes can give to guests as a processor: the incarnation that said so, and the record, opaque here.
    pub processors: BTreeMap<NodeId, (Epoch, Bytes)>,
    /// Processors that guests were given, by version. None is ever changed.
    pub baselines: BTreeMap<u32, Baseline>,
    /// The last [`EVENTS_MAX`] events, oldest first.
    pub events: VecDeque<Arc<EventRecord>>,
    /// Position in the log up to which this copy has come.
    pub applied: u64,
}

/// A processor that all nodes of one maker could give to guests when it was frozen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Baseline {
    /// Maker of the processors.
    pub vendor: String,
    /// The processor, opaque here.
    pub record: Bytes,
}

impl ClusterState {
    /// The newest baseline for processors of a maker.
    #[must_use]
    pub fn newest_baseline(&self, vendor: &str) -> Option<(u32, &Baseline)> {
        let of_vendor = |(_, baseline): &(&u32, &Baseline)| baseline.vendor == vendor;
        self.baselines.iter().rev().find(of_vendor).map(|(version, baseline)| (*version, baseline))
    }

    /// The members that are up and can have volumes and VMs.
    pub fn serving(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|member| self.can_serve(member))
    }

    /// Whether a member is up and can have volumes and VMs.
    #[must_use]
    pub fn can_serve(&self, member: &Member) -> bool {
        member.state == MemberState::Up && !self.witnesses.contains(&member.id)
    }
}

/// A renewal of the members' certificates. By each node's own clock: security only, no safety rests on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Renewal {
    /// Certificates that were issued before this moment are to be renewed, in ms since 1970.
    pub before_ms: u64,
    /// From this moment on they are refused.
    pub refused_from_ms: u64,
}

/// One node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where its peers reach it.
    pub address: String,
    /// Its incarnation; 0 before it first joined.
    pub epoch: Epoch,
    /// What the quorum holds of it.
    pub state: MemberState,
    /// When this incarnation began, as its node's clock had it, in ms since 1970.
    pub joined_ms: u64,
}

/// What the quorum holds of a node's incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberState {
    /// Not there: never came, or left in order. It holds nothing.
    Down,
    /// A member in good standing.
    Up,
    /// Presumed dead; somebody is cutting it off. Nothing of it may be reused yet.
    Fencing,
    /// Confirmed cut off: what it held may be reused.
    Fenced,
    /// Could not be cut off: quarantined until a fence succeeds or an operator confirms that it is off.
    FenceFailed,
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Down => "down",
            Self::Up => "up",
            Self::Fencing => "fencing",
            Self::Fenced => "fenced",
            Self::FenceFailed => "fence-failed",
        })
    }
}

/// How a volume's dead nodes are cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FenceKind {
    /// Persistent reservations on the LUN.
    Reservation,
    /// A program that powers the node off.
    Agent,
    /// Time: the node stops by itself before its lease ends, others wait longer.
    Lease,
}

impl fmt::Display for FenceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reservation => "reservation",
            Self::Agent => "agent",
            Self::Lease => "lease",
        })
    }
}

/// One volume and its coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Unique in the cluster.
    pub name: String,
    /// As in its superblock.
    pub id: VolumeId,
    /// Where every node finds the LUN.
    pub lun_uri: String,
    /// The coordinator.
    pub owner: NodeId,
    /// Incarnation of the coordinator when it was appointed: another one is not the owner.
    pub owner_epoch: Epoch,
    /// The coordinator's reign; grows by one with each appointment.
    pub term: Term,
    /// How its dead nodes are cut off.
    pub fence_kind: FenceKind,
    /// What its coordinator last reported of this term.
    pub state: VolumeState,
    /// Why it is not online; empty otherwise.
    pub reason: String,
}

/// What a coordinator has reported of its term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VolumeState {
    /// A coordinator is appointed and has not reported yet.
    Opening,
    /// It serves.
    Online,
    /// Closed in order.
    Offline,
    /// It could not be opened; see the reason.
    Failed,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Opening => "opening",
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Failed => "failed",
        })
    }
}

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmRecord {
    /// Unique in the cluster.
    pub name: String,
    /// Never reused.
    pub id: Uuid,
    /// The node that may run it.
    pub owner: NodeId,
    /// Grows whenever another runner may exist: at each start, move and restart.
    pub epoch: u64,
    /// What it does.
    pub state: VmState,
    /// The other node of a move in progress; the owner itself of a VM that a user has saved.
    pub peer: Option<NodeId>,
    /// Its configuration, opaque here.
    pub spec: Bytes,
    /// Where its saved state lies, if it was saved.
    pub saved: Option<String>,
    /// Why it is in this state, where that needs a reason; empty otherwise.
    pub reason: String,
    /// It ran on a node that is gone and shall run again: attempts that are left. 0 when nothing is to be done by itself.
    pub restarts_left: u32,
}

impl VmRecord {
    /// The command that changes this record, provided that it is still as it is here.
    #[must_use]
    pub fn update(&self, change: impl FnOnce(&mut Self)) -> Command {
        let mut to = self.clone();
        change(&mut to);
        Command::UpdateVm(VmUpdate {
            expect_epoch: self.epoch,
            expect_owner: self.owner,
            expect_state: self.state,
            expect_spec: Some(self.spec.clone()),
            to,
        })
    }
}

/// What a virtual machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum VmState {
    /// Defined, runs nowhere.
    Stopped,
    /// Its owner is starting it.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest is halted in memory.
    Paused,
    /// Its state is being written to the volume.
    Saving,
    /// Runs nowhere; its state lies on the volume.
    Saved,
    /// Moves from the owner to the peer.
    Migrating,
    /// Runs nowhere; see the reason.
    Failed,
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Saving => "saving",
            Self::Saved => "saved",
            Self::Migrating => "migrating",
            Self::Failed => "failed",
        })
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// Its position in the log: unique and growing.
    pub index: u64,
    /// When, by the clock of the node that proposed it, in ms since 1970. For people; nothing is decided by it.
    pub at_ms: u64,
    /// The node that proposed it.
    pub node: NodeId,
    /// Noun and verb, such as `volume.moved`.
    pub kind: String,
    /// What it happened to.
    pub subject: String,
    /// One line for people.
    pub text: String,
}
