//! What other nodes send, handed to the part that it is for.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use csvfs::proto as pb;
use futures::future::BoxFuture;
use lockmgr::NodeId;
use prost::Message;
use wire::{
    ByteStream, Class, Connection, Handler, JoinReply, JoinRequest, Peer, Refusal, RefusalCode, Stream,
    service,
};

use crate::core::Core;
use crate::{admin, forward, membership, redirect, router, vms};

/// The handler of all connections between nodes. Frames that come before the daemon is complete are refused; the
/// sender tries again.
#[derive(Debug, Default)]
pub(crate) struct Dispatcher {
    core: OnceLock<Arc<Core>>,
}

impl Dispatcher {
    /// From here on frames are served.
    pub(crate) fn begin(&self, core: &Arc<Core>) {
        drop(self.core.set(Arc::clone(core)));
    }
}

impl Handler for Dispatcher {
    fn handle(
        &self,
        from: Peer,
        _conn: Connection,
        service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let Some(core) = self.core.get().cloned() else {
            return Box::pin(async { Err(Refusal::new(RefusalCode::Busy, "the node is starting")) });
        };
        if !core.mesh.endpoint().accepts(from.issued_ms) {
            let refusal =
                Refusal::new(RefusalCode::Denied, "the certificate of this connection has been replaced");
            return Box::pin(async move { Err(refusal) });
        }
        // Raft's messages bring the records up to date, so they are taken from a leader that these do not know yet.
        if service != service::RAFT && is_stranger(&core, from.node) {
            let refusal = Refusal::new(RefusalCode::Busy, "this node knows no such member")
                .with_hint("a new member is known in a moment; one that was evicted must join again");
            return Box::pin(async move { Err(refusal) });
        }
        match service {
            service::RAFT | service::PROPOSAL => core.cluster.handle(service, &from, body),
            service::HEARTBEAT => {
                let reply = membership::answer_beat(&core, NodeId(from.node), body);
                Box::pin(async { reply.map_err(|error| malformed(&error)) })
            }
            service::CSVFS => Box::pin(async move { csvfs(&core, &from, body).await }),
            service::ADMIN => {
                Box::pin(async move { Ok(forward::serve(&core, NodeId(from.node), body).await) })
            }
            other => Box::pin(async move { Err(Refusal::unsupported(other)) }),
        }
    }

    fn join(&self, request: JoinRequest) -> BoxFuture<'static, Result<JoinReply, Refusal>> {
        let core = self.core.get().cloned();
        Box::pin(async move {
            let core = core.ok_or_else(|| Refusal::new(RefusalCode::Busy, "the node is starting"))?;
            membership::let_join(&core, request).await
        })
    }

    fn pushed(&self, from: Peer, _conn: Connection, service: u16, body: Bytes) {
        let Some(core) = self.core.get() else { return };
        if service != service::CSVFS_PUSH {
            tracing::warn!(peer = %from, service, "push for an unknown service dropped");
        } else if let Err(error) = router::deliver(core, body) {
            tracing::warn!(peer = %from, %error, "unreadable push dropped");
        }
    }

    fn blocks(&self, stream: Stream) {
        match self.core.get() {
            Some(core) => redirect::serve(core, stream),
            None => tracing::debug!(peer = %stream.peer(), "a stream came before the node was complete"),
        }
    }

    fn admin(&self, stream: ByteStream) {
        match self.core.get().filter(|core| !is_stranger(core, stream.peer().node)) {
            Some(core) => drop(core.runtime.spawn(admin::carry(Arc::clone(core), stream))),
            None => tracing::warn!(peer = %stream.peer(), "an admin connection was refused"),
        }
    }

    fn bare_stream(&self, stream: Stream) {
        // A move that is this early has no attempt that it could belong to.
        if let Some(core) = self.core.get() {
            vms::streamed(core, stream);
        }
    }

    fn connected(&self, conn: &Connection) {
        let peer = conn.peer();
        tracing::debug!(peer = %peer, class = %peer.class, "connected");
        if let Some(core) = self.core.get().filter(|_| peer.class == Class::Control) {
            router::reconnected(core, peer.node);
        }
    }

    fn gone(&self, conn: &Connection, reason: &str) {
        tracing::debug!(peer = %conn.peer(), class = %conn.peer().class, reason, "disconnected");
    }
}

/// Whether the records, as far as they have come here, do not list the node: its certificate outlives its membership.
fn is_stranger(core: &Core, node: u16) -> bool {
    let state = core.state();
    state.cluster.is_some() && !state.members.contains_key(&NodeId(node))
}

/// A client of another node asks the coordinator here. It can only speak for clients of its own node.
async fn csvfs(core: &Arc<Core>, from: &Peer, body: Bytes) -> Result<Bytes, Refusal> {
    let request = pb::Request::decode(body).map_err(|error| malformed(&error))?;
    let speaks_for = request.client.map(|client| client.node);
    if speaks_for != Some(from.node.into()) {
        return Err(Refusal::new(RefusalCode::Denied, "the client is not one of this node's"));
    }
    let volume = router::volume_of(&request)
        .ok_or_else(|| Refusal::new(RefusalCode::Invalid, "the request names no volume"))?;
    Ok(router::serve(core, volume, request).await.encode_to_vec().into())
}

fn malformed(error: &prost::DecodeError) -> Refusal {
    Refusal::new(RefusalCode::Invalid, format!("unreadable request: {error}"))
}
