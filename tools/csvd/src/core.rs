//! What all parts of the daemon share.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use api::Error;
use api::config::NodeConfig;
use lockmgr::cluster::{Cluster, ClusterState, Command, Outcome, ProposeError};
use lockmgr::timing::Timing;
use lockmgr::{ClientId, Epoch, NodeId};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use wire::Mesh;

use crate::clients::Clients;
use crate::membership::Membership;
use crate::redirect::{PeerKey, ProcessKey, Sessions};
use crate::vms::{self, Vms};
use crate::volumes::Volumes;

/// The daemon's parts and where they find each other.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: NodeConfig,
    pub(crate) me: NodeId,
    pub(crate) timing: Timing,
    /// Digest of the certificate of the cluster's authority.
    pub(crate) authority: wire::Digest,
    pub(crate) runtime: Handle,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) clients: Clients,
    pub(crate) membership: Membership,
    pub(crate) volumes: Volumes,
    pub(crate) vms: Vms,
    /// Cuts this node's paths to all LUNs, for rehearsals.
    pub(crate) lun_cut: blockio::Switch,
    /// Nodes that reach LUNs through this one.
    pub(crate) peer_sessions: Sessions<PeerKey>,
    /// Processes of this node that reach LUNs through the daemon.
    pub(crate) process_sessions: Sessions<ProcessKey>,
    /// Moves whenever something that `wait` and `health` look at has changed beside the records.
    pub(crate) pulse: Pulse,
    /// Cancelled when the daemon shall end: nothing new is begun, and what there is is put away in order.
    pub(crate) stop: CancellationToken,
    /// Cancelled when all is put away. Until then the node beats, holds its lease and follows the records.
    pub(crate) done: CancellationToken,
    /// This incarnation was declared over by the others: after its end the next one begins.
    pub(crate) begin_anew: AtomicBool,
    epoch: OnceLock<Epoch>,
}

impl Core {
    pub(crate) fn new(
        config: NodeConfig,
        timing: Timing,
        authority: wire::Digest,
        mesh: Arc<Mesh>,
        cluster: Arc<Cluster>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let own_user = vms::user::is_own(&config);
        Arc::new(Self {
            me: NodeId(config.id),
            membership: Membership::new(&config, &timing),
            config,
            timing,
            authority,
            runtime: Handle::current(),
            mesh,
            cluster,
            clients: Clients::default(),
            volumes: Volumes::default(),
            vms: Vms::new(own_user),
            lun_cut: blockio::Switch::default(),
            peer_sessions: Sessions::default(),
            process_sessions: Sessions::default(),
            pulse: Pulse::default(),
            stop,
            done: CancellationToken::new(),
            begin_anew: AtomicBool::new(false),
            epoch: OnceLock::new(),
        })
    }

    /// This node's incarnation; nothing is done on LUNs before there is one.
    pub(crate) fn epoch(&self) -> Option<Epoch> {
        self.epoch.get().copied()
    }

    /// A witness has no volumes and runs no VMs.
    pub(crate) fn refuse_witness(&self, what: &str) -> Result<(), Error> {
        if !self.config.witness {
            return Ok(());
        }
        Err(Error::conflict(format!(
            "{what}: {} is a witness, it has no volumes and no VMs",
            self.config.name
        ))
        .hint("ask another node"))
    }

    /// The quorum has given this node its epoch.
    pub(crate) fn begin_epoch(&self, epoch: Epoch) {
        self.epoch.set(epoch).expect("a daemon lives for one epoch");
        self.pulse.beat();
    }

    /// A client of this node in this incarnation.
    pub(crate) fn client(&self, serial: u64) -> ClientId {
        ClientId { node: self.me, epoch: self.epoch().unwrap_or_default(), serial }
    }

    /// The records as this node knows them.
    pub(crate) fn state(&self) -> Arc<ClusterState> {
        self.cluster.watch().borrow().clone()
    }

    /// Whether all members that can be reached know what the protocol's `version` has brought: a record that one of them cannot
    /// read would hold it up until it is upgraded (G4).
    pub(crate) fn all_speak(&self, version: u32, what: &str) -> Result<(), Error> {
        let older = self.mesh.status().into_iter().find(|peer| peer.version.is_some_and(|it| it < version));
        let Some(peer) = older else { return Ok(()) };
        let name = crate::view::node_name(&self.state(), NodeId(peer.node));
        Err(Error::conflict(format!("{what}: node {name} is of an older release that does not know of it"))
            .hint("upgrade that node first, see `csvctl node list`"))
    }

    /// Proposes a change, and tells why it failed in the words of the admin interface.
    pub(crate) async fn propose(&self, command: Command) -> Result<Outcome, Error> {
        self.cluster.propose(command).await.map_err(|error| refused(&error))
    }

    /// Adds a line to the cluster's events, without waiting for it.
    pub(crate) fn note(self: &Arc<Self>, kind: &str, subject: &str, text: String) {
        tracing::info!(kind, subject, "{text}");
        let command = Command::Event { kind: kind.to_owned(), subject: subject.to_owned(), text };
        let core = Arc::clone(self);
        self.runtime.spawn(async move {
            if let Err(error) = core.cluster.propose(command).await {
                tracing::warn!(%error, "the event above is only in this log");
            }
        });
    }
}

/// A failed proposal, for the user.
pub(crate) fn refused(error: &ProposeError) -> Error {
    let kind = match error {
        ProposeError::Conflict { .. } => api::Kind::Conflict,
        ProposeError::Invalid { .. } => api::Kind::Usage,
        ProposeError::NoQuorum { .. } | ProposeError::OutcomeUnknown { .. } => api::Kind::Unreachable,
        ProposeError::Stopped { .. } => api::Kind::Failed,
    };
    Error::new(kind, error).hint(error.hint())
}

/// A counter to wait on.
#[derive(Debug, Default)]
pub(crate) struct Pulse {
    beats: watch::Sender<u64>,
}

impl Pulse {
    pub(crate) fn beat(&self) {
        self.beats.send_modify(|beats| *beats = beats.wrapping_add(1));
    }

    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.beats.subscribe()
    }
}
