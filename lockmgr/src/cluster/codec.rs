//! Records and commands to bytes and back, by `proto/cluster.proto`.
//!
//! Everything read is checked: an unknown enum value or an id out of range is an error, never a guess.

use std::sync::Arc;

use bytes::Bytes;
use uuid::Uuid;

use super::apply::Position;
use super::command::{Command, Given, Rejection, VmUpdate};
use super::drain::{Drain, DrainPhase};
use super::pb;
use super::pb::proposal::Command as PbCommand;
use super::records::{
    Baseline, ClusterState, EventRecord, FenceKind, Member, MemberState, Renewal, VmRecord, VmState,
    VolumeRecord, VolumeState,
};
use crate::{ClusterId, Epoch, NodeId, Term, VolumeId};

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {what}")]
pub struct CodecError {
    what: String,
}

pub(crate) fn malformed(what: impl Into<String>) -> CodecError {
    CodecError { what: what.into() }
}

impl From<prost::DecodeError> for CodecError {
    fn from(error: prost::DecodeError) -> Self {
        malformed(format!("message: {error}"))
    }
}

/// A command on its way through the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Proposal {
    pub(crate) id: Uuid,
    pub(crate) node: NodeId,
    /// The proposer's incarnation; 0 before it has begun one.
    pub(crate) epoch: Epoch,
    pub(crate) at_ms: u64,
    /// How far the proposer's copy had come when it first proposed this.
    pub(crate) basis: u64,
    pub(crate) command: Command,
}

impl Proposal {
    pub(crate) fn position(&self, index: u64) -> Position {
        Position { index, node: self.node, epoch: self.epoch, at_ms: self.at_ms }
    }
}

/// What became of a log entry when it was applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) index: u64,
    pub(crate) result: Result<Given, Rejection>,
}

pub(crate) fn node_id(value: u32) -> Result<NodeId, CodecError> {
    u16::try_from(value).map(NodeId).map_err(|_| malformed(format!("node id {value}")))
}

pub(crate) fn uuid(bytes: &[u8]) -> Result<Uuid, CodecError> {
    Uuid::from_slice(bytes).map_err(|_| malformed("id"))
}

fn ticket_digest(bytes: &[u8]) -> Result<[u8; 32], CodecError> {
    bytes.try_into().map_err(|_| malformed("digest of a join ticket"))
}

pub(crate) fn uuid_bytes(id: Uuid) -> Bytes {
    Bytes::copy_from_slice(id.as_bytes())
}

/// A configuration of its own memory: a slice would keep the whole message alive as long as the record.
fn own(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

/// Both directions of an enum that has a value 0 for "unknown".
macro_rules! convert_enum {
    ($ours:ident, $theirs:ident, $prefix:literal, $($variant:ident = $number:ident),+) => {
        impl From<$ours> for pb::$theirs {
            fn from(value: $ours) -> Self {
                match value { $($ours::$variant => Self::$number),+ }
            }
        }

        impl $ours {
            fn from_number(number: i32) -> Result<Self, CodecError> {
                match pb::$theirs::try_from(number) {
                    $(Ok(pb::$theirs::$number) => Ok(Self::$variant),)+
                    _ => Err(malformed(format!(concat!($prefix, " state {}"), number))),
                }
            }
        }
    };
}
convert_enum!(
    MemberState,
    MemberState,
    "node",
    Down = MemberDown,
    Up = MemberUp,
    Fencing = MemberFencing,
    Fenced = MemberFenced,
    FenceFailed = MemberFenceFailed
);
convert_enum!(
    FenceKind,
    FenceKind,
    "fence",
    Reservation = FenceReservation,
    Agent = FenceAgent,
    Lease = FenceLease
);
convert_enum!(
    VolumeState,
    VolumeState,
    "volume",
    Opening = VolumeOpening,
    Online = VolumeOnline,
    Offline = VolumeOffline,
    Failed = VolumeFailed
);
convert_enum!(
    DrainPhase,
    DrainPhase,
    "drain",
    Draining = DrainDraining,
    Drained = DrainDrained,
    Resuming = DrainResuming
);
convert_enum!(
    VmState,
    VmState,
    "vm",
    Stopped = VmStopped,
    Starting = VmStarting,
    Running = VmRunning,
    Paused = VmPaused,
    Saving = VmSaving,
    Saved = VmSaved,
    Migrating = VmMigrating,
    Failed = VmFailed
);

impl From<&Member> for pb::Member {
    fn from(member: &Member) -> Self {
        Self {
            id: member.id.0.into(),
            name: member.name.clone(),
            address: member.address.clone(),
            epoch: member.epoch.0,
            state: pb::MemberState::from(member.state).into(),
            joined_ms: member.joined_ms,
        }
    }
}

impl TryFrom<pb::Member> for Member {
    type Error = CodecError;

    fn try_from(member: pb::Member) -> Result<Self, CodecError> {
        Ok(Self {
            id: node_id(member.id)?,
            name: member.name,
            address: member.address,
            epoch: Epoch(member.epoch),
            state: MemberState::from_number(member.state)?,
            joined_ms: member.joined_ms,
        })
    }
}

impl From<&VolumeRecord> for pb::Volume {
    fn from(volume: &VolumeRecord) -> Self {
        Self {
            name: volume.name.clone(),
            id: uuid_bytes(volume.id.0),
            lun_uri: volume.lun_uri.clone(),
            owner: volume.owner.0.into(),
            owner_epoch: volume.owner_epoch.0,
            term: volume.term.0,
            fence_kind: pb::FenceKind::from(volume.fence_kind).into(),
            state: pb::VolumeState::from(volume.state).into(),
            reason: volume.reason.clone(),
        }
    }
}

impl TryFrom<pb::Volume> for VolumeRecord {
    type Error = CodecError;

    fn try_from(volume: pb::Volume) -> Result<Self, CodecError> {
        Ok(Self {
            id: VolumeId(uuid(&volume.id)?),
            owner: node_id(volume.owner)?,
            owner_epoch: Epoch(volume.owner_epoch),
            term: Term(volume.term),
            fence_kind: FenceKind::from_number(volume.fence_kind)?,
            state: VolumeState::from_number(volume.state)?,
            name: volume.name,
            lun_uri: volume.lun_uri,
            reason: volume.reason,
        })
    }
}

impl From<&VmRecord> for pb::Vm {
    fn from(vm: &VmRecord) -> Self {
        Self {
            name: vm.name.clone(),
            id: uuid_bytes(vm.id),
            owner: vm.owner.0.into(),
            epoch: vm.epoch,
            state: pb::VmState::from(vm.state).into(),
            peer: vm.peer.map(|peer| peer.0.into()),
            spec: vm.spec.clone(),
            saved: vm.saved.clone(),
            reason: vm.reason.clone(),
            restarts_left: vm.restarts_left,
        }
    }
}

impl TryFrom<pb::Vm> for VmRecord {
    type Error = CodecError;

    fn try_from(vm: pb::Vm) -> Result<Self, CodecError> {
        Ok(Self {
            id: uuid(&vm.id)?,
            owner: node_id(vm.owner)?,
            epoch: vm.epoch,
            state: VmState::from_number(vm.state)?,
            peer: vm.peer.map(node_id).transpose()?,
            spec: own(&vm.spec),
            saved: vm.saved,
            name: vm.name,
            reason: vm.reason,
            restarts_left: vm.restarts_left,
        })
    }
}

impl From<&EventRecord> for pb::EventRecord {
    fn from(event: &EventRecord) -> Self {
        Self {
            index: event.index,
            at_ms: event.at_ms,
            node: event.node.0.into(),
            kind: event.kind.clone(),
            subject: event.subject.clone(),
            text: event.text.clone(),
        }
    }
}

impl TryFrom<pb::EventRecord> for EventRecord {
    type Error = CodecError;

    fn try_from(event: pb::EventRecord) -> Result<Self, CodecError> {
        Ok(Self {
            index: event.index,
            at_ms: event.at_ms,
            node: node_id(event.node)?,
            kind: event.kind,
            subject: event.subject,
            text: event.text,
        })
    }
}

impl From<&Proposal> for pb::Proposal {
    fn from(proposal: &Proposal) -> Self {
        Self {
            id: uuid_bytes(proposal.id),
            node: proposal.node.0.into(),
            epoch: proposal.epoch.0,
            at_ms: proposal.at_ms,
            basis: proposal.basis,
            command: Some(PbCommand::from(&proposal.command)),
        }
    }
}

impl TryFrom<pb::Proposal> for Proposal {
    type Error = CodecError;

    fn try_from(proposal: pb::Proposal) -> Result<Self, CodecError> {
        let command = proposal.command.ok_or_else(|| malformed("proposal: a command of a later release"))?;
        Ok(Self {
            id: uuid(&proposal.id)?,
            node: node_id(proposal.node)?,
            epoch: Epoch(proposal.epoch),
            at_ms: proposal.at_ms,
            basis: proposal.basis,
            command: command.try_into()?,
        })
    }
}

impl From<&Command> for PbCommand {
    fn from(command: &Command) -> Self {
        match command.clone() {
            Command::CreateCluster { cluster, name, members } => {
                let first =
                    |(id, name, address): (NodeId, _, _)| pb::FirstMember { id: id.0.into(), name, address };
                let members = members.into_iter().map(first).collect();
                Self::CreateCluster(pb::CreateCluster { cluster: uuid_bytes(cluster.0), name, members })
            }
            Command::AddTicket { digest, expires_ms } => {
                Self::AddTicket(pb::AddTicket { digest: Bytes::copy_from_slice(&digest), expires_ms })
            }
            Command::AddMember { digest, name, address, witness } => Self::AddMember(pb::AddMember {
                digest: Bytes::copy_from_slice(&digest),
                name,
                address,
                witness,
            }),
            Command::RemoveMember { node, expect } => {
                Self::RemoveMember(pb::RemoveMember { node: node.0.into(), expect: expect.0 })
            }
            Command::BeginEpoch { node, expect } => {
                Self::BeginEpoch(pb::BeginEpoch { node: node.0.into(), expect: expect.0 })
            }
            Command::MarkNode { node, epoch, state } => Self::MarkNode(pb::MarkNode {
                node: node.0.into(),
                epoch: epoch.0,
                state: pb::MemberState::from(state).into(),
            }),
            Command::CreateVolume { name, id, lun_uri, owner, owner_epoch, fence_kind } => {
                Self::CreateVolume(pb::CreateVolume {
                    name,
                    id: uuid_bytes(id.0),
                    lun_uri,
                    owner: owner.0.into(),
                    owner_epoch: owner_epoch.0,
                    fence_kind: pb::FenceKind::from(fence_kind).into(),
                })
            }
            Command::RemoveVolume { name, expect_term } => {
                Self::RemoveVolume(pb::RemoveVolume { name, expect_term: expect_term.0 })
            }
            Command::MoveVolume { name, expect_term, to, to_epoch } => Self::MoveVolume(pb::MoveVolume {
                name,
                expect_term: expect_term.0,
                to: to.0.into(),
                to_epoch: to_epoch.0,
            }),
            Command::SetVolumeState { name, expect_term, state, reason } => {
                Self::SetVolumeState(pb::SetVolumeState {
                    name,
                    expect_term: expect_term.0,
                    state: pb::VolumeState::from(state).into(),
                    reason,
                })
            }
            Command::CreateVm { name, id, owner, spec } => {
                Self::CreateVm(pb::CreateVm { name, id: uuid_bytes(id), owner: owner.0.into(), spec })
            }
            Command::UpdateVm(update) => Self::UpdateVm(pb::UpdateVm {
                expect_epoch: update.expect_epoch,
                expect_owner: update.expect_owner.0.into(),
                expect_state: pb::VmState::from(update.expect_state).into(),
                expect_spec: update.expect_spec,
                to: Some(pb::Vm::from(&update.to)),
            }),
            Command::DeleteVm { name, expect_epoch } => Self::DeleteVm(pb::DeleteVm { name, expect_epoch }),
            Command::SetDrain { node, expect_step, to } => Self::SetDrain(pb::SetDrain {
                node: node.0.into(),
                expect_step,
                to: to.as_ref().map(|drain| drain_to_pb(node, drain)),
            }),
            Command::RenewCertificates { expect_before_ms, to } => {
                Self::RenewCertificates(pb::RenewCertificates {
                    expect_before_ms,
                    to: Some(renewal_to_pb(to)),
                })
            }
            Command::Set { name, value } => Self::Set(pb::Setting { name, value }),
            Command::PublishProcessor { node, epoch, record } => {
                Self::PublishProcessor(processor_to_pb(node, epoch, record))
            }
            Command::FreezeBaseline { version, vendor, record } => {
                Self::FreezeBaseline(pb::Baseline { version, vendor, record })
            }
            Command::Event { kind, subject, text } => Self::AddEvent(pb::AddEvent { kind, subject, text }),
        }
    }
}

impl TryFrom<PbCommand> for Command {
    type Error = CodecError;

    fn try_from(command: PbCommand) -> Result<Self, CodecError> {
        Ok(match command {
            PbCommand::CreateCluster(create) => {
                let first = |m: pb::FirstMember| Ok((node_id(m.id)?, m.name, m.address));
                let members = create.members.into_iter().map(first).collect::<Result<_, CodecError>>()?;
                Self::CreateCluster { cluster: ClusterId(uuid(&create.cluster)?), name: create.name, members }
            }
            PbCommand::AddTicket(add) => {
                Self::AddTicket { digest: ticket_digest(&add.digest)?, expires_ms: add.expires_ms }
            }
            PbCommand::AddMember(add) => Self::AddMember {
                digest: ticket_digest(&add.digest)?,
                name: add.name,
                address: add.address,
                witness: add.witness,
            },
            PbCommand::RemoveMember(remove) => {
                Self::RemoveMember { node: node_id(remove.node)?, expect: Epoch(remove.expect) }
            }
            PbCommand::BeginEpoch(begin) => {
                Self::BeginEpoch { node: node_id(begin.node)?, expect: Epoch(begin.expect) }
            }
            PbCommand::MarkNode(mark) => Self::MarkNode {
                node: node_id(mark.node)?,
                epoch: Epoch(mark.epoch),
                state: MemberState::from_number(mark.state)?,
            },
            PbCommand::CreateVolume(create) => Self::CreateVolume {
                id: VolumeId(uuid(&create.id)?),
                owner: node_id(create.owner)?,
                owner_epoch: Epoch(create.owner_epoch),
                fence_kind: FenceKind::from_number(create.fence_kind)?,
                name: create.name,
                lun_uri: create.lun_uri,
            },
            PbCommand::RemoveVolume(remove) => {
                Self::RemoveVolume { name: remove.name, expect_term: Term(remove.expect_term) }
            }
            PbCommand::MoveVolume(to) => Self::MoveVolume {
                name: to.name,
                expect_term: Term(to.expect_term),
                to: node_id(to.to)?,
                to_epoch: Epoch(to.to_epoch),
            },
            PbCommand::SetVolumeState(set) => Self::SetVolumeState {
                name: set.name,
                expect_term: Term(set.expect_term),
                state: VolumeState::from_number(set.state)?,
                reason: set.reason,
            },
            PbCommand::CreateVm(create) => Self::CreateVm {
                id: uuid(&create.id)?,
                owner: node_id(create.owner)?,
                name: create.name,
                spec: own(&create.spec),
            },
            PbCommand::UpdateVm(update) => Self::UpdateVm(VmUpdate {
                expect_epoch: update.expect_epoch,
                expect_owner: node_id(update.expect_owner)?,
                expect_state: VmState::from_number(update.expect_state)?,
                expect_spec: update.expect_spec,
                to: update.to.ok_or_else(|| malformed("vm update"))?.try_into()?,
            }),
            PbCommand::DeleteVm(delete) => {
                Self::DeleteVm { name: delete.name, expect_epoch: delete.expect_epoch }
            }
            PbCommand::PublishProcessor(of) => Self::PublishProcessor {
                node: node_id(of.node)?,
                epoch: Epoch(of.epoch),
                record: own(&of.record),
            },
            PbCommand::FreezeBaseline(of) => {
                Self::FreezeBaseline { version: of.version, vendor: of.vendor, record: own(&of.record) }
            }
            PbCommand::AddEvent(event) => {
                Self::Event { kind: event.kind, subject: event.subject, text: event.text }
            }
            PbCommand::SetDrain(set) => Self::SetDrain {
                node: node_id(set.node)?,
                expect_step: set.expect_step,
                to: set.to.map(drain_from_pb).transpose()?,
            },
            PbCommand::RenewCertificates(renew) => Self::RenewCertificates {
                expect_before_ms: renew.expect_before_ms,
                to: renewal_from_pb(renew.to.ok_or_else(|| malformed("renewal"))?),
            },
            PbCommand::Set(set) => Self::Set { name: set.name, value: set.value },
            PbCommand::Read(_) => return Err(malformed("proposal: a read changes nothing")),
        })
    }
}

impl From<&End> for pb::End {
    fn from(end: &End) -> Self {
        use pb::end::End as Kind;
        let kind = match end.result.clone() {
            Ok(Given::Nothing) => Kind::Nothing(pb::Nothing {}),
            Ok(Given::Node(node)) => Kind::Node(node.0.into()),
            Ok(Given::Epoch(epoch)) => Kind::Epoch(epoch.0),
            Ok(Given::Term(term)) => Kind::Term(term.0),
            Ok(Given::VmEpoch(epoch)) => Kind::VmEpoch(epoch),
            Err(Rejection::Conflict { what, expected, found }) => {
                Kind::Conflict(pb::Conflict { what, expected, found })
            }
            Err(Rejection::Invalid { what }) => Kind::Invalid(pb::Invalid { what }),
            Err(Rejection::Expired) => Kind::Expired(pb::Nothing {}),
        };
        Self { index: end.index, end: Some(kind) }
    }
}

impl TryFrom<pb::End> for End {
    type Error = CodecError;

    fn try_from(end: pb::End) -> Result<Self, CodecError> {
        use pb::end::End as Kind;
        let result = match end.end.ok_or_else(|| malformed("end of a proposal"))? {
            Kind::Nothing(_) => Ok(Given::Nothing),
            Kind::Node(node) => Ok(Given::Node(node_id(node)?)),
            Kind::Epoch(epoch) => Ok(Given::Epoch(Epoch(epoch))),
            Kind::Term(term) => Ok(Given::Term(Term(term))),
            Kind::VmEpoch(epoch) => Ok(Given::VmEpoch(epoch)),
            Kind::Conflict(conflict) => {
                let pb::Conflict { what, expected, found } = conflict;
                Err(Rejection::Conflict { what, expected, found })
            }
            Kind::Invalid(invalid) => Err(Rejection::Invalid { what: invalid.what }),
            Kind::Expired(_) => Err(Rejection::Expired),
        };
        Ok(Self { index: end.index, result })
    }
}

/// Records for a snapshot; the remembered ends are added by the machine.
pub(crate) fn state_to_pb(state: &ClusterState) -> pb::Snapshot {
    pb::Snapshot {
        cluster: state.cluster.map(|id| uuid_bytes(id.0)).unwrap_or_default(),
        name: state.name.clone(),
        members: state.members.values().map(Into::into).collect(),
        volumes: state.volumes.values().map(Into::into).collect(),
        vms: state.vms.values().map(Into::into).collect(),
        events: state.events.iter().map(|event| event.as_ref().into()).collect(),
        remembered: Vec::new(),
        applied: state.applied,
        tickets: state.tickets.iter().map(|(digest, expires_ms)| ticket_to_pb(digest, *expires_ms)).collect(),
        nodes_given: state.nodes_given.into(),
        drains: state.drains.iter().map(|(node, drain)| drain_to_pb(*node, drain)).collect(),
        settings: state.settings.iter().map(setting_to_pb).collect(),
        processors: state
            .processors
            .iter()
            .map(|(node, (epoch, record))| processor_to_pb(*node, *epoch, record.clone()))
            .collect(),
        baselines: state.baselines.iter().map(|(version, it)| baseline_to_pb(*version, it)).collect(),
        witnesses: state.witnesses.iter().map(|node| node.0.into()).collect(),
        renewal: (state.renewal != Renewal::default()).then(|| renewal_to_pb(state.renewal)),
    }
}

fn renewal_to_pb(renewal: Renewal) -> pb::Renewal {
    pb::Renewal { before_ms: renewal.before_ms, refused_from_ms: renewal.refused_from_ms }
}

fn renewal_from_pb(renewal: pb::Renewal) -> Renewal {
    Renewal { before_ms: renewal.before_ms, refused_from_ms: renewal.refused_from_ms }
}

fn setting_to_pb((name, value): (&String, &String)) -> pb::Setting {
    pb::Setting { name: name.clone(), value: Some(value.clone()) }
}

fn drain_to_pb(node: NodeId, drain: &Drain) -> pb::Drain {
    let stuck = |(what, why): (&String, &String)| pb::Stuck { what: what.clone(), why: why.clone() };
    pb::Drain {
        node: node.0.into(),
        step: drain.step,
        phase: pb::DrainPhase::from(drain.phase).into(),
        for_good: drain.for_good,
        volumes: drain.volumes.iter().cloned().collect(),
        vms: drain.vms.iter().cloned().collect(),
        stuck: drain.stuck.iter().map(stuck).collect(),
    }
}

fn drain_from_pb(drain: pb::Drain) -> Result<Drain, CodecError> {
    Ok(Drain {
        step: drain.step,
        phase: DrainPhase::from_number(drain.phase)?,
        for_good: drain.for_good,
        volumes: drain.volumes.into_iter().collect(),
        vms: drain.vms.into_iter().collect(),
        stuck: drain.stuck.into_iter().map(|stuck| (stuck.what, stuck.why)).collect(),
    })
}

fn processor_to_pb(node: NodeId, epoch: Epoch, record: Bytes) -> pb::Processor {
    pb::Processor { node: node.0.into(), epoch: epoch.0, record }
}

fn baseline_to_pb(version: u32, baseline: &Baseline) -> pb::Baseline {
    pb::Baseline { version, vendor: baseline.vendor.clone(), record: baseline.record.clone() }
}

fn ticket_to_pb(digest: &[u8; 32], expires_ms: u64) -> pb::JoinTicket {
    pb::JoinTicket { digest: Bytes::copy_from_slice(digest), expires_ms }
}

pub(crate) fn state_from_pb(snapshot: pb::Snapshot) -> Result<ClusterState, CodecError> {
    let cluster = if snapshot.cluster.is_empty() { None } else { Some(ClusterId(uuid(&snapshot.cluster)?)) };
    let mut state =
        ClusterState { cluster, name: snapshot.name, applied: snapshot.applied, ..Default::default() };
    state.nodes_given = node_id(snapshot.nodes_given)?.0;
    state.witnesses = snapshot.witnesses.into_iter().map(node_id).collect::<Result<_, _>>()?;
    for ticket in snapshot.tickets {
        state.tickets.insert(ticket_digest(&ticket.digest)?, ticket.expires_ms);
    }
    state.renewal = snapshot.renewal.map(renewal_from_pb).unwrap_or_default();
    for drain in snapshot.drains {
        state.drains.insert(node_id(drain.node)?, drain_from_pb(drain)?);
    }
    for setting in snapshot.settings {
        state.settings.insert(setting.name, setting.value.unwrap_or_default());
    }
    for member in snapshot.members {
        let member = Member::try_from(member)?;
        state.members.insert(member.id, member);
    }
    for volume in snapshot.volumes {
        let volume = VolumeRecord::try_from(volume)?;
        state.volumes.insert(volume.name.clone(), volume);
    }
    for vm in snapshot.vms {
        let vm = VmRecord::try_from(vm)?;
        state.vms.insert(vm.name.clone(), vm);
    }
    for of in snapshot.processors {
        state.processors.insert(node_id(of.node)?, (Epoch(of.epoch), own(&of.record)));
    }
    for of in snapshot.baselines {
        state.baselines.insert(of.version, Baseline { vendor: of.vendor, record: own(&of.record) });
    }
    for event in snapshot.events {
        state.events.push_back(Arc::new(event.try_into()?));
    }
    Ok(state)
}
