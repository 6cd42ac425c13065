//! How a node's requests reach the coordinator: in the same process, through the node's daemon, or over the mesh.

use crate::proto as pb;

/// Why there is no reply.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// The connection ended, or there is no coordinator now. Whether the request was carried out is unknown.
    #[error("lost the way to the coordinator: {0}")]
    Lost(String),
}

/// Called once with the reply. It may run on the link's own thread and must not block.
pub type ReplyTo = Box<dyn FnOnce(Result<pb::Reply, LinkError>) + Send>;

/// The way to the coordinator.
///
/// - Any number of requests may be under way; replies may come in another order.
/// - Exactly one completion per request. The outcome of a request that was under way when the connection ended is
///   [`LinkError::Lost`]; the node then keeps the request and sends it again after it has attached to whoever is the
///   coordinator now.
/// - After a connection came back, and for each new coordinator, the owner of the link delivers a `NewCoordinator` push
///   ([`super::Node::deliver`]). Without one the node tries by itself from time to time.
pub trait CoordinatorLink: Send + Sync {
    /// Sends a request. Does not block for the reply.
    fn send(&self, request: pb::Request, done: ReplyTo);
}
