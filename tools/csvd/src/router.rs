//! The way of a csvfs request to the volume's coordinator, and of its pushes back.
//!
//! ```text
//!   mount, hv process --request--> Router --+-- coordinator here
//!                                           '-- mesh --> router there --> coordinator there
//!   coordinator --push--> Router --+-- client here
//!                                  '-- mesh --> client there
//! ```
//! Who the coordinator is, is read from the records each time. While a coordinator is about to open here, requests wait
//! for it; what reaches a node that is not the owner is refused as NOT_COORDINATOR, and the client asks again.
//!
//! **Invariant:** a request is answered by the coordinator or not at all; the router never invents an outcome.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use csvfs::coordinator::{Coordinator, PushTarget};
use csvfs::node::{CoordinatorLink, LinkError, ReplyTo};
use csvfs::proto as pb;
use lockmgr::{ClientId, Term, VolumeId};
use prost::Message;
use tokio::sync::oneshot;
use wire::service;

use crate::core::Core;
use crate::messages::{ClientPush, NodeOp, OfClient};
use crate::{forward, membership, view};

/// Longest time that a request waits here for a coordinator that is about to open; then the client is told to try again.
const OPENING_WITHIN: Duration = Duration::from_secs(5);

/// Longest time that a node may take to tell whether a client of its own is gone.
const QUESTION_WITHIN: Duration = Duration::from_secs(2);

/// Sends the requests of a client of this node where they belong.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    /// The daemon owns volumes, which own mounts, which own this.
    core: Weak<Core>,
}

impl Router {
    pub(crate) fn new(core: &Arc<Core>) -> Self {
        Self { core: Arc::downgrade(core) }
    }

    fn core(&self) -> Result<Arc<Core>, LinkError> {
        self.core.upgrade().ok_or_else(|| LinkError::Lost("the daemon is ending".to_owned()))
    }
}

/// Carries a request of a client of this node to the coordinator, wherever it is.
pub(crate) async fn request(core: &Arc<Core>, request: pb::Request) -> Result<pb::Reply, LinkError> {
    let Some(volume) = volume_of(&request) else {
        return Err(LinkError::Lost("the request names no volume".to_owned()));
    };
    let owner = view::volume_by_id(&core.state(), volume).map(|record| record.owner);
    match owner {
        None => Err(LinkError::Lost(format!("volume {volume} is not in the records"))),
        Some(owner) if owner == core.me => Ok(serve(core, volume, request).await),
        Some(owner) => {
            let reply = core.mesh.call(owner.0, service::CSVFS, request.encode_to_vec().into()).await;
            let body = reply.map_err(|error| LinkError::Lost(error.to_string()))?;
            pb::Reply::decode(body).map_err(|error| LinkError::Lost(format!("unreadable reply: {error}")))
        }
    }
}

/// Answers a request at the coordinator of this node.
pub(crate) async fn serve(core: &Arc<Core>, volume: VolumeId, request: pb::Request) -> pb::Reply {
    let attaching = matches!(request.op, Some(pb::request::Op::Attach(_)));
    let Some(coordinator) = coordinator_soon(core, volume, !attaching).await else {
        return not_coordinator();
    };
    let (tell, told) = oneshot::channel();
    coordinator.submit(
        request,
        Box::new(move |reply| {
            drop(tell.send(reply));
        }),
    );
    drop(coordinator);
    let reply = told.await.unwrap_or_else(|_| not_coordinator());
    if !attaching {
        answered(core, volume, &reply);
    }
    reply
}

/// Tells the events how long it took to get here, after the first answer of a coordinator.
fn answered(core: &Arc<Core>, volume: VolumeId, reply: &pb::Reply) {
    if matches!(reply.result, None | Some(pb::reply::Result::Failure(_) | pb::reply::Result::Attached(_))) {
        return;
    }
    let Some(phases) = core.volumes.host(volume).and_then(|host| host.answered()) else { return };
    if let Some(record) = view::volume_by_id(&core.state(), volume) {
        let text = format!("term {} on {}: {phases}", record.term, core.config.name);
        core.note("volume.served", &record.name, text);
    }
}

/// The coordinator of this node, waiting a little when it is about to open.
async fn coordinator_soon(core: &Arc<Core>, volume: VolumeId, counts: bool) -> Option<Arc<Coordinator>> {
    let host = core.volumes.host(volume)?;
    if let Some(serving) = host.serving() {
        return Some(serving);
    }
    if counts {
        host.hold();
    }
    let mine = view::volume_by_id(&core.state(), volume)
        .is_some_and(|record| record.owner == core.me && Some(record.owner_epoch) == core.epoch());
    if !mine {
        return None;
    }
    tokio::time::timeout(OPENING_WITHIN, host.serving_soon()).await.ok().flatten()
}

/// The volume that a request is about.
pub(crate) fn volume_of(request: &pb::Request) -> Option<VolumeId> {
    uuid::Uuid::from_slice(&request.volume).ok().map(VolumeId)
}

fn not_coordinator() -> pb::Reply {
    pb::Reply {
        term: 0,
        at: 0,
        known: Vec::new(),
        held: Vec::new(),
        result: Some(pb::reply::Result::Failure(pb::Failure {
            kind: pb::FailureKind::NotCoordinator.into(),
            errno: 0,
            message: "the coordinator of this volume is not on this node now".to_owned(),
        })),
    }
}

impl CoordinatorLink for Router {
    fn send(&self, request: pb::Request, done: ReplyTo) {
        let core = match self.core() {
            Ok(core) => core,
            Err(error) => return done(Err(error)),
        };
        // Straight to a coordinator in this process: no task, no wake-up.
        let here = volume_of(&request).and_then(|volume| core.volumes.host(volume)?.serving());
        if let (Some(coordinator), Some(volume)) = (here, volume_of(&request)) {
            let tell = move |reply: pb::Reply| {
                answered(&core, volume, &reply);
                done(Ok(reply));
            };
            coordinator.submit(request, Box::new(tell));
            return;
        }
        let runtime = core.runtime.clone();
        runtime.spawn(async move { done(self::request(&core, request).await) });
    }
}

/// What a volume's coordinator on this node has to tell others.
pub(crate) struct Pushes {
    core: Weak<Core>,
    volume: VolumeId,
    term: Term,
}

impl Pushes {
    pub(crate) fn new(core: &Arc<Core>, volume: VolumeId, term: Term) -> Self {
        Self { core: Arc::downgrade(core), volume, term }
    }
}

impl PushTarget for Pushes {
    fn push(&self, to: ClientId, push: pb::Push) {
        let Some(core) = self.core.upgrade() else { return };
        if to.node == core.me {
            if Some(to.epoch) == core.epoch() {
                core.clients.deliver(self.volume, to.serial, push);
            }
            return;
        }
        let body = ClientPush { epoch: to.epoch.0, serial: to.serial, push: push.encode_to_vec().into() };
        let sent = core.mesh.push(to.node.0, service::CSVFS_PUSH, body.encode_to_vec().into());
        if let Err(error) = sent {
            tracing::warn!(client = %to, error = error.explain(), "push not sent");
        }
    }

    fn reclaimed(&self) {
        let host = self.core.upgrade().and_then(|core| core.volumes.host(self.volume));
        if let Some(host) = host {
            host.reclaimed();
        }
    }

    fn overdue(&self, client: ClientId, ino: u64) {
        let Some(core) = self.core.upgrade() else { return };
        let runtime = core.runtime.clone();
        runtime.spawn(question(core, self.volume, client, ino));
    }

    fn stopped(&self, reason: &str) {
        let Some(core) = self.core.upgrade() else { return };
        tracing::error!(volume = %self.volume, term = %self.term, reason, "coordinator stopped by itself");
        if let Some(host) = core.volumes.host(self.volume) {
            host.stopped(self.term);
        }
    }
}

/// A client that does not answer is gone, which its node can tell, or its node must be cut off (E2).
async fn question(core: Arc<Core>, volume: VolumeId, client: ClientId, ino: u64) {
    let Some(name) = view::volume_by_id(&core.state(), volume).map(|record| record.name.clone()) else {
        return;
    };
    let op = NodeOp::IsClientGone(OfClient::new(&name, client));
    let asked = tokio::time::timeout(QUESTION_WITHIN, forward::ask(&core, client.node, op)).await;
    if matches!(asked, Ok(Ok(_))) {
        tracing::info!(%client, volume = name, "client is gone, as its node says");
        if let Some(coordinator) = core.volumes.host(volume).and_then(|host| host.serving()) {
            coordinator.client_gone(client);
        }
        return;
    }
    let reason = match ino {
        0 => format!("client {client} of volume {name} did not attach to the new coordinator in time"),
        ino => format!("client {client} of volume {name} did not answer the recall of inode {ino} in time"),
    };
    membership::convict(&core, client.node, client.epoch, reason);
}

/// Takes a push that another node's coordinator sent to a client here.
pub(crate) fn deliver(core: &Arc<Core>, body: Bytes) -> Result<(), prost::DecodeError> {
    let envelope = ClientPush::decode(body)?;
    let push = pb::Push::decode(envelope.push)?;
    let ours = core.epoch().is_some_and(|epoch| epoch.0 == envelope.epoch);
    match uuid::Uuid::from_slice(&push.volume) {
        Ok(volume) if ours => {
            core.clients.deliver(VolumeId(volume), envelope.serial, push);
        }
        _ => tracing::debug!(epoch = envelope.epoch, "push for a client that is gone"),
    }
    Ok(())
}

/// After the way to `node` was open again: clients here attach again to the coordinators there.
pub(crate) fn reconnected(core: &Arc<Core>, node: u16) {
    for record in core.state().volumes.values().filter(|record| record.owner.0 == node) {
        core.clients.announce(record.id, Term(record.term.0), record.owner);
    }
}
