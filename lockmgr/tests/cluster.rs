//! Three members in one process, over real TLS on loopback: election, proposals from everywhere, loss and return of
//! nodes, restart from disk. The tests wait for records and for what nodes see of Raft, never for time.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::future::{BoxFuture, join_all};
use lockmgr::cluster::{
    Cluster, ClusterConfig, ClusterError, ClusterState, Command, FenceKind, Given, MemberConfig, MemberState,
    ProposeError, RaftStatus, RaftTiming, VmState, not_started,
};
use lockmgr::{ClusterId, Epoch, NodeId, Term, VolumeId};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::sync::watch::Receiver;
use uuid::Uuid;
use wire::{Connection, Endpoint, Handler, Identity, Local, Mesh, Peer, Refusal, Server, authority};

const ONE: NodeId = NodeId(1);
const TWO: NodeId = NodeId(2);
const THREE: NodeId = NodeId(3);
const ALL: [NodeId; 3] = [ONE, TWO, THREE];

/// A test that hangs fails here, with a name; no test waits for it.
const STUCK: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Dispatcher {
    cluster: OnceLock<Arc<Cluster>>,
}

impl Handler for Dispatcher {
    fn handle(
        &self,
        from: Peer,
        _conn: Connection,
        service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        match self.cluster.get() {
            Some(cluster) => cluster.handle(service, &from, body),
            None => Box::pin(async { Err(not_started()) }),
        }
    }
}

struct Node {
    cluster: Arc<Cluster>,
    mesh: Arc<Mesh>,
    server: Server,
}

impl Node {
    async fn stop(self) {
        self.cluster.shutdown().await;
        self.mesh.shutdown().await;
        self.server.shutdown().await;
    }
}

struct World {
    folder: TempDir,
    ca: authority::Issued,
    cluster: ClusterId,
    addresses: Vec<String>,
    timing: RaftTiming,
}

impl World {
    /// Reserves an address for each node and starts all.
    async fn start(timing: RaftTiming) -> (Self, Vec<Node>) {
        let mut listeners = Vec::new();
        for _ in ALL {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.expect("bind"));
        }
        let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
        let world = Self {
            folder: tempfile::tempdir().expect("folder"),
            ca: authority::create_ca("test").expect("authority"),
            cluster: ClusterId(Uuid::new_v4()),
            addresses: listeners.iter().map(address).collect(),
            timing,
        };
        let nodes =
            join_all(ALL.into_iter().zip(listeners).map(|(id, listener)| world.start_on(id, listener))).await;
        (world, nodes)
    }

    async fn restart(&self, id: NodeId) -> Node {
        let address = &self.addresses[usize::from(id.0) - 1];
        self.start_on(id, TcpListener::bind(address).await.expect("same port")).await
    }

    fn config(&self, id: NodeId) -> ClusterConfig {
        let member = |(id, address): (NodeId, &String)| MemberConfig {
            id,
            name: format!("n{id}"),
            address: address.clone(),
        };
        ClusterConfig {
            cluster: self.cluster,
            cluster_name: "test".to_owned(),
            node: id,
            data_dir: self.folder.path().join(id.to_string()),
            members: ALL.into_iter().zip(&self.addresses).map(member).collect(),
            bootstrap: id == ONE,
            timing: self.timing,
        }
    }

    fn endpoint(&self, id: NodeId) -> Endpoint {
        let issued = authority::issue(&self.ca, id.0).expect("certificate");
        let identity =
            Identity::from_pem(&issued.cert_pem, &issued.key_pem, &self.ca.cert_pem).expect("identity");
        let local = Local { cluster: self.cluster.0, node: id.0, name: format!("n{id}") };
        Endpoint::new(local, identity).expect("endpoint")
    }

    async fn start_on(&self, id: NodeId, listener: TcpListener) -> Node {
        let endpoint = self.endpoint(id);
        let dispatcher = Arc::new(Dispatcher::default());
        let server =
            Server::serve_tls(listener, endpoint.clone(), Arc::clone(&dispatcher) as Arc<dyn Handler>);
        let mesh = Mesh::new(endpoint, Arc::clone(&dispatcher) as Arc<dyn Handler>);
        let cluster = Cluster::start(self.config(id), Arc::clone(&mesh)).await.expect("starts");
        assert!(dispatcher.cluster.set(Arc::clone(&cluster)).is_ok());
        Node { cluster, mesh, server }
    }
}

/// Quicker than the default, and patient: a loaded machine may need several elections.
fn quick() -> RaftTiming {
    RaftTiming {
        heartbeat_ms: 100,
        election_ms_min: 500,
        election_ms_max: 1000,
        propose_ms: 50_000,
        ..RaftTiming::default()
    }
}

async fn in_time<T>(what: &str, step: impl Future<Output = T>) -> T {
    tokio::time::timeout(STUCK, step).await.unwrap_or_else(|_| panic!("stuck: {what}"))
}

async fn ready(nodes: &[Node]) {
    in_time("ready", join_all(nodes.iter().map(|node| node.cluster.ready()))).await;
}

async fn state_where(node: &Node, what: &str, check: impl Fn(&ClusterState) -> bool) -> Arc<ClusterState> {
    let mut watch = node.cluster.watch();
    let found = in_time(what, watch.wait_for(|state| check(state))).await.expect("watched");
    Arc::clone(&found)
}

async fn status_where(node: &Node, what: &str, check: impl Fn(&RaftStatus) -> bool) -> RaftStatus {
    in_time(what, async {
        loop {
            let status = node.cluster.status();
            if check(&status) {
                return status;
            }
            node.cluster.status_changed().await;
        }
    })
    .await
}

/// Waits until the writers have come `n` proposals further.
async fn count(proposed: &mut UnboundedReceiver<()>, n: usize) {
    in_time("writers", async {
        for _ in 0..n {
            proposed.recv().await.expect("writers run");
        }
    })
    .await;
}

fn event(text: impl Into<String>) -> Command {
    Command::Event { kind: "test".to_owned(), subject: "it".to_owned(), text: text.into() }
}

fn texts(state: &ClusterState) -> Vec<String> {
    state.events.iter().filter(|event| event.kind == "test").map(|event| event.text.clone()).collect()
}

async fn join_epoch(node: &Node) -> Epoch {
    let me = node.cluster.node();
    let expect = node.cluster.state().members[&me].epoch;
    let outcome = node.cluster.propose(Command::BeginEpoch { node: me, expect }).await.expect("joins");
    match outcome.given {
        Given::Epoch(epoch) => epoch,
        other => panic!("{other:?}"),
    }
}

async fn stop_all(nodes: Vec<Node>) {
    in_time("stop", join_all(nodes.into_iter().map(Node::stop))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_elect_a_leader_and_agree_on_what_all_of_them_propose() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    let state = nodes[2].cluster.state();
    assert_eq!((state.name.as_str(), state.members.len()), ("test", 3));
    let proposals = (0..300).map(|i| {
        let cluster = Arc::clone(&nodes[i % 3].cluster);
        async move { cluster.propose(event(format!("{i}"))).await.expect("applied") }
    });
    let outcomes = in_time("proposals", join_all(proposals)).await;
    let indexes: BTreeSet<u64> = outcomes.iter().map(|outcome| outcome.index).collect();
    assert_eq!(indexes.len(), 300, "each has its own place in the log");
    let last = *indexes.last().expect("some");
    let states = join_all(nodes.iter().map(|n| state_where(n, "all applied", |s| s.applied >= last))).await;
    assert_eq!(texts(&states[0]).len(), 300);
    assert!(states.iter().all(|state| state.events == states[0].events), "one order for all");
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposer_reads_its_own_change_on_its_own_node() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    for round in 0..20u64 {
        for node in &nodes {
            let before = node.cluster.state().members[&node.cluster.node()].epoch;
            assert_eq!(before, Epoch(round));
            assert_eq!(join_epoch(node).await, Epoch(round + 1));
            assert_eq!(node.cluster.state().members[&node.cluster.node()].epoch, Epoch(round + 1));
        }
    }
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_change_is_lost_when_the_leader_goes_and_comes_back() {
    let (world, mut nodes) = World::start(quick()).await;
    ready(&nodes).await;
    let leader = status_where(&nodes[0], "leader", |s| s.leader.is_some()).await.leader.expect("one");
    let survivors: Vec<Arc<Cluster>> =
        nodes.iter().filter(|n| n.cluster.node() != leader).map(|n| Arc::clone(&n.cluster)).collect();
    let (more, mut enough) = tokio::sync::mpsc::unbounded_channel();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writers = survivors.iter().cloned().map(|cluster| {
        let (more, stopped) = (more.clone(), stopped.clone());
        tokio::spawn(create_vms(cluster, more, stopped))
    });
    let writers: Vec<_> = writers.collect();
    count(&mut enough, 50).await;
    let position = nodes.iter().position(|n| n.cluster.node() == leader).expect("one of them");
    in_time("leader stops", nodes.remove(position).stop()).await;
    for node in &nodes {
        status_where(node, "new leader", |s| s.leader.is_some_and(|l| l != leader)).await;
    }
    count(&mut enough, 100).await;
    nodes.push(in_time("leader returns", world.restart(leader)).await);
    count(&mut enough, 50).await;
    stop.send(true).expect("writers run");
    let mut acknowledged = BTreeSet::new();
    for writer in writers {
        acknowledged.extend(writer.await.expect("writer"));
    }
    let last = nodes[0].cluster.propose(event("last")).await.expect("applied").index;
    for node in &nodes {
        let state = state_where(node, "caught up", |s| s.applied >= last).await;
        let lost: Vec<_> = acknowledged.iter().filter(|name| !state.vms.contains_key(*name)).collect();
        assert!(lost.is_empty(), "node {} lost {lost:?}", node.cluster.node());
    }
    stop_all(nodes).await;
}

/// Creates VMs until it is stopped; returns those that were acknowledged. A command that was sent twice and applied twice
/// would meet itself as a conflict.
async fn create_vms(
    cluster: Arc<Cluster>,
    more: UnboundedSender<()>,
    mut stopped: Receiver<bool>,
) -> Vec<String> {
    let mut acknowledged = Vec::new();
    for i in 0..1500 {
        if *stopped.borrow() {
            return acknowledged;
        }
        let name = format!("n{}-{i}", cluster.node());
        let create = Command::CreateVm {
            name: name.clone(),
            id: Uuid::new_v4(),
            owner: cluster.node(),
            spec: Bytes::new(),
        };
        match cluster.propose(create).await {
            Ok(_) => acknowledged.push(name),
            Err(ProposeError::OutcomeUnknown { .. } | ProposeError::NoQuorum { .. }) => {}
            Err(other) => panic!("{name}: {other}"),
        }
        more.send(()).expect("counted");
    }
    stopped.wait_for(|stopped| *stopped).await.expect("test runs");
    acknowledged
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_cluster_starts_again_from_disk_without_hands() {
    let (world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    join_epoch(&nodes[1]).await;
    let last = nodes[1].cluster.propose(event("before")).await.expect("applied").index;
    stop_all(nodes).await;

    let nodes = join_all(ALL.map(|id| world.restart(id))).await;
    ready(&nodes).await;
    let after = nodes[0].cluster.propose(event("after")).await.expect("applied").index;
    assert!(after > last);
    for node in &nodes {
        let state = state_where(node, "caught up", |s| s.applied >= after).await;
        assert_eq!(texts(&state), ["before", "after"]);
        assert_eq!(state.members[&TWO].epoch, Epoch(1));
        let created = state.events.iter().filter(|event| event.kind == "cluster.created").count();
        assert_eq!(created, 1, "the bootstrap node creates the cluster once");
    }
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_for_long_catches_up_by_snapshot() {
    let timing = RaftTiming { snapshot_entries: 50, ..quick() };
    let (world, mut nodes) = World::start(timing).await;
    ready(&nodes).await;
    in_time("stop", nodes.pop().expect("three").stop()).await;
    for i in 0..400 {
        in_time("proposal", nodes[0].cluster.propose(event(format!("{i}")))).await.expect("applied");
    }
    let node = world.restart(THREE).await;
    let last = nodes[0].cluster.status().last_applied;
    let state = state_where(&node, "caught up", |s| s.applied >= last).await;
    assert_eq!(texts(&state).len(), 400);
    assert_eq!(state.events, nodes[0].cluster.state().events);
    nodes.push(node);
    // A proposal from a node that has just come is not mistaken for an old one.
    in_time("proposal", nodes[2].cluster.propose(event("here again"))).await.expect("applied");
    stop_all(nodes).await;
}

fn copy_folder(from: &std::path::Path, to: &std::path::Path) {
    std::fs::create_dir_all(to).expect("made");
    for entry in std::fs::read_dir(from).expect("a folder").flatten() {
        let place = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &place);
        } else {
            std::fs::copy(entry.path(), place).expect("copied");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_disk_was_rolled_back_is_refused_with_the_reason_and_the_others_go_on() {
    let (world, mut nodes) = World::start(RaftTiming { propose_ms: 10_000, ..quick() }).await;
    ready(&nodes).await;
    // The victim must follow a leader that stays.
    let leader = status_where(&nodes[0], "a leader", |status| status.leader.is_some()).await.leader;
    let leader = leader.expect("just seen");
    let victim = ALL.into_iter().find(|id| *id != leader).expect("three");
    let (folder, copy) = (world.config(victim).data_dir, world.folder.path().join("copy"));
    in_time("stop", nodes.remove(nodes_index(victim)).stop()).await;
    copy_folder(&folder, &copy);
    let node = world.restart(victim).await;
    for i in 0..20 {
        in_time("proposal", node.cluster.propose(event(format!("{i}")))).await.expect("applied");
    }
    in_time("stop", node.stop()).await;
    std::fs::remove_dir_all(&folder).expect("removed");
    copy_folder(&copy, &folder);
    let node = world.restart(victim).await;
    let refused = in_time("refusal", async {
        loop {
            match node.cluster.propose(event("as if nothing had happened")).await {
                Err(ProposeError::Invalid { what }) => return what,
                other => drop(other),
            }
        }
    });
    let what = refused.await;
    assert!(what.contains("rolled back"), "{what}");
    in_time("proposal", nodes[0].cluster.propose(event("on"))).await.expect("the others go on");
    nodes.push(node);
    stop_all(nodes).await;
}

fn nodes_index(id: NodeId) -> usize {
    usize::from(id.0) - 1
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_majority_decides_nothing_and_says_so() {
    let timing = RaftTiming { propose_ms: 1000, ..quick() };
    let (_world, nodes) = World::start(timing).await;
    ready(&nodes).await;
    let leader = status_where(&nodes[0], "leader", |s| s.leader.is_some()).await.leader.expect("one");
    let position = nodes.iter().position(|n| n.cluster.node() == leader).expect("one of them");
    nodes[position].mesh.set_partitioned(true);
    status_where(&nodes[position], "no quorum", |s| !s.quorum).await;
    let error = nodes[position].cluster.propose(event("alone")).await.expect_err("no majority");
    assert!(matches!(error, ProposeError::OutcomeUnknown { .. } | ProposeError::NoQuorum { .. }), "{error}");
    let other = &nodes[(position + 1) % 3];
    status_where(other, "new leader", |s| s.leader.is_some_and(|l| l != leader)).await;
    in_time("proposal", other.cluster.propose(event("together"))).await.expect("applied");
    nodes[position].mesh.set_partitioned(false);
    status_where(&nodes[position], "follows", |s| s.quorum && s.leader != Some(leader)).await;
    let state =
        state_where(&nodes[position], "caught up", |s| texts(s).contains(&"together".to_owned())).await;
    assert!(!texts(&state).contains(&"alone".to_owned()), "what no majority has seen is gone");
    stop_all(nodes).await;
}

// Invariant H6: in doubt the record is read, and what is read is the present.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_contains_all_that_was_acknowledged_on_any_node_before_it() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    for round in 0..30usize {
        let text = format!("{round}");
        in_time("proposal", nodes[round % 3].cluster.propose(event(text.clone()))).await.expect("applied");
        for node in &nodes {
            let state = in_time("read", node.cluster.read()).await.expect("quorum");
            assert!(texts(&state).contains(&text), "node {} read the past", node.cluster.node());
        }
    }
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_does_not_hang_with_a_leader_that_hangs() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    let leader = status_where(&nodes[0], "leader", |s| s.leader.is_some()).await.leader.expect("one");
    let position = nodes.iter().position(|n| n.cluster.node() == leader).expect("one of them");
    // Connections to a partitioned node stay open and silent, as those to a stopped process.
    nodes[position].mesh.set_partitioned(true);
    let other = &nodes[(position + 1) % 3];
    other.cluster.propose(event("meanwhile")).await.expect("applied");
    assert_ne!(other.cluster.status().leader, Some(leader));
    let state = other.cluster.read().await.expect("quorum");
    assert_eq!(texts(&state), ["meanwhile"]);
    nodes[position].mesh.set_partitioned(false);
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_runs_on_after_a_cluster_was_shut_down() {
    let tasks = tokio::runtime::Handle::current().metrics();
    let before = tasks.num_alive_tasks();
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    in_time("proposal", nodes[1].cluster.propose(event("one"))).await.expect("applied");
    let cluster = Arc::clone(&nodes[0].cluster);
    stop_all(nodes).await;
    assert!(matches!(cluster.propose(event("late")).await, Err(ProposeError::Stopped { .. })));
    assert!(cluster.status().stopped.is_some());
    // The runtime counts a task out a moment after whoever joined it goes on.
    in_time("tasks end", async {
        while tasks.num_alive_tasks() > before {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

// Invariant H1: the commit of a move is one compare-and-swap with one winner; E5.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_all_who_try_to_take_a_vm_exactly_one_succeeds() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    for node in &nodes {
        join_epoch(node).await;
    }
    let create = Command::CreateVm {
        name: "vm".to_owned(),
        id: Uuid::new_v4(),
        owner: ONE,
        spec: Bytes::from_static(b"s"),
    };
    in_time("create", nodes[0].cluster.propose(create)).await.expect("created");
    for round in 1..=10u64 {
        let read =
            state_where(&nodes[0], "vm", |s| s.vms.get("vm").is_some_and(|vm| vm.epoch == round)).await;
        let vm = read.vms["vm"].clone();
        let tries = (0..12).map(|i| {
            let cluster = Arc::clone(&nodes[i % 3].cluster);
            let take = vm.update(|vm| {
                vm.owner = cluster.node();
                vm.epoch += 1;
                vm.state = VmState::Running;
                vm.reason = format!("try {i}");
            });
            async move { (i, cluster.propose(take).await) }
        });
        let outcomes = in_time("race", join_all(tries)).await;
        let winners: Vec<_> = outcomes.iter().filter(|(_, outcome)| outcome.is_ok()).collect();
        assert_eq!(winners.len(), 1, "round {round}: {outcomes:?}");
        for (_, outcome) in outcomes.iter().filter(|(_, outcome)| outcome.is_err()) {
            assert!(matches!(outcome, Err(ProposeError::Conflict { .. })), "{outcome:?}");
        }
        let after = state_where(&nodes[1], "taken", |s| s.vms["vm"].epoch == round + 1).await;
        assert_eq!(after.vms["vm"].reason, format!("try {}", winners[0].0), "the winner's record stands");
    }
    stop_all(nodes).await;
}

// Invariants A7 (of two that fence, one completes) and A4 (an unconfirmed fence is quarantine).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_has_one_owner_and_its_node_stays_out_until_it_is_confirmed() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    let epoch = join_epoch(&nodes[2]).await;
    let mark = |state| Command::MarkNode { node: THREE, epoch, state };
    let race = join_all(nodes.iter().map(|node| node.cluster.propose(mark(MemberState::Fencing)))).await;
    assert_eq!(race.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let cluster = &nodes[0].cluster;
    let rejoin = || cluster.propose(Command::BeginEpoch { node: THREE, expect: epoch });
    assert!(matches!(rejoin().await, Err(ProposeError::Conflict { .. })), "not while it is being fenced");
    cluster.propose(mark(MemberState::FenceFailed)).await.expect("noted");
    assert!(matches!(rejoin().await, Err(ProposeError::Conflict { .. })), "not from quarantine");
    cluster.propose(mark(MemberState::Fenced)).await.expect("confirmed");
    assert_eq!(rejoin().await.expect("joins anew").given, Given::Epoch(Epoch(epoch.0 + 1)));
    let late = cluster.propose(mark(MemberState::Fencing)).await;
    assert!(
        matches!(late, Err(ProposeError::Conflict { .. })),
        "a fence of the old incarnation does not hit the new"
    );
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_has_one_coordinator_per_term_and_conflicts_name_what_was_found() {
    let (_world, nodes) = World::start(quick()).await;
    ready(&nodes).await;
    let mut epochs = Vec::new();
    for node in &nodes {
        epochs.push(join_epoch(node).await);
    }
    let cluster = &nodes[0].cluster;
    let create = |name: &str, lun: &str| Command::CreateVolume {
        name: name.to_owned(),
        id: VolumeId(Uuid::new_v4()),
        lun_uri: lun.to_owned(),
        owner: ONE,
        owner_epoch: epochs[0],
        fence_kind: FenceKind::Agent,
    };
    cluster.propose(create("v1", "file:a")).await.expect("created");
    assert!(matches!(cluster.propose(create("v1", "file:b")).await, Err(ProposeError::Conflict { .. })));
    assert!(matches!(cluster.propose(create("v2", "file:a")).await, Err(ProposeError::Conflict { .. })));
    assert!(matches!(cluster.propose(create("../v", "file:c")).await, Err(ProposeError::Invalid { .. })));
    let to = |to: NodeId, to_epoch| Command::MoveVolume {
        name: "v1".to_owned(),
        expect_term: Term(1),
        to,
        to_epoch,
    };
    let stale = cluster.propose(to(TWO, Epoch(99))).await.expect_err("no such incarnation");
    let ProposeError::Conflict { what, expected, found } = &stale else { panic!("{stale}") };
    assert_eq!(
        (what.as_str(), expected.as_str(), found.as_str()),
        ("node 2", "up with epoch 99", "up with epoch 1")
    );
    let race = [(TWO, epochs[1]), (THREE, epochs[2])].map(|(node, epoch)| cluster.propose(to(node, epoch)));
    let race = in_time("race", join_all(race)).await;
    assert_eq!(race.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let volume = cluster.state().volumes["v1"].clone();
    assert_eq!(volume.term, Term(2));
    stop_all(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_node_on_the_same_folder_is_refused() {
    let (world, nodes) = World::start(quick()).await;
    let second = Cluster::start(world.config(ONE), Arc::clone(&nodes[0].mesh)).await;
    assert!(matches!(&second, Err(ClusterError::Store(_))), "{second:?}");
    let mut stranger = world.config(ONE);
    stranger.node = NodeId(9);
    let stranger = Cluster::start(stranger, Arc::clone(&nodes[0].mesh)).await;
    assert!(matches!(&stranger, Err(ClusterError::Config { .. })), "{stranger:?}");
    stop_all(nodes).await;
}
