//! Nodes and their coordinator in one process: what a daemon uses for the volumes that it coordinates itself.
//!
//! ```text
//!   Node --LocalLink--> Coordinator
//!     ^                     |
//!     '--- deliver --- LocalPushes (by client)
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};

use lockmgr::{ClientId, NodeId, Term, VolumeId};

use crate::coordinator::{Coordinator, PushTarget};
use crate::node::{CoordinatorLink, LinkError, Node, ReplyTo};
use crate::proto as pb;

/// The way to a coordinator in this process, while there is one.
#[derive(Debug, Default)]
pub struct LocalLink {
    /// Rank: leaf; not held while a request is handed over.
    coordinator: RwLock<Option<Arc<Coordinator>>>,
}

impl LocalLink {
    /// A link to `coordinator`.
    #[must_use]
    pub fn to(coordinator: Arc<Coordinator>) -> Arc<Self> {
        Arc::new(Self { coordinator: RwLock::new(Some(coordinator)) })
    }

    /// Changes where requests go. Gives the coordinator of before.
    pub fn set(&self, coordinator: Option<Arc<Coordinator>>) -> Option<Arc<Coordinator>> {
        std::mem::replace(&mut *self.coordinator.write().unwrap_or_else(PoisonError::into_inner), coordinator)
    }

    /// Where requests go now.
    #[must_use]
    pub fn coordinator(&self) -> Option<Arc<Coordinator>> {
        self.coordinator.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl CoordinatorLink for LocalLink {
    fn send(&self, request: pb::Request, done: ReplyTo) {
        match self.coordinator() {
            Some(coordinator) => coordinator.submit(request, Box::new(move |reply| done(Ok(reply)))),
            None => done(Err(LinkError::Lost("this process has no coordinator of the volume now".into()))),
        }
    }
}

/// Pushes of a coordinator to the nodes of this process. Nodes that are gone get none.
#[derive(Default)]
pub struct LocalPushes {
    /// Rank: leaf; not held while a node is told.
    nodes: Mutex<HashMap<ClientId, Weak<Node>>>,
}

impl std::fmt::Debug for LocalPushes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LocalPushes")
    }
}

impl LocalPushes {
    /// Nobody is told anything yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Tells `node` from now on what is for `client`.
    pub fn add(&self, client: ClientId, node: &Arc<Node>) {
        self.lock().insert(client, Arc::downgrade(node));
    }

    /// Tells `client` nothing more.
    pub fn remove(&self, client: ClientId) {
        self.lock().remove(&client);
    }

    /// The node of a client, if it is in this process.
    #[must_use]
    pub fn node(&self, client: ClientId) -> Option<Arc<Node>> {
        self.lock().get(&client).and_then(Weak::upgrade)
    }

    /// Tells all nodes of this process who coordinates the volume now.
    pub fn announce(&self, volume: VolumeId, term: Term, coordinator: NodeId) {
        let nodes: Vec<_> = self.lock().values().filter_map(Weak::upgrade).collect();
        for node in nodes {
            node.deliver(new_coordinator(volume, term, coordinator));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ClientId, Weak<Node>>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The push that says who coordinates a volume now.
#[must_use]
pub fn new_coordinator(volume: VolumeId, term: Term, coordinator: NodeId) -> pb::Push {
    pb::Push {
        volume: volume.0.as_bytes().to_vec().into(),
        term: term.0,
        what: Some(pb::push::What::NewCoordinator(pb::NewCoordinator { node: u32::from(coordinator.0) })),
    }
}

impl PushTarget for LocalPushes {
    fn push(&self, to: ClientId, push: pb::Push) {
        if let Some(node) = self.node(to) {
            node.deliver(push);
        }
    }

    fn overdue(&self, client: ClientId, ino: u64) {
        tracing::error!(%client, ino, "a client of this process does not answer a recall");
    }
}
