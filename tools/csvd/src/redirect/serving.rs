//! Peers that go through this node: their streams, what they may do, and their certain end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::Error;
use blockio::{BlockDevice, GatedDevice, NbdExport, NbdExports, Permission, WriteRight, serve_nbd};
use lockmgr::cluster::ClusterState;
use lockmgr::{Epoch, NodeId, VolumeId};
use uuid::Uuid;
use wire::{Duplex, Stream};

use crate::core::Core;
use crate::messages::{EndOver, NodeOp, SessionOf};
use crate::redirect::Sessions;
use crate::redirect::protected::protected;
use crate::{forward, view};

/// Pause before a node that did not answer is asked again.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Longest wait for one answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// A session of another node: which volume, which node in which incarnation.
pub(crate) type PeerKey = (VolumeId, NodeId, Epoch);

/// What of this node a peer may meet.
trait Host: Send + Sync {
    /// The cluster's records as this node has them now.
    fn records(&self) -> Arc<ClusterState>;

    /// This node's own way to the LUN of a volume, or why it has none.
    fn direct(&self, volume: VolumeId) -> Result<Arc<dyn BlockDevice>, String>;

    /// The sessions of peers.
    fn sessions(&self) -> &Sessions<PeerKey>;
}

impl Host for Core {
    fn records(&self) -> Arc<ClusterState> {
        self.state()
    }

    fn direct(&self, volume: VolumeId) -> Result<Arc<dyn BlockDevice>, String> {
        let road = self.volumes.get(volume).and_then(|volume| volume.road());
        road.ok_or("the volume is not open here")?.direct_for_peers()
    }

    fn sessions(&self) -> &Sessions<PeerKey> {
        &self.peer_sessions
    }
}

/// Serves a peer's stream, on a thread of its own.
pub(crate) fn serve(core: &Arc<Core>, stream: Stream) {
    let peer = stream.peer().clone();
    let host: Arc<dyn Host> = core.clone();
    let serving = move || match serve_peer(&host, stream) {
        Ok(()) => tracing::info!(node = %peer.node, "a peer does not go through this node any more"),
        Err(why) => tracing::info!(node = %peer.node, why, "a peer's session has ended"),
    };
    let thread = std::thread::Builder::new().name("nbd:peer".to_owned()).stack_size(1 << 20);
    if let Err(error) = thread.spawn(serving) {
        tracing::error!(%error, "a peer that has lost its path cannot be served");
    }
}

/// Serves a peer until it leaves or is cut off, and all that it has begun is done. Which node it is its certificate says.
fn serve_peer(host: &Arc<dyn Host>, stream: Stream) -> Result<(), String> {
    let from = NodeId(stream.peer().node);
    let (stream, duplex) = protected(stream);
    let exports = Served { host: Arc::clone(host), from, stream: duplex, session: Mutex::new(None) };
    let outcome = serve_nbd(stream, &exports);
    exports.leave();
    outcome
}

/// What one peer may choose from.
struct Served {
    host: Arc<dyn Host>,
    from: NodeId,
    stream: Arc<Duplex>,
    /// The session that was begun, with its number. Rank: above the table of sessions.
    session: Mutex<Option<(PeerKey, u64)>>,
}

impl Served {
    fn begin(&self, key: PeerKey) -> Result<(), String> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        match &*session {
            Some((begun, _)) if *begun == key => return Ok(()),
            Some(_) => return Err("a stream is for one volume".to_owned()),
            None => {}
        }
        let stream = Arc::clone(&self.stream);
        let number = self.host.sessions().enter(&key, move || stream.end());
        *session = Some((key, number));
        Ok(())
    }

    /// Nothing of the session can reach the device any more.
    fn leave(&self) {
        if let Some((key, number)) = self.session.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.host.sessions().leave(&key, number);
        }
    }
}

impl NbdExports for Served {
    fn find(&self, name: &str) -> Result<NbdExport, String> {
        let (volume, epoch) = parse(name).ok_or("this is no volume and epoch")?;
        let right = Right { host: Arc::clone(&self.host), volume, node: self.from, epoch };
        right.refusal().map_or(Ok(()), Err)?;
        let direct = self.host.direct(volume)?;
        self.begin((volume, self.from, epoch))?;
        tracing::warn!(node = %self.from, %epoch, %volume, "a peer goes through this node to the LUN");
        Ok(NbdExport::new(Arc::new(GatedDevice::new(direct, Arc::new(right))), false))
    }

    /// Names are known to those who need them.
    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

fn parse(name: &str) -> Option<(VolumeId, Epoch)> {
    let (volume, epoch) = name.split_once('/')?;
    Some((VolumeId(Uuid::try_parse(volume).ok()?), Epoch(epoch.parse().ok()?)))
}

/// The right of a peer's incarnation, read before each of its requests. Which node it is its certificate says.
struct Right {
    host: Arc<dyn Host>,
    volume: VolumeId,
    node: NodeId,
    epoch: Epoch,
}

impl Right {
    fn refusal(&self) -> Option<String> {
        refusal(&self.host.records(), self.volume, self.node, self.epoch)
    }
}

/// Why an incarnation may not go through this node to a volume.
fn refusal(records: &ClusterState, volume: VolumeId, node: NodeId, epoch: Epoch) -> Option<String> {
    if !view::is_up(records, node, epoch) {
        return Some(format!("epoch {epoch} of node {node} is not in the cluster's records"));
    }
    if records.witnesses.contains(&node) {
        return Some(format!("node {node} is a witness: it has no volumes"));
    }
    let known = view::volume_by_id(records, volume).is_some();
    (!known).then(|| format!("volume {volume} is not in the cluster's records"))
}

impl WriteRight for Right {
    fn check(&self) -> Permission {
        self.refusal().map_or(Permission::Granted, Permission::Revoked)
    }
}

/// Ends a session of `from`, for itself: it takes another way, and must know that this one is over.
pub(crate) async fn end_session(core: &Arc<Core>, asked: SessionOf) -> Result<(), Error> {
    let volume = Uuid::from_slice(&asked.volume).map_err(|_| Error::usage("no such volume"))?;
    let node = u16::try_from(asked.node).map_err(|_| Error::usage("no such node"))?;
    let key = (VolumeId(volume), NodeId(node), Epoch(asked.epoch));
    let core = Arc::clone(core);
    let ending = move || core.peer_sessions.end(|session| *session == key);
    tokio::task::spawn_blocking(ending).await.map_err(Error::failed)
}

/// Ends the sessions of incarnations that are over by the records up to `asked.applied`, and returns when they have ended.
pub(crate) async fn end_over(core: &Arc<Core>, asked: EndOver) -> Result<(), Error> {
    let mut records = core.cluster.watch();
    let state =
        records.wait_for(|state| state.applied >= asked.applied).await.map_err(Error::failed)?.clone();
    let core = Arc::clone(core);
    // No session can begin for an incarnation that these records call over.
    let ending = move || core.peer_sessions.end(|(_, node, epoch)| view::is_over(&state, *node, *epoch));
    tokio::task::spawn_blocking(ending).await.map_err(Error::failed)
}

/// Makes sure that nothing of a dead incarnation is on its way to a LUN through any living node (A1). Nodes that do not
/// answer are asked until they do, or are over themselves.
pub(crate) async fn cut_off_the_dead(core: &Arc<Core>) {
    let applied = core.state().applied;
    let members: Vec<_> = core.state().members.values().map(|member| (member.id, member.epoch)).collect();
    for (node, epoch) in members {
        while view::is_up(&core.state(), node, epoch) {
            let asked = forward::ask(core, node, NodeOp::EndOver(EndOver { applied }));
            match tokio::time::timeout(ANSWER_WITHIN, asked).await {
                Ok(Ok(_)) => break,
                Ok(Err(error)) => {
                    tracing::debug!(%node, %error, "not heard yet that the sessions of the dead have ended");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = core.done.cancelled() => return,
                () = tokio::time::sleep(AGAIN_AFTER) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lockmgr::Term;
    use lockmgr::cluster::{FenceKind, Member, MemberState, VolumeRecord, VolumeState};

    use blockio::{MemoryDevice, NbdDevice, NbdOptions};

    use super::*;
    use crate::redirect::testing::{Nodes, endpoint, endpoint_of};

    const VOLUME: VolumeId = VolumeId(Uuid::from_u128(7));

    fn records(state: MemberState) -> ClusterState {
        let mut records = ClusterState::default();
        let (id, epoch, name, address) = (NodeId(2), Epoch(4), "n2".to_owned(), String::new());
        records.members.insert(id, Member { id, name, address, epoch, state, joined_ms: 0 });
        let volume = VolumeRecord {
            name: "vol1".to_owned(),
            id: VOLUME,
            lun_uri: String::new(),
            owner: id,
            owner_epoch: epoch,
            term: Term(1),
            fence_kind: FenceKind::Agent,
            state: VolumeState::Online,
            reason: String::new(),
        };
        records.volumes.insert(volume.name.clone(), volume);
        records
    }

    // Invariant A1: asked when a stream names its session, and before each request of it.
    #[test]
    fn only_an_incarnation_that_the_records_call_up_goes_through_this_node() {
        let nobody = ClusterState::default();
        assert!(refusal(&nobody, VOLUME, NodeId(2), Epoch(4)).is_some(), "nobody knows the node");
        for state in [MemberState::Up, MemberState::Down, MemberState::Fencing, MemberState::Fenced] {
            let records = records(state);
            let refused = |epoch| refusal(&records, VOLUME, NodeId(2), Epoch(epoch)).is_some();
            assert_eq!(!refused(4), state == MemberState::Up, "{state}");
            assert!(refused(3), "an incarnation before: {state}");
            assert!(refused(5), "one that has not begun: {state}");
        }
    }

    #[test]
    fn a_witness_goes_to_no_volume_and_nobody_to_one_that_the_records_do_not_have() {
        let mut records = records(MemberState::Up);
        let asked = |records: &ClusterState, volume| refusal(records, volume, NodeId(2), Epoch(4));
        assert_eq!(asked(&records, VOLUME), None);
        let removed = asked(&records, VolumeId(Uuid::from_u128(8))).expect("refused");
        assert!(removed.contains("not in the cluster's records"), "{removed}");
        records.witnesses.insert(NodeId(2));
        let refused = asked(&records, VOLUME).expect("refused");
        assert!(refused.contains("witness"), "{refused}");
    }

    /// A node with one volume.
    struct Node {
        records: Mutex<ClusterState>,
        lun: Arc<dyn BlockDevice>,
        sessions: Sessions<PeerKey>,
    }

    impl Host for Node {
        fn records(&self) -> Arc<ClusterState> {
            Arc::new(self.records.lock().expect("no panic").clone())
        }

        fn direct(&self, _volume: VolumeId) -> Result<Arc<dyn BlockDevice>, String> {
            Ok(Arc::clone(&self.lun))
        }

        fn sessions(&self) -> &Sessions<PeerKey> {
            &self.sessions
        }
    }

    /// What a node is told that wants to go to a volume through the node of the test, over TLS with its certificate.
    fn go(nodes: &Nodes, host: &Arc<Node>, certificate: u16, export: &str) -> Result<NbdDevice, String> {
        let near = nodes.connect(&endpoint(&nodes.ca, certificate), 2).map_err(|error| error.explain())?;
        let far = nodes.arrived.recv().expect("it arrives");
        let host: Arc<dyn Host> = Arc::clone(host) as Arc<dyn Host>;
        // It ends with its stream.
        drop(std::thread::spawn(move || serve_peer(&host, far)));
        let options = NbdOptions { writes_outlive_server: true, ..NbdOptions::default() };
        NbdDevice::over(protected(near).0, export, "the LUN", options).map_err(|error| error.to_string())
    }

    // Invariant A1: the certificate says who goes through, whatever the stream claims, and each request asks again.
    #[test]
    fn over_tls_a_peer_goes_through_as_the_node_of_its_certificate_to_volumes_of_the_records() {
        let nodes = Nodes::start();
        let mut records = records(MemberState::Up);
        let member = |id: u16, epoch: u64| Member {
            id: NodeId(id),
            name: format!("n{id}"),
            address: String::new(),
            epoch: Epoch(epoch),
            state: MemberState::Up,
            joined_ms: 0,
        };
        for (id, epoch) in [(1, 9), (3, 5)] {
            records.members.insert(NodeId(id), member(id, epoch));
        }
        records.witnesses.insert(NodeId(3));
        let lun = Arc::new(MemoryDevice::new(1 << 20));
        let host =
            Arc::new(Node { records: Mutex::new(records), lun: lun.clone(), sessions: Sessions::default() });
        let named = |volume: VolumeId, epoch| format!("{}/{epoch}", volume.0);
        let refused = |certificate, export: &str, why: &str| {
            let told = go(&nodes, &host, certificate, export).expect_err("refused");
            assert!(told.contains(why), "{told}");
        };
        refused(1, &named(VOLUME, 4), "epoch 4 of node 1");
        refused(3, &named(VOLUME, 5), "witness");
        refused(3, &named(VOLUME, 9), "epoch 9 of node 3");
        refused(4, &named(VOLUME, 9), "epoch 9 of node 4");
        refused(1, &named(VolumeId(Uuid::from_u128(8)), 9), "volume");
        refused(1, "", "no volume and epoch");
        let through = go(&nodes, &host, 1, &named(VOLUME, 9)).expect("a member with its epoch");
        through.write_at(0, &[7; 4096]).expect("written");
        let dead = |records: &mut ClusterState| {
            records.members.get_mut(&NodeId(1)).expect("a member").state = MemberState::Fenced;
        };
        dead(&mut host.records.lock().expect("no panic"));
        through.write_at(0, &[8; 4096]).expect_err("its incarnation is over");
        let mut found = [0; 4096];
        lun.read_at(0, &mut found).expect("read");
        assert_eq!(found, [7; 4096]);
    }

    #[test]
    fn a_node_of_another_cluster_gets_no_stream_even_with_a_certificate_of_this_authority() {
        let nodes = Nodes::start();
        let stranger = endpoint_of(&nodes.ca, Uuid::from_u128(8), 1);
        let told = nodes.connect(&stranger, 2).expect_err("another cluster").explain();
        assert!(told.contains("cluster"), "{told}");
        assert!(nodes.arrived.try_recv().is_err(), "nothing of it has come");
    }

    #[test]
    fn a_session_is_named_by_volume_and_epoch() {
        let volume = Uuid::from_u128(7);
        assert_eq!(parse(&format!("{volume}/12")), Some((VolumeId(volume), Epoch(12))));
        for name in ["", "/", "vol1/3", &format!("{volume}"), &format!("{volume}/-1")] {
            assert_eq!(parse(name), None, "{name}");
        }
    }
}
