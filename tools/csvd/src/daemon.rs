//! The daemon's life: what is started in which order, and how it ends.
//!
//! ```text
//!   pid file -> mesh -> Raft -> admin socket ("ready") -> epoch, lease -> node socket -> heartbeats -> volumes -> VMs
//!   SIGTERM or a declared end:   VMs stop -> volumes left (volumes/leave.rs) -> silence -> Raft, mesh
//!   a node that leaves for good gives its vote back before Raft ends (drain/farewell.rs)
//! ```
//! A node that was fenced although it lives has lost its grants and its VMs, and comes back by itself: the program is
//! executed anew in the same process, and takes part with the next epoch (A3).

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api::Error;
use api::config::NodeConfig;
use lockmgr::ClusterId;
use lockmgr::NodeId;
use lockmgr::cluster::{Cluster, ClusterConfig, MemberConfig, RaftTiming};
use lockmgr::timing::Timing;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use wire::{Endpoint, Identity, Local, Mesh, Server, WireError};

use crate::core::Core;
use crate::dispatch::Dispatcher;
use crate::pid_file::PidFile;
use crate::{admin, drain, membership, node_socket, redirect, vms, volumes};

/// Longest time for an end in order: VMs flush their disks, coordinators commit.
const IN_ORDER_WITHIN: Duration = Duration::from_secs(12);
/// Longest time for what is left after that, when nothing of it can write any more.
const CUT_SHORT_WITHIN: Duration = Duration::from_secs(10);
/// Longest time for taking leave of the other nodes.
const LEAVE_WITHIN: Duration = Duration::from_secs(3);

/// Reads the configuration.
pub(crate) fn load(path: &Path) -> Result<NodeConfig, Error> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Error::not_found(format!("configuration {}: {error}", path.display()))
            .hint("`csvctl dev up --dir DIR` writes one per node")
    })?;
    toml::from_str(&text).map_err(|error| {
        Error::usage(format!("configuration {}: {error}", path.display())).hint("correct the file")
    })
}

/// What comes after the daemon's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Afterwards {
    Nothing,
    /// The others have gone on without this incarnation: the next one takes its place.
    BeginAnew,
}

/// Runs the daemon until it is told to end.
pub(crate) async fn run(config: NodeConfig, inherit_listener: bool) -> Result<Afterwards, Error> {
    let _pid_file = PidFile::take(&config.pid_file())?;
    let stop = CancellationToken::new();
    end_on_signals(&stop)?;

    let timing = config.base_ms.map_or(Timing::DEFAULT, Timing::from_base);
    let listener = listener(&config, inherit_listener).await?;
    let identity = membership::certificates::at_start(&config)?;
    let authority = identity.authority();
    let endpoint = endpoint(&config, identity)?;
    let dispatcher = Arc::new(Dispatcher::default());
    let mesh = Mesh::new(endpoint.clone(), Arc::clone(&dispatcher) as Arc<dyn wire::Handler>);
    let cluster = Cluster::start(cluster_config(&config), Arc::clone(&mesh))
        .await
        .map_err(|error| Error::failed(error).during("starting this node's part of the cluster"))?;
    let core = Core::new(config, timing, authority, mesh, cluster, stop);
    dispatcher.begin(&core);
    let server = Server::serve_tls(listener, endpoint, dispatcher);
    membership::meet_peers(&core);

    let admin = admin::serve(&core)?;
    say_ready();
    tracing::info!(node = core.config.name, address = %core.config.listen, "started");
    let ended = live(&core).await;

    end(&core);
    // Nothing on a LUN depends on what follows, and a request to a node that hangs is not waited for.
    let taking_leave = async {
        admin.end().await;
        server.shutdown().await;
        core.cluster.shutdown().await;
        core.mesh.shutdown().await;
    };
    if tokio::time::timeout(LEAVE_WITHIN, taking_leave).await.is_err() {
        tracing::warn!("requests of other nodes were cut off");
    }
    tracing::info!("ended");
    let anew = core.begin_anew.load(std::sync::atomic::Ordering::Acquire);
    ended.map(|()| if anew { Afterwards::BeginAnew } else { Afterwards::Nothing })
}

/// From joining the cluster to the wish to end.
async fn live(core: &Arc<Core>) -> Result<(), Error> {
    tokio::select! {
        () = core.stop.cancelled() => return Ok(()),
        joined = membership::begin_epoch(core) => joined?,
    }
    if core.config.witness {
        return vote_only(core).await;
    }
    let processes = node_socket::serve(core)?;
    redirect::serve_processes(core)?;
    vms::user::serve_luns(core)?;
    membership::start(core);
    vms::adopt(core).await;
    core.runtime.spawn(tell_processor(Arc::clone(core)));
    core.runtime.spawn(volumes::run(Arc::clone(core)));
    core.runtime.spawn(vms::restart_lost(Arc::clone(core)));
    core.runtime.spawn(drain::run(Arc::clone(core)));
    core.runtime.spawn(volumes::balancing::run(Arc::clone(core)));
    core.stop.cancelled().await;
    let in_order = async {
        vms::end_all(core).await;
        volumes::leave(core).await;
    };
    tokio::select! {
        () = in_order => {}
        () = cut_short(core) => {}
    }
    drain::take_leave(core).await;
    if tokio::time::timeout(LEAVE_WITHIN, processes.shutdown()).await.is_err() {
        tracing::warn!("requests of this node's VMs were cut off");
    }
    Ok(())
}

/// VMs can start without: they then get what their node has.
async fn tell_processor(core: Arc<Core>) {
    if let Err(error) = vms::publish_processor(&core).await {
        tracing::warn!(%error, "the cluster does not know what this node's processor can give");
    }
}

/// A witness takes part in the quorum and in judging the others, and has neither volumes nor VMs.
async fn vote_only(core: &Arc<Core>) -> Result<(), Error> {
    membership::start(core);
    core.stop.cancelled().await;
    volumes::leave(core).await;
    Ok(())
}

/// Without a quorum the lease runs out, and what must still be written waits for it for ever: then the right is given up,
/// so that it fails instead, as in a crash. What does not end then either goes with the process.
async fn cut_short(core: &Arc<Core>) {
    tokio::time::sleep(IN_ORDER_WITHIN).await;
    tracing::error!("the node does not come to an end in order: its VMs are killed, all I/O is stopped");
    core.vms.kill_all();
    core.membership.lease.revoke();
    tokio::time::sleep(CUT_SHORT_WITHIN).await;
    tracing::error!("not all has ended: the rest goes with the process");
}

/// From here on this node is silent.
fn end(core: &Arc<Core>) {
    core.stop.cancel();
    core.done.cancel();
    core.membership.lease.revoke();
}

fn endpoint(config: &NodeConfig, identity: Identity) -> Result<Endpoint, Error> {
    let local = Local { cluster: config.cluster_id, node: config.id, name: config.name.clone() };
    Endpoint::new(local, identity).map_err(|error| unusable(&error))
}

fn unusable(error: &WireError) -> Error {
    Error::failed(error.explain()).hint(error.hint().unwrap_or("check the files named in the configuration"))
}

fn cluster_config(config: &NodeConfig) -> ClusterConfig {
    ClusterConfig {
        cluster: ClusterId(config.cluster_id),
        cluster_name: config.cluster.clone(),
        node: NodeId(config.id),
        data_dir: config.data_dir(),
        members: config
            .members
            .iter()
            .map(|member| MemberConfig {
                id: NodeId(member.id),
                name: member.name.clone(),
                address: member.address.to_string(),
            })
            .collect(),
        bootstrap: config.bootstrap,
        timing: config.base_ms.map_or_else(RaftTiming::default, RaftTiming::from_base),
    }
}

/// The socket for other nodes: the one that was handed over as stdin, or a new one.
async fn listener(config: &NodeConfig, inherit: bool) -> Result<TcpListener, Error> {
    let cannot = |error: std::io::Error| {
        Error::failed(format!("listen on {}: {error}", config.listen))
            .hint("another program uses the address; see `ss -ltnp`")
    };
    if !inherit {
        return TcpListener::bind(config.listen).await.map_err(cannot);
    }
    let inherited = std::io::stdin().as_fd().try_clone_to_owned().map_err(cannot)?;
    let listener = std::net::TcpListener::from(inherited);
    listener.set_nonblocking(true).map_err(cannot)?;
    TcpListener::from_std(listener).map_err(cannot)
}

fn end_on_signals(stop: &CancellationToken) -> Result<(), Error> {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let mut signals =
            signal(kind).map_err(|error| Error::failed(format!("catching signals: {error}")))?;
        let stop = stop.clone();
        tokio::spawn(async move {
            if signals.recv().await.is_some() {
                tracing::info!("asked to end");
                stop.cancel();
            }
        });
    }
    Ok(())
}

/// Tells whoever started the daemon that its admin socket answers.
fn say_ready() {
    let mut out = std::io::stdout().lock();
    // Nobody needs to listen.
    drop(writeln!(out, "ready").and_then(|()| out.flush()));
}
