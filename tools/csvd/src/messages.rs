//! What the daemons say to each other beside Raft and csvfs. Field numbers are never reused.

use api::pb;
use lockmgr::ClientId;
use prost::Message;

/// Service `HEARTBEAT`: "I am here, in this epoch". The reply says whether the receiver still believes it.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Beat {
    /// Incarnation of the sender.
    #[prost(uint64, tag = "1")]
    pub(crate) epoch: u64,
    /// The sender is about to leave in order: nothing new is to be given to it.
    #[prost(bool, tag = "2")]
    pub(crate) leaving: bool,
}

/// Answer to a [`Beat`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct BeatReply {
    /// Incarnation of the receiver; 0 while it has none.
    #[prost(uint64, tag = "1")]
    pub(crate) epoch: u64,
    /// The sender's incarnation is over: it was fenced, or has begun a later one.
    #[prost(bool, tag = "2")]
    pub(crate) over: bool,
    /// The sender is being fenced: this answer does not prolong its lease.
    #[prost(bool, tag = "3")]
    pub(crate) barred: bool,
}

/// Service `CSVFS_PUSH`: a push from a coordinator to a client on the receiving node.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct ClientPush {
    /// The client's incarnation of the node.
    #[prost(uint64, tag = "1")]
    pub(crate) epoch: u64,
    /// Which client of the node.
    #[prost(uint64, tag = "2")]
    pub(crate) serial: u64,
    /// A `csvfs.Push`.
    #[prost(bytes = "bytes", tag = "3")]
    pub(crate) push: bytes::Bytes,
}

/// Service `ADMIN`: something that only the receiver can do.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct NodeRequest {
    #[prost(
        oneof = "NodeOp",
        tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 30, 40, 41, 42, 44, 50, 51, 52, 53, 60, 61, 70, 71, 72, 80, 81, 82, 83, 100, 110, 111"
    )]
    pub(crate) op: Option<NodeOp>,
    /// How far the sender's copy of the records has come: what it asks for may rest on all of that. 0 in older releases.
    #[prost(uint64, tag = "101")]
    pub(crate) seen: u64,
}

/// See [`NodeRequest`].
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum NodeOp {
    /// To the owner: hand the coordinator over.
    #[prost(message, tag = "1")]
    VolumeMove(pb::VolumeMoveRequest),
    /// To the new owner: answer when the coordinator serves.
    #[prost(message, tag = "2")]
    AwaitCoordinator(AwaitCoordinator),
    /// To any node: how it reaches its volumes.
    #[prost(message, tag = "3")]
    VolumeState(pb::VolumeStateRequest),
    /// To the owner: a client of another node is gone.
    #[prost(message, tag = "4")]
    ClientGone(OfClient),
    /// To the leader: this node must be fenced.
    #[prost(message, tag = "5")]
    Convict(Convict),
    #[prost(message, tag = "6")]
    VmStart(pb::VmRequest),
    #[prost(message, tag = "7")]
    VmStop(pb::VmStopRequest),
    #[prost(message, tag = "8")]
    VmPause(pb::VmRequest),
    #[prost(message, tag = "44")]
    VmSave(pb::VmRequest),
    #[prost(message, tag = "9")]
    VmResume(pb::VmRequest),
    #[prost(message, tag = "10")]
    VmShow(pb::VmRequest),
    #[prost(message, tag = "11")]
    VmConsole(pb::VmConsoleRequest),
    #[prost(message, tag = "111")]
    VmType(pb::VmTypeRequest),
    /// To the source of a move.
    #[prost(message, tag = "12")]
    VmMigrate(pb::VmMigrateRequest),
    /// To the target of a move: a message of the `migrator`.
    #[prost(bytes = "bytes", tag = "13")]
    VmIncoming(bytes::Bytes),
    /// To the client's node: done when it is gone for certain, an error otherwise.
    #[prost(message, tag = "14")]
    IsClientGone(OfClient),
    /// To the source of a move: how far it is.
    #[prost(message, tag = "40")]
    VmProgress(pb::VmRequest),
    /// To the source of a move: give it up.
    #[prost(message, tag = "41")]
    VmMigrateCancel(pb::VmRequest),
    /// To the owner: what stands against a move.
    #[prost(message, tag = "42")]
    VmCheckMigrate(pb::VmCheckMigrateRequest),
    /// To any node: take the detour to a volume, or leave it.
    #[prost(message, tag = "50")]
    VolumeIoMode(pb::VolumeIoModeRequest),
    /// To the peer that the sender went through: done when nothing of that session is under way any more.
    #[prost(message, tag = "51")]
    EndSession(SessionOf),
    /// To any node: done when nothing of incarnations that are over is under way through it.
    #[prost(message, tag = "52")]
    EndOver(EndOver),
    /// To the leader: the sender's detector holds this node for dead.
    #[prost(message, tag = "53")]
    Testify(Convict),
    /// To any node: what its coordinators have carried out.
    #[prost(message, tag = "60")]
    Loads(pb::Done),
    /// To a node that reaches the LUN: take the key of a node that is being fenced off it.
    #[prost(message, tag = "80")]
    CutOff(CutOff),
    /// To any node: done when it renews the lease of a node that is being fenced no more.
    #[prost(message, tag = "81")]
    Barred(Barred),
    /// To any node: try out what it promises.
    #[prost(message, tag = "82")]
    Validate(pb::ValidateRequest),
    /// To a node that reaches the LUN: take the sender's trial key off it.
    #[prost(message, tag = "83")]
    CutTrial(CutOff),
    /// To any node: a piece of one of its logs.
    #[prost(message, tag = "61")]
    LogRead(pb::LogRequest),
    #[prost(message, tag = "30")]
    VmDisk(pb::VmDiskRequest),
    /// To the owner.
    #[prost(message, tag = "110")]
    VmBalloon(pb::VmBalloonRequest),
    /// To the owner: work on the image of a disk.
    #[prost(message, tag = "70")]
    VmImage(pb::VmImageRequest),
    /// To the owner: how far that work is.
    #[prost(message, tag = "71")]
    VmImageProgress(pb::VmRequest),
    /// To the owner.
    #[prost(message, tag = "72")]
    VmCheckpoint(pb::VmCheckpointRequest),
    /// To any node: change or show its read cache.
    #[prost(message, tag = "100")]
    VolumeCache(pb::VolumeCacheRequest),
}

/// See [`NodeOp::AwaitCoordinator`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct AwaitCoordinator {
    #[prost(string, tag = "1")]
    pub(crate) volume: String,
    #[prost(uint64, tag = "2")]
    pub(crate) term: u64,
}

/// A client of a volume, see [`NodeOp::ClientGone`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct OfClient {
    #[prost(string, tag = "1")]
    pub(crate) volume: String,
    #[prost(uint32, tag = "2")]
    pub(crate) node: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) epoch: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) serial: u64,
}

/// A session of redirected I/O, see [`NodeOp::EndSession`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct SessionOf {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) volume: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub(crate) node: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) epoch: u64,
}

/// See [`NodeOp::EndOver`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct EndOver {
    /// The receiver's records must have come so far.
    #[prost(uint64, tag = "1")]
    pub(crate) applied: u64,
}

/// See [`NodeOp::CutOff`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct CutOff {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) volume: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub(crate) node: u32,
    #[prost(uint64, tag = "3")]
    pub(crate) epoch: u64,
    /// The receiver's records must have come so far.
    #[prost(uint64, tag = "4")]
    pub(crate) applied: u64,
}

/// See [`NodeOp::Barred`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Barred {
    #[prost(uint32, tag = "1")]
    pub(crate) node: u32,
    #[prost(uint64, tag = "2")]
    pub(crate) epoch: u64,
    /// The receiver's records must have come so far.
    #[prost(uint64, tag = "3")]
    pub(crate) applied: u64,
}

/// See [`NodeOp::Convict`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Convict {
    #[prost(uint32, tag = "1")]
    pub(crate) node: u32,
    #[prost(uint64, tag = "2")]
    pub(crate) epoch: u64,
    #[prost(string, tag = "3")]
    pub(crate) reason: String,
}

/// Answer to a [`NodeRequest`].
#[derive(Clone, PartialEq, Message)]
pub(crate) struct NodeReply {
    #[prost(oneof = "NodeAnswer", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 40, 41, 60, 61, 70, 71, 80, 100, 111")]
    pub(crate) answer: Option<NodeAnswer>,
}

/// See [`NodeReply`].
#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(clippy::large_enum_variant, reason = "one answer at a time is held, for a moment")]
pub(crate) enum NodeAnswer {
    #[prost(message, tag = "1")]
    Error(pb::ErrorDetail),
    #[prost(message, tag = "2")]
    Done(pb::Done),
    #[prost(message, tag = "3")]
    VolumeMoved(pb::VolumeMoved),
    #[prost(message, tag = "4")]
    VolumeStates(pb::VolumeStates),
    #[prost(message, tag = "5")]
    Vm(pb::Vm),
    #[prost(message, tag = "6")]
    Console(pb::ConsoleChunk),
    #[prost(message, tag = "7")]
    Migrated(pb::MigrateReport),
    #[prost(bytes = "bytes", tag = "8")]
    Incoming(bytes::Bytes),
    #[prost(message, tag = "9")]
    Serving(Serving),
    #[prost(message, tag = "40")]
    Progress(pb::MigrateProgress),
    #[prost(message, tag = "41")]
    MigrateProblems(pb::MigrateProblems),
    #[prost(message, tag = "60")]
    Loads(Loads),
    #[prost(message, tag = "70")]
    Image(pb::VmImageProgress),
    #[prost(message, tag = "71")]
    Checkpoints(pb::VmCheckpoints),
    #[prost(message, tag = "80")]
    Validated(pb::ValidationOfNode),
    #[prost(message, tag = "61")]
    Log(pb::LogPiece),
    #[prost(message, tag = "111")]
    Typed(pb::VmTyped),
    #[prost(message, tag = "100")]
    VolumeCaches(pb::VolumeCaches),
}

/// Answer to [`NodeOp::Loads`].
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct Loads {
    #[prost(message, repeated, tag = "1")]
    pub(crate) volumes: Vec<VolumeLoad>,
    #[prost(message, repeated, tag = "2")]
    pub(crate) vms: Vec<VmLoad>,
}

/// What a VM has done since its process was started.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct VmLoad {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(uint64, tag = "2")]
    pub(crate) reads: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) writes: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) flushes: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) errors: u64,
    #[prost(string, tag = "6")]
    pub(crate) moving: String,
}

/// What a coordinator has carried out since it was opened.
#[derive(Clone, PartialEq, Eq, Message)]
pub(crate) struct VolumeLoad {
    #[prost(string, tag = "1")]
    pub(crate) volume: String,
    #[prost(uint64, tag = "2")]
    pub(crate) term: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) requests: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) commits: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) clients: u64,
}

/// Answer to [`NodeOp::AwaitCoordinator`].
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub(crate) struct Serving {
    /// Requests that waited for the coordinator to open.
    #[prost(uint64, tag = "1")]
    pub(crate) held_ops: u64,
}

impl NodeOp {
    /// Whether it is carried out at once, however far the records have come here. A fence must not wait for a node that lags,
    /// nor a guest that stands still for a move; these say in themselves which incarnation or attempt they mean.
    pub(crate) fn is_urgent(&self) -> bool {
        match self {
            Self::AwaitCoordinator(_)
            | Self::ClientGone(_)
            | Self::IsClientGone(_)
            | Self::EndSession(_)
            | Self::EndOver(_)
            | Self::CutOff(_)
            | Self::CutTrial(_)
            | Self::Barred(_)
            | Self::Testify(_)
            | Self::Convict(_)
            | Self::VmIncoming(_)
            | Self::VmProgress(_)
            | Self::VmMigrateCancel(_) => true,
            Self::VolumeMove(_)
            | Self::VolumeState(_)
            | Self::VolumeIoMode(_)
            | Self::VolumeCache(_)
            | Self::Validate(_)
            | Self::Loads(_)
            | Self::LogRead(_)
            | Self::VmStart(_)
            | Self::VmStop(_)
            | Self::VmSave(_)
            | Self::VmPause(_)
            | Self::VmResume(_)
            | Self::VmDisk(_)
            | Self::VmBalloon(_)
            | Self::VmShow(_)
            | Self::VmConsole(_)
            | Self::VmType(_)
            | Self::VmMigrate(_)
            | Self::VmCheckMigrate(_)
            | Self::VmImage(_)
            | Self::VmImageProgress(_)
            | Self::VmCheckpoint(_) => false,
        }
    }
}

impl OfClient {
    pub(crate) fn new(volume: &str, client: ClientId) -> Self {
        Self {
            volume: volume.to_owned(),
            node: client.node.0.into(),
            epoch: client.epoch.0,
            serial: client.serial,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of each kind that has content of its own.
    fn samples() -> Vec<Vec<u8>> {
        let request = |op| NodeRequest { op: Some(op), seen: 300 }.encode_to_vec();
        let name = || "vol1".to_owned();
        vec![
            Beat { epoch: 7, leaving: true }.encode_to_vec(),
            BeatReply { epoch: 7, ..BeatReply::default() }.encode_to_vec(),
            ClientPush { epoch: 1, serial: 2, push: vec![1, 2, 3].into() }.encode_to_vec(),
            request(NodeOp::AwaitCoordinator(AwaitCoordinator { volume: name(), term: 3 })),
            request(NodeOp::ClientGone(OfClient { volume: name(), node: 1, epoch: 2, serial: 3 })),
            request(NodeOp::Convict(Convict { node: 1, epoch: 2, reason: name() })),
            request(NodeOp::EndSession(SessionOf { volume: vec![7; 16], node: 1, epoch: 2 })),
            request(NodeOp::VmIncoming(vec![9; 40].into())),
            NodeReply { answer: Some(NodeAnswer::Incoming(vec![9; 40].into())) }.encode_to_vec(),
        ]
    }

    fn feed(bytes: &[u8]) {
        let _beat = Beat::decode(bytes);
        let _reply = BeatReply::decode(bytes);
        let _push = ClientPush::decode(bytes);
        let _answer = NodeReply::decode(bytes);
        let Ok(request) = NodeRequest::decode(bytes) else { return };
        let again = NodeRequest::decode(request.encode_to_vec().as_slice()).expect("ours");
        assert_eq!(again.encode_to_vec(), request.encode_to_vec(), "it means the same after it was sent on");
    }

    // Forged and damaged messages of another node; each damage is made by its number.
    #[test]
    fn damaged_messages_of_another_node_are_refused_or_mean_something_else() {
        let samples = samples();
        for (number, sample) in samples.iter().enumerate() {
            feed(sample);
            for at in 0..sample.len() {
                for to in [0, 1, 0x7f, 0x80, 0xff, sample[at] ^ 1, sample[at] ^ 0x10] {
                    let mut forged = sample.clone();
                    forged[at] = to;
                    feed(&forged);
                }
                feed(&sample[..at]);
                let other = &samples[(number + at) % samples.len()];
                feed(&[&sample[..at], other, &sample[at..]].concat());
                // A length of more bytes than any message has.
                feed(&[&sample[..at], &[0xff; 9][..], &[1], &sample[at..]].concat());
            }
        }
    }
}
