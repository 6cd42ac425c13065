//! The way of a proposal: to the leader, wherever it is, and its end back to the proposer.
//!
//! A proposal has one id over all its tries, so trying again is safe even if the first try was applied
//! ([`super::machine`]). What cannot be hidden is the end of the proposer's patience: if a try may be in the log by then,
//! the outcome is unknown and the record tells.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::error::RaftError;
use prost::Message;
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;
use wire::{Mesh, Refusal, RefusalCode, WireError, service};

use super::codec::{End, Proposal};
use super::command::{Command, Outcome, ProposeError, Rejection};
use super::pb;
use super::pb::proposal_reply::Result as Answer;
use super::raft_types::Raft;
use super::records::ClusterState;
use crate::NodeId;

/// Pause before another try after a leader could not be reached or was none.
const RETRY_MS: u64 = 20;

/// What proposing needs.
#[derive(Clone)]
pub(crate) struct Proposer {
    pub(crate) node: NodeId,
    pub(crate) raft: Raft,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) state: watch::Receiver<Arc<ClusterState>>,
    pub(crate) propose_ms: u64,
}

/// What one try has come to.
enum Try {
    Ended(End),
    /// Certainly nothing was put into the log.
    NotDone,
    /// It may be in the log.
    Unknown,
}

impl Proposer {
    pub(crate) async fn propose(&self, command: Command) -> Result<Outcome, ProposeError> {
        let deadline = Instant::now() + Duration::from_millis(self.propose_ms);
        let mut proposal = self.proposal(command, self.state.borrow().applied);
        let mut maybe_logged = false;
        let end = loop {
            let driven = tokio::time::timeout_at(deadline, self.drive(&proposal, &mut maybe_logged)).await;
            let end = driven.map_err(|_| self.out_of_time(maybe_logged))??;
            if end.result != Err(Rejection::Expired) || maybe_logged {
                break end;
            }
            // The first try came from too far behind to be told from a later one. There was no other: say it anew.
            proposal = self.proposal(proposal.command.clone(), end.index);
        };
        let given = end.result?;
        self.wait_applied(end.index, deadline).await;
        Ok(Outcome { index: end.index, given })
    }

    fn proposal(&self, command: Command, basis: u64) -> Arc<Proposal> {
        Arc::new(Proposal { id: Uuid::new_v4(), node: self.node, at_ms: unix_ms(), basis, command })
    }

    fn out_of_time(&self, maybe_logged: bool) -> ProposeError {
        let waited_ms = self.propose_ms;
        if maybe_logged {
            ProposeError::OutcomeUnknown { waited_ms }
        } else {
            ProposeError::NoQuorum { waited_ms }
        }
    }

    /// Tries until there is an end.
    async fn drive(&self, proposal: &Arc<Proposal>, maybe_logged: &mut bool) -> Result<End, ProposeError> {
        let mut metrics = self.raft.metrics();
        loop {
            let leader = {
                let led = metrics.wait_for(|m| m.current_leader.is_some() || m.running_state.is_err());
                let seen = led.await.map_err(|_| stopped("raft ended"))?;
                seen.running_state.as_ref().map_err(|error| stopped(error))?;
                seen.current_leader.and_then(node_id)
            };
            let before = *maybe_logged;
            // Should this future be dropped within the try, the try may have come through.
            *maybe_logged = true;
            match self.try_at(leader, proposal).await? {
                Try::Ended(end) => {
                    *maybe_logged = before;
                    return Ok(end);
                }
                Try::NotDone => *maybe_logged = before,
                Try::Unknown => {}
            }
            tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
        }
    }

    async fn try_at(&self, leader: Option<NodeId>, proposal: &Arc<Proposal>) -> Result<Try, ProposeError> {
        match leader {
            Some(leader) if leader == self.node => self.try_here(Arc::clone(proposal)).await,
            Some(leader) => self.try_there(leader, proposal).await,
            None => Ok(Try::NotDone),
        }
    }

    async fn try_here(&self, proposal: Arc<Proposal>) -> Result<Try, ProposeError> {
        match self.raft.client_write(proposal).await {
            Ok(written) => Ok(Try::Ended(written.data)),
            // Also said to those whose entry is in the log already when leadership is lost.
            Err(RaftError::APIError(_)) => Ok(Try::Unknown),
            Err(RaftError::Fatal(error)) => Err(stopped(&error)),
        }
    }

    async fn try_there(&self, leader: NodeId, proposal: &Proposal) -> Result<Try, ProposeError> {
        let body = Bytes::from(pb::Proposal::from(proposal).encode_to_vec());
        let reply = match self.mesh.call(leader.0, service::PROPOSAL, body).await {
            Ok(reply) => reply,
            Err(WireError::Refused(refusal)) if for_good(refusal.code) => {
                return Err(ProposeError::Invalid { what: refusal.to_string() });
            }
            Err(WireError::NotConnected { .. } | WireError::Refused(_)) => return Ok(Try::NotDone),
            Err(error @ WireError::TooLong { .. }) => {
                return Err(ProposeError::Invalid { what: error.to_string() });
            }
            Err(_) => return Ok(Try::Unknown),
        };
        let answer = pb::ProposalReply::decode(reply).ok().and_then(|reply| reply.result);
        Ok(match answer {
            Some(Answer::End(end)) => End::try_from(end).map_or(Try::Unknown, Try::Ended),
            Some(Answer::NotLeader(_)) => Try::NotDone,
            Some(Answer::Unknown(_)) | None => Try::Unknown,
        })
    }

    /// Waits until this node's copy has come as far, so that a proposer reads its own change.
    async fn wait_applied(&self, index: u64, deadline: Instant) {
        let mut state = self.state.clone();
        let applied = state.wait_for(|state| state.applied >= index);
        // A node that lags or stops does not undo what was decided.
        let _lagging = tokio::time::timeout_at(deadline, applied).await;
    }
}

/// Answers a proposal that another node has forwarded.
pub(crate) async fn serve(proposer: Proposer, from: u16, body: Bytes) -> Result<Bytes, Refusal> {
    let invalid = |what: String| Refusal::new(RefusalCode::Invalid, what);
    let proposal = pb::Proposal::decode(body).map_err(|error| invalid(format!("proposal: {error}")))?;
    let proposal = Proposal::try_from(proposal).map_err(|error| invalid(error.to_string()))?;
    if proposal.node.0 != from {
        let what = format!("node {from} proposed in the name of node {}", proposal.node);
        return Err(Refusal::new(RefusalCode::Denied, what));
    }
    let leader = proposer.raft.metrics().borrow().current_leader;
    let answer = if leader == Some(proposer.node.0.into()) {
        let limit = Duration::from_millis(proposer.propose_ms);
        match tokio::time::timeout(limit, proposer.try_here(Arc::new(proposal))).await {
            Ok(Ok(Try::Ended(end))) => Answer::End(pb::End::from(&end)),
            Ok(Ok(Try::NotDone | Try::Unknown) | Err(_)) | Err(_) => Answer::Unknown(pb::Nothing {}),
        }
    } else {
        let leader = leader.and_then(|leader| u32::try_from(leader).ok());
        Answer::NotLeader(pb::NotLeader { leader })
    };
    Ok(pb::ProposalReply { result: Some(answer) }.encode_to_vec().into())
}

/// Whether asking again is pointless, whoever leads.
fn for_good(code: RefusalCode) -> bool {
    matches!(code, RefusalCode::Invalid | RefusalCode::Denied)
}

pub(crate) fn node_id(id: u64) -> Option<NodeId> {
    u16::try_from(id).ok().map(NodeId)
}

pub(crate) fn stopped(reason: impl ToString) -> ProposeError {
    ProposeError::Stopped { reason: reason.to_string() }
}

/// For the events that people read; nothing is decided by it.
fn unix_ms() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "the edge that stamps events with the time of day")]
    let now = std::time::SystemTime::now();
    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
