//! The beginning of an incarnation.

use std::sync::Arc;
use std::time::Duration;

use api::Error;
use lockmgr::cluster::{Command, Given, MemberState, ProposeError};

use crate::core::Core;

/// Pause between two attempts while a fence of the former incarnation is under way, or while there is no quorum.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

/// Asks the quorum for a new epoch, until there is one. The daemon answers on its admin socket meanwhile.
///
/// The pid file has been taken before, so no process of an earlier epoch of this node is alive.
pub(crate) async fn begin(core: &Arc<Core>) -> Result<(), Error> {
    // No quorum for a while is no reason to give up: the other nodes may come later.
    while let Err(error) = core.cluster.ready().await {
        if let ProposeError::Stopped { reason } = error {
            return Err(Error::failed(reason));
        }
        tracing::info!(%error, "waiting for the cluster");
    }
    loop {
        let state = core.state();
        let Some(member) = state.members.get(&core.me) else {
            return Err(Error::conflict(format!("this node ({}) is not a member of the cluster", core.me))
                .hint("join it first"));
        };
        let command = Command::BeginEpoch { node: core.me, expect: member.epoch };
        match core.cluster.propose(command).await {
            Ok(outcome) => {
                let Given::Epoch(epoch) = outcome.given else { continue };
                core.membership.lease.open(&core.config, epoch)?;
                core.begin_epoch(epoch);
                tracing::info!(%epoch, "joined the cluster");
                return Ok(());
            }
            Err(ProposeError::Stopped { reason }) => return Err(Error::failed(reason)),
            Err(ProposeError::Invalid { what }) => {
                return Err(
                    Error::conflict(what).hint("evict the node and let it join anew, with an empty folder")
                );
            }
            Err(error) => {
                if member.state == MemberState::FenceFailed {
                    return Err(Error::conflict(
                        "this node is in quarantine: its last fence was not confirmed",
                    )
                    .hint("make sure that its former incarnation is off, then confirm it"));
                }
                tracing::debug!(%error, "not joined yet");
                tokio::time::sleep(AGAIN_AFTER).await;
            }
        }
    }
}
