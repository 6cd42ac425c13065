//! Raft's messages over the mesh: control for votes and entries, bulk for snapshots.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::error::{InstallSnapshotError, RPCError, RaftError, RemoteError, Timeout, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{BasicNode, RPCTypes};
use prost::Message;
use wire::{Mesh, Refusal, RefusalCode, WireError, service};

use super::codec::{CodecError, malformed};
use super::pb;
use super::pb::raft_reply::Reply;
use super::pb::raft_request::Request;
use super::raft_codec as codec;
use super::raft_types::{Raft, Types};
use super::regress::{Acknowledged, Regressed};
use crate::NodeId;

/// Pause before a peer that could not be reached is tried again.
const BACKOFF_MS: u64 = 100;
/// Longest snapshot that is taken from a peer.
const SNAPSHOT_BYTES_MAX: u64 = 256 << 20;

type RpcError<E = openraft::error::Infallible> = RPCError<u64, BasicNode, RaftError<u64, E>>;

/// Makes the clients that openraft asks for.
pub(crate) struct Network {
    pub(crate) node: NodeId,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) regressed: Regressed,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &BasicNode) -> Client {
        Client {
            node: self.node,
            target,
            mesh: Arc::clone(&self.mesh),
            acknowledged: Acknowledged::default(),
            regressed: self.regressed.clone(),
        }
    }
}

/// Raft's way to one peer.
pub(crate) struct Client {
    node: NodeId,
    target: u64,
    mesh: Arc<Mesh>,
    acknowledged: Acknowledged,
    regressed: Regressed,
}

#[derive(Clone, Copy)]
enum Lane {
    Control,
    Bulk,
}

impl Client {
    async fn call<E>(
        &self,
        lane: Lane,
        request: Request,
        action: RPCTypes,
        option: &RPCOption,
    ) -> Result<Reply, RpcError<E>>
    where
        E: std::error::Error,
    {
        let body = Bytes::from(pb::RaftRequest { request: Some(request) }.encode_to_vec());
        let limit = option.hard_ttl();
        match tokio::time::timeout(limit, self.exchange(lane, body)).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(error)) => Err(unreachable(&error)),
            Err(_) => {
                let (id, target) = (u64::from(self.node.0), self.target);
                Err(RPCError::Timeout(Timeout { action, id, target, timeout: limit }))
            }
        }
    }

    async fn exchange(&self, lane: Lane, body: Bytes) -> Result<Reply, io::Error> {
        let target = u16::try_from(self.target).map_err(io::Error::other)?;
        let reply = match lane {
            Lane::Control => self.mesh.call(target, service::RAFT, body).await,
            Lane::Bulk => self.mesh.call_bulk(target, service::RAFT, body).await,
        };
        let reply = reply.map_err(|error: WireError| io::Error::other(error.explain()))?;
        let reply = pb::RaftReply::decode(reply).map_err(io::Error::other)?;
        reply.reply.ok_or_else(|| io::Error::other("empty reply"))
    }
}

/// Any failure pauses: a peer that answers nonsense or is not up yet must not be asked in a tight loop.
fn unreachable<E: std::error::Error>(error: &(impl std::error::Error + 'static)) -> RpcError<E> {
    RPCError::Unreachable(Unreachable::new(error))
}

fn wrong_reply<E: std::error::Error>() -> RpcError<E> {
    unreachable(&malformed("reply: of another kind than the request"))
}

impl RaftNetwork<Types> for Client {
    async fn append_entries(
        &mut self,
        append: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, RpcError> {
        let request = Request::Append(codec::append_to_pb(&append));
        match self.call(Lane::Control, request, RPCTypes::AppendEntries, &option).await? {
            Reply::Append(reply) => {
                let answer = codec::append_reply_from_pb(reply).map_err(|error| unreachable(&error))?;
                self.acknowledged.take(&append, &answer).map_err(|what| {
                    self.regressed.accuse(self.target, &what);
                    unreachable(&malformed("the follower's log went back"))
                })?;
                Ok(answer)
            }
            _ => Err(wrong_reply()),
        }
    }

    async fn install_snapshot(
        &mut self,
        install: InstallSnapshotRequest<Types>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, RpcError<InstallSnapshotError>> {
        use pb::install_reply::Result as Kind;
        let request = Request::Install(codec::install_to_pb(install));
        let reply = match self.call(Lane::Bulk, request, RPCTypes::InstallSnapshot, &option).await? {
            Reply::Install(reply) => reply.result,
            _ => return Err(wrong_reply()),
        };
        match reply.ok_or_else(wrong_reply)? {
            Kind::Vote(vote) => Ok(InstallSnapshotResponse { vote: codec::vote_from_pb(&vote) }),
            Kind::Mismatch(mismatch) => {
                let mismatch = InstallSnapshotError::SnapshotMismatch(codec::mismatch_from_pb(mismatch));
                Err(RPCError::RemoteError(RemoteError::new(self.target, RaftError::APIError(mismatch))))
            }
        }
    }

    async fn vote(
        &mut self,
        vote: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, RpcError> {
        let request = Request::Vote(codec::vote_request_to_pb(&vote));
        match self.call(Lane::Control, request, RPCTypes::Vote, &option).await? {
            Reply::Vote(reply) => codec::vote_reply_from_pb(reply).map_err(|error| unreachable(&error)),
            _ => Err(wrong_reply()),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(Duration::from_millis(BACKOFF_MS)))
    }
}

/// Answers a Raft message of a peer.
pub(crate) async fn serve(raft: Raft, from: u16, body: Bytes) -> Result<Bytes, Refusal> {
    let reply = match decode(from, body)? {
        Request::Append(append) => {
            let append = codec::append_from_pb(append).map_err(|error| invalid(&error))?;
            let reply = raft.append_entries(append).await.map_err(|error| failed(&error))?;
            Reply::Append(codec::append_reply_to_pb(&reply))
        }
        Request::Vote(vote) => {
            let vote = codec::vote_request_from_pb(vote).map_err(|error| invalid(&error))?;
            let reply = raft.vote(vote).await.map_err(|error| failed(&error))?;
            Reply::Vote(codec::vote_reply_to_pb(&reply))
        }
        Request::Install(install) => Reply::Install(serve_install(&raft, install).await?),
    };
    Ok(pb::RaftReply { reply: Some(reply) }.encode_to_vec().into())
}

async fn serve_install(raft: &Raft, install: pb::Install) -> Result<pb::InstallReply, Refusal> {
    use pb::install_reply::Result as Kind;
    // openraft writes the piece where the peer says; a wild offset must not become memory.
    let end = install.offset.checked_add(install.data.len() as u64);
    if end.is_none_or(|end| end > SNAPSHOT_BYTES_MAX) {
        return Err(Refusal::new(RefusalCode::Invalid, "snapshot is too long"));
    }
    let install = codec::install_from_pb(install).map_err(|error| invalid(&error))?;
    let kind = match raft.install_snapshot(install).await {
        Ok(reply) => Kind::Vote(codec::vote_to_pb(&reply.vote)),
        Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(mismatch))) => {
            Kind::Mismatch(codec::mismatch_to_pb(&mismatch))
        }
        Err(error @ RaftError::Fatal(_)) => return Err(failed(&error)),
    };
    Ok(pb::InstallReply { result: Some(kind) })
}

/// Decodes a request. A node speaks for itself only: the vote in its message must be its own.
fn decode(from: u16, body: Bytes) -> Result<Request, Refusal> {
    let request = pb::RaftRequest::decode(body).map_err(|error| invalid(&error.into()))?;
    let request = request
        .request
        .ok_or_else(|| Refusal::new(RefusalCode::Unsupported, "raft request of a later release"))?;
    let vote = match &request {
        Request::Append(append) => append.vote,
        Request::Vote(vote) => vote.vote,
        Request::Install(install) => install.vote,
    };
    match vote {
        Some(vote) if vote.node == u64::from(from) => Ok(request),
        Some(vote) => {
            let what = format!("node {from} sent a raft message in the name of node {}", vote.node);
            tracing::warn!(from, "{what}");
            Err(Refusal::new(RefusalCode::Denied, what))
        }
        None => Err(invalid(&malformed("raft message: no vote"))),
    }
}

fn invalid(error: &CodecError) -> Refusal {
    Refusal::new(RefusalCode::Invalid, error.to_string())
}

fn failed(error: &impl std::error::Error) -> Refusal {
    Refusal::new(RefusalCode::Failed, format!("raft: {error}"))
}
