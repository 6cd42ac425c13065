//! Two nodes with certificates of one authority, for tests of what passes between them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::runtime::Runtime;
use uuid::Uuid;
use wire::authority::{self, Issued};
use wire::{Connection, Endpoint, Handler, Identity, Local, Peer, Refusal, Server, Stream};

struct Taking(Sender<Stream>);

impl Handler for Taking {
    fn handle(
        &self,
        _from: Peer,
        _conn: Connection,
        service: u16,
        _body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        Box::pin(async move { Err(Refusal::unsupported(service)) })
    }

    fn blocks(&self, stream: Stream) {
        self.0.send(stream).expect("the test listens");
    }
}

/// Node 2, which listens, and the authority of its cluster.
pub(super) struct Nodes {
    runtime: Runtime,
    pub(super) ca: Issued,
    address: String,
    pub(super) arrived: Receiver<Stream>,
    _server: Server,
}

pub(super) fn endpoint(ca: &Issued, node: u16) -> Endpoint {
    endpoint_of(ca, Uuid::from_u128(7), node)
}

/// A node that takes itself for one of `cluster`.
pub(super) fn endpoint_of(ca: &Issued, cluster: Uuid, node: u16) -> Endpoint {
    let issued = authority::issue(ca, node).expect("a certificate");
    let identity = Identity::from_pem(&issued.cert_pem, &issued.key_pem, &ca.cert_pem);
    let local = Local { cluster, node, name: format!("n{node}") };
    Endpoint::new(local, identity.expect("an identity")).expect("they fit")
}

impl Nodes {
    pub(super) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        let ca = authority::create_ca("test").expect("an authority");
        let (tell, arrived) = channel();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a port");
        let address = listener.local_addr().expect("it is bound").to_string();
        let server = {
            let _inside = runtime.enter();
            Server::serve_tls(listener, endpoint(&ca, 2), Arc::new(Taking(tell)))
        };
        Self { runtime, ca, address, arrived, _server: server }
    }

    pub(super) fn connect(&self, from: &Endpoint, to: u16) -> Result<Stream, wire::WireError> {
        self.runtime.block_on(wire::connect_blocks(&self.address, from, to))
    }
}
