//! A node's connections to all its peers.
//!
//! Each peer has two lanes (and bare streams, one by one): control, kept up all the time, and bulk, opened when it is first used. A lane connects by
//! itself and again after a loss, waiting longer after each failure up to [`BACKOFF_MS_MAX`]. A call on a lane that is
//! down fails at once: whoever calls knows better whether to wait, ask somebody else, or give up.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::connect::{connect_bare, connect_tls_with};
use crate::{Class, Connection, Endpoint, Handler, Identity, Stream, WireError};

/// Longest time for the answers that a connection still owes when another has taken its place.
const RETIRED_AFTER_MS: u64 = 30_000;
const BACKOFF_MS_MIN: u64 = 20;
const BACKOFF_MS_MAX: u64 = 500;

/// Reconnecting connections to the other members.
pub struct Mesh {
    endpoint: Endpoint,
    handler: Arc<dyn Handler>,
    /// Held for map operations only.
    peers: Mutex<BTreeMap<u16, Arc<Slot>>>,
    closing: CancellationToken,
    tasks: TaskTracker,
}

/// What is known of one peer's control lane.
#[derive(Clone, Debug)]
pub struct PeerStatus {
    /// The peer.
    pub node: u16,
    /// Where it is expected.
    pub address: String,
    /// Why there is no connection; nothing if there is one.
    pub down: Option<Arc<str>>,
    /// One side does not accept the other's certificate: no wait will change that.
    pub foreign: bool,
    /// The protocol version that is spoken with it; nothing while there is no connection.
    pub version: Option<u32>,
}

struct Slot {
    node: u16,
    address: String,
    removed: CancellationToken,
    control: watch::Sender<LaneState>,
    bulk: OnceLock<watch::Sender<LaneState>>,
}

#[derive(Clone)]
enum LaneState {
    /// No attempt has ended yet.
    Fresh,
    Down(Arc<str>),
    /// One side does not accept the other's certificate.
    Foreign(Arc<str>),
    /// The machine answered at that moment, and nobody listened there.
    Refused(Arc<str>, Instant),
    Up(Connection),
}

impl LaneState {
    fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Up(connection) if !connection.is_closed() => Some(connection),
            _ => None,
        }
    }

    fn down_reason(&self) -> Option<Arc<str>> {
        match self {
            Self::Fresh => Some(Arc::from("not connected yet")),
            Self::Down(reason) | Self::Foreign(reason) | Self::Refused(reason, _) => Some(Arc::clone(reason)),
            Self::Up(connection) if connection.is_closed() => Some(connection.link().reason()),
            Self::Up(_) => None,
        }
    }
}

impl Mesh {
    /// A mesh without peers. `handler` serves what peers ask over the connections that this side has opened.
    #[must_use]
    pub fn new(endpoint: Endpoint, handler: Arc<dyn Handler>) -> Arc<Self> {
        Arc::new(Self {
            endpoint,
            handler,
            peers: Mutex::default(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Adds a peer and starts to connect, or notes its new address. This node itself is not a peer.
    pub fn set_peer(&self, node: u16, address: &str) {
        if node == self.endpoint.local.node || self.closing.is_cancelled() {
            return;
        }
        let mut peers = self.peers();
        if peers.get(&node).is_some_and(|slot| slot.address == address) {
            return;
        }
        let slot = Arc::new(Slot {
            node,
            address: address.to_owned(),
            removed: self.closing.child_token(),
            control: watch::Sender::new(LaneState::Fresh),
            bulk: OnceLock::new(),
        });
        if let Some(old) = peers.insert(node, Arc::clone(&slot)) {
            old.removed.cancel();
        }
        self.run_lane(slot, Class::Control);
    }

    /// Closes the connections to a peer for good.
    pub fn remove_peer(&self, node: u16) {
        if let Some(slot) = self.peers().remove(&node) {
            slot.removed.cancel();
        }
    }

    /// Sends a request over the control lane and waits for the reply.
    pub async fn call(&self, node: u16, service: u16, body: Bytes) -> Result<Bytes, WireError> {
        self.connection(node)?.call(service, body).await
    }

    /// Sends a request over the bulk lane, which is opened if need be, and waits for the reply.
    pub async fn call_bulk(&self, node: u16, service: u16, body: Bytes) -> Result<Bytes, WireError> {
        self.connect(node, Class::Bulk).await?.call(service, body).await
    }

    /// Sends a message that wants no answer over the control lane.
    pub fn push(&self, node: u16, service: u16, body: Bytes) -> Result<(), WireError> {
        self.connection(node)?.push(service, body)
    }

    /// The control connection to a peer, if it is up now.
    pub fn connection(&self, node: u16) -> Result<Connection, WireError> {
        let slot = self.slot(node)?;
        let state = slot.control.borrow();
        state.connection().cloned().ok_or_else(|| not_connected(node, &state))
    }

    /// How long ago the last attempt to connect to a peer was refused by its machine, because no daemon was at its address.
    /// Nothing when the last attempt ended otherwise.
    #[must_use]
    pub fn refused_for(&self, node: u16) -> Option<Duration> {
        match &*self.slot(node).ok()?.control.borrow() {
            LaneState::Refused(_, at) => Some(at.elapsed()),
            _ => None,
        }
    }

    /// Waits until a lane to a peer is up. Opens the bulk lane if it is not yet; a bulk lane that cannot be opened is
    /// an error after the first attempt, the control lane is waited for until it is up or the peer is removed.
    pub async fn connect(&self, node: u16, class: Class) -> Result<Connection, WireError> {
        let slot = self.slot(node)?;
        let mut lane = match class {
            Class::Control => slot.control.subscribe(),
            Class::Bulk => self.bulk_lane(&slot).subscribe(),
            Class::Blocks | Class::Stream | Class::Admin => {
                let reason = Arc::from("streams have no lane: each is opened for itself");
                return Err(WireError::NotConnected { node, reason });
            }
        };
        loop {
            {
                let state = lane.borrow_and_update();
                if let Some(connection) = state.connection() {
                    return Ok(connection.clone());
                }
                let failed = !matches!(&*state, LaneState::Fresh | LaneState::Up(_));
                if class == Class::Bulk && failed {
                    return Err(not_connected(node, &state));
                }
            }
            tokio::select! {
                () = slot.removed.cancelled() => return Err(unknown(node)),
                changed = lane.changed() => changed.map_err(|_| unknown(node))?,
            }
        }
    }

    /// Opens a bare stream to a peer; it ends with its value.
    pub async fn open_stream(&self, node: u16) -> Result<Stream, WireError> {
        let address = self.slot(node)?.address.clone();
        connect_bare(&address, &self.endpoint, node).await
    }

    /// All peers and whether they are connected.
    #[must_use]
    pub fn status(&self) -> Vec<PeerStatus> {
        let slots: Vec<_> = self.peers().values().cloned().collect();
        slots
            .into_iter()
            .map(|slot| {
                let state = slot.control.borrow();
                PeerStatus {
                    node: slot.node,
                    address: slot.address.clone(),
                    down: state.down_reason(),
                    foreign: matches!(&*state, LaneState::Foreign(_)),
                    version: state.connection().map(|connection| connection.peer().version),
                }
            })
            .collect()
    }

    /// Cuts this node off from all others, or connects it again. Also stops servers that share the endpoint.
    pub fn set_partitioned(&self, cut: bool) {
        self.endpoint.partition.set(cut);
    }

    /// What this node says about itself.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Closes all connections and waits until their tasks have ended.
    pub async fn shutdown(&self) {
        self.closing.cancel();
        self.peers().clear();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn bulk_lane<'a>(&self, slot: &'a Arc<Slot>) -> &'a watch::Sender<LaneState> {
        slot.bulk.get_or_init(|| {
            self.run_lane(Arc::clone(slot), Class::Bulk);
            watch::Sender::new(LaneState::Fresh)
        })
    }

    fn run_lane(&self, slot: Arc<Slot>, class: Class) {
        let lane = Lane {
            slot,
            class,
            endpoint: self.endpoint.clone(),
            handler: Arc::clone(&self.handler),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn(lane.run());
    }

    fn slot(&self, node: u16) -> Result<Arc<Slot>, WireError> {
        self.peers().get(&node).cloned().ok_or_else(|| unknown(node))
    }

    fn peers(&self) -> MutexGuard<'_, BTreeMap<u16, Arc<Slot>>> {
        self.peers.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh").field("local", &self.endpoint.local).field("peers", &self.status()).finish()
    }
}

fn unknown(node: u16) -> WireError {
    WireError::NotConnected { node, reason: Arc::from("it is not a known peer") }
}

fn not_connected(node: u16, state: &LaneState) -> WireError {
    let reason = state.down_reason().unwrap_or_else(|| Arc::from("connection lost"));
    WireError::NotConnected { node, reason }
}

/// Keeps one connection up.
struct Lane {
    slot: Arc<Slot>,
    class: Class,
    endpoint: Endpoint,
    handler: Arc<dyn Handler>,
    tasks: TaskTracker,
}

impl Lane {
    async fn run(self) {
        let mut backoff_ms = BACKOFF_MS_MIN;
        while !self.slot.removed.is_cancelled() {
            // Before it connects: a certificate that is renewed meanwhile is news.
            let renewals = self.endpoint.renewals();
            let attempt = connect_tls_with(
                &self.slot.address,
                &self.endpoint,
                self.slot.node,
                self.class,
                Arc::clone(&self.handler),
                &self.tasks,
            );
            let attempt = tokio::select! {
                biased;
                () = self.slot.removed.cancelled() => break,
                attempt = attempt => attempt,
            };
            match attempt {
                Ok(connection) => {
                    backoff_ms = BACKOFF_MS_MIN;
                    self.hold(connection, renewals).await;
                }
                Err(error) => self.note_failure(&error),
            }
            tokio::select! {
                () = self.slot.removed.cancelled() => {}
                () = tokio::time::sleep(Duration::from_millis(backoff_ms)) => {}
            }
            backoff_ms = (backoff_ms * 2).min(BACKOFF_MS_MAX);
        }
        self.state().send_replace(LaneState::Down(Arc::from("the peer was removed")));
    }

    async fn hold(&self, mut connection: Connection, mut renewals: watch::Receiver<Identity>) {
        tracing::info!(peer = %connection.peer(), class = %self.class, "connected");
        self.state().send_replace(LaneState::Up(connection.clone()));
        let reason = loop {
            tokio::select! {
                reason = connection.closed() => break reason,
                () = self.slot.removed.cancelled() => {
                    connection.close();
                    break connection.closed().await;
                }
                Ok(()) = renewals.changed() => {
                    renewals.mark_unchanged();
                    let Some(next) = self.renewed().await else {
                        // The old one will be refused some day: the next attempts are made as after any loss.
                        connection.close();
                        break connection.closed().await;
                    };
                    self.state().send_replace(LaneState::Up(next.clone()));
                    self.retire(std::mem::replace(&mut connection, next));
                }
            }
        };
        tracing::info!(peer = %connection.peer(), class = %self.class, %reason, "disconnected");
        self.state().send_replace(LaneState::Down(reason));
    }

    /// Another connection, made while the first one serves.
    async fn renewed(&self) -> Option<Connection> {
        let attempt = connect_tls_with(
            &self.slot.address,
            &self.endpoint,
            self.slot.node,
            self.class,
            Arc::clone(&self.handler),
            &self.tasks,
        );
        match attempt.await {
            Ok(connection) => Some(connection),
            Err(error) => {
                tracing::warn!(node = self.slot.node, error = error.explain(), "not connected anew");
                None
            }
        }
    }

    /// Closes a connection that has been replaced, when the answers that it owes have had time to come.
    fn retire(&self, connection: Connection) {
        let removed = self.slot.removed.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = removed.cancelled() => {}
                _reason = connection.closed() => {}
                () = tokio::time::sleep(Duration::from_millis(RETIRED_AFTER_MS)) => {}
            }
            connection.close();
        });
    }

    /// Logs a failure when it is news, so that a node that is away fills no log.
    fn note_failure(&self, error: &WireError) {
        let reason: Arc<str> = Arc::from(error.explain());
        let (node, class) = (self.slot.node, self.class);
        let now = match error {
            WireError::ForeignCertificate { .. } => LaneState::Foreign(Arc::clone(&reason)),
            WireError::Io { source, .. } if source.kind() == std::io::ErrorKind::ConnectionRefused => {
                LaneState::Refused(Arc::clone(&reason), Instant::now())
            }
            _ => LaneState::Down(Arc::clone(&reason)),
        };
        let news = self.state().send_replace(now);
        if news.down_reason().is_none_or(|before| before != reason) {
            tracing::warn!(node, %class, error = %reason, "cannot connect");
        }
    }

    fn state(&self) -> &watch::Sender<LaneState> {
        match self.class {
            Class::Control => &self.slot.control,
            Class::Bulk | Class::Blocks | Class::Stream | Class::Admin => {
                self.slot.bulk.get_or_init(|| watch::Sender::new(LaneState::Fresh))
            }
        }
    }
}
