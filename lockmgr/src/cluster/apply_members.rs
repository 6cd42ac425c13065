//! What the commands about membership do to the records: tickets, new members, forgotten ones. Pure.
//!
//! **Invariant:** a ticket lets one member join; a member is forgotten only when nothing of it can be alive.

use super::apply::{Applied, Line, Position, conflict, invalid};
use super::command::{Given, Rejection, TICKETS_MAX};
use super::records::{ClusterState, Member, MemberState, Renewal, VmState};
use crate::{Epoch, NODES_MAX, NodeId};

impl ClusterState {
    pub(super) fn add_ticket(&mut self, digest: [u8; 32], expires_ms: u64, at: Position) -> Applied {
        self.tickets.retain(|_, expires_ms| *expires_ms > at.at_ms);
        if self.tickets.len() >= TICKETS_MAX {
            return Err(invalid(format!(
                "{TICKETS_MAX} join tokens are open already; use them or wait until they expire"
            )));
        }
        self.tickets.insert(digest, expires_ms);
        let text = format!("a join token was made by node {}", at.node);
        Ok((Given::Nothing, Line { kind: "cluster.token", subject: self.name.clone(), text }))
    }

    pub(super) fn add_member(
        &mut self,
        digest: [u8; 32],
        (name, address): (String, String),
        witness: bool,
        at: Position,
    ) -> Applied {
        self.check_ticket(&digest, at)?;
        if let Some(twin) =
            self.members.values().find(|member| member.name == name || member.address == address)
        {
            let found = format!("node {} at {}", twin.name, twin.address);
            return Err(conflict(
                format!("node {name} at {address}"),
                "a name and address of its own",
                found,
            ));
        }
        let id = self.free_number()?;
        // Only now: a join that was refused for its name may be tried again with the same token.
        self.tickets.remove(&digest);
        self.nodes_given = self.nodes_given.max(id.0);
        let role = if witness { "a witness" } else { "a member" };
        let text = format!("node {name} at {address} is {role}, number {id}");
        let line = Line { kind: "node.added", subject: name.clone(), text };
        let member = Member { id, name, address, epoch: Epoch(0), state: MemberState::Down, joined_ms: 0 };
        self.members.insert(id, member);
        if witness {
            self.witnesses.insert(id);
        }
        Ok((Given::Node(id), line))
    }

    pub(super) fn renew_certificates(&mut self, expect_before_ms: u64, to: Renewal) -> Applied {
        let found = self.renewal.before_ms;
        if found != expect_before_ms {
            return Err(conflict("renewal of certificates", expect_before_ms, found));
        }
        if to.before_ms <= found || to.refused_from_ms < to.before_ms {
            return Err(invalid(
                "a renewal lies after the last one, and what it replaces is refused later".to_owned(),
            ));
        }
        self.renewal = to;
        let grace_s = (to.refused_from_ms - to.before_ms) / 1000;
        let text = format!("all nodes renew their certificates; older ones are refused after {grace_s} s");
        Ok((Given::Nothing, Line { kind: "cluster.certificates", subject: self.name.clone(), text }))
    }

    fn check_ticket(&self, digest: &[u8; 32], at: Position) -> Result<(), Rejection> {
        match self.tickets.get(digest) {
            Some(expires_ms) if at.at_ms < *expires_ms => Ok(()),
            Some(_) => Err(conflict("join token", "one that is valid", "one that has expired")),
            None => Err(conflict("join token", "one that was not used yet", "none like this")),
        }
    }

    /// A number that nobody ever had, as long as there is one: whoever still believes in a former member of that number
    /// (its certificate, its slot on a LUN) cannot take the new one for it.
    fn free_number(&self) -> Result<NodeId, Rejection> {
        let fresh = (self.nodes_given < NODES_MAX).then(|| NodeId(self.nodes_given + 1));
        let reused = || (1..=NODES_MAX).map(NodeId).find(|id| !self.members.contains_key(id));
        fresh.or_else(reused).ok_or_else(|| invalid(format!("the cluster has {NODES_MAX} members already")))
    }

    pub(super) fn remove_member(&mut self, node: NodeId, expect: Epoch) -> Applied {
        let member = self.member(node)?;
        if member.epoch != expect {
            return Err(conflict(format!("epoch of node {node}"), expect, member.epoch));
        }
        if !matches!(member.state, MemberState::Down | MemberState::Fenced) {
            return Err(conflict(format!("state of node {node}"), "down or fenced", member.state));
        }
        if let Some(volume) = self.volumes.values().find(|volume| volume.owner == node) {
            return Err(conflict(
                format!("coordinator of volume {}", volume.name),
                "another node",
                &member.name,
            ));
        }
        let runs = |state| !matches!(state, VmState::Stopped | VmState::Saved | VmState::Failed);
        if let Some(vm) = self.vms.values().find(|vm| vm.owner == node && runs(vm.state)) {
            return Err(conflict(format!("node of vm {}", vm.name), "another node", &member.name));
        }
        let subject = member.name.clone();
        let up = self.serving().next().map(|member| member.id);
        let heir = self.open_members().next().map(|member| member.id).or(up);
        let heir = heir.ok_or_else(|| conflict("members", "one that is up", "none"))?;
        self.members.remove(&node);
        self.drains.remove(&node);
        self.processors.remove(&node);
        self.witnesses.remove(&node);
        // What runs nowhere is kept for whoever starts it next.
        for vm in self.vms.values_mut().filter(|vm| vm.owner == node) {
            vm.owner = heir;
            vm.epoch = vm.epoch.saturating_add(1);
        }
        let text = format!("node {subject} is no longer a member");
        Ok((Given::Nothing, Line { kind: "node.evicted", subject, text }))
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::ClusterId;
    use crate::cluster::command::Command;
    use crate::cluster::records::{VmRecord, VmState};

    fn at(at_ms: u64) -> Position {
        Position { index: 9, node: NodeId(1), epoch: Epoch(0), at_ms }
    }

    fn founded() -> ClusterState {
        let mut state = ClusterState::default();
        let members = vec![(NodeId(1), "n1".to_owned(), "a:1".to_owned())];
        let found = Command::CreateCluster { cluster: ClusterId(Uuid::nil()), name: "c".to_owned(), members };
        state.apply(found, at(0)).expect("created");
        state.apply(Command::BeginEpoch { node: NodeId(1), expect: Epoch(0) }, at(0)).expect("joined");
        state
    }

    fn add(name: &str, secret: u8) -> Command {
        Command::AddMember {
            digest: [secret; 32],
            name: name.to_owned(),
            address: format!("{name}:1"),
            witness: name.starts_with('w'),
        }
    }

    fn with_ticket(secret: u8) -> ClusterState {
        let mut state = founded();
        state.apply(Command::AddTicket { digest: [secret; 32], expires_ms: 100 }, at(0)).expect("ticket");
        state
    }

    #[test]
    fn a_renewal_goes_forward_and_leaves_time() {
        let mut state = founded();
        let renew = |expect_before_ms, before_ms, refused_from_ms| Command::RenewCertificates {
            expect_before_ms,
            to: Renewal { before_ms, refused_from_ms },
        };
        state.apply(renew(1, 50, 60), at(1)).expect_err("there was none at 1");
        state.apply(renew(0, 50, 40), at(1)).expect_err("refused before it is renewed");
        state.apply(renew(0, 50, 60), at(1)).expect("renewed");
        state.apply(renew(50, 50, 60), at(1)).expect_err("it goes forward");
        state.apply(renew(50, 51, 60), at(1)).expect("once more");
    }

    #[test]
    fn a_ticket_lets_one_node_join_and_only_in_time() {
        let mut state = with_ticket(7);
        state.apply(add("n2", 8), at(1)).expect_err("another secret");
        state.apply(add("n2", 7), at(100)).expect_err("expired");
        state.apply(add("n1", 7), at(1)).expect_err("the name is taken; the ticket is not used up by that");
        assert_eq!(state.apply(add("n2", 7), at(1)), Ok(Given::Node(NodeId(2))));
        state.apply(add("n3", 7), at(1)).expect_err("used");
    }

    // Invariant A1: what may be alive is not forgotten, or its successor could not be told from it.
    #[test]
    fn a_member_is_forgotten_only_when_it_is_certainly_off() {
        let mut state = with_ticket(7);
        state.apply(add("n2", 7), at(1)).expect("joins");
        let (node, epoch) = (NodeId(2), Epoch(1));
        state.apply(Command::BeginEpoch { node, expect: Epoch(0) }, at(1)).expect("up");
        let remove = Command::RemoveMember { node, expect: epoch };
        for becomes in [MemberState::Up, MemberState::Fencing, MemberState::FenceFailed] {
            if becomes != MemberState::Up {
                state.apply(Command::MarkNode { node, epoch, state: becomes }, at(1)).expect("marked");
            }
            state.apply(remove.clone(), at(1)).expect_err("may be alive");
        }
        state.apply(Command::MarkNode { node, epoch, state: MemberState::Fenced }, at(1)).expect("fenced");
        state.apply(remove, at(1)).expect("off");
        assert!(!state.members.contains_key(&node));
    }

    #[test]
    fn numbers_are_not_given_twice_and_stopped_vms_are_inherited() {
        let mut state = with_ticket(7);
        state.apply(add("n2", 7), at(1)).expect("joins");
        let vm = VmRecord {
            name: "web".to_owned(),
            id: Uuid::nil(),
            owner: NodeId(2),
            epoch: 1,
            state: VmState::Stopped,
            peer: None,
            spec: Vec::new().into(),
            saved: None,
            reason: String::new(),
            restarts_left: 0,
        };
        state.vms.insert("web".to_owned(), vm);
        state.apply(Command::RemoveMember { node: NodeId(2), expect: Epoch(0) }, at(1)).expect("off");
        assert_eq!((state.vms["web"].owner, state.vms["web"].epoch), (NodeId(1), 2));
        state.apply(Command::AddTicket { digest: [8; 32], expires_ms: 100 }, at(1)).expect("ticket");
        assert_eq!(state.apply(add("n2", 8), at(1)), Ok(Given::Node(NodeId(3))));
    }

    // Invariant A7: a witness has a vote, and nothing that would have to be fenced off a LUN.
    #[test]
    fn a_witness_is_given_no_volume_and_no_vm() {
        let mut state = founded();
        state.apply(Command::AddTicket { digest: [7; 32], expires_ms: 9 }, at(1)).expect("a ticket");
        let given = state.apply(add("w", 7), at(2)).expect("joined");
        let Given::Node(witness) = given else { panic!("{given:?}") };
        state.apply(Command::BeginEpoch { node: witness, expect: Epoch(0) }, at(3)).expect("up");
        assert_eq!(state.serving().map(|member| member.id).collect::<Vec<_>>(), [NodeId(1)]);
        let volume = Command::CreateVolume {
            name: "vol1".into(),
            id: crate::VolumeId(Uuid::nil()),
            lun_uri: "file:/lun".into(),
            owner: witness,
            owner_epoch: Epoch(1),
            fence_kind: crate::cluster::FenceKind::Lease,
        };
        assert!(matches!(state.apply(volume, at(4)), Err(Rejection::Conflict { .. })));
        let vm =
            Command::CreateVm { name: "vm".into(), id: Uuid::nil(), owner: witness, spec: Vec::new().into() };
        assert!(matches!(state.apply(vm, at(5)), Err(Rejection::Conflict { .. })));
    }
}
