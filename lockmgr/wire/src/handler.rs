//! What a process does with what its peers send.

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::{ByteStream, Connection, JoinReply, JoinRequest, Peer, Refusal, RefusalCode, Stream};

/// Receives the requests and pushes of all connections of a server or a mesh.
///
/// The methods are called by a connection's reader, in the order of arrival, and must not block. The future of
/// [`Handler::handle`] is polled once right there, so that a quick answer costs no task; if it must wait it goes on
/// as a task of its own and later frames overtake it. It is not cancelled when the connection ends.
pub trait Handler: Send + Sync + 'static {
    /// Answers a request.
    fn handle(
        &self,
        from: Peer,
        conn: Connection,
        service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>>;

    /// Lets a node join that has no certificate yet. Its secret proves nothing before it was compared with the records.
    fn join(&self, _request: JoinRequest) -> BoxFuture<'static, Result<JoinReply, Refusal>> {
        Box::pin(async { Err(Refusal::new(RefusalCode::NotHere, "nodes cannot join here")) })
    }

    /// Takes a message that wants no answer.
    fn pushed(&self, from: Peer, _conn: Connection, service: u16, _body: Bytes) {
        tracing::warn!(peer = %from, service, "push for an unknown service dropped");
    }

    /// A program elsewhere wants to talk to this node's admin interface. Must not block.
    fn admin(&self, stream: ByteStream) {
        tracing::warn!(peer = %stream.peer(), "there is no admin interface here");
    }

    /// Another node has opened a bare stream. Blocking on it is for a thread of its own.
    fn bare_stream(&self, stream: Stream) {
        tracing::warn!(peer = %stream.peer(), "a stream that nobody expects was closed");
    }

    /// Another node wants to read and write blocks through this one. Must not block.
    fn blocks(&self, stream: Stream) {
        tracing::warn!(peer = %stream.peer(), "no blocks are served here");
    }

    /// A connection is up.
    fn connected(&self, _conn: &Connection) {}

    /// A connection is over.
    fn gone(&self, _conn: &Connection, _reason: &str) {}
}

/// Serves nothing: for clients that only ask.
#[derive(Clone, Copy, Debug, Default)]
pub struct RefuseAll;

impl Handler for RefuseAll {
    fn handle(
        &self,
        _from: Peer,
        _conn: Connection,
        service: u16,
        _body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        Box::pin(async move { Err(Refusal::unsupported(service)) })
    }
}
