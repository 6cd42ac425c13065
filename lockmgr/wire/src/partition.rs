//! The switch that cuts a node off, for tests of what the cluster does then.
//!
//! Cut off means what a dead network means: connections stay open and nothing moves on them, in either direction,
//! nor on new ones. When the switch opens again, what was held goes on, as TCP would have it.

use std::sync::Arc;

use tokio::sync::watch;

/// A switch shared by everything through which a node talks to others.
#[derive(Clone, Debug)]
pub struct Partition {
    cut: Arc<watch::Sender<bool>>,
}

impl Default for Partition {
    fn default() -> Self {
        Self { cut: Arc::new(watch::Sender::new(false)) }
    }
}

impl Partition {
    /// Cuts the node off, or connects it again.
    pub fn set(&self, cut: bool) {
        if self.cut.send_replace(cut) != cut {
            tracing::warn!(cut, "network partition switched");
        }
    }

    /// Whether the node is cut off.
    #[must_use]
    pub fn is_set(&self) -> bool {
        *self.cut.borrow()
    }

    /// Returns as soon as bytes may pass.
    pub(crate) async fn passable(&self) {
        if !self.is_set() {
            return;
        }
        let mut cut = self.cut.subscribe();
        // The sender lives in `self`, so this cannot fail while we are called.
        let _open = cut.wait_for(|cut| !*cut).await;
    }
}
