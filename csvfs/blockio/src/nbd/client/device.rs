//! An export of an NBD server as a block device.
//!
//! ```text
//!   submit -> plan (check, cut to the server's limits) -> a connection -> server
//!                                 keeper thread per connection: takes replies in, connects again after a loss
//! ```
//!
//! **When the server goes away**, all that is in flight, and all that is submitted until it is back, fails with
//! [`IoError::Lost`]: nothing waits here, because whoever owns the device knows better whether to wait, to take another
//! way, or to give up. The keepers connect again by themselves. If writes had completed that no flush had covered, the
//! server may have lost them with its cache: then every later write and flush fails as [`IoError::Poisoned`], as after a
//! failed flush (invariant D6), until the device is opened anew. Not so with [`NbdOptions::writes_outlive_server`].

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use std::time::Duration;
use threads::Kind;

use super::connection::Connection;
use super::handshake::{Export, negotiate};
use super::plan;
use crate::nbd::NbdAddress;
use crate::nbd::inbox::Inbox;
use crate::nbd::socket::Socket;
use crate::nbd::transport::NbdStream;
use crate::poison::Poison;
use crate::queue::Workers;
use crate::{BlockDevice, Completion, Geometry, IoError, IoRequest};

/// Pauses between attempts to reach a server that has gone away.
const AGAIN_AFTER_MIN: Duration = Duration::from_millis(50);
const AGAIN_AFTER_MAX: Duration = Duration::from_secs(2);
/// Connections of one device at most.
const CONNECTIONS_MAX: usize = 16;
const STACK_BYTES: usize = 256 << 10;

/// How to use an export.
#[derive(Clone, Copy, Debug)]
pub struct NbdOptions {
    /// Whether writes are allowed here, as far as the server allows them.
    pub writable: bool,
    /// Connections, if the server says that a flush on one covers the others. More than one pays off only against servers
    /// that use a processor per connection.
    pub connections: usize,
    /// Longest transfer that is asked for at once, in bytes, as far as the server allows it and in whole blocks; longer ones
    /// are cut. While one piece is on its way the server is busy with the device for the next.
    pub piece_bytes_max: u32,
    /// The server keeps nothing of its own that could be lost: what it has acknowledged is on the device behind it, and a
    /// flush over any other way to that device makes it stable. Its end is then no failed flush.
    pub writes_outlive_server: bool,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self { writable: true, connections: 1, piece_bytes_max: u32::MAX, writes_outlive_server: false }
    }
}

/// See the module.
pub struct NbdDevice {
    pub(super) core: Arc<Core>,
    keepers: Vec<JoinHandle<()>>,
}

/// What the handle and the keepers share.
pub(super) struct Core {
    /// For messages.
    what: String,
    pub(super) export: Export,
    pub(super) writable: bool,
    writes_outlive_server: bool,
    /// Longest transfer that is asked for at once, in whole blocks.
    pub(super) piece_bytes: u64,
    /// Lock rank: a leaf.
    lines: Mutex<Lines>,
    ended: Condvar,
    next: AtomicUsize,
    pub(super) ledger: Ledger,
    /// Where completions run that no reply leads to.
    outcomes: Workers<(Completion, Result<(), IoError>)>,
}

#[derive(Default)]
struct Lines {
    /// The connection of each keeper, while it is up.
    up: Vec<Option<Arc<Connection>>>,
    /// The device was dropped.
    closed: bool,
}

/// Which writes are certainly stable.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) poison: Poison,
    written: AtomicU64,
    flushed: AtomicU64,
}

impl Ledger {
    /// Writes that have completed so far: what a flush that begins now covers.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Acquire)
    }

    pub(super) fn wrote(&self) {
        self.written.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn flushed(&self, covered: u64) {
        self.flushed.fetch_max(covered, Ordering::AcqRel);
    }

    fn has_unflushed(&self) -> bool {
        self.written() > self.flushed.load(Ordering::Acquire)
    }
}

impl NbdDevice {
    /// Connects to a server and takes its export.
    ///
    /// # Errors
    /// [`IoError::NotOpened`], with the reason and a hint.
    pub fn open(address: &NbdAddress, options: NbdOptions) -> Result<Self, IoError> {
        let first = connect(address, None)?;
        let count =
            if first.0.export.can_multi_conn() { options.connections.clamp(1, CONNECTIONS_MAX) } else { 1 };
        let mut lines = vec![first];
        while lines.len() < count {
            lines.push(connect(address, Some(&lines[0].0.export))?);
        }
        Self::over_lines(lines, &address.to_string(), options, Some(address))
    }

    /// Takes an export of the server at the other end of a connected stream. When the stream ends, the device is over.
    ///
    /// # Errors
    /// [`IoError::NotOpened`], with the reason.
    pub fn over(
        stream: impl Into<NbdStream>,
        export: &str,
        what: &str,
        options: NbdOptions,
    ) -> Result<Self, IoError> {
        let line = greet(stream.into(), export, what)?;
        Self::over_lines(vec![line], what, options, None)
    }

    fn over_lines(
        lines: Vec<(Arc<Connection>, Inbox)>,
        what: &str,
        options: NbdOptions,
        address: Option<&NbdAddress>,
    ) -> Result<Self, IoError> {
        let export = lines[0].0.export;
        let up = lines.iter().map(|(connection, _)| Some(Arc::clone(connection))).collect();
        let core = Arc::new(Core {
            what: what.to_owned(),
            export,
            writable: options.writable && !export.is_read_only(),
            writes_outlive_server: options.writes_outlive_server,
            piece_bytes: piece_bytes(options.piece_bytes_max, &export),
            lines: Mutex::new(Lines { up, closed: false }),
            ended: Condvar::new(),
            next: AtomicUsize::new(0),
            ledger: Ledger::default(),
            outcomes: Workers::new("nbd:outcome", 1, |(done, outcome): (Completion, Result<(), IoError>)| {
                done(outcome);
            }),
        });
        let mut device = Self { core, keepers: Vec::new() };
        for (index, (connection, inbox)) in lines.into_iter().enumerate() {
            let keeper = Keeper { core: Arc::clone(&device.core), index, address: address.cloned() };
            let named = Builder::new().name("nbd".to_owned()).stack_size(STACK_BYTES);
            let work = move || keeper.run(connection, inbox);
            let thread = threads::spawn(Kind::Network, named, work).map_err(|error| IoError::NotOpened {
                what: what.to_owned(),
                why: format!("a thread cannot be started: {error}"),
            })?;
            device.keepers.push(thread);
        }
        Ok(device)
    }

    /// Ends the connections at once: what is in flight fails as lost.
    pub fn abort(&self) {
        let lines = self.core.lock();
        for connection in lines.up.iter().flatten() {
            connection.abort();
        }
    }
}

impl BlockDevice for NbdDevice {
    fn geometry(&self) -> Geometry {
        let export = &self.core.export;
        Geometry {
            size_bytes: export.size_bytes,
            block_bytes: export.block_bytes,
            can_discard: self.core.writable && export.can_trim(),
        }
    }

    fn submit(&self, request: IoRequest) {
        plan::start(&self.core, request);
    }
}

impl Drop for NbdDevice {
    fn drop(&mut self) {
        let up: Vec<_> = {
            let mut lines = self.core.lock();
            lines.closed = true;
            lines.up.iter().flatten().cloned().collect()
        };
        self.core.ended.notify_all();
        let here = up.iter().any(|connection| connection.is_served_here());
        up.iter().for_each(|connection| connection.close());
        // The last handle may go inside a completion, on the very thread that would be waited for.
        if !here {
            for keeper in self.keepers.drain(..) {
                drop(keeper.join());
            }
        }
    }
}

impl fmt::Debug for NbdDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdDevice").field("export", &self.core.what).finish_non_exhaustive()
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection for the next request, or why there is none.
    pub(super) fn connection(&self) -> Result<Arc<Connection>, IoError> {
        let lines = self.lock();
        let count = lines.up.len();
        let start = if count > 1 { self.next.fetch_add(1, Ordering::Relaxed) } else { 0 };
        let found = (0..count).find_map(|step| lines.up[(start + step) % count].clone());
        found.ok_or_else(|| IoError::Lost {
            what: self.what.clone(),
            why: "the server cannot be reached".to_owned(),
        })
    }

    /// Completes a request that no server is asked for, on a thread that may run its completion.
    pub(super) fn finish(&self, done: Completion, outcome: Result<(), IoError>) {
        self.outcomes.push((done, outcome));
    }

    /// A flush has failed: nothing may be acknowledged any more, unless it has not reached the device at all.
    pub(super) fn note_failed_flush(&self, error: &IoError) {
        if !(self.writes_outlive_server && is_of_the_way(error)) {
            self.ledger.poison.set(error);
        }
    }

    fn note_loss(&self) {
        if !self.writes_outlive_server && self.ledger.has_unflushed() {
            self.ledger.poison.set(&IoError::Lost {
                what: self.what.clone(),
                why: "the connection ended with writes that no flush had covered".to_owned(),
            });
        }
    }
}

fn piece_bytes(most: u32, export: &Export) -> u64 {
    let most = most.min(export.transfer_bytes_max);
    u64::from((most - most % export.block_bytes).max(export.block_bytes))
}

/// The server, or its way to the device, is gone.
fn is_of_the_way(error: &IoError) -> bool {
    matches!(error, IoError::Lost { .. } | IoError::Os { errno: libc::ESHUTDOWN, .. })
}

/// Keeps one connection up.
struct Keeper {
    core: Arc<Core>,
    index: usize,
    address: Option<NbdAddress>,
}

impl Keeper {
    fn run(self, connection: Arc<Connection>, inbox: Inbox) {
        let mut line = Some((connection, inbox));
        while let Some((connection, inbox)) = line.take() {
            self.set(Some(&connection));
            connection.run(inbox, &self.core.what);
            self.set(None);
            if !self.core.lock().closed {
                self.core.note_loss();
                tracing::warn!(export = self.core.what, "the NBD server has gone away");
            }
            line = self.connect_again();
        }
    }

    fn set(&self, connection: Option<&Arc<Connection>>) {
        let mut lines = self.core.lock();
        lines.up[self.index] = connection.cloned();
        if let (Some(connection), true) = (connection, lines.closed) {
            connection.close();
        }
    }

    /// A new connection; nothing when the device is dropped, or cannot be connected again.
    fn connect_again(&self) -> Option<(Arc<Connection>, Inbox)> {
        let address = self.address.as_ref()?;
        let mut pause = AGAIN_AFTER_MIN;
        let mut told = false;
        while !self.pause(pause) {
            match connect(address, Some(&self.core.export)) {
                Ok(line) => {
                    tracing::info!(export = self.core.what, "the NBD server is back");
                    return Some(line);
                }
                Err(error) if !told => tracing::warn!(%error, "the NBD server is not back yet"),
                Err(_) => {}
            }
            told = true;
            pause = (pause * 2).min(AGAIN_AFTER_MAX);
        }
        None
    }

    /// Waits; `true` when the device was dropped.
    fn pause(&self, pause: Duration) -> bool {
        let lines = self.core.lock();
        let waited = self.core.ended.wait_timeout_while(lines, pause, |lines| !lines.closed);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }
}

/// Connects; with `before`, only to the same export as it was then.
fn connect(address: &NbdAddress, before: Option<&Export>) -> Result<(Arc<Connection>, Inbox), IoError> {
    let not_opened = |why: String| IoError::NotOpened { what: address.to_string(), why };
    let stream =
        address.connect().map_err(|error| not_opened(format!("{error} (is the NBD server running?)")))?;
    let line = greet(stream.into(), address.export(), &address.to_string())?;
    match before {
        Some(before) if *before != line.0.export => Err(not_opened(
            "the export is another one than before: its size or its abilities have changed".to_owned(),
        )),
        _ => Ok(line),
    }
}

fn greet(stream: NbdStream, export: &str, what: &str) -> Result<(Arc<Connection>, Inbox), IoError> {
    let (socket, mut inbox) = (Socket::new(stream), Inbox::new());
    let found = negotiate(&socket, &mut inbox, export)
        .map_err(|why| IoError::NotOpened { what: what.to_owned(), why })?;
    Ok((Arc::new(Connection::new(socket, found)), inbox))
}
