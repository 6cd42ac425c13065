//! Raft's own values and messages to bytes and back, by `proto/cluster.proto`.
//!
//! openraft's types never reach disk or wire: its next release may change them, our files and peers stay.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use openraft::error::SnapshotMismatch;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, VoteRequest, VoteResponse,
};
use openraft::{BasicNode, CommittedLeaderId, EntryPayload};

use super::codec::{CodecError, Proposal, malformed};
use super::pb;
use super::raft_types::{Entry, LogId, Membership, SnapshotMeta, StoredMembership, Types, Vote};

pub(crate) fn log_id_to_pb(id: &LogId) -> pb::LogId {
    pb::LogId { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
}

pub(crate) fn log_id_from_pb(id: &pb::LogId) -> LogId {
    LogId::new(CommittedLeaderId::new(id.term, id.node), id.index)
}

pub(crate) fn vote_to_pb(vote: &Vote) -> pb::Vote {
    pb::Vote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
}

pub(crate) fn vote_from_pb(vote: &pb::Vote) -> Vote {
    if vote.committed { Vote::new_committed(vote.term, vote.node) } else { Vote::new(vote.term, vote.node) }
}

fn wanted_vote(vote: Option<pb::Vote>) -> Result<Vote, CodecError> {
    vote.as_ref().map(vote_from_pb).ok_or_else(|| malformed("raft message: no vote"))
}

fn membership_to_pb(membership: &Membership) -> pb::Membership {
    let configs = membership.get_joint_config().iter();
    pb::Membership {
        configs: configs.map(|voters| pb::Config { voters: voters.iter().copied().collect() }).collect(),
        nodes: membership
            .nodes()
            .map(|(id, node)| pb::RaftNode { id: *id, address: node.addr.clone() })
            .collect(),
    }
}

fn membership_from_pb(membership: pb::Membership) -> Membership {
    let configs: Vec<BTreeSet<u64>> =
        membership.configs.into_iter().map(|config| config.voters.into_iter().collect()).collect();
    let nodes: BTreeMap<u64, BasicNode> =
        membership.nodes.into_iter().map(|node| (node.id, BasicNode::new(node.address))).collect();
    Membership::new(configs, nodes)
}

fn stored_to_pb(stored: &StoredMembership) -> pb::StoredMembership {
    pb::StoredMembership {
        log_id: stored.log_id().as_ref().map(log_id_to_pb),
        membership: Some(membership_to_pb(stored.membership())),
    }
}

fn stored_from_pb(stored: pb::StoredMembership) -> StoredMembership {
    let membership = stored.membership.map(membership_from_pb).unwrap_or_default();
    StoredMembership::new(stored.log_id.as_ref().map(log_id_from_pb), membership)
}

pub(crate) fn meta_to_pb(meta: &SnapshotMeta) -> pb::SnapshotMeta {
    pb::SnapshotMeta {
        last: meta.last_log_id.as_ref().map(log_id_to_pb),
        membership: Some(stored_to_pb(&meta.last_membership)),
        id: meta.snapshot_id.clone(),
    }
}

pub(crate) fn meta_from_pb(meta: pb::SnapshotMeta) -> SnapshotMeta {
    SnapshotMeta {
        last_log_id: meta.last.as_ref().map(log_id_from_pb),
        last_membership: meta.membership.map(stored_from_pb).unwrap_or_default(),
        snapshot_id: meta.id,
    }
}

pub(crate) fn entry_to_pb(entry: &Entry) -> pb::Entry {
    use pb::entry::Payload;
    let payload = match &entry.payload {
        EntryPayload::Blank => Payload::Blank(pb::Nothing {}),
        EntryPayload::Normal(proposal) => Payload::Proposal(proposal.as_ref().into()),
        EntryPayload::Membership(membership) => Payload::Membership(membership_to_pb(membership)),
    };
    pb::Entry { log_id: Some(log_id_to_pb(&entry.log_id)), payload: Some(payload) }
}

pub(crate) fn entry_from_pb(entry: pb::Entry) -> Result<Entry, CodecError> {
    use pb::entry::Payload;
    let log_id = entry.log_id.as_ref().map(log_id_from_pb).ok_or_else(|| malformed("log entry: no id"))?;
    let payload = match entry.payload.ok_or_else(|| malformed("log entry: nothing in it"))? {
        Payload::Blank(_) => EntryPayload::Blank,
        Payload::Proposal(proposal) => EntryPayload::Normal(Arc::new(Proposal::try_from(proposal)?)),
        Payload::Membership(membership) => EntryPayload::Membership(membership_from_pb(membership)),
    };
    Ok(Entry { log_id, payload })
}

pub(crate) fn append_to_pb(append: &AppendEntriesRequest<Types>) -> pb::Append {
    pb::Append {
        vote: Some(vote_to_pb(&append.vote)),
        previous: append.prev_log_id.as_ref().map(log_id_to_pb),
        entries: append.entries.iter().map(entry_to_pb).collect(),
        committed: append.leader_commit.as_ref().map(log_id_to_pb),
    }
}

pub(crate) fn append_from_pb(append: pb::Append) -> Result<AppendEntriesRequest<Types>, CodecError> {
    Ok(AppendEntriesRequest {
        vote: wanted_vote(append.vote)?,
        prev_log_id: append.previous.as_ref().map(log_id_from_pb),
        entries: append.entries.into_iter().map(entry_from_pb).collect::<Result<_, _>>()?,
        leader_commit: append.committed.as_ref().map(log_id_from_pb),
    })
}

pub(crate) fn append_reply_to_pb(reply: &AppendEntriesResponse<u64>) -> pb::AppendReply {
    use pb::append_reply::Result as Kind;
    let kind = match reply {
        AppendEntriesResponse::Success => Kind::Success(pb::Nothing {}),
        AppendEntriesResponse::PartialSuccess(matching) => {
            Kind::Partial(pb::PartialSuccess { matching: matching.as_ref().map(log_id_to_pb) })
        }
        AppendEntriesResponse::Conflict => Kind::Conflict(pb::Nothing {}),
        AppendEntriesResponse::HigherVote(vote) => Kind::HigherVote(vote_to_pb(vote)),
    };
    pb::AppendReply { result: Some(kind) }
}

pub(crate) fn append_reply_from_pb(reply: pb::AppendReply) -> Result<AppendEntriesResponse<u64>, CodecError> {
    use pb::append_reply::Result as Kind;
    Ok(match reply.result.ok_or_else(|| malformed("append reply"))? {
        Kind::Success(_) => AppendEntriesResponse::Success,
        Kind::Partial(partial) => {
            AppendEntriesResponse::PartialSuccess(partial.matching.as_ref().map(log_id_from_pb))
        }
        Kind::Conflict(_) => AppendEntriesResponse::Conflict,
        Kind::HigherVote(vote) => AppendEntriesResponse::HigherVote(vote_from_pb(&vote)),
    })
}

pub(crate) fn vote_request_to_pb(request: &VoteRequest<u64>) -> pb::VoteRequest {
    pb::VoteRequest {
        vote: Some(vote_to_pb(&request.vote)),
        last: request.last_log_id.as_ref().map(log_id_to_pb),
    }
}

pub(crate) fn vote_request_from_pb(request: pb::VoteRequest) -> Result<VoteRequest<u64>, CodecError> {
    Ok(VoteRequest::new(wanted_vote(request.vote)?, request.last.as_ref().map(log_id_from_pb)))
}

pub(crate) fn vote_reply_to_pb(reply: &VoteResponse<u64>) -> pb::VoteReply {
    pb::VoteReply {
        vote: Some(vote_to_pb(&reply.vote)),
        granted: reply.vote_granted,
        last: reply.last_log_id.as_ref().map(log_id_to_pb),
    }
}

pub(crate) fn vote_reply_from_pb(reply: pb::VoteReply) -> Result<VoteResponse<u64>, CodecError> {
    let last = reply.last.as_ref().map(log_id_from_pb);
    Ok(VoteResponse::new(wanted_vote(reply.vote)?, last, reply.granted))
}

pub(crate) fn install_to_pb(install: InstallSnapshotRequest<Types>) -> pb::Install {
    pb::Install {
        vote: Some(vote_to_pb(&install.vote)),
        meta: Some(meta_to_pb(&install.meta)),
        offset: install.offset,
        data: install.data.into(),
        done: install.done,
    }
}

pub(crate) fn install_from_pb(install: pb::Install) -> Result<InstallSnapshotRequest<Types>, CodecError> {
    Ok(InstallSnapshotRequest {
        vote: wanted_vote(install.vote)?,
        meta: meta_from_pb(install.meta.ok_or_else(|| malformed("snapshot: no description"))?),
        offset: install.offset,
        data: install.data.into(),
        done: install.done,
    })
}

pub(crate) fn mismatch_to_pb(mismatch: &SnapshotMismatch) -> pb::Mismatch {
    pb::Mismatch {
        expected_id: mismatch.expect.id.clone(),
        expected_offset: mismatch.expect.offset,
        found_id: mismatch.got.id.clone(),
        found_offset: mismatch.got.offset,
    }
}

pub(crate) fn mismatch_from_pb(mismatch: pb::Mismatch) -> SnapshotMismatch {
    let segment = |id, offset| openraft::SnapshotSegmentId { id, offset };
    SnapshotMismatch {
        expect: segment(mismatch.expected_id, mismatch.expected_offset),
        got: segment(mismatch.found_id, mismatch.found_offset),
    }
}
