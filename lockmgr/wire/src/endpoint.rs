//! What a process says and proves about itself on its connections.

use uuid::Uuid;

use crate::{Identity, Partition, WireError};

/// Who this side is, as its hello tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Our cluster. `Uuid::nil()` on a Unix socket means: whichever the server belongs to.
    pub cluster: Uuid,
    /// Our node.
    pub node: u16,
    /// How logs of the other side shall call us.
    pub name: String,
}

/// A node's side of its TLS connections.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub(crate) local: Local,
    pub(crate) identity: Identity,
    pub(crate) partition: Partition,
}

impl Endpoint {
    /// Joins hello and certificate; refuses a certificate that names another node.
    pub fn new(local: Local, identity: Identity) -> Result<Self, WireError> {
        if identity.node() != local.node {
            return Err(WireError::BadIdentity {
                what: format!("the certificate is for node {}, this is node {}", identity.node(), local.node),
            });
        }
        Ok(Self { local, identity, partition: Partition::default() })
    }

    /// Who this side is.
    #[must_use]
    pub fn local(&self) -> &Local {
        &self.local
    }

    /// The switch that cuts this endpoint off, shared by its clones.
    #[must_use]
    pub fn partition(&self) -> &Partition {
        &self.partition
    }
}
