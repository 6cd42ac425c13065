//! The server: any block device for any NBD client.
//!
//! ```text
//!   listener (Unix socket, 0600) -> a thread per client:  handshake -> session -> device
//! ```
//! It listens on Unix sockets only: nothing leaves the machine in clear text. Whoever wants to serve others hands
//! [`serve`] a stream that is protected in its own way.

mod buffers;
mod export;
mod handshake;
mod reply;
mod request;
mod session;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

pub use export::{Allocation, NbdExport, NbdExports};

use super::inbox::Inbox;
use super::socket::Socket;
use super::transport::NbdStream;
use crate::IoError;

/// Clients of one server at once; further ones wait in the listener.
const CLIENTS_MAX: usize = 16;
const STACK_BYTES: usize = 256 << 10;

/// Serves one client on a connected stream, until it leaves or is cut off (by the end of the stream). Returns when
/// nothing that it has asked for can reach a device any more.
///
/// # Errors
/// A sentence that says why the client was cut off.
pub fn serve(stream: impl Into<NbdStream>, exports: &dyn NbdExports) -> Result<(), String> {
    let (socket, mut inbox) = (Socket::new(stream), Inbox::new());
    match handshake::negotiate(&socket, &mut inbox, exports)? {
        Some(chosen) => session::run(socket, inbox, chosen),
        None => Ok(()),
    }
}

/// A server on a Unix socket. Dropping it cuts its clients off, waits for what they have begun, and removes the socket.
pub struct NbdServer {
    path: PathBuf,
    listener: Arc<UnixListener>,
    clients: Arc<Clients>,
    accepting: Option<JoinHandle<()>>,
}

/// The streams of the clients, by number, to cut them off.
#[derive(Default)]
struct Clients {
    /// Lock rank: a leaf.
    table: Mutex<Table>,
    left: std::sync::Condvar,
}

#[derive(Default)]
struct Table {
    streams: Vec<(u64, OwnedFd)>,
    next: u64,
    closed: bool,
}

impl NbdServer {
    /// Listens at `path`, which only this user may connect to.
    ///
    /// # Errors
    /// [`IoError::NotOpened`], also when the path exists.
    pub fn listen(path: &Path, exports: Arc<dyn NbdExports>) -> Result<Self, IoError> {
        let not_opened = |error: io::Error| IoError::NotOpened {
            what: path.display().to_string(),
            why: match error.kind() {
                io::ErrorKind::AddrInUse => "the path exists: remove it, or choose another one".to_owned(),
                io::ErrorKind::InvalidInput => "the path is too long for a socket".to_owned(),
                _ => error.to_string(),
            },
        };
        let listener = Arc::new(bind(path).map_err(not_opened)?);
        let clients = Arc::new(Clients::default());
        let accepting = {
            let (listener, clients) = (Arc::clone(&listener), Arc::clone(&clients));
            let thread = Builder::new().name("nbd:accept".to_owned()).stack_size(STACK_BYTES);
            thread.spawn(move || accept_all(&listener, &clients, &exports)).map_err(not_opened)?
        };
        Ok(Self { path: path.to_owned(), listener, clients, accepting: Some(accepting) })
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        // Wakes the thread that waits for clients.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        self.clients.cut_off();
        if let Some(thread) = self.accepting.take() {
            drop(thread.join());
        }
        self.clients.wait_for(0);
        // Somebody may have removed it before.
        drop(std::fs::remove_file(&self.path));
    }
}

impl fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdServer").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A listening socket that nobody else could connect to even for a moment: its mode is set before it has a name.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(UnixListener::from(socket))
}

fn accept_all(listener: &UnixListener, clients: &Arc<Clients>, exports: &Arc<dyn NbdExports>) {
    while clients.wait_for(CLIENTS_MAX - 1) {
        let stream = match listener.accept() {
            Ok((stream, _)) => OwnedFd::from(stream),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) =>
            {
                continue;
            }
            Err(error) => {
                if !clients.is_closed() {
                    tracing::error!(%error, "no further NBD clients are taken");
                }
                return;
            }
        };
        let Some(number) = clients.enter(&stream) else { return };
        let (own, exports) = (Arc::clone(clients), Arc::clone(exports));
        let client = move || {
            if let Err(why) = serve(stream, &*exports) {
                tracing::warn!(why, "an NBD client was cut off");
            }
            own.leave(number);
        };
        let started = Builder::new().name("nbd:client".to_owned()).stack_size(STACK_BYTES).spawn(client);
        if let Err(error) = started {
            tracing::error!(%error, "an NBD client is not served: no thread can be started");
            clients.leave(number);
        }
    }
}

impl Clients {
    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.lock().closed
    }

    fn enter(&self, stream: &OwnedFd) -> Option<u64> {
        let stream = stream.as_fd().try_clone_to_owned().ok()?;
        let mut table = self.lock();
        if table.closed {
            return None;
        }
        table.next += 1;
        let number = table.next;
        table.streams.push((number, stream));
        Some(number)
    }

    fn leave(&self, number: u64) {
        self.lock().streams.retain(|(other, _)| *other != number);
        self.left.notify_all();
    }

    /// Waits until at most `most` clients are there; `false` when no further ones are wanted.
    fn wait_for(&self, most: usize) -> bool {
        let crowded = |table: &mut Table| table.streams.len() > most && !(table.closed && most > 0);
        let table = self.left.wait_while(self.lock(), crowded).unwrap_or_else(PoisonError::into_inner);
        !table.closed
    }

    fn cut_off(&self) {
        let mut table = self.lock();
        table.closed = true;
        for (_, stream) in &table.streams {
            let _ = rustix::net::shutdown(stream, rustix::net::Shutdown::Both);
        }
        drop(table);
        self.left.notify_all();
    }
}
