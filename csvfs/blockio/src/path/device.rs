//! The device with two ways, as its users see it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use threads::Kind;

use super::failure::{Blame, blame};
use super::steering;
use crate::{BlockDevice, Completion, Geometry, IoError, IoOp, IoRequest};

/// The owner's code runs here too, TLS handshakes among it.
const STACK_BYTES: usize = 2 << 20;

/// The way that requests take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Straight to the device.
    Direct,
    /// Through a peer.
    Detour,
    /// None now; requests wait.
    Closed,
}

/// How it stands with the ways.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathStatus {
    /// The way taken now.
    pub route: Route,
    /// Why, in words.
    pub reason: String,
    /// Somebody asked for the detour.
    pub by_hand: bool,
}

/// A way through a peer.
pub trait Detour: Send + Sync {
    /// The device, as it is reached there.
    fn device(&self) -> Arc<dyn BlockDevice>;

    /// Who is in between, for people.
    fn via(&self) -> String;

    /// Ends the detour. Success means that nothing which was sent over it can reach the device any more; after an error
    /// that is not known yet, and it is asked for again. May block.
    ///
    /// # Errors
    /// Why it is not known.
    fn settle(&self) -> Result<(), IoError>;
}

/// Finds the ways. Called on the steering thread of a [`PathDevice`], one call at a time; may block.
pub trait Ways: Send + Sync {
    /// Opens the direct way anew and proves that it leads to the right device.
    ///
    /// # Errors
    /// Why it cannot be used now.
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError>;

    /// Opens a way through a peer that reaches the device now.
    ///
    /// # Errors
    /// Why there is none now.
    fn detour(&self) -> Result<Box<dyn Detour>, IoError>;

    /// Why this node may not use the device any more, for good. No way is looked for then, and what waits for one is told so.
    fn ended(&self) -> Option<String> {
        None
    }

    /// It stands otherwise with the ways. Must not block.
    fn changed(&self, status: &PathStatus);
}

/// See the module.
pub struct PathDevice {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

pub(super) struct Shared {
    pub(super) ways: Arc<dyn Ways>,
    /// Lock rank: above those of the devices, which are not called under it. Protects what follows against each other.
    state: Mutex<State>,
    pub(super) changed: Condvar,
    redirected_bytes: AtomicU64,
}

pub(super) struct State {
    /// Where requests go; nothing while they are held.
    pub(super) open: Option<Arc<dyn BlockDevice>>,
    pub(super) geometry: Geometry,
    pub(super) status: PathStatus,
    /// Requests that a way has, whichever it is: they are all on the same one.
    pub(super) in_flight: usize,
    pub(super) held: VecDeque<Held>,
    /// Why the way that is open seems to be lost.
    pub(super) trouble: Option<IoError>,
    /// The detour is wanted whatever the direct way does.
    pub(super) by_hand: bool,
    /// Orders that were given, and those that were looked at.
    pub(super) ordered: u64,
    pub(super) answered: u64,
    /// Why there will be no way any more.
    pub(super) ended: Option<String>,
    pub(super) closing: bool,
}

/// A request that waits for a way.
pub(super) struct Held {
    pub(super) op: IoOp,
    pub(super) done: Completion,
    /// Times that it was submitted.
    pub(super) tries: u32,
    /// How the last try ended.
    pub(super) failed: Option<IoError>,
}

impl PathDevice {
    /// Opens the device by its direct way or, when that is lost, by a detour.
    ///
    /// # Errors
    /// That of the direct way, when there is no other either.
    pub fn open(ways: Arc<dyn Ways>) -> Result<Self, IoError> {
        let direct = ways.direct();
        let (device, detour, reason) = match direct {
            Ok(device) => (device, None, "file data goes straight to the LUN".to_owned()),
            // Another device under this name is no lost way: nobody else's is taken for it.
            Err(wrong) if blame(&wrong) == Blame::Device => return Err(wrong),
            Err(lost) => match ways.detour() {
                Ok(detour) => (detour.device(), Some(detour), format!("the direct path is lost: {lost}")),
                Err(_) => return Err(lost),
            },
        };
        let route = if detour.is_some() { Route::Detour } else { Route::Direct };
        let status = PathStatus { route, reason, by_hand: false };
        ways.changed(&status);
        let state = State {
            geometry: device.geometry(),
            open: Some(Arc::clone(&device)),
            status,
            in_flight: 0,
            held: VecDeque::new(),
            trouble: None,
            by_hand: false,
            ordered: 0,
            answered: 0,
            ended: None,
            closing: false,
        };
        let shared = Arc::new(Shared {
            ways,
            state: Mutex::new(state),
            changed: Condvar::new(),
            redirected_bytes: AtomicU64::new(0),
        });
        let steered = Arc::clone(&shared);
        let direct = detour.is_none().then_some(device);
        let builder = Builder::new().name("io:path".to_owned()).stack_size(STACK_BYTES);
        let work = move || steering::run(&steered, direct, detour);
        let thread = threads::spawn(Kind::Ways, builder, work).map_err(|error| IoError::NotOpened {
            what: "the paths of a LUN".to_owned(),
            why: format!("a thread cannot be started: {error}"),
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// How it stands with the ways.
    #[must_use]
    pub fn status(&self) -> PathStatus {
        self.shared.lock().status.clone()
    }

    /// Bytes that have gone over detours.
    #[must_use]
    pub fn redirected_bytes(&self) -> u64 {
        self.shared.redirected_bytes.load(Ordering::Relaxed)
    }

    /// Requests that wait for a way.
    #[must_use]
    pub fn held(&self) -> usize {
        self.shared.lock().held.len()
    }

    /// Somebody else has found the direct way lost: it is looked at even if no request is submitted.
    pub fn suspect(&self, error: IoError) {
        let mut state = self.shared.lock();
        if state.status.route == Route::Direct && blame(&error) != Blame::Device {
            state.trouble.get_or_insert(error);
            drop(state);
            self.shared.changed.notify_all();
        }
    }

    /// As [`Self::redirect_by_hand`], without waiting.
    pub fn order_redirected(&self, wanted: bool) {
        drop(self.order(wanted));
    }

    fn order(&self, wanted: bool) -> MutexGuard<'_, State> {
        let mut state = self.shared.lock();
        state.by_hand = wanted;
        state.ordered += 1;
        self.shared.changed.notify_all();
        state
    }

    /// Takes the detour from now on, or the direct way if it works. Waits until the ways were looked at.
    pub fn redirect_by_hand(&self, wanted: bool) -> PathStatus {
        let state = self.order(wanted);
        let mine = state.ordered;
        let unseen = |state: &mut State| state.answered < mine && !state.closing;
        let state = self.shared.changed.wait_while(state, unseen).unwrap_or_else(PoisonError::into_inner);
        state.status.clone()
    }
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request over the way that is open, or holds it.
    fn route(self: &Arc<Self>, mut request: Held) {
        let mut state = self.lock();
        if state.closing {
            drop(state);
            return (request.done)(Err(IoError::Closed));
        }
        if let Some(reason) = state.ended.clone() {
            drop(state);
            return (request.done)(Err(IoError::NotPermitted { reason }));
        }
        let Some(device) = state.open.clone() else {
            return state.held.push_back(request);
        };
        state.in_flight += 1;
        let detour = state.status.route == Route::Detour;
        drop(state);
        request.tries += 1;
        request.failed = None;
        self.submit(&device, request, detour);
    }

    /// Submits a request that is counted as in flight.
    pub(super) fn submit(self: &Arc<Self>, device: &Arc<dyn BlockDevice>, request: Held, detour: bool) {
        let shared = Arc::clone(self);
        let Held { op, done, tries, .. } = request;
        let again = op.clone();
        let done: Completion = Box::new(move |outcome| {
            shared.returned(Held { op: again, done, tries, failed: None }, outcome, detour);
        });
        device.submit(IoRequest { op, done });
    }

    /// A way has ended a request.
    fn returned(&self, mut request: Held, outcome: Result<(), IoError>, detour: bool) {
        let error = match outcome {
            Err(error) if blame(&error) != Blame::Device => error,
            outcome => {
                if detour && outcome.is_ok() {
                    self.redirected_bytes.fetch_add(transfer_bytes(&request.op), Ordering::Relaxed);
                }
                // First the count: whoever is told may drop the device, which waits for it. And whoever is told wants its
                // memory back as the only owner.
                self.one_less(None);
                drop(request.op);
                return (request.done)(outcome);
            }
        };
        request.failed = Some(error.clone());
        self.one_less(Some((request, error)));
    }

    /// Tells the error of a request that is counted as in flight and is not tried again.
    pub(super) fn give_up(&self, request: Held, error: IoError) {
        self.one_less(None);
        (request.done)(Err(error));
    }

    fn one_less(&self, failed: Option<(Held, IoError)>) {
        let mut state = self.lock();
        state.in_flight -= 1;
        let tell = failed.is_some() || (state.in_flight == 0 && state.open.is_none());
        if let Some((request, error)) = failed {
            state.held.push_back(request);
            state.trouble.get_or_insert(error);
        }
        drop(state);
        if tell {
            self.changed.notify_all();
        }
    }
}

fn transfer_bytes(op: &IoOp) -> u64 {
    match op {
        IoOp::Read { buf, .. } | IoOp::Write { buf, .. } => buf.len() as u64,
        IoOp::Flush | IoOp::Discard { .. } | IoOp::WriteZeroes { .. } => 0,
    }
}

impl BlockDevice for PathDevice {
    fn geometry(&self) -> Geometry {
        let (open, known) = {
            let state = self.shared.lock();
            (state.open.clone(), state.geometry)
        };
        open.map_or(known, |device| device.geometry())
    }

    fn size_now(&self) -> u64 {
        let open = self.shared.lock().open.clone();
        open.map_or_else(|| self.geometry().size_bytes, |device| device.size_now())
    }

    fn submit(&self, request: IoRequest) {
        let IoRequest { op, done } = request;
        self.shared.route(Held { op, done, tries: 0, failed: None });
    }
}

impl Drop for PathDevice {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            drop(thread.join());
        }
    }
}

impl fmt::Debug for PathDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PathDevice").field("status", &self.status()).finish_non_exhaustive()
    }
}
