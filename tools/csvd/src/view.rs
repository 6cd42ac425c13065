//! Questions about the cluster's records.

use api::Error;
use lockmgr::cluster::{ClusterState, Member, MemberState, VmRecord, VolumeRecord};
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
        // Records that have not arrived here yet prove nothing.
        None => state.cluster.is_some(),
    }
}

/// Whether this incarnation of a node is a member in good standing.
pub(crate) fn is_up(state: &ClusterState, node: NodeId, epoch: Epoch) -> bool {
    state.members.get(&node).is_some_and(|member| member.epoch == epoch && member.state == MemberState::Up)
}
