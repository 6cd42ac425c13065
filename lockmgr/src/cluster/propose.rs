//! The way of a proposal: to the leader, wherever it is, and its end back to the proposer.
//!
//! A proposal has one id over all its tries, so trying again is safe even if the first try was applied
//! ([`super::machine`]). What cannot be hidden is the end of the proposer's patience: if a try may be in the log by then,
//! the outcome is unknown and the record tells.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::error::RaftError;
use prost::Message;
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;
use wire::{Mesh, Refusal, RefusalCode, WireError, service};

use super::codec::{End, Proposal};
use super::command::{Command, Given, Outcome, ProposeError, Rejection};
use super::pb;
use super::pb::proposal::Command as PbCommand;
use super::pb::proposal_reply::Result as Answer;
use super::raft_types::Raft;
use super::records::ClusterState;
use super::regress::Regressed;
use crate::{Epoch, NodeId};

/// Pause before another try after a leader could not be reached or was none.
const RETRY_MS: u64 = 20;

/// What proposing needs.
#[derive(Clone)]
pub(crate) struct Proposer {
    pub(crate) node: NodeId,
    /// The incarnation that this node has begun; 0 before.
    pub(crate) epoch: Arc<AtomicU64>,
    pub(crate) raft: Raft,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) state: watch::Receiver<Arc<ClusterState>>,
    pub(crate) propose_ms: u64,
    pub(crate) regressed: Regressed,
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
        if let (Command::BeginEpoch { node, .. }, Given::Epoch(epoch)) = (&proposal.command, &given)
            && *node == self.node
        {
            self.epoch.store(epoch.0, Ordering::Relaxed);
        }
        self.wait_applied(end.index, deadline).await;
        Ok(Outcome { index: end.index, given })
    }

    fn proposal(&self, command: Command, basis: u64) -> Arc<Proposal> {
        let epoch = Epoch(self.epoch.load(Ordering::Relaxed));
        Arc::new(Proposal { id: Uuid::new_v4(), node: self.node, epoch, at_ms: unix_ms(), basis, command })
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
        loop {
            let leader = self.leader().await?;
            let before = *maybe_logged;
            // Should this future be dropped within the try, the try may have come through.
            *maybe_logged = true;
            let outcome = tokio::select! {
                biased;
                outcome = self.try_at(leader, proposal) => outcome?,
                // A leader that hangs is not waited for longer than it takes to elect another.
                () = self.deposed(leader) => Try::Unknown,
            };
            match outcome {
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

    /// The present: how far this node's copy must have come to contain all that was acknowledged anywhere before the call.
    pub(crate) async fn read(&self) -> Result<Arc<ClusterState>, ProposeError> {
        let deadline = Instant::now() + Duration::from_millis(self.propose_ms);
        // Reading changes nothing, so an answer that is lost is no unknown outcome.
        let no_quorum = ProposeError::NoQuorum { waited_ms: self.propose_ms };
        let index = tokio::time::timeout_at(deadline, self.read_index());
        let index = index.await.map_err(|_| no_quorum.clone())??;
        let mut state = self.state.clone();
        let applied = tokio::time::timeout_at(deadline, state.wait_for(|state| state.applied >= index));
        let state = applied.await.map_err(|_| no_quorum)?.map_err(|_| stopped("raft ended"))?;
        Ok(Arc::clone(&state))
    }

    async fn read_index(&self) -> Result<u64, ProposeError> {
        loop {
            let leader = self.leader().await?;
            let index = tokio::select! {
                biased;
                index = self.read_index_at(leader) => index?,
                () = self.deposed(leader) => None,
            };
            match index {
                Some(index) => return Ok(index),
                None => tokio::time::sleep(Duration::from_millis(RETRY_MS)).await,
            }
        }
    }

    async fn read_index_at(&self, leader: Option<NodeId>) -> Result<Option<u64>, ProposeError> {
        match leader {
            Some(leader) if leader == self.node => self.read_index_here().await,
            Some(leader) => Ok(self.read_index_there(leader).await),
            None => Ok(None),
        }
    }

    /// Waits until another node leads.
    async fn deposed(&self, leader: Option<NodeId>) {
        let mut metrics = self.raft.metrics();
        let leader = leader.map(|leader| u64::from(leader.0));
        // An error means that Raft has ended here, which the try itself notices.
        let _ended = metrics.wait_for(|m| m.current_leader.is_some() && m.current_leader != leader).await;
    }

    /// Asks a majority whether this node still leads.
    async fn read_index_here(&self) -> Result<Option<u64>, ProposeError> {
        match self.raft.get_read_log_id().await {
            Ok((read, _)) => Ok(Some(read.map_or(0, |id| id.index))),
            Err(RaftError::APIError(_)) => Ok(None),
            Err(RaftError::Fatal(error)) => Err(stopped(&error)),
        }
    }

    async fn read_index_there(&self, leader: NodeId) -> Option<u64> {
        let command = Some(PbCommand::Read(pb::Nothing {}));
        let read = pb::Proposal { node: self.node.0.into(), command, ..pb::Proposal::default() };
        let reply = self.mesh.call(leader.0, service::PROPOSAL, read.encode_to_vec().into()).await.ok()?;
        match pb::ProposalReply::decode(reply).ok()?.result? {
            Answer::End(end) => Some(end.index),
            Answer::NotLeader(_) | Answer::Unknown(_) => None,
        }
    }

    /// Waits until there is a leader.
    pub(crate) async fn leader(&self) -> Result<Option<NodeId>, ProposeError> {
        let mut metrics = self.raft.metrics();
        let led = metrics.wait_for(|m| m.current_leader.is_some() || m.running_state.is_err());
        let seen = led.await.map_err(|_| stopped("raft ended"))?;
        seen.running_state.as_ref().map_err(stopped)?;
        Ok(seen.current_leader.and_then(node_id))
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
    let message = pb::Proposal::decode(body).map_err(|error| invalid(format!("proposal: {error}")))?;
    if message.node != u32::from(from) {
        let what = format!("node {from} proposed in the name of node {}", message.node);
        return Err(Refusal::new(RefusalCode::Denied, what));
    }
    if let Some(refusal) = proposer.regressed.refusal(from) {
        return Err(refusal);
    }
    let leader = proposer.raft.metrics().borrow().current_leader;
    let result = if leader != Some(proposer.node.0.into()) {
        let leader = leader.and_then(|leader| u32::try_from(leader).ok());
        Answer::NotLeader(pb::NotLeader { leader })
    } else if matches!(message.command, Some(PbCommand::Read(_))) {
        answer_read(&proposer).await
    } else {
        let proposal = Proposal::try_from(message).map_err(|error| invalid(error.to_string()))?;
        answer_proposal(&proposer, proposal).await
    };
    Ok(pb::ProposalReply { result: Some(result) }.encode_to_vec().into())
}

async fn answer_proposal(proposer: &Proposer, proposal: Proposal) -> Answer {
    let limit = Duration::from_millis(proposer.propose_ms);
    match tokio::time::timeout(limit, proposer.try_here(Arc::new(proposal))).await {
        Ok(Ok(Try::Ended(end))) => Answer::End(pb::End::from(&end)),
        Ok(Ok(Try::NotDone | Try::Unknown) | Err(_)) | Err(_) => Answer::Unknown(pb::Nothing {}),
    }
}

async fn answer_read(proposer: &Proposer) -> Answer {
    let limit = Duration::from_millis(proposer.propose_ms);
    match tokio::time::timeout(limit, proposer.read_index_here()).await {
        Ok(Ok(Some(index))) => Answer::End(pb::End { index, end: None }),
        Ok(Ok(None)) => Answer::NotLeader(pb::NotLeader { leader: None }),
        Ok(Err(_)) | Err(_) => Answer::Unknown(pb::Nothing {}),
    }
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
