//! The desk at which nodes join: a token for a certificate and a number.
//!
//! **Invariant:** the token is used up by the same compare-and-swap that makes the member; of two nodes that show it, one
//! joins. A node that fails afterwards is a member that is down, and can be evicted.

use std::sync::Arc;

use api::config::SharedConfig;
use lockmgr::NodeId;
use lockmgr::cluster::{ClusterState, Command, Given, ProposeError};
use wire::authority::{self, Issued};
use wire::{JoinMember, JoinReply, JoinRequest, Refusal, RefusalCode, sha256};

use crate::core::Core;

/// Lets a node join that shows the secret of an open ticket.
pub(crate) async fn let_join(core: &Arc<Core>, request: JoinRequest) -> Result<JoinReply, Refusal> {
    let ca = authority_of(core)?;
    // Before the ticket is used up: a request that could not be certified must not cost it.
    authority::issue_requested(&ca, core.me.0, &request.csr_der).map_err(|error| invalid(&error))?;
    let command = Command::AddMember {
        digest: sha256(&request.secret),
        name: request.name.clone(),
        address: request.address.clone(),
        witness: request.witness,
    };
    let node = match core.cluster.propose(command).await.map(|outcome| outcome.given) {
        Ok(Given::Node(node)) => node,
        Ok(_) => return Err(Refusal::new(RefusalCode::Failed, "the cluster gave no number")),
        Err(error) => return Err(refused(&error)),
    };
    let cert_pem =
        authority::issue_requested(&ca, node.0, &request.csr_der).map_err(|error| invalid(&error))?;
    reply(core, &core.state(), node, cert_pem, ca)
}

fn reply(
    core: &Core,
    state: &ClusterState,
    node: NodeId,
    cert_pem: String,
    ca: Issued,
) -> Result<JoinReply, Refusal> {
    let shared = SharedConfig { base_ms: core.config.base_ms, fence: core.config.fence.clone() };
    let shared_config =
        toml::to_string(&shared).map_err(|error| Refusal::new(RefusalCode::Failed, error.to_string()))?;
    let members = state.members.values().map(|member| JoinMember {
        node: member.id.0.into(),
        name: member.name.clone(),
        address: member.address.clone(),
    });
    Ok(JoinReply {
        node: node.0.into(),
        cluster_name: state.name.clone(),
        cluster: core.config.cluster_id.as_bytes().to_vec().into(),
        cert_pem,
        ca_cert_pem: ca.cert_pem,
        ca_key_pem: ca.key_pem,
        members: members.collect(),
        shared_config,
    })
}

/// The authority with its key, on a node that has it.
fn authority_of(core: &Core) -> Result<Issued, Refusal> {
    let Some(key) = &core.config.tls.ca_key else {
        return Err(Refusal::new(RefusalCode::NotHere, "this node does not hold the authority's key")
            .with_hint("make the token on a node that was set up by `cluster create` or `node join`"));
    };
    let read = |path: &std::path::Path| {
        std::fs::read_to_string(path)
            .map_err(|error| Refusal::new(RefusalCode::Failed, format!("read {}: {error}", path.display())))
    };
    Ok(Issued { cert_pem: read(&core.config.tls.ca)?, key_pem: read(key)? })
}

fn invalid(error: &wire::WireError) -> Refusal {
    Refusal::new(RefusalCode::Invalid, error.to_string())
}

fn refused(error: &ProposeError) -> Refusal {
    let code = match error {
        ProposeError::Conflict { .. } => RefusalCode::Denied,
        ProposeError::Invalid { .. } => RefusalCode::Invalid,
        _ => RefusalCode::Busy,
    };
    let hint = match error {
        ProposeError::Conflict { what, .. } if what == "join token" => {
            "make a new one with `csvctl cluster token`"
        }
        other => other.hint(),
    };
    Refusal::new(code, error.to_string()).with_hint(hint)
}
