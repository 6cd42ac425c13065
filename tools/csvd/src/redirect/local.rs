//! The detour of this node's VM processes: over the daemon's own way, whichever that is.
//!
//! A process that has lost its path connects to `blocks.sock`. Its requests join those of the mounts, so the daemon alone
//! deals with peers.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use api::Error;
use blockio::{NbdExport, NbdExports, serve_nbd};
use lockmgr::VolumeId;
use uuid::Uuid;

use crate::core::Core;

/// A session of a process: which volume, which client.
pub(crate) type ProcessKey = (VolumeId, u64);

/// Listens on the socket for blocks, for the processes of VMs. It lives as long as the daemon.
pub(crate) fn serve(core: &Arc<Core>) -> Result<(), Error> {
    let path = hv_runner::config::blocks_socket(&core.config.node_socket());
    let listener = crate::node_socket::listen(&path, 0o600)?;
    crate::vms::user::open_to_processes(core, &path)?;
    let listener =
        listener.into_std().and_then(|listener| listener.set_nonblocking(false).map(|()| listener));
    let listener =
        listener.map_err(|error| Error::failed(format!("listen on {}: {error}", path.display())))?;
    let core = Arc::clone(core);
    let accepting = move || accept_all(&core, &listener);
    let thread = std::thread::Builder::new().name("nbd:accept".to_owned()).stack_size(128 << 10);
    thread.spawn(accepting).map(drop).map_err(|error| Error::failed(format!("start of a thread: {error}")))
}

fn accept_all(core: &Arc<Core>, listener: &UnixListener) {
    while let Ok((stream, _)) = listener.accept() {
        let core = Arc::clone(core);
        let serving = move || {
            if let Err(error) = serve_one(&core, stream) {
                tracing::info!(error, "a process's way through the daemon has ended");
            }
        };
        let thread = std::thread::Builder::new().name("nbd:process".to_owned()).stack_size(1 << 20);
        if let Err(error) = thread.spawn(serving) {
            tracing::error!(%error, "a process is not served: no thread can be started");
        }
    }
}

fn serve_one(core: &Arc<Core>, stream: UnixStream) -> Result<(), String> {
    let handle = stream.try_clone().map_err(|error| error.to_string())?;
    let pid = crate::vms::user::pid_of(&stream);
    let served = Served { core: Arc::clone(core), stream: Arc::new(handle), pid, session: Mutex::new(None) };
    let outcome = serve_nbd(stream, &served);
    if let Some((key, number)) = served.session.lock().unwrap_or_else(PoisonError::into_inner).take() {
        core.process_sessions.leave(&key, number);
    }
    outcome
}

struct Served {
    core: Arc<Core>,
    stream: Arc<UnixStream>,
    /// Who is at the other end.
    pid: u32,
    /// Rank: above the table of sessions.
    session: Mutex<Option<(ProcessKey, u64)>>,
}

impl NbdExports for Served {
    fn find(&self, name: &str) -> Result<NbdExport, String> {
        let key = parse(name).ok_or("this is no volume and client")?;
        if !self.core.vms.may_use(key.1, self.pid, key.0) {
            return Err("this process was not started with that volume".to_owned());
        }
        let volume = self.core.volumes.get(key.0).ok_or("there is no such volume here")?;
        let path = volume.path().ok_or("the volume is not open here")?;
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        match &*session {
            Some((begun, _)) if *begun == key => {}
            Some(_) => return Err("a stream is for one volume".to_owned()),
            None => {
                // What the process has begun before over another stream is done first.
                let stream = Arc::clone(&self.stream);
                let number =
                    self.core.process_sessions.enter(&key, move || drop(stream.shutdown(Shutdown::Both)));
                *session = Some((key, number));
            }
        }
        Ok(NbdExport::new(path, false))
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

fn parse(name: &str) -> Option<ProcessKey> {
    let (volume, serial) = name.split_once('/')?;
    Some((VolumeId(Uuid::try_parse(volume).ok()?), serial.parse().ok()?))
}
