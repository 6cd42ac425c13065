//! A small cluster's identities, and a handler whose answers show what arrived.
#![expect(dead_code, reason = "each test file uses its part")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use uuid::Uuid;
use wire::{Connection, Endpoint, Handler, Identity, Local, Peer, Refusal, Server, authority};

/// Answers with what was sent.
pub(crate) const ECHO: u16 = 100;
/// Answers with what this side's caller answers to the same body on service ECHO.
pub(crate) const ASK_BACK: u16 = 101;
/// Never answers before `gate` has permits.
pub(crate) const HELD: u16 = 102;
/// Answers with more bytes than a frame holds.
pub(crate) const TOO_MUCH: u16 = 103;

pub(crate) struct Pki {
    pub(crate) ca: authority::Issued,
    pub(crate) cluster: Uuid,
}

impl Pki {
    pub(crate) fn new() -> Self {
        Self { ca: authority::create_ca("test").expect("authority"), cluster: Uuid::new_v4() }
    }

    pub(crate) fn endpoint(&self, node: u16) -> Endpoint {
        Endpoint::new(self.local(node), self.identity(node)).expect("endpoint")
    }

    pub(crate) fn identity(&self, node: u16) -> Identity {
        let issued = authority::issue(&self.ca, node).expect("certificate");
        Identity::from_pem(&issued.cert_pem, &issued.key_pem, &self.ca.cert_pem).expect("identity")
    }

    pub(crate) fn local(&self, node: u16) -> Local {
        Local { cluster: self.cluster, node, name: format!("n{node}") }
    }
}

pub(crate) struct Echo {
    pub(crate) gate: Arc<Semaphore>,
    pub(crate) held: Arc<AtomicUsize>,
    pub(crate) pushed: mpsc::UnboundedSender<(u16, Bytes)>,
    pub(crate) gone: mpsc::UnboundedSender<String>,
    pub(crate) connections: Mutex<Vec<Connection>>,
    pub(crate) arrived: tokio::sync::Notify,
}

pub(crate) struct Received {
    pub(crate) pushed: mpsc::UnboundedReceiver<(u16, Bytes)>,
    pub(crate) gone: mpsc::UnboundedReceiver<String>,
}

impl Echo {
    pub(crate) fn new() -> (Arc<Self>, Received) {
        let (pushed, received_pushes) = mpsc::unbounded_channel();
        let (gone, received_ends) = mpsc::unbounded_channel();
        let echo = Self {
            gate: Arc::new(Semaphore::new(0)),
            held: Arc::default(),
            pushed,
            gone,
            connections: Mutex::default(),
            arrived: tokio::sync::Notify::new(),
        };
        (Arc::new(echo), Received { pushed: received_pushes, gone: received_ends })
    }
}

impl Echo {
    /// The first connection; the client may know of it before the server does.
    pub(crate) async fn first_connection(&self) -> Connection {
        loop {
            let first = self.connections.lock().expect("lock").first().cloned();
            if let Some(first) = first {
                return first;
            }
            self.arrived.notified().await;
        }
    }
}

impl Handler for Echo {
    fn handle(
        &self,
        _from: Peer,
        conn: Connection,
        service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let (gate, held) = (Arc::clone(&self.gate), Arc::clone(&self.held));
        Box::pin(async move {
            match service {
                ECHO => Ok(body),
                ASK_BACK => conn
                    .call(ECHO, body)
                    .await
                    .map_err(|error| Refusal::new(wire::RefusalCode::Failed, error.to_string())),
                HELD => {
                    held.fetch_add(1, Ordering::SeqCst);
                    let _permit = gate.acquire().await.expect("never closed");
                    Ok(body)
                }
                TOO_MUCH => Ok(Bytes::from(vec![0; wire::FRAME_BYTES_MAX + 1])),
                other => Err(Refusal::unsupported(other)),
            }
        })
    }

    fn pushed(&self, _from: Peer, _conn: Connection, service: u16, body: Bytes) {
        self.pushed.send((service, body)).expect("test listens");
    }

    fn connected(&self, conn: &Connection) {
        self.connections.lock().expect("lock").push(conn.clone());
        self.arrived.notify_one();
    }

    fn gone(&self, conn: &Connection, reason: &str) {
        self.connections.lock().expect("lock").retain(|open| !open.same_as(conn));
        // The test may be over already.
        let _over = self.gone.send(reason.to_owned());
    }
}

pub(crate) async fn serve(endpoint: Endpoint) -> (Server, String, Arc<Echo>, Received) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let (echo, received) = Echo::new();
    let server = Server::serve_tls(listener, endpoint, Arc::clone(&echo) as Arc<dyn Handler>);
    let address = server.address().expect("bound").to_string();
    (server, address, echo, received)
}
