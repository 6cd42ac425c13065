//! What may be proposed to the cluster, and how it ends.

use bytes::Bytes;
use uuid::Uuid;

use super::drain::Drain;
use super::records::{FenceKind, MemberState, Renewal, VmRecord, VolumeState};
use crate::{ClusterId, Epoch, NodeId, Term, VolumeId};

/// Longest name of a cluster, node, volume or VM, in bytes.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest VM configuration.
pub const SPEC_BYTES_MAX: usize = 64 << 10;
/// Longest other text (address, LUN, reason, event), in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;
/// Volumes of a cluster.
pub const VOLUMES_MAX: usize = 256;
/// Join tickets that are open at once.
pub(super) const TICKETS_MAX: usize = 64;
/// Longest record of a processor.
pub const PROCESSOR_BYTES_MAX: usize = 32 << 10;
/// Baselines that are ever frozen.
pub const BASELINES_MAX: u32 = 256;
/// Virtual machines of a cluster.
pub const VMS_MAX: usize = 4096;

/// A change of the records. Each names what it expects to find; if it finds something else, nothing changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Expects that there is no cluster yet. Proposed by the bootstrap node itself.
    CreateCluster {
        /// The cluster.
        cluster: ClusterId,
        /// Its name.
        name: String,
        /// The first members: id, name, address.
        members: Vec<(NodeId, String, String)>,
    },
    /// Somebody may join with the secret behind this digest, once.
    AddTicket {
        /// SHA-256 of the secret.
        digest: [u8; 32],
        /// When it is over, by the proposer's clock, in ms since 1970. Security only: no safety rests on it.
        expires_ms: u64,
    },
    /// A new member, not heard of before. Uses the ticket up, and gives the member its number.
    AddMember {
        /// SHA-256 of the secret that it has shown.
        digest: [u8; 32],
        /// Its name; no other member has it.
        name: String,
        /// Where it listens; no other member does.
        address: String,
        /// It votes and does nothing else.
        witness: bool,
    },
    /// Forgets a member that is certainly off, owns no volume, and has no VM. Its number is not given out again as long as
    /// there are others.
    RemoveMember {
        /// The member.
        node: NodeId,
        /// Its last epoch.
        expect: Epoch,
    },
    /// A node joins anew: its epoch grows by one and it is up. Refused while it is being fenced or in quarantine.
    BeginEpoch {
        /// The node.
        node: NodeId,
        /// The epoch that it had.
        expect: Epoch,
    },
    /// The state of a node's incarnation changes, along the allowed ways only: of two that try, one succeeds.
    MarkNode {
        /// The node.
        node: NodeId,
        /// The incarnation that is meant.
        epoch: Epoch,
        /// Its new state.
        state: MemberState,
    },
    /// Expects that no volume has this name, id or LUN, and that the owner is up with this epoch.
    CreateVolume {
        /// Name.
        name: String,
        /// As in its superblock.
        id: VolumeId,
        /// Where every node finds the LUN.
        lun_uri: String,
        /// First coordinator.
        owner: NodeId,
        /// Its incarnation.
        owner_epoch: Epoch,
        /// How dead nodes are cut off.
        fence_kind: FenceKind,
    },
    /// Forgets a volume; its LUN is not touched.
    RemoveVolume {
        /// Name.
        name: String,
        /// The term that it has.
        expect_term: Term,
    },
    /// Appoints another coordinator (or the same one anew) with the next term. It must be up with this epoch.
    MoveVolume {
        /// Name.
        name: String,
        /// The term that it has.
        expect_term: Term,
        /// New coordinator.
        to: NodeId,
        /// Its incarnation.
        to_epoch: Epoch,
    },
    /// The coordinator of a term reports.
    SetVolumeState {
        /// Name.
        name: String,
        /// The reporter's term.
        expect_term: Term,
        /// What it reports.
        state: VolumeState,
        /// Why, if it does not serve.
        reason: String,
    },
    /// Expects that no VM has this name or id. It is created stopped, with epoch 1.
    CreateVm {
        /// Name.
        name: String,
        /// Id.
        id: Uuid,
        /// Where it will run.
        owner: NodeId,
        /// Its configuration.
        spec: Bytes,
    },
    /// Changes a VM's record; see [`VmRecord::update`].
    UpdateVm(VmUpdate),
    /// Forgets a VM that runs nowhere.
    DeleteVm {
        /// Name.
        name: String,
        /// The epoch that it has.
        expect_epoch: u64,
    },
    /// Changes what is known of a node's drain.
    SetDrain {
        /// The node.
        node: NodeId,
        /// Step of the record that this was made from; 0 when there was none.
        expect_step: u64,
        /// What it becomes, with whatever step; nothing when the node takes part as before.
        to: Option<Drain>,
    },
    /// Has all members renew their certificates.
    RenewCertificates {
        /// The `before_ms` of the renewal that was read.
        expect_before_ms: u64,
        /// The new one.
        to: Renewal,
    },
    /// Changes a setting of the whole cluster.
    Set {
        /// Which.
        name: String,
        /// Its value; nothing for the default.
        value: Option<String>,
    },
    /// A node of this epoch says what it can give to guests as a processor. Replaces what it said before.
    PublishProcessor {
        /// The node.
        node: NodeId,
        /// Its incarnation.
        epoch: Epoch,
        /// What it can give.
        record: Bytes,
    },
    /// Adds a baseline. Expects that it is the next version: of two that try, one succeeds.
    FreezeBaseline {
        /// Its number, one above the highest.
        version: u32,
        /// Maker of the processors.
        vendor: String,
        /// The processor.
        record: Bytes,
    },
    /// Adds a line to the events.
    Event {
        /// Noun and verb.
        kind: String,
        /// What it happened to.
        subject: String,
        /// One line for people.
        text: String,
    },
}

/// One compare-and-swap of a VM record.
///
/// The new record keeps name and id. Its epoch is the expected one or the next; it must be the next if the owner changes,
/// and then the new owner must be up: this is the commit point of a move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmUpdate {
    /// The epoch that it has.
    pub expect_epoch: u64,
    /// The owner that it has.
    pub expect_owner: NodeId,
    /// The state that it has.
    pub expect_state: super::VmState,
    /// The configuration that it has, where that matters: whoever does not know of a disk must not take it out of the record.
    pub expect_spec: Option<Bytes>,
    /// The whole new record.
    pub to: VmRecord,
}

/// A command that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its position in the log. [`super::ClusterState::applied`] of this node has reached it when `propose` returns, unless
    /// this node lags far behind.
    pub index: u64,
    /// What it gave.
    pub given: Given,
}

/// The number that a command has handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// None.
    Nothing,
    /// A new member's number.
    Node(NodeId),
    /// A node's new epoch.
    Epoch(Epoch),
    /// A volume's term.
    Term(Term),
    /// A VM's epoch.
    VmEpoch(u64),
}

/// A command that was refused: nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The records are not as expected.
    #[error("{what}: expected {expected}, found {found}")]
    Conflict {
        /// What was looked at.
        what: String,
        /// What the command expected there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The command can never be applied.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// Too much has happened since it was first proposed to know whether it was applied then.
    #[error("the proposal was sent again too late to tell whether it had been applied before")]
    Expired,
}

/// A proposal failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The records are not as expected; nothing has changed.
    #[error("{what}: expected {expected}, found {found}")]
    Conflict {
        /// What was looked at.
        what: String,
        /// What the command expected there.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The command can never be applied.
    #[error("{what}")]
    Invalid {
        /// What is wrong with it.
        what: String,
    },
    /// No majority of members was reachable; nothing has changed nor will.
    #[error("no quorum: the cluster has had no leader for {waited_ms} ms")]
    NoQuorum {
        /// How long was waited.
        waited_ms: u64,
    },
    /// The proposal was sent and no answer came: read the record to learn what became of it.
    #[error("outcome unknown: no answer for {waited_ms} ms after the proposal was sent")]
    OutcomeUnknown {
        /// How long was waited.
        waited_ms: u64,
    },
    /// This node's cluster part has stopped.
    #[error("this node's part of the cluster has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

impl ProposeError {
    /// What the administrator can do about it.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Conflict { .. } => {
                "somebody else was faster; look at the record and try again if it still makes sense"
            }
            Self::Invalid { .. } => "correct the request",
            Self::NoQuorum { .. } => "start more nodes: a majority of the members must be connected",
            Self::OutcomeUnknown { .. } => "look at the record before trying again",
            Self::Stopped { .. } => "see this node's log, then restart it",
        }
    }
}

impl From<Rejection> for ProposeError {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::Conflict { what, expected, found } => Self::Conflict { what, expected, found },
            Rejection::Invalid { what } => Self::Invalid { what },
            Rejection::Expired => Self::OutcomeUnknown { waited_ms: 0 },
        }
    }
}
