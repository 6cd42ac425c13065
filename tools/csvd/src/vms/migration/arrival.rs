//! The memory of a live move, by its target: streams are matched with the move that expects them and fill its RAM.
//!
//! ```text
//!   stream 0 --thread--> RAM ... end --.                                   .--> answer
//!   stream 1 --thread--> RAM ... end --+--> all have ended: hv load state --+--> answer
//! ```
//! **Invariants:** a stream is read only after TLS has proved that it comes from the move's source; the answer `ready` is
//! given only when every stream has ended well and the process has taken the state (H7).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hv::GuestRam;
use migrator::stream::{Opening, Received, STREAMS_MAX, answer, receive};
use tokio::runtime::Handle;
use tokio::sync::watch;
use wire::{Stream, StreamEnd};

use crate::core::Core;
use crate::vms::control::Session;
use crate::vms::runner::Runner;

/// What came of it, for all streams: ready, or why not.
type Outcome = Option<Result<(), String>>;

/// A VM whose memory is coming.
pub(crate) struct Arrival {
    runtime: Handle,
    /// To the process, open already: the guest stands still when it is needed.
    session: Session,
    ram: GuestRam,
    /// Rank: a leaf; nothing is waited for under it.
    gathered: Mutex<Gathered>,
    outcome: watch::Sender<Outcome>,
}

#[derive(Default)]
struct Gathered {
    /// Announced by the first stream that came.
    streams: u32,
    begun: u32,
    ended: u32,
    state: Option<Vec<u8>>,
    ends: Vec<StreamEnd>,
}

impl std::fmt::Debug for Arrival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrival").finish_non_exhaustive()
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.give_up("the move is off");
    }
}

impl Arrival {
    /// For a process that waits for its content.
    pub(super) async fn expect(core: &Core, runner: &Arc<Runner>) -> Result<Arc<Self>, String> {
        let session = runner.control().session().await.map_err(|error| error.message)?;
        let ram = super::copy::ram_of(runner.pid, &session).await?;
        Ok(Arc::new(Self {
            runtime: core.runtime.clone(),
            session,
            ram,
            gathered: Mutex::default(),
            outcome: watch::Sender::new(None),
        }))
    }

    /// The VM belongs to this node: its guest runs when this returns.
    pub(super) async fn activate(&self) -> Result<(), api::Error> {
        self.session.activate().await
    }

    /// Ends all streams; the source learns why where it still listens.
    pub(super) fn give_up(&self, why: &str) {
        self.decide(Err(why.to_owned()));
        self.lock().ends.clear();
    }

    /// The first word counts.
    fn decide(&self, outcome: Result<(), String>) {
        self.outcome.send_if_modified(|now| {
            let first = now.is_none();
            if first {
                *now = Some(outcome);
            }
            first
        });
    }

    /// Takes one stream to its end.
    fn take(&self, mut stream: Stream, opening: &Opening) -> Result<(), String> {
        self.begin(&stream, opening)?;
        match receive(&mut stream, &self.ram, |stream| answer(stream, Ok(()))) {
            Ok(received) => self.one_has_ended(received),
            Err(error) => self.decide(Err(error.to_string())),
        }
        let mut outcome = self.outcome.subscribe();
        let decided = self.runtime.block_on(outcome.wait_for(Option::is_some));
        let decided =
            decided.ok().and_then(|outcome| outcome.clone()).unwrap_or(Err("it was given up".into()));
        let told = answer(&mut stream, decided.as_ref().copied().map_err(String::as_str));
        decided.and_then(|()| told.map_err(|error| error.to_string()))
    }

    fn begin(&self, stream: &Stream, opening: &Opening) -> Result<(), String> {
        let mut gathered = self.lock();
        if gathered.streams == 0 {
            gathered.streams = opening.streams.min(STREAMS_MAX);
        }
        let bit = 1 << opening.stream;
        if gathered.streams != opening.streams || gathered.begun & bit != 0 || self.outcome.borrow().is_some()
        {
            return Err("the stream does not fit the others of its move".to_owned());
        }
        gathered.begun |= bit;
        let end = stream.ender().map_err(|error| error.to_string())?;
        gathered.ends.push(end);
        Ok(())
    }

    fn one_has_ended(&self, received: Received) {
        let state = {
            let mut gathered = self.lock();
            gathered.ended += 1;
            gathered.state = gathered.state.take().or(received.state);
            if gathered.ended < gathered.streams {
                return;
            }
            gathered.state.take()
        };
        tracing::debug!("all memory streams of a move have ended");
        let loaded = match state {
            Some(state) => self.runtime.block_on(self.session.load(state)),
            None => Err(api::Error::failed("no stream has brought the VM's state")),
        };
        self.decide(loaded.map_err(|error| error.message));
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.gathered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another node has opened a stream.
pub(crate) fn streamed(core: &Arc<Core>, mut stream: Stream) {
    let core = Arc::clone(core);
    let peer = stream.peer().clone();
    let taken = std::thread::Builder::new().name("move-in".to_owned()).spawn(move || {
        // The guest stands still for the last of it.
        threads::prompt();
        let outcome = Opening::read(&mut stream).map_err(|error| error.to_string()).and_then(|opening| {
            let expected = (stream.peer().node == opening.of.from.0)
                .then(|| core.vms.moves.arrival(&opening.of))
                .flatten()
                .ok_or("no such move is expected here")?;
            expected.take(stream, &opening)
        });
        if let Err(error) = outcome {
            tracing::warn!(%peer, error, "a memory stream came to nothing");
        }
    });
    if let Err(error) = taken {
        tracing::warn!(%error, "no thread for a memory stream");
    }
}
