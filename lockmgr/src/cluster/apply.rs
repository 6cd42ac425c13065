//! What each command does to the records. Pure: the same log gives the same records on every node.

use std::sync::Arc;

use bytes::Bytes;

use super::command::{
    BASELINES_MAX, Command, Given, NAME_BYTES_MAX, PROCESSOR_BYTES_MAX, Rejection, SPEC_BYTES_MAX,
    TEXT_BYTES_MAX, VMS_MAX, VOLUMES_MAX, VmUpdate,
};
use super::records::{
    Baseline, ClusterState, EVENTS_MAX, EventRecord, FenceKind, Member, MemberState, VmRecord, VmState,
    VolumeRecord, VolumeState,
};
use super::{drain, settings};
use crate::{ClusterId, Epoch, NODES_MAX, NodeId, Term, VolumeId};

/// Where a command stands in the log and who proposed it when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    pub(crate) index: u64,
    pub(crate) node: NodeId,
    /// The proposer's incarnation; 0 before it has begun one.
    pub(crate) epoch: Epoch,
    pub(crate) at_ms: u64,
}

/// Line of the events for a change.
pub(super) struct Line {
    pub(super) kind: &'static str,
    pub(super) subject: String,
    pub(super) text: String,
}

pub(super) type Applied = Result<(Given, Line), Rejection>;

impl ClusterState {
    /// Applies a command, or refuses it and changes nothing.
    pub(crate) fn apply(&mut self, command: Command, at: Position) -> Result<Given, Rejection> {
        check_sizes(&command)?;
        // What happened is told by whoever saw it; whatever changes something is not his any more to say.
        if !matches!(command, Command::Event { .. }) {
            self.check_proposer(at)?;
        }
        let (given, line) = match command {
            Command::CreateCluster { cluster, name, members } => self.create_cluster(cluster, name, members),
            Command::AddTicket { digest, expires_ms } => self.add_ticket(digest, expires_ms, at),
            Command::AddMember { digest, name, address, witness } => {
                self.add_member(digest, (name, address), witness, at)
            }
            Command::RemoveMember { node, expect } => self.remove_member(node, expect),
            Command::BeginEpoch { node, expect } => self.begin_epoch(node, expect, at),
            Command::MarkNode { node, epoch, state } => self.mark_node(node, epoch, state),
            Command::CreateVolume { name, id, lun_uri, owner, owner_epoch, fence_kind } => {
                self.create_volume(name, id, lun_uri, (owner, owner_epoch), fence_kind)
            }
            Command::RemoveVolume { name, expect_term } => self.remove_volume(name, expect_term),
            Command::MoveVolume { name, expect_term, to, to_epoch } => {
                self.move_volume(name, expect_term, to, to_epoch)
            }
            Command::SetVolumeState { name, expect_term, state, reason } => {
                self.set_volume_state(name, expect_term, state, reason)
            }
            Command::CreateVm { name, id, owner, spec } => self.create_vm(VmRecord {
                name,
                id,
                owner,
                epoch: 1,
                state: VmState::Stopped,
                peer: None,
                spec,
                saved: None,
                reason: String::new(),
                restarts_left: 0,
            }),
            Command::UpdateVm(update) => self.update_vm(update),
            Command::DeleteVm { name, expect_epoch } => self.delete_vm(name, expect_epoch),
            Command::SetDrain { node, expect_step, to } => self.set_drain(node, expect_step, to, at),
            Command::Set { name, value } => self.set(name, value),
            Command::PublishProcessor { node, epoch, record } => self.publish_processor(node, epoch, record),
            Command::FreezeBaseline { version, vendor, record } => {
                self.freeze_baseline(version, vendor, record)
            }
            Command::RenewCertificates { expect_before_ms, to } => {
                self.renew_certificates(expect_before_ms, to)
            }
            Command::Event { kind, subject, text } => {
                self.note(at, kind, subject, text);
                return Ok(Given::Nothing);
            }
        }?;
        self.note(at, line.kind.to_owned(), line.subject, line.text);
        Ok(given)
    }

    /// Whether the incarnation that proposed may still decide anything: one that was fenced, or that another has followed, may have
    /// left proposals on the way, and nobody is there any more who would do what they announce (A4).
    fn check_proposer(&self, at: Position) -> Result<(), Rejection> {
        let Some(member) = self.members.get(&at.node).filter(|_| at.epoch > Epoch(0)) else { return Ok(()) };
        let over = member.epoch > at.epoch || member.state == MemberState::Fenced;
        if over {
            let found = format!("epoch {}, {}", member.epoch, member.state);
            return Err(conflict(
                format!("proposer, node {}", member.name),
                format!("epoch {}", at.epoch),
                found,
            ));
        }
        Ok(())
    }

    /// What these records become by a command of a node's incarnation. The cluster's own records change by consensus only; this is for models, which
    /// ask what could happen.
    ///
    /// # Errors
    /// Why the command is refused.
    pub fn after(&self, command: Command, by: (NodeId, Epoch)) -> Result<Self, Rejection> {
        let mut after = self.clone();
        after.apply(command, Position { index: 0, node: by.0, epoch: by.1, at_ms: 0 })?;
        Ok(after)
    }

    fn note(&mut self, at: Position, kind: String, subject: String, text: String) {
        while self.events.len() >= EVENTS_MAX {
            self.events.pop_front();
        }
        let event = EventRecord { index: at.index, at_ms: at.at_ms, node: at.node, kind, subject, text };
        self.events.push_back(Arc::new(event));
    }

    fn create_cluster(
        &mut self,
        cluster: ClusterId,
        name: String,
        members: Vec<(NodeId, String, String)>,
    ) -> Applied {
        if let Some(found) = self.cluster {
            return Err(conflict("cluster", "none", found));
        }
        for (id, name, address) in members {
            let member =
                Member { id, name, address, epoch: Epoch(0), state: MemberState::Down, joined_ms: 0 };
            self.nodes_given = self.nodes_given.max(id.0);
            self.members.insert(id, member);
        }
        self.cluster = Some(cluster);
        self.name = name;
        let text = format!("cluster {} created with {} members", self.name, self.members.len());
        Ok((Given::Nothing, Line { kind: "cluster.created", subject: self.name.clone(), text }))
    }

    fn begin_epoch(&mut self, node: NodeId, expect: Epoch, at: Position) -> Applied {
        let member = self.member_mut(node)?;
        if member.epoch != expect {
            return Err(conflict(format!("epoch of node {node}"), expect, member.epoch));
        }
        // A node whose fence is not confirmed may still have writes under way: it must not come back as a new one.
        if matches!(member.state, MemberState::Fencing | MemberState::FenceFailed) {
            return Err(conflict(format!("state of node {node}"), "no fence under way", member.state));
        }
        member.epoch = Epoch(next(expect.0)?);
        member.state = MemberState::Up;
        member.joined_ms = at.at_ms;
        let text = format!("node {} joined with epoch {}", member.name, member.epoch);
        Ok((Given::Epoch(member.epoch), Line { kind: "node.joined", subject: member.name.clone(), text }))
    }

    fn mark_node(&mut self, node: NodeId, epoch: Epoch, state: MemberState) -> Applied {
        let member = self.member_mut(node)?;
        if member.epoch != epoch {
            return Err(conflict(format!("epoch of node {node}"), epoch, member.epoch));
        }
        if !may_become(member.state, state) {
            let expected = format!("one that may become {state}");
            return Err(conflict(format!("state of node {node}"), expected, member.state));
        }
        member.state = state;
        let text = format!("node {} epoch {epoch} is {state}", member.name);
        Ok((Given::Nothing, Line { kind: "node.marked", subject: member.name.clone(), text }))
    }

    fn publish_processor(&mut self, node: NodeId, epoch: Epoch, record: Bytes) -> Applied {
        let member = self.member_mut(node)?;
        if member.epoch != epoch {
            return Err(conflict(format!("epoch of node {node}"), epoch, member.epoch));
        }
        let subject = member.name.clone();
        let text = format!("node {subject} has said which processors it can give to guests");
        self.processors.insert(node, (epoch, record));
        Ok((Given::Nothing, Line { kind: "node.processor", subject, text }))
    }

    fn freeze_baseline(&mut self, version: u32, vendor: String, record: Bytes) -> Applied {
        let last = self.baselines.last_key_value().map_or(0, |(version, _)| *version);
        if version != last.saturating_add(1) {
            return Err(conflict("the next baseline of processors", version, last.saturating_add(1)));
        }
        if version > BASELINES_MAX {
            return Err(invalid(format!("there are {last} baselines already")));
        }
        let text = format!("guests that boot on {vendor} from now on get processor baseline {version}");
        self.baselines.insert(version, Baseline { vendor, record });
        let subject = self.name.clone();
        Ok((Given::Nothing, Line { kind: "cluster.baseline", subject, text }))
    }

    fn create_volume(
        &mut self,
        name: String,
        id: VolumeId,
        lun_uri: String,
        (owner, owner_epoch): (NodeId, Epoch),
        fence_kind: FenceKind,
    ) -> Applied {
        if let Some(found) = self.volumes.get(&name) {
            return Err(conflict(format!("volume {name}"), "none", found.id));
        }
        let twin = self.volumes.values().find(|volume| volume.id == id || volume.lun_uri == lun_uri);
        if let Some(twin) = twin {
            let what = format!("volume with id {id} or LUN {lun_uri}");
            return Err(conflict(what, "none", format!("volume {}", twin.name)));
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(invalid(format!(
                "cannot add volume {name}: the cluster has {VOLUMES_MAX} volumes already"
            )));
        }
        self.check_up(owner, owner_epoch)?;
        self.check_may_coordinate(owner)?;
        self.check_no_witness(owner)?;
        let line = Line {
            kind: "volume.created",
            subject: name.clone(),
            text: format!("volume {name} added, coordinator is node {owner}, fence {fence_kind}"),
        };
        let term = Term(1);
        let state = VolumeState::Opening;
        let reason = String::new();
        let volume = VolumeRecord {
            name: name.clone(),
            id,
            lun_uri,
            owner,
            owner_epoch,
            term,
            fence_kind,
            state,
            reason,
        };
        self.volumes.insert(name, volume);
        Ok((Given::Term(term), line))
    }

    fn remove_volume(&mut self, name: String, expect_term: Term) -> Applied {
        self.volume_mut(&name, expect_term)?;
        self.volumes.remove(&name);
        let text = format!("volume {name} removed");
        Ok((Given::Nothing, Line { kind: "volume.removed", subject: name, text }))
    }

    fn move_volume(&mut self, name: String, expect_term: Term, to: NodeId, to_epoch: Epoch) -> Applied {
        self.volume_mut(&name, expect_term)?;
        self.check_serves(to, to_epoch)?;
        let from = self.volume_mut(&name, expect_term)?.owner;
        if to != from {
            self.check_may_coordinate(to)?;
        }
        let next_term = Term(next(expect_term.0)?);
        let volume = self.volume_mut(&name, expect_term)?;
        volume.owner = to;
        volume.owner_epoch = to_epoch;
        volume.term = next_term;
        volume.state = VolumeState::Opening;
        volume.reason = String::new();
        let text = format!("coordinator of {name} moves from node {from} to node {to}, term {}", volume.term);
        Ok((Given::Term(volume.term), Line { kind: "volume.moved", subject: name, text }))
    }

    fn set_volume_state(
        &mut self,
        name: String,
        expect_term: Term,
        state: VolumeState,
        reason: String,
    ) -> Applied {
        let volume = self.volume_mut(&name, expect_term)?;
        volume.state = state;
        volume.reason = reason;
        let because = if volume.reason.is_empty() { String::new() } else { format!(": {}", volume.reason) };
        let text = format!("volume {name} is {state} on node {}, term {expect_term}{because}", volume.owner);
        Ok((Given::Term(expect_term), Line { kind: "volume.state", subject: name, text }))
    }

    fn create_vm(&mut self, vm: VmRecord) -> Applied {
        let twin = self.vms.values().find(|other| other.name == vm.name || other.id == vm.id);
        if let Some(twin) = twin {
            return Err(conflict(format!("vm {}", vm.name), "none", format!("{} ({})", twin.name, twin.id)));
        }
        if self.vms.len() >= VMS_MAX {
            return Err(invalid(format!("cannot add vm {}: the cluster has {VMS_MAX} already", vm.name)));
        }
        self.member(vm.owner)?;
        self.check_no_witness(vm.owner)?;
        let text = format!("vm {} created on node {}", vm.name, vm.owner);
        let line = Line { kind: "vm.created", subject: vm.name.clone(), text };
        let given = Given::VmEpoch(vm.epoch);
        self.vms.insert(vm.name.clone(), vm);
        Ok((given, line))
    }

    fn update_vm(&mut self, update: VmUpdate) -> Applied {
        let VmUpdate { expect_epoch, expect_owner, expect_state, expect_spec, mut to } = update;
        let old = self.vm(&to.name)?;
        let expected = (expect_epoch, expect_owner, expect_state);
        if (old.epoch, old.owner, old.state) != expected {
            let told = |(epoch, owner, state)| {
                format!("epoch {epoch} on node {owner}, {state}", state = state as VmState)
            };
            let found = (old.epoch, old.owner, old.state);
            return Err(conflict(format!("vm {}", to.name), told(expected), told(found)));
        }
        if expect_spec.is_some_and(|spec| spec != old.spec) {
            return Err(conflict(
                format!("configuration of vm {}", to.name),
                "the one that was read",
                "a newer one",
            ));
        }
        check_vm_change(old, &to)?;
        self.check_may_run(old, &to)?;
        if to.owner != old.owner {
            self.check_vm_owner(to.owner)?;
        }
        if to.spec == old.spec {
            // One copy in memory, however often the record changes.
            to.spec = old.spec.clone();
        }
        let text = if to.owner == old.owner {
            format!("vm {} is {} on node {}, epoch {}", to.name, to.state, to.owner, to.epoch)
        } else {
            format!("vm {} belongs to node {}, {}, epoch {}", to.name, to.owner, to.state, to.epoch)
        };
        let because = if to.reason.is_empty() { String::new() } else { format!(": {}", to.reason) };
        let line = Line { kind: "vm.state", subject: to.name.clone(), text: text + &because };
        let given = Given::VmEpoch(to.epoch);
        self.vms.insert(to.name.clone(), to);
        Ok((given, line))
    }

    fn delete_vm(&mut self, name: String, expect_epoch: u64) -> Applied {
        let vm = self.vm(&name)?;
        if vm.epoch != expect_epoch {
            return Err(conflict(format!("epoch of vm {name}"), expect_epoch, vm.epoch));
        }
        if !matches!(vm.state, VmState::Stopped | VmState::Saved | VmState::Failed) {
            return Err(conflict(format!("state of vm {name}"), "stopped, saved or failed", vm.state));
        }
        self.vms.remove(&name);
        let text = format!("vm {name} deleted");
        Ok((Given::Nothing, Line { kind: "vm.deleted", subject: name, text }))
    }

    pub(super) fn member(&self, node: NodeId) -> Result<&Member, Rejection> {
        self.members.get(&node).ok_or_else(|| conflict(format!("node {node}"), "a member", "none"))
    }

    fn member_mut(&mut self, node: NodeId) -> Result<&mut Member, Rejection> {
        self.members.get_mut(&node).ok_or_else(|| conflict(format!("node {node}"), "a member", "none"))
    }

    fn vm(&self, name: &str) -> Result<&VmRecord, Rejection> {
        self.vms.get(name).ok_or_else(|| conflict(format!("vm {name}"), "one", "none"))
    }

    fn volume_mut(&mut self, name: &str, expect_term: Term) -> Result<&mut VolumeRecord, Rejection> {
        let volume =
            self.volumes.get_mut(name).ok_or_else(|| conflict(format!("volume {name}"), "one", "none"))?;
        if volume.term != expect_term {
            return Err(conflict(format!("term of volume {name}"), expect_term, volume.term));
        }
        Ok(volume)
    }

    fn check_serves(&self, node: NodeId, epoch: Epoch) -> Result<(), Rejection> {
        self.check_up(node, epoch)?;
        self.check_no_witness(node)
    }

    fn check_no_witness(&self, node: NodeId) -> Result<(), Rejection> {
        if self.witnesses.contains(&node) {
            return Err(conflict(format!("role of node {node}"), "node", "witness"));
        }
        Ok(())
    }

    fn check_up(&self, node: NodeId, epoch: Epoch) -> Result<(), Rejection> {
        let member = self.member(node)?;
        if member.state == MemberState::Up && member.epoch == epoch {
            return Ok(());
        }
        let found = format!("{} with epoch {}", member.state, member.epoch);
        Err(conflict(format!("node {node}"), format!("up with epoch {epoch}"), found))
    }

    fn check_vm_owner(&self, node: NodeId) -> Result<(), Rejection> {
        let member = self.member(node)?;
        if member.state == MemberState::Up {
            return self.check_no_witness(node);
        }
        Err(conflict(format!("node {node}"), MemberState::Up, member.state))
    }
}

/// The ways of a node's state within one incarnation. A fence ends in a confirmation or in quarantine; only a
/// confirmation leads out of quarantine.
fn may_become(from: MemberState, to: MemberState) -> bool {
    use MemberState::{Down, FenceFailed, Fenced, Fencing, Up};
    matches!(
        (from, to),
        (Up, Down | Fencing)
            | (Down, Fencing)
            | (Fencing, Fenced | FenceFailed)
            | (FenceFailed, Fencing | Fenced)
    )
}

fn check_vm_change(old: &VmRecord, new: &VmRecord) -> Result<(), Rejection> {
    if new.id != old.id {
        return Err(conflict(format!("id of vm {}", old.name), new.id, old.id));
    }
    let next = new.epoch.checked_sub(old.epoch);
    if !matches!(next, Some(0 | 1)) {
        return Err(invalid(format!("vm {} cannot go from epoch {} to {}", old.name, old.epoch, new.epoch)));
    }
    // Two runners must never share an epoch, and a new owner is a new runner.
    if new.owner != old.owner && next != Some(1) {
        return Err(invalid(format!("vm {} needs the next epoch to go to node {}", old.name, new.owner)));
    }
    Ok(())
}

fn check_sizes(command: &Command) -> Result<(), Rejection> {
    match command {
        Command::CreateCluster { name, members, .. } => {
            check_name("cluster", name)?;
            if members.is_empty() {
                return Err(invalid("a cluster needs a member".to_owned()));
            }
            members.iter().try_for_each(|(id, name, address)| {
                if id.0 == 0 || id.0 > NODES_MAX {
                    return Err(invalid(format!("node id {id} is not within 1 to {NODES_MAX}")));
                }
                check_name("node", name)?;
                check_text("address", address)
            })
        }
        Command::AddMember { name, address, .. } => {
            check_name("node", name)?;
            check_text("address", address)
        }
        Command::CreateVolume { name, lun_uri, .. } => {
            check_name("volume", name)?;
            check_text("LUN", lun_uri)
        }
        Command::CreateVm { name, spec, .. } => {
            check_name("vm", name)?;
            check_spec(spec.len())
        }
        Command::UpdateVm(VmUpdate { to, .. }) => {
            check_spec(to.spec.len())?;
            check_text("path of the saved state", to.saved.as_deref().unwrap_or_default())?;
            check_text("reason", &to.reason)
        }
        Command::SetDrain { to: Some(drain), .. } => drain::check_size(drain),
        Command::Set { name, value } => settings::check_size(name, value.as_deref()),
        Command::SetVolumeState { reason, .. } => check_text("reason", reason),
        Command::PublishProcessor { record, .. } => check_processor(record.len()),
        Command::FreezeBaseline { vendor, record, .. } => {
            check_name("vendor", vendor)?;
            check_processor(record.len())
        }
        Command::Event { kind, subject, text } => {
            check_text("event", kind)?;
            check_text("event", subject)?;
            check_text("event", text)
        }
        Command::BeginEpoch { .. }
        | Command::RenewCertificates { .. }
        | Command::SetDrain { to: None, .. }
        | Command::AddTicket { .. }
        | Command::RemoveMember { .. }
        | Command::MarkNode { .. }
        | Command::RemoveVolume { .. }
        | Command::MoveVolume { .. }
        | Command::DeleteVm { .. } => Ok(()),
    }
}

pub(super) fn check_name(what: &str, name: &str) -> Result<(), Rejection> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(allowed) || name.starts_with('.') {
        return Err(invalid(format!(
            "{what} name {:?} is not allowed: use up to {NAME_BYTES_MAX} letters, digits, '-', '_' and '.'",
            name.chars().take(NAME_BYTES_MAX).collect::<String>()
        )));
    }
    Ok(())
}

pub(super) fn check_text(what: &str, text: &str) -> Result<(), Rejection> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(invalid(format!("{what} has {} bytes, more than {TEXT_BYTES_MAX}", text.len())));
    }
    Ok(())
}

fn check_processor(bytes: usize) -> Result<(), Rejection> {
    if bytes > PROCESSOR_BYTES_MAX {
        return Err(invalid(format!(
            "a processor's record has {bytes} bytes, more than {PROCESSOR_BYTES_MAX}"
        )));
    }
    Ok(())
}

fn check_spec(bytes: usize) -> Result<(), Rejection> {
    if bytes > SPEC_BYTES_MAX {
        return Err(invalid(format!("the vm's configuration has {bytes} bytes, more than {SPEC_BYTES_MAX}")));
    }
    Ok(())
}

/// The next epoch or term. They count joins and moves; only a forged record could exhaust them.
fn next(number: u64) -> Result<u64, Rejection> {
    number.checked_add(1).ok_or_else(|| invalid("the number cannot grow any more".to_owned()))
}

pub(super) fn conflict(what: impl Into<String>, expected: impl ToString, found: impl ToString) -> Rejection {
    Rejection::Conflict { what: what.into(), expected: expected.to_string(), found: found.to_string() }
}

pub(super) fn invalid(what: String) -> Rejection {
    Rejection::Invalid { what }
}
