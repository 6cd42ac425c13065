//! A running member: start, propose, watch, serve, stop.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use openraft::{BasicNode, SnapshotPolicy};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use wire::{Mesh, Peer, Refusal, RefusalCode, service};

use super::command::{Command, Outcome, ProposeError};
use super::config::{ClusterConfig, ClusterError};
use super::network::{self, Network};
use super::propose::{self, Proposer};
use super::raft_types::Raft;
use super::records::ClusterState;
use super::regress::Regressed;
use super::store::{Closer, Store};
use crate::NodeId;

/// Log entries kept behind a snapshot, so that a follower that is a little behind needs no snapshot.
const LOG_ENTRIES_KEPT: u64 = 500;
/// Entries of one message to a follower.
const ENTRIES_PER_MESSAGE_MAX: u64 = 256;
/// Longest time for one piece of a snapshot.
const SNAPSHOT_PIECE_MS: u64 = 5_000;

/// This node's part of the cluster.
pub struct Cluster {
    node: NodeId,
    raft: Raft,
    state: watch::Receiver<Arc<ClusterState>>,
    proposer: Proposer,
    election_ms_max: u64,
    store: Arc<Closer>,
    creating: std::sync::Mutex<Option<JoinHandle<()>>>,
}

/// How this node sees Raft.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RaftStatus {
    /// The leader, if one is known.
    pub leader: Option<NodeId>,
    /// Raft's term (not a volume's).
    pub raft_term: u64,
    /// Last entry of this node's log.
    pub last_log: u64,
    /// Last entry that was applied to the records here.
    pub last_applied: u64,
    /// Members with a vote.
    pub voters: Vec<NodeId>,
    /// Whether a majority is behind the leader, as far as this node can know.
    pub quorum: bool,
    /// Why this node's part has stopped, if it has.
    pub stopped: Option<String>,
}

impl Cluster {
    /// Opens this node's log and takes part. Returns before there is a leader; see [`Cluster::ready`].
    ///
    /// The mesh gets the members as peers. Its handler and those of the node's servers must pass Raft and proposal frames
    /// to [`Cluster::handle`].
    pub async fn start(config: ClusterConfig, mesh: Arc<Mesh>) -> Result<Arc<Self>, ClusterError> {
        config.check()?;
        let (folder, cluster, node) = (config.data_dir.clone(), config.cluster, config.node);
        let opening = tokio::task::spawn_blocking(move || Store::open(&folder, cluster, node));
        let store = opening.await.map_err(|error| ClusterError::Raft { what: error.to_string() })??;
        let state = store.watch();
        let (log, machine, closer) = store.into_parts();
        for member in &config.members {
            mesh.set_peer(member.id.0, &member.address);
        }
        // Members that joined later are in the records only, and what they say of an address is newer.
        for member in state.borrow().members.values() {
            mesh.set_peer(member.id.0, &member.address);
        }
        let regressed = Regressed::default();
        let network = Network { node, mesh: Arc::clone(&mesh), regressed: regressed.clone() };
        let raft = Raft::new(node.0.into(), Arc::new(raft_config(&config)?), network, log, machine)
            .await
            .map_err(|error| ClusterError::Raft { what: error.to_string() })?;
        if config.bootstrap {
            initialize(&raft, &config).await?;
        }
        let propose_ms = config.timing.propose_ms;
        let proposer = Proposer {
            node,
            epoch: Arc::default(),
            raft: raft.clone(),
            mesh,
            state: state.clone(),
            propose_ms,
            regressed,
        };
        let creating = config.bootstrap.then(|| tokio::spawn(create(proposer.clone(), config.clone())));
        Ok(Arc::new(Self {
            node,
            raft,
            state,
            proposer,
            election_ms_max: config.timing.election_ms_max,
            store: Arc::new(closer),
            creating: std::sync::Mutex::new(creating),
        }))
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> NodeId {
        self.node
    }

    pub(super) fn raft(&self) -> &Raft {
        &self.raft
    }

    /// Proposes a change and waits until it was applied, here too, or refused. Goes through the leader, wherever it is, and
    /// survives a change of leader: the command is applied at most once.
    pub async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        self.proposer.propose(command).await
    }

    /// The records, as they change. This copy may lag behind the leader's; whoever acts on it proposes a change that expects
    /// what it has read.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }

    /// The records as this node knows them now.
    #[must_use]
    pub fn state(&self) -> Arc<ClusterState> {
        Arc::clone(&self.state.borrow())
    }

    /// The records as they are now: all that was acknowledged anywhere before this call is in them. Asks the leader, which
    /// asks a majority. For decisions that a stale copy would get wrong, such as what became of a lost message.
    pub async fn read(&self) -> Result<Arc<ClusterState>, ProposeError> {
        self.proposer.read().await
    }

    /// Waits until there is a leader and the cluster's records exist here.
    pub async fn ready(&self) -> Result<(), ProposeError> {
        self.proposer.leader().await?;
        let mut state = self.state.clone();
        let mut metrics = self.raft.metrics();
        tokio::select! {
            created = state.wait_for(|state| state.cluster.is_some()) => {
                created.map_err(|_| propose::stopped("raft ended"))?;
                Ok(())
            }
            ended = metrics.wait_for(|metrics| metrics.running_state.is_err()) => {
                let reason = ended.ok().and_then(|seen| seen.running_state.as_ref().err().map(ToString::to_string));
                Err(propose::stopped(reason.unwrap_or_else(|| "raft ended".to_owned())))
            }
        }
    }

    /// How this node sees Raft.
    #[must_use]
    pub fn status(&self) -> RaftStatus {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let leading = metrics.current_leader == Some(self.node.0.into());
        let quorum = if leading {
            metrics.millis_since_quorum_ack.is_some_and(|ms| ms <= self.election_ms_max)
        } else {
            metrics.current_leader.is_some()
        };
        RaftStatus {
            leader: metrics.current_leader.and_then(propose::node_id),
            raft_term: metrics.current_term,
            last_log: metrics.last_log_index.unwrap_or(0),
            last_applied: metrics.last_applied.map_or(0, |id| id.index),
            voters: metrics.membership_config.voter_ids().filter_map(propose::node_id).collect(),
            quorum,
            stopped: metrics.running_state.as_ref().err().map(ToString::to_string),
        }
    }

    /// Waits until another node leads than `known`, as this one sees it, or nobody.
    pub async fn leader_changed(&self, known: Option<NodeId>) {
        let mut metrics = self.raft.metrics();
        let known = known.map(|node| u64::from(node.0));
        if metrics.wait_for(|metrics| metrics.current_leader != known).await.is_err() {
            // Raft has ended here: nobody will be seen to lead any more.
            std::future::pending::<()>().await;
        }
    }

    /// Asks for the leadership that `silent` has, because it is silent. Nothing on a node that follows somebody else.
    pub async fn stand_for_election(&self, silent: NodeId) {
        if self.status().leader != Some(silent) {
            return;
        }
        if let Err(error) = self.raft.trigger().elect().await {
            tracing::debug!(%error, "no election");
        }
    }

    /// Waits until what this node sees of Raft has changed.
    pub async fn status_changed(&self) {
        let mut metrics = self.raft.metrics();
        metrics.mark_unchanged();
        // An error means that Raft has ended: the status says so.
        let _ended = metrics.changed().await;
    }

    /// Returns as soon as this node has no vote.
    pub async fn without_vote(&self) {
        let mut metrics = self.raft.metrics();
        let me = u64::from(self.node.0);
        let votes = |id| id == me;
        // An error means that Raft has ended: then it votes for nothing any more.
        let _ended = metrics.wait_for(|metrics| !metrics.membership_config.voter_ids().any(votes)).await;
    }

    /// Answers a frame of a peer for the services [`service::RAFT`] and [`service::PROPOSAL`].
    pub fn handle(
        &self,
        service: u16,
        from: &Peer,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        match service {
            service::RAFT => network::serve(self.raft.clone(), from.node, body).boxed(),
            service::PROPOSAL => propose::serve(self.proposer.clone(), from.node, body).boxed(),
            other => async move { Err(Refusal::unsupported(other)) }.boxed(),
        }
    }

    /// Stops taking part and closes the log. The mesh is left to its owner.
    pub async fn shutdown(&self) {
        let creating = self.creating.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(creating) = creating {
            creating.abort();
            let _aborted = creating.await;
        }
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "raft ended badly");
        }
        let store = Arc::clone(&self.store);
        let _panicked = tokio::task::spawn_blocking(move || store.close()).await;
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("node", &self.node)
            .field("status", &self.status())
            .finish_non_exhaustive()
    }
}

fn raft_config(config: &ClusterConfig) -> Result<openraft::Config, ClusterError> {
    let timing = &config.timing;
    let raft = openraft::Config {
        cluster_name: config.cluster.to_string(),
        heartbeat_interval: timing.heartbeat_ms,
        election_timeout_min: timing.election_ms_min,
        election_timeout_max: timing.election_ms_max,
        install_snapshot_timeout: SNAPSHOT_PIECE_MS,
        max_payload_entries: ENTRIES_PER_MESSAGE_MAX,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_entries),
        max_in_snapshot_log_to_keep: LOG_ENTRIES_KEPT.min(timing.snapshot_entries),
        replication_lag_threshold: timing.snapshot_entries,
        ..openraft::Config::default()
    };
    raft.validate().map_err(|error| ClusterError::Config { what: error.to_string() })
}

/// Gives a new log its first entry: who votes. An old log is left as it is.
async fn initialize(raft: &Raft, config: &ClusterConfig) -> Result<(), ClusterError> {
    let failed = |what: String| ClusterError::Raft { what };
    if raft.is_initialized().await.map_err(|error| failed(error.to_string()))? {
        return Ok(());
    }
    let voters: BTreeMap<u64, BasicNode> = config
        .members
        .iter()
        .map(|member| (member.id.0.into(), BasicNode::new(member.address.clone())))
        .collect();
    raft.initialize(voters).await.map_err(|error| failed(error.to_string()))
}

/// Writes the cluster's first records, as soon as there is a majority and unless they exist.
async fn create(proposer: Proposer, config: ClusterConfig) {
    let members = config.members.iter().map(|m| (m.id, m.name.clone(), m.address.clone())).collect();
    let command =
        Command::CreateCluster { cluster: config.cluster, name: config.cluster_name.clone(), members };
    while proposer.state.borrow().cluster.is_none() {
        match proposer.propose(command.clone()).await {
            Ok(_) | Err(ProposeError::Conflict { .. }) => return,
            Err(error @ (ProposeError::Invalid { .. } | ProposeError::Stopped { .. })) => {
                tracing::error!(%error, hint = error.hint(), "the cluster cannot be created");
                return;
            }
            Err(error) => tracing::info!(%error, hint = error.hint(), "the cluster is not created yet"),
        }
        tokio::time::sleep(Duration::from_millis(config.timing.heartbeat_ms)).await;
    }
}

/// What a node answers before its cluster part has started.
#[must_use]
pub fn not_started() -> Refusal {
    Refusal::new(RefusalCode::NotHere, "this node does not take part in the cluster yet")
}
