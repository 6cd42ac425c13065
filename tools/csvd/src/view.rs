//! Questions about the cluster's records.

use api::Error;
use lockmgr::cluster::{ClusterState, Member, MemberState, VmRecord, VmState, VolumeRecord};
use lockmgr::{Epoch, NodeId, VolumeId};

/// What a node is called.
pub(crate) fn node_name(state: &ClusterState, node: NodeId) -> String {
    state.members.get(&node).map_or_else(|| format!("node {node}"), |member| member.name.clone())
}

/// The member of that name (or number).
pub(crate) fn member<'a>(state: &'a ClusterState, name: &str) -> Result<&'a Member, Error> {
    let found = state.members.values().find(|member| member.name == name || member.id.0.to_string() == name);
    found.ok_or_else(|| {
        let names: Vec<_> = state.members.values().map(|member| member.name.as_str()).collect();
        Error::not_found(format!("there is no node {name}"))
            .hint(format!("the nodes are {}", names.join(", ")))
    })
}

/// The volume of that name.
pub(crate) fn volume<'a>(state: &'a ClusterState, name: &str) -> Result<&'a VolumeRecord, Error> {
    state.volumes.get(name).ok_or_else(|| {
        Error::not_found(format!("there is no volume {name}")).hint("`csvctl volume list` shows the volumes")
    })
}

/// The volume of that id.
pub(crate) fn volume_by_id(state: &ClusterState, id: VolumeId) -> Option<&VolumeRecord> {
    state.volumes.values().find(|volume| volume.id == id)
}

/// The VM of that name.
pub(crate) fn vm<'a>(state: &'a ClusterState, name: &str) -> Result<&'a VmRecord, Error> {
    state.vms.get(name).ok_or_else(|| {
        Error::not_found(format!("there is no VM {name}")).hint("`csvctl vm list` shows the VMs")
    })
}

/// Whether this incarnation of a node is certainly over: whatever it held may be given to others (A1).
///
/// A later epoch proves it too: a daemon begins one only after it has seen the end of every process of the former.
pub(crate) fn is_over(state: &ClusterState, node: NodeId, epoch: Epoch) -> bool {
    match state.members.get(&node) {
        Some(member) if member.epoch == epoch => {
            matches!(member.state, MemberState::Fenced | MemberState::Down)
        }
        Some(member) => member.epoch > epoch,
        // It has been removed. A number that was not given by now is a node's whose joining has not arrived here yet, and records
        // that have not arrived prove nothing.
        None => node.0 <= state.nodes_given,
    }
}

/// Whether nothing of a node runs: its last incarnation is certainly over, and no other has begun.
pub(crate) fn is_certainly_off(state: &ClusterState, node: NodeId) -> bool {
    is_over(state, node, state.members.get(&node).map_or(Epoch(0), |member| member.epoch))
}

/// Whether a VM has a process, or may have one at any moment.
pub(crate) fn runs(vm: &VmRecord) -> bool {
    !matches!(vm.state, VmState::Stopped | VmState::Saved | VmState::Failed)
}

/// Whether this incarnation of a node is being fenced, or a fence of it has failed.
pub(crate) fn is_being_cut_off(state: &ClusterState, node: NodeId, epoch: Epoch) -> bool {
    state.members.get(&node).is_some_and(|member| {
        member.epoch == epoch && matches!(member.state, MemberState::Fencing | MemberState::FenceFailed)
    })
}

/// Whether this incarnation of a node is a member in good standing.
pub(crate) fn is_up(state: &ClusterState, node: NodeId, epoch: Epoch) -> bool {
    state.members.get(&node).is_some_and(|member| member.epoch == epoch && member.state == MemberState::Up)
}

#[cfg(test)]
mod tests {
    use lockmgr::ClusterId;
    use uuid::Uuid;

    use super::*;

    fn with_member(epoch: u64, state: MemberState) -> ClusterState {
        let mut records = ClusterState { cluster: Some(ClusterId(Uuid::nil())), ..ClusterState::default() };
        let member = Member {
            id: NodeId(1),
            name: "n1".into(),
            address: String::new(),
            epoch: Epoch(epoch),
            state,
            joined_ms: 0,
        };
        records.members.insert(NodeId(1), member);
        records
    }

    // Invariants A4 and H1: what is saved on a node that is being cut off may be about to run there.
    #[test]
    fn a_node_is_certainly_off_only_when_its_last_incarnation_is_over() {
        use MemberState::{Down, FenceFailed, Fenced, Fencing, Up};
        for (state, off) in
            [(Up, false), (Fencing, false), (FenceFailed, false), (Fenced, true), (Down, true)]
        {
            assert_eq!(is_certainly_off(&with_member(3, state), NodeId(1)), off, "{state}");
        }
        assert!(!is_certainly_off(&ClusterState::default(), NodeId(1)), "records that have not arrived");
    }

    // Invariants A1 and A4: only a confirmed end, or a later incarnation, makes an incarnation over.
    #[test]
    fn an_incarnation_is_over_only_when_its_end_is_certain() {
        use MemberState::{Down, FenceFailed, Fenced, Fencing, Up};
        for (state, over) in
            [(Up, false), (Fencing, false), (FenceFailed, false), (Fenced, true), (Down, true)]
        {
            assert_eq!(is_over(&with_member(3, state), NodeId(1), Epoch(3)), over, "{state}");
        }
        assert!(is_over(&with_member(3, Up), NodeId(1), Epoch(2)));
    }

    // A node that has begun its epoch is told about it by nodes whose records are behind.
    #[test]
    fn records_that_are_behind_prove_nothing() {
        assert!(!is_over(&with_member(2, MemberState::Up), NodeId(1), Epoch(3)));
        assert!(!is_over(&ClusterState::default(), NodeId(1), Epoch(1)));
        let records = ClusterState { nodes_given: 3, ..with_member(2, MemberState::Up) };
        assert!(is_over(&records, NodeId(3), Epoch(1)), "it was removed");
        assert!(!is_over(&records, NodeId(4), Epoch(1)), "it has just joined");
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = member(&with_member(1, MemberState::Up), "n9").expect_err("unknown");
        assert!(error.kind == api::Kind::NotFound && error.hint.contains("n1"), "{error:?}");
    }
}
