//! LUNs that have forgotten this node: it begins anew, because only a new incarnation may register there (A3).
//!
//! ```text
//!   key gone -> ask the quorum: up in this epoch?  no:  it was fenced, and hears from its peers what comes next
//!                                                  yes: the SAN has lost its keys
//!                                                       other volumes work here: left to people, VMs run on them
//!                                                       none does:               all ends, the next incarnation begins
//! ```
//! A target that loses its power may lose registrations and reservation, whatever it has promised. Then every node is cut off,
//! and a machine that was fenced is not: until somebody reserves the LUN again it takes writes of anybody. So whoever has
//! nothing left to lose does not wait for people.
//!
//! **Invariant:** an incarnation whose key is gone registers no more: it ends as if it had been fenced.

use std::sync::Arc;
use std::time::Duration;

use crate::core::Core;
use crate::{membership, view};

/// Pause before the quorum is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// What to do about a key that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// The others have ended this incarnation.
    Fenced,
    /// Something here works still.
    Stay,
    BeginAnew,
}

/// `lost`: of each volume that is open here, whether this node is cut off from its LUN.
fn verdict(is_up: bool, lost: impl IntoIterator<Item = bool>) -> Verdict {
    match is_up {
        false => Verdict::Fenced,
        true if lost.into_iter().all(|lost| lost) => Verdict::BeginAnew,
        true => Verdict::Stay,
    }
}

/// After a key of this node was found to be gone.
pub(super) async fn consider(core: Arc<Core>) {
    let Some(epoch) = core.epoch() else { return };
    let state = loop {
        match core.cluster.read().await {
            Ok(state) => break state,
            Err(error) => tracing::debug!(%error, "not known yet whether this node was fenced"),
        }
        tokio::select! {
            () = core.done.cancelled() => return,
            () = tokio::time::sleep(AGAIN_AFTER) => {}
        }
    };
    let open = core.volumes.all().into_iter().filter_map(|volume| volume.road());
    match verdict(view::is_up(&state, core.me, epoch), open.map(|road| road.place().lost().is_some())) {
        Verdict::Fenced => {}
        Verdict::Stay => tracing::error!("other volumes work on this node: it goes on until it is restarted"),
        Verdict::BeginAnew => {
            tracing::error!("the SAN has forgotten this node, which was not fenced: it begins anew");
            membership::begin_anew(&core);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Invariants A3 and A6.
    #[test]
    fn a_node_begins_anew_by_itself_when_it_was_not_fenced_and_has_nothing_left() {
        assert_eq!(verdict(true, [true, true]), Verdict::BeginAnew);
        assert_eq!(verdict(true, [true, false]), Verdict::Stay, "VMs run on the other volume");
        assert_eq!(verdict(false, [true]), Verdict::Fenced, "its peers tell it");
    }
}
