//! The way to the coordinators: one connection to the node's daemon, for all volumes of this process.
//!
//! The daemon may restart while the VM runs: data I/O goes on under the lease, requests fail as lost, and a thread
//! connects again. **Invariant:** after each new connection every node is told to attach again, because the daemon that
//! answers now may know nothing of it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::Builder;
use std::time::Duration;

use csvfs::node::{CoordinatorLink, LinkError, Node, ReplyTo};
use csvfs::proto as pb;
use prost::Message;
use threads::Kind;
use wire::{BlockingCallbacks, BlockingConnection, Local, WireError, service};

use crate::failure::Failure;
use crate::path::{Path, PathOrder};

/// Waits between attempts to reach the daemon again: short at first, as a restart takes a moment.
const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 256 << 10;

/// The connection to one node daemon.
pub(crate) struct NodeLink {
    socket: PathBuf,
    local: Local,
    /// Protects the handle only. Rank: a leaf, as is the next.
    connection: Mutex<Option<Arc<BlockingConnection>>>,
    volumes: Mutex<HashMap<Vec<u8>, Attached>>,
    /// Tells the thread that connects again.
    lost: Sender<()>,
}

#[derive(Default)]
struct Attached {
    node: Option<Weak<Node>>,
    path: Option<Weak<Path>>,
    /// The newest term that was seen.
    term: u64,
}

impl NodeLink {
    /// Connects.
    pub(crate) fn connect(socket: PathBuf, local: Local) -> Result<Arc<Self>, Failure> {
        let (lost, told) = channel();
        let link =
            Arc::new(Self { socket, local, connection: Mutex::default(), volumes: Mutex::default(), lost });
        link.try_connect().map_err(|error| {
            Failure::new(
                format!("cannot reach the node daemon at {}: {error}", link.socket.display()),
                "is csvd running on this node?",
            )
        })?;
        let weak = Arc::downgrade(&link);
        let builder = Builder::new().name("node-link".into()).stack_size(STACK_BYTES);
        threads::spawn(Kind::Link, builder, move || keep_connected(&weak, &told))
            .map_err(|error| Failure::new(format!("cannot start a thread: {error}"), "check the limits"))?;
        Ok(link)
    }

    /// Pushes for this volume go to this node from now on. What was announced since it began to attach, to the
    /// coordinator of term `since`, is told again: that coordinator waits for it.
    pub(crate) fn register(&self, volume: &[u8], node: &Arc<Node>, since: u64) {
        let term = {
            let mut volumes = self.volumes();
            let known = volumes.entry(volume.to_vec()).or_default();
            known.node = Some(Arc::downgrade(node));
            known.term
        };
        if term > since {
            node.deliver(self.announcement(volume, term));
        }
    }

    /// Orders about this volume's LUN go to this path from now on.
    pub(crate) fn register_path(&self, volume: &[u8], path: &Arc<Path>) {
        self.volumes().entry(volume.to_vec()).or_default().path = Some(Arc::downgrade(path));
    }

    fn order(&self, body: &[u8]) {
        let Ok(order) = PathOrder::decode(body) else {
            return tracing::warn!("an unreadable order about a path was dropped");
        };
        let path = self.volumes().get(&order.volume).and_then(|volume| volume.path.clone());
        if let Some(path) = path.and_then(|path| path.upgrade()) {
            path.follow(&order);
        }
    }

    fn announcement(&self, volume: &[u8], term: u64) -> pb::Push {
        let what = pb::push::What::NewCoordinator(pb::NewCoordinator { node: self.local.node.into() });
        pb::Push { volume: volume.to_vec().into(), term, what: Some(what) }
    }

    fn try_connect(self: &Arc<Self>) -> Result<(), WireError> {
        let (pushed, closed) = (Arc::downgrade(self), Arc::downgrade(self));
        let callbacks = BlockingCallbacks {
            pushed: Box::new(move |service, body| match (pushed.upgrade(), service) {
                (Some(link), service::CSVFS_PUSH) => link.deliver(&body),
                (Some(link), service::PATHS) => link.order(&body),
                _ => {}
            }),
            closed: Box::new(move |error| {
                if let Some(link) = closed.upgrade() {
                    tracing::warn!(error = error.explain(), "the connection to the node daemon ended");
                    let _ = link.lost.send(());
                }
            }),
        };
        let connection = BlockingConnection::connect(&self.socket, &self.local, callbacks)?;
        *self.connection() = Some(Arc::new(connection));
        Ok(())
    }

    fn deliver(&self, body: &[u8]) {
        let Ok(push) = pb::Push::decode(body) else {
            return tracing::warn!("an unreadable push was dropped");
        };
        self.saw_term(&push.volume, push.term);
        let node = self.volumes().get(&*push.volume).and_then(|volume| volume.node.clone());
        if let Some(node) = node.and_then(|node| node.upgrade()) {
            node.deliver(push);
        }
    }

    fn saw_term(&self, volume: &[u8], term: u64) {
        let mut volumes = self.volumes();
        match volumes.get_mut(volume) {
            Some(known) => known.term = known.term.max(term),
            None => drop(volumes.insert(volume.to_vec(), Attached { term, ..Attached::default() })),
        }
    }

    /// After a new connection: every node attaches again.
    fn attach_again(&self) {
        let all: Vec<_> = {
            let volumes = self.volumes();
            let each = |(id, known): (&Vec<u8>, &Attached)| {
                Some((id.clone(), known.term, known.node.as_ref()?.upgrade()?))
            };
            volumes.iter().filter_map(each).collect()
        };
        for (volume, term, node) in all {
            node.deliver(self.announcement(&volume, term));
        }
    }

    fn connection(&self) -> MutexGuard<'_, Option<Arc<BlockingConnection>>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn volumes(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Attached>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Body of the thread that connects again; ends with the link.
fn keep_connected(link: &Weak<NodeLink>, lost: &Receiver<()>) {
    while lost.recv().is_ok() {
        let mut pause = RETRY_MIN;
        loop {
            let Some(link) = link.upgrade() else { return };
            link.connection().take();
            match link.try_connect() {
                Ok(()) => {
                    tracing::info!("connected to the node daemon again");
                    link.attach_again();
                    break;
                }
                Err(error) => tracing::debug!(error = error.explain(), "the node daemon does not answer yet"),
            }
            drop(link);
            // Ends early when the link is dropped.
            if lost.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return;
            }
            pause = (pause * 2).min(RETRY_MAX);
        }
    }
}

/// [`NodeLink`] as the node library wants it.
pub(crate) struct VolumeLink(pub(crate) Arc<NodeLink>);

impl CoordinatorLink for VolumeLink {
    fn send(&self, request: pb::Request, done: ReplyTo) {
        let Some(connection) = self.0.connection().clone() else {
            return done(Err(LinkError::Lost("not connected to the node daemon".into())));
        };
        let link = Arc::downgrade(&self.0);
        let volume = request.volume.clone();
        let body = request.encode_to_vec().into();
        connection.send(
            service::CSVFS,
            body,
            Box::new(move |answer| {
                let reply = answer.map_err(|error| LinkError::Lost(error.to_string())).and_then(|body| {
                    pb::Reply::decode(body)
                        .map_err(|error| LinkError::Lost(format!("unreadable reply: {error}")))
                });
                if let (Ok(reply), Some(link)) = (&reply, link.upgrade()) {
                    link.saw_term(&volume, reply.term);
                }
                done(reply);
            }),
        );
    }
}
