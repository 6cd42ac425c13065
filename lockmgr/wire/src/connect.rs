//! Opening connections.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use rustls_pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::task::TaskTracker;

use crate::driver::{self, Greeted, in_time};
use crate::hello::Proof;
use crate::identity::{Certified, certified, tls_error};
use crate::{Class, Connection, Endpoint, Handler, Local, Partition, Stream, Via, WireError, authority};

/// Bytes unacknowledged for this long end a connection; a shorter silence is for heartbeats to judge.
const UNACKNOWLEDGED_MS_MAX: u32 = 30_000;

/// Congestion control between nodes.
const CONGESTION: &str = "cubic";

/// Connects to another node over mutual TLS. Fails unless exactly `expected_node` answers.
pub async fn connect_tls(
    address: &str,
    endpoint: &Endpoint,
    expected_node: u16,
    class: Class,
    handler: Arc<dyn Handler>,
) -> Result<Connection, WireError> {
    connect_tls_with(address, endpoint, expected_node, class, handler, &TaskTracker::new()).await
}

pub(crate) async fn connect_tls_with(
    address: &str,
    endpoint: &Endpoint,
    expected_node: u16,
    class: Class,
    handler: Arc<dyn Handler>,
    tasks: &TaskTracker,
) -> Result<Connection, WireError> {
    let greeted = greet_tls(address, endpoint, Some(expected_node), class).await?;
    Ok(driver::start(greeted, handler, endpoint.partition.clone(), tasks))
}

/// Opens a bare stream to another node over mutual TLS. Fails unless exactly `expected_node` answers.
pub async fn connect_bare(
    address: &str,
    endpoint: &Endpoint,
    expected_node: u16,
) -> Result<Stream, WireError> {
    let greeted = greet_tls(address, endpoint, Some(expected_node), Class::Stream).await?;
    Stream::of_client(greeted, endpoint.partition.clone())
}

/// Opens a bare stream to another node over mutual TLS, for redirected blocks. Fails unless exactly `expected_node` answers.
pub async fn connect_blocks(
    address: &str,
    endpoint: &Endpoint,
    expected_node: u16,
) -> Result<Stream, WireError> {
    let greeted = greet_tls(address, endpoint, Some(expected_node), Class::Blocks).await?;
    Stream::of_client(greeted, endpoint.partition.clone())
}

/// Connects and exchanges hellos. Without an expected node, any member of the cluster will do.
pub(crate) async fn greet_tls(
    address: &str,
    endpoint: &Endpoint,
    expected: Option<u16>,
    class: Class,
) -> Result<Greeted<TlsStream<TcpStream>>, WireError> {
    let doing = match expected {
        Some(node) => format!("connect to node {node} at {address}"),
        None => format!("connect to {address}"),
    };
    let handshake = async {
        endpoint.partition.passable().await;
        let tcp = dial(address).await.map_err(|error| WireError::io(&doing, error))?;
        // Who takes any member checks the name that the certificate itself gives.
        let name = ServerName::try_from(authority::node_name(expected.unwrap_or_default()))
            .map_err(|error| WireError::BadIdentity { what: error.to_string() })?;
        let identity = endpoint.identity();
        let rules = match expected {
            Some(_) => identity.client,
            None => identity.any_member,
        };
        let connector = TlsConnector::from(rules);
        let tls = connector.connect(name, tcp).await.map_err(|error| tls_error(&doing, expected, &error))?;
        let peer = shown(&tls)?;
        endpoint.check_date(peer)?;
        let proof = Proof { via: Via::Tls, node: Some(peer), class: Some(class) };
        // Our own certificate is judged by the peer after our side of the handshake is done: the verdict comes here.
        driver::greet(tls, &endpoint.local, class, proof).await.map_err(|error| match &error {
            WireError::Io { source, .. } => tls_error(&doing, expected, source),
            _ => error,
        })
    };
    in_time(&doing, handshake).await
}

/// What the peer's certificate says.
fn shown(tls: &TlsStream<TcpStream>) -> Result<Certified, WireError> {
    let shown = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let shown =
        shown.ok_or_else(|| WireError::ForeignCertificate { what: "the peer shows none".to_owned() })?;
    certified(shown)
}

/// Connects to a process of this node over a Unix socket.
pub async fn connect_unix(
    path: &Path,
    local: &Local,
    handler: Arc<dyn Handler>,
) -> Result<Connection, WireError> {
    let doing = format!("connect to {}", path.display());
    let handshake = async {
        let stream = UnixStream::connect(path).await.map_err(|error| WireError::io(&doing, error))?;
        let proof = Proof { via: unix_peer(&stream)?, node: None, class: Some(Class::Control) };
        driver::greet(stream, local, Class::Control, proof).await
    };
    let greeted = in_time(&doing, handshake).await?;
    Ok(driver::start(greeted, handler, Partition::default(), &TaskTracker::new()))
}

/// Connects to the first address of a name that answers.
pub(crate) async fn dial(address: &str) -> io::Result<TcpStream> {
    let mut last = None;
    for address in tokio::net::lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        do_not_pace(&socket);
        match socket.connect(address).await {
            Ok(tcp) => {
                tune(&tcp);
                return Ok(tcp);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

/// Takes the congestion control that Linux has by default, on a socket that is not connected yet, or that listens. Nodes are
/// near each other; where a machine is set up for far peers (BBR), its timers would pace masses of data between nodes to half
/// of what the network carries.
pub(crate) fn do_not_pace(socket: impl AsFd) {
    // An improvement; a socket that refuses it still works.
    let _kept = rustix::net::sockopt::set_tcp_congestion(socket, CONGESTION);
}

/// Small frames leave at once, and a vanished peer is noticed even without heartbeats.
pub(crate) fn tune(tcp: &TcpStream) {
    // Both are improvements; a socket that refuses them still works.
    let _kept_delay = tcp.set_nodelay(true);
    let _kept_timeout = rustix::net::sockopt::set_tcp_user_timeout(tcp, UNACKNOWLEDGED_MS_MAX);
}

pub(crate) fn unix_peer(stream: &UnixStream) -> Result<Via, WireError> {
    let who = stream.peer_cred().map_err(|error| WireError::io("ask who is at the other end", error))?;
    let pid = who.pid().and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0);
    Ok(Via::Unix { uid: who.uid(), pid })
}
