//! The detour of this node's VM processes: over the daemon's own way, whichever that is.
//!
//! A process that has lost its path connects to `blocks.sock`. Its requests join those of the mounts, so the daemon alone
//! deals with peers.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::Error;
use blockio::{NbdExport, NbdExports, serve_nbd};
use lockmgr::VolumeId;
use uuid::Uuid;

use super::places::Places;
use crate::core::Core;

/// Streams of all processes at most, each with a thread: one for each client of a volume that may have a log.
const STREAMS_MAX: usize = 256;
/// Streams of one process at most: one for each of its volumes, and one that takes its place after a loss.
const STREAMS_OF_A_PROCESS_MAX: usize = 16;
/// Pause after a refused accept (no descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    let places = Places::new(STREAMS_MAX, STREAMS_OF_A_PROCESS_MAX);
    let core = Arc::clone(core);
    let serve: Arc<Serve> = Arc::new(move |stream, pid| {
        if let Err(error) = serve_one(&core, stream, pid) {
            tracing::info!(error, "a process's way through the daemon has ended");
        }
    });
    let accepting = move || accept_all(&listener, &places, &serve);
    let thread = std::thread::Builder::new().name("nbd:accept".to_owned()).stack_size(128 << 10);
    thread.spawn(accepting).map(drop).map_err(|error| Error::failed(format!("start of a thread: {error}")))
}

/// Serves one stream of a process until it ends.
type Serve = dyn Fn(UnixStream, u32) + Send + Sync;

fn accept_all(listener: &UnixListener, places: &Arc<Places>, serve: &Arc<Serve>) {
    // One stream at a time is told that there is no place; others are closed meanwhile.
    let refusals = Places::new(1, 1);
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // The listener lives as long as the daemon; what fails is a want of descriptors.
            Err(error) => {
                tracing::warn!(%error, "a process cannot be accepted");
                std::thread::park_timeout(ACCEPT_PAUSE);
                continue;
            }
        };
        let pid = crate::vms::user::pid_of(&stream);
        let serving: Box<dyn FnOnce() + Send> = match places.take(pid) {
            Ok(place) => {
                let serve = Arc::clone(serve);
                Box::new(move || {
                    serve(stream, pid);
                    drop(place);
                })
            }
            Err(why) => {
                let Ok(refusal) = refusals.take(0) else { continue };
                tracing::warn!(pid, why, "a process is not served");
                Box::new(move || {
                    // It hears the reason in its handshake, which has a limited time.
                    drop(serve_nbd(stream, &Refusing(why)));
                    drop(refusal);
                })
            }
        };
        let thread = std::thread::Builder::new().name("nbd:process".to_owned()).stack_size(1 << 20);
        if let Err(error) = thread.spawn(serving) {
            tracing::error!(%error, "a process is not served: no thread can be started");
        }
    }
}

/// Offers nothing, and says why.
struct Refusing(String);

impl NbdExports for Refusing {
    fn find(&self, _name: &str) -> Result<NbdExport, String> {
        Err(self.0.clone())
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }
}

fn serve_one(core: &Arc<Core>, stream: UnixStream, pid: u32) -> Result<(), String> {
    let handle = stream.try_clone().map_err(|error| error.to_string())?;
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use blockio::{IoError, MemoryDevice, NbdDevice, NbdOptions};

    use super::*;

    fn connect(path: &std::path::Path) -> Result<NbdDevice, IoError> {
        let stream = UnixStream::connect(path).expect("the daemon listens");
        NbdDevice::over(stream, "", "the LUN", NbdOptions::default())
    }

    #[test]
    fn a_process_with_too_many_ways_through_the_daemon_is_told_so_until_it_closes_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("blocks.sock");
        let listener = UnixListener::bind(&path).expect("bound");
        let places = Places::new(5, 2);
        let export = NbdExport::new(Arc::new(MemoryDevice::new(1 << 20)), false);
        let (tell, told) = channel();
        let serve: Arc<Serve> = Arc::new(move |stream, _| {
            drop(serve_nbd(stream, &export));
            tell.send(()).expect("the test listens");
        });
        let own = Arc::clone(&places);
        // It ends with the test's process.
        drop(std::thread::spawn(move || accept_all(&listener, &own, &serve)));
        let (first, second) = (connect(&path).expect("a place"), connect(&path).expect("a place"));
        let why = connect(&path).expect_err("no third place").to_string();
        assert!(why.contains("2 ways through the daemon"), "{why}");
        drop(first);
        told.recv().expect("its end is noticed");
        // The place is free a moment after that.
        while places.take(std::process::id()).is_err() {
            std::thread::yield_now();
        }
        drop(connect(&path).expect("a place"));
        drop(second);
    }

    #[test]
    fn many_processes_have_a_limit_together() {
        let places = Places::new(3, 2);
        let mut taken: Vec<_> = [1, 1, 2].map(|pid| places.take(pid).expect("a place")).into();
        assert!(places.take(3).expect_err("full").contains("3 ways"), "those of all count");
        taken.pop();
        assert!(places.take(1).expect_err("its share is used").contains("this process has 2"));
        drop(places.take(3).expect("there is room for another"));
    }
}
