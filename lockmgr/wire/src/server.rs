//! Accepting connections, over TLS from other nodes or over a Unix socket from this node's processes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::rustls::server::Acceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connect::{do_not_pace, tune, unix_peer};
use crate::driver::{self, Greeted, in_time};
use crate::hello::Proof;
use crate::identity::{certified, tls_error};
use crate::join;
use crate::{ByteStream, Class, Endpoint, Handler, Local, Partition, Stream, Via, WireError};

/// Connections of one server at once; further ones wait in the listener.
const CONNECTIONS_MAX: usize = 1024;
/// Pause after a refused accept (no descriptors left), so that the log is not flooded.
const ACCEPT_PAUSE_MS: u64 = 100;

/// A listening socket with all its connections. Dropping it closes them; [`Server::shutdown`] also waits.
#[derive(Debug)]
pub struct Server {
    closing: CancellationToken,
    tasks: TaskTracker,
    address: Option<SocketAddr>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl Server {
    /// Serves other nodes of the cluster.
    #[must_use]
    pub fn serve_tls(listener: TcpListener, endpoint: Endpoint, handler: Arc<dyn Handler>) -> Self {
        let address = listener.local_addr().ok();
        // What it accepts inherits it.
        do_not_pace(&listener);
        Self::serve(FromNodes { listener, endpoint }, handler, address)
    }

    /// Serves processes of this node. The listener's file permissions decide who may connect.
    #[must_use]
    pub fn serve_unix(listener: UnixListener, local: Local, handler: Arc<dyn Handler>) -> Self {
        Self::serve(FromProcesses { listener, local }, handler, None)
    }

    fn serve(source: impl Source, handler: Arc<dyn Handler>, address: Option<SocketAddr>) -> Self {
        let server = Self { closing: CancellationToken::new(), tasks: TaskTracker::new(), address };
        let accepting = Accepting {
            source: Arc::new(source),
            handler,
            closing: server.closing.clone(),
            tasks: server.tasks.clone(),
        };
        server.tasks.spawn(accepting.run());
        server
    }

    /// Address of a TLS server, for listeners on port 0.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Closes the listener and all connections and waits until their tasks, requests in progress included, have ended.
    pub async fn shutdown(&self) {
        self.closing.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Where connections come from.
trait Source: Send + Sync + 'static {
    type Socket: Send + 'static;
    type Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    fn accept(&self) -> impl Future<Output = std::io::Result<Self::Socket>> + Send;

    /// Finds out who it is. `None`: it was served already and is gone.
    fn greet(
        &self,
        socket: Self::Socket,
        handler: &dyn Handler,
    ) -> impl Future<Output = Result<Option<Greeted<Self::Stream>>, WireError>> + Send;

    fn partition(&self) -> Partition;

    /// The bare stream that a greeted peer has asked for.
    fn bare(&self, greeted: Greeted<Self::Stream>) -> Result<Stream, WireError>;
}

/// What the accepting task and the tasks of its connections share.
struct Accepting<S> {
    source: Arc<S>,
    handler: Arc<dyn Handler>,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl<S: Source> Accepting<S> {
    async fn run(self) {
        let accepting = Arc::new(self);
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let until_closing = accepting.closing.clone();
        let accept_all = async {
            while let Ok(place) = Arc::clone(&room).acquire_owned().await {
                match accepting.source.accept().await {
                    Ok(socket) => {
                        accepting.tasks.spawn(Arc::clone(&accepting).hold(socket, place));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(ACCEPT_PAUSE_MS)).await;
                    }
                }
            }
        };
        until_closing.run_until_cancelled(accept_all).await;
    }

    /// Runs one connection until it ends or the server closes.
    async fn hold(self: Arc<Self>, socket: S::Socket, _place: OwnedSemaphorePermit) {
        let greeting = self.source.greet(socket, &*self.handler);
        let greeted = match self.closing.run_until_cancelled(greeting).await {
            Some(Ok(Some(greeted))) => greeted,
            Some(Ok(None)) => return,
            Some(Err(error)) => {
                tracing::warn!(error = error.explain(), "connection refused");
                return;
            }
            None => return,
        };
        match greeted.class() {
            Class::Admin => {
                return self.handler.admin(ByteStream::new(greeted, self.source.partition()));
            }
            class @ (Class::Blocks | Class::Stream) => {
                return match self.source.bare(greeted) {
                    Ok(stream) if class == Class::Blocks => self.handler.blocks(stream),
                    Ok(stream) => self.handler.bare_stream(stream),
                    Err(error) => tracing::warn!(error = error.explain(), "stream refused"),
                };
            }
            Class::Control | Class::Bulk => {}
        }
        let connection =
            driver::start(greeted, Arc::clone(&self.handler), self.source.partition(), &self.tasks);
        if self.closing.run_until_cancelled(connection.closed()).await.is_none() {
            connection.close();
            connection.closed().await;
        }
    }
}

struct FromNodes {
    listener: TcpListener,
    endpoint: Endpoint,
}

impl Source for FromNodes {
    type Socket = TcpStream;
    type Stream = TlsStream<TcpStream>;

    async fn accept(&self) -> std::io::Result<TcpStream> {
        self.listener.accept().await.map(|(tcp, _)| tcp)
    }

    async fn greet(
        &self,
        tcp: TcpStream,
        handler: &dyn Handler,
    ) -> Result<Option<Greeted<Self::Stream>>, WireError> {
        self.endpoint.partition.passable().await;
        let doing = match tcp.peer_addr() {
            Ok(from) => format!("accept a connection from {from}"),
            Err(_) => "accept a connection".to_owned(),
        };
        match in_time(&doing, accept_tls(tcp, &self.endpoint, &doing)).await? {
            Accepted::Member(greeted) => Ok(Some(*greeted)),
            Accepted::Newcomer(stream) => {
                join::serve(stream, handler).await?;
                Ok(None)
            }
        }
    }

    fn partition(&self) -> Partition {
        self.endpoint.partition.clone()
    }

    fn bare(&self, greeted: Greeted<Self::Stream>) -> Result<Stream, WireError> {
        Stream::of_server(greeted, self.partition())
    }
}

struct FromProcesses {
    listener: UnixListener,
    local: Local,
}

impl Source for FromProcesses {
    type Socket = UnixStream;
    type Stream = UnixStream;

    async fn accept(&self) -> std::io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    async fn greet(
        &self,
        stream: UnixStream,
        _handler: &dyn Handler,
    ) -> Result<Option<Greeted<UnixStream>>, WireError> {
        let proof = Proof { via: unix_peer(&stream)?, node: None, class: None };
        let greeting = driver::greet(stream, &self.local, Class::Control, proof);
        in_time("the hello of a local process", greeting).await.map(Some)
    }

    fn partition(&self) -> Partition {
        Partition::default()
    }

    fn bare(&self, _greeted: Greeted<UnixStream>) -> Result<Stream, WireError> {
        Err(WireError::BadFrame { what: "a process of this node asks for a bare stream".to_owned() })
    }
}

/// Who has come.
enum Accepted {
    /// Another node of the cluster.
    Member(Box<Greeted<TlsStream<TcpStream>>>),
    /// Somebody without a certificate who wants to join.
    Newcomer(Box<TlsStream<TcpStream>>),
}

async fn accept_tls(tcp: TcpStream, endpoint: &Endpoint, doing: &str) -> Result<Accepted, WireError> {
    tune(&tcp);
    let (tls, newcomer) = match handshake(tcp, endpoint).await {
        Ok(tls) => tls,
        Err((error, mut tcp)) => {
            // The alert is on its way; closing before the peer has read it would discard it.
            if let Some(tcp) = &mut tcp {
                driver::discard_in_time(tcp).await;
            }
            return Err(tls_error(doing, None, &error));
        }
    };
    if newcomer {
        return Ok(Accepted::Newcomer(Box::new(tls)));
    }
    let certificate = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let certificate = certificate
        .ok_or_else(|| WireError::ForeignCertificate { what: "the peer shows none".to_owned() })?;
    let peer = certified(certificate)?;
    let refused = endpoint.check_date(peer).err();
    let proof = Proof { via: Via::Tls, node: Some(peer), class: None };
    if let Some(error) = refused {
        // Told in the protocol, so that the peer's log says why.
        driver::refuse(tls, &error).await;
        return Err(error);
    }
    driver::greet(tls, &endpoint.local, Class::Control, proof)
        .await
        .map(|greeted| Accepted::Member(Box::new(greeted)))
}

/// The TLS handshake, with the rules for members or, when the client's first message asks for it, for a newcomer.
async fn handshake(
    tcp: TcpStream,
    endpoint: &Endpoint,
) -> Result<(TlsStream<TcpStream>, bool), (std::io::Error, Option<TcpStream>)> {
    let mut acceptor = LazyConfigAcceptor::new(Acceptor::default(), tcp);
    let start = match (&mut acceptor).await {
        Ok(start) => start,
        Err(error) => return Err((error, acceptor.take_io())),
    };
    let newcomer = start.client_hello().alpn().is_some_and(|mut names| names.any(|name| name == join::ALPN));
    let identity = endpoint.identity();
    let rules = if newcomer { identity.joining } else { identity.server };
    let accepted = start.into_stream(rules).into_fallible().await;
    accepted.map(|tls| (tls, newcomer)).map_err(|(error, tcp)| (error, Some(tcp)))
}
