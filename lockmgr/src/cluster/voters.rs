//! Who votes follows from who is a member: the leader brings Raft's configuration in line with the records.
//!
//! ```text
//!   recorded, not voting --connected--> learner (gets the log) --caught up--> voter
//!   voting, not recorded -----------------------------------------------------> out
//!   voting, leaves for good --> learner (still gets the log), until it is not recorded any more --> out
//! ```
//! One change at a time: the majorities of two neighbouring configurations always share a node. Any step may be lost with
//! the leader that took it; the next leader sees what is left to do in records and configuration.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::{BasicNode, ChangeMembers};

use super::node::Cluster;
use super::propose::node_id;
use super::records::Member;
use crate::NodeId;

/// How long a new member may take to catch up before the next look.
const CATCH_UP_MS_MAX: u64 = 30_000;

impl Cluster {
    /// Takes one step towards a configuration in which the recorded members vote, and says which. Nothing on nodes that do
    /// not lead, and while all is as it should be. `connected` tells whether a node can be reached now.
    ///
    /// # Errors
    /// When the step failed; it is tried again at the next look.
    pub async fn align_voters(&self, connected: impl Fn(NodeId) -> bool) -> Result<Option<String>, String> {
        let status = self.status();
        if status.leader != Some(self.node()) {
            return Ok(None);
        }
        let state = self.state();
        let voting = |id: &NodeId| status.voters.contains(id);
        let recorded = |id: &NodeId| state.members.contains_key(id);
        if let Some(gone) = status.voters.iter().find(|id| !recorded(id) || state.is_leaving(**id)) {
            self.drop_voter(*gone, recorded(gone)).await?;
            return Ok(Some(format!("node {gone} does not vote any more")));
        }
        if let Some(gone) = self.learners().into_iter().find(|id| !recorded(id)) {
            self.drop_learner(gone).await?;
            return Ok(Some(format!("node {gone} does not get the log any more")));
        }
        let joins =
            |member: &&Member| !voting(&member.id) && !state.is_leaving(member.id) && connected(member.id);
        let Some(new) = state.members.values().find(joins) else { return Ok(None) };
        self.add_voter(new).await?;
        Ok(Some(format!("node {} votes", new.name)))
    }

    async fn add_voter(&self, member: &Member) -> Result<(), String> {
        let (id, node) = (u64::from(member.id.0), BasicNode::new(member.address.clone()));
        let caught_up = self.raft().add_learner(id, node, true);
        tokio::time::timeout(Duration::from_millis(CATCH_UP_MS_MAX), caught_up)
            .await
            .map_err(|_| format!("node {} did not catch up within {CATCH_UP_MS_MAX} ms", member.name))?
            .map_err(|error| error.to_string())?;
        let change = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
        self.raft().change_membership(change, true).await.map_err(|error| error.to_string())?;
        Ok(())
    }

    /// `follows`: it still gets the log, so that it learns when it may go.
    async fn drop_voter(&self, node: NodeId, follows: bool) -> Result<(), String> {
        let change = ChangeMembers::RemoveVoters(BTreeSet::from([u64::from(node.0)]));
        self.raft().change_membership(change, follows).await.map_err(|error| error.to_string())?;
        Ok(())
    }

    async fn drop_learner(&self, node: NodeId) -> Result<(), String> {
        let change = ChangeMembers::RemoveNodes(BTreeSet::from([u64::from(node.0)]));
        self.raft().change_membership(change, false).await.map_err(|error| error.to_string())?;
        Ok(())
    }

    /// Those that get the log and have no vote.
    fn learners(&self) -> Vec<NodeId> {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow();
        let membership = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        membership.nodes().filter(|(id, _)| !voters.contains(id)).filter_map(|(id, _)| node_id(*id)).collect()
    }

    /// Waits until the set of voters differs from `known`.
    pub async fn voters_changed(&self, known: &[NodeId]) {
        let mut metrics = self.raft().metrics();
        let differs = |metrics: &openraft::RaftMetrics<u64, BasicNode>| {
            let now: Vec<NodeId> = metrics.membership_config.voter_ids().filter_map(node_id).collect();
            now != known
        };
        // An error means that Raft has ended.
        let _ended = metrics.wait_for(differs).await;
    }
}
