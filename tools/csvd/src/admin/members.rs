//! `cluster token`, `node confirm-dead`, `node evict`.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use api::config::FenceConfig;
use api::{Error, pb};
use lockmgr::cluster::{Command, MemberState};
use wire::JoinToken;

use super::cluster::node;
use crate::core::Core;
use crate::{membership, view};

/// Longest life of a token: a week.
const VALID_MS_MAX: u64 = 7 * 24 * 3_600_000;

pub(super) async fn token(core: &Arc<Core>, valid_ms: u64) -> Result<pb::ClusterToken, Error> {
    if valid_ms == 0 || valid_ms > VALID_MS_MAX {
        return Err(Error::usage("a token is valid for at least a millisecond and at most a week"));
    }
    if core.config.tls.ca_key.is_none() {
        return Err(Error::conflict("this node does not hold the key of the cluster's authority")
            .hint("ask a node that was set up by `cluster create` or `node join`"));
    }
    if matches!(core.config.fence, FenceConfig::LocalKill) {
        return Err(Error::conflict("an embedded cluster cuts its nodes off by killing their processes on this machine: a node elsewhere would be out of its reach")
            .hint("make a cluster that others can join with `csvctl cluster create`"));
    }
    let token = JoinToken::new(core.me.0, &core.config.listen.to_string(), core.authority);
    let expires_ms = unix_ms().saturating_add(valid_ms);
    core.propose(Command::AddTicket { digest: token.digest(), expires_ms }).await?;
    Ok(pb::ClusterToken { token: token.to_string(), expires_ms })
}

#[expect(
    clippy::disallowed_methods,
    reason = "the end of a token is a date that people read; no safety rests on it"
)]
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

pub(super) async fn confirm_dead(
    core: &Arc<Core>,
    request: pb::NodeConfirmDeadRequest,
) -> Result<pb::Node, Error> {
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let member = view::member(&state, &request.name)?;
    match member.state {
        MemberState::FenceFailed => {}
        MemberState::Fencing => {
            return Err(Error::conflict(format!("node {} is being fenced", member.name))
                .hint("wait for the outcome; `csvctl events --follow` shows it"));
        }
        other => {
            return Err(Error::conflict(format!("node {} is {other}, not in quarantine", member.name))
                .hint("only a node whose fence failed needs this; `csvctl node list` shows the states"));
        }
    }
    membership::confirm_dead(core, member.id, member.epoch, &request.who).await?;
    let state = core.state();
    Ok(node(core, &state, view::member(&state, &request.name)?, &core.cluster.status()))
}

pub(super) async fn evict(core: &Arc<Core>, request: pb::NodeEvictRequest) -> Result<pb::NodeEvicted, Error> {
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let member = view::member(&state, &request.name)?;
    if !matches!(member.state, MemberState::Down | MemberState::Fenced) {
        return Err(Error::conflict(format!("node {} is {}", member.name, member.state))
            .hint("stop its csvd first; one that is dead is fenced by the cluster, or confirmed with `node confirm-dead`"));
    }
    let left = u32::try_from(state.members.len().saturating_sub(1)).unwrap_or(u32::MAX);
    let evicted = pb::NodeEvicted { node: member.name.clone(), members_left: left, dry_run: request.dry_run };
    if !request.dry_run {
        core.propose(Command::RemoveMember { node: member.id, expect: member.epoch }).await?;
    }
    Ok(evicted)
}
