//! What a process says and proves about itself on its connections.
//!
//! The certificate may be renewed while connections are open: those that are made from then on show the new one, and each
//! lane of a mesh is made anew beside the old one, which goes when its answers have had time to come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use uuid::Uuid;

use crate::identity::Certified;
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

/// A node's side of its TLS connections. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub(crate) local: Local,
    /// Shown by every connection that is made from now on.
    identity: Arc<watch::Sender<Identity>>,
    /// Certificates that were issued earlier are refused, in ms since 1970.
    floor_ms: Arc<AtomicU64>,
    pub(crate) partition: Partition,
}

impl Endpoint {
    /// Joins hello and certificate; refuses a certificate that names another node.
    pub fn new(local: Local, identity: Identity) -> Result<Self, WireError> {
        check_node(&local, &identity)?;
        Ok(Self {
            local,
            identity: Arc::new(watch::Sender::new(identity)),
            floor_ms: Arc::default(),
            partition: Partition::default(),
        })
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

    /// Shows another certificate from now on, and has the lanes of the mesh made anew with it.
    ///
    /// # Errors
    /// When it is another node's.
    pub fn renew(&self, identity: Identity) -> Result<(), WireError> {
        check_node(&self.local, &identity)?;
        self.identity.send_replace(identity);
        Ok(())
    }

    /// Refuses certificates that were issued before this moment, in ms since 1970, on connections that are made from now on.
    pub fn refuse_issued_before(&self, floor_ms: u64) {
        self.floor_ms.fetch_max(floor_ms, Ordering::AcqRel);
    }

    /// Whether a certificate of that date is still good.
    #[must_use]
    pub fn accepts(&self, issued_ms: u64) -> bool {
        issued_ms >= self.floor_ms.load(Ordering::Acquire)
    }

    /// The certificate that is shown now.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity.borrow().clone()
    }

    /// Moves when another certificate is shown.
    pub(crate) fn renewals(&self) -> watch::Receiver<Identity> {
        self.identity.subscribe()
    }

    /// Refuses a certificate of before the last renewal.
    pub(crate) fn check_date(&self, peer: Certified) -> Result<(), WireError> {
        if self.accepts(peer.issued_ms) {
            return Ok(());
        }
        Err(WireError::ForeignCertificate {
            what: format!(
                "that of node {} is from before the cluster's certificates were renewed",
                peer.node
            ),
        })
    }
}

fn check_node(local: &Local, identity: &Identity) -> Result<(), WireError> {
    if identity.node() == local.node {
        return Ok(());
    }
    Err(WireError::BadIdentity {
        what: format!("the certificate is for node {}, this is node {}", identity.node(), local.node),
    })
}
