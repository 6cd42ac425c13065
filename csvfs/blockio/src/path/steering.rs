//! The thread that changes the way.
//!
//! ```text
//!   look: trouble, an order, or time to try the direct way again
//!     close the way -> wait for what is in flight -> settle the detour -> choose -> open, and send what was held
//! ```
//! **Invariant:** between `close` and `open` nothing is in flight and nothing is submitted.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::device::{Detour, Held, PathStatus, Route, Shared, State};
use super::failure::{TRIES_MAX, is_worth_another_try};
use crate::{BlockDevice, IoError};

/// How often a lost direct way is tried while the detour is taken.
const PROBE_EVERY: Duration = Duration::from_millis(500);
/// Pause between attempts while there is no way at all, or a detour is not settled.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Most such pauses before a way that was lost again and again is taken again.
const RESTS_MAX: u32 = 20;

/// Steers until the device is dropped.
pub(super) fn run(
    shared: &Arc<Shared>,
    direct: Option<Arc<dyn BlockDevice>>,
    detour: Option<Box<dyn Detour>>,
) {
    let mut steering = Steering { shared: Arc::clone(shared), direct, detour, order: 0 };
    while let Some(cause) = steering.wait() {
        steering.act(cause);
        steering.answer();
    }
    steering.end();
}

/// Why something is to be done.
enum Cause {
    Trouble(IoError),
    /// The detour is wanted.
    ByHand,
    /// The direct way may be back, or is wanted again.
    Probe,
    /// There was an order, and it is carried out already.
    Nothing,
}

struct Steering {
    shared: Arc<Shared>,
    /// The direct way that was last in use, while it is.
    direct: Option<Arc<dyn BlockDevice>>,
    detour: Option<Box<dyn Detour>>,
    /// The newest order that has been seen.
    order: u64,
}

impl Steering {
    /// Waits for the next cause; nothing when the device is dropped.
    fn wait(&mut self) -> Option<Cause> {
        let on_detour = self.detour.is_some();
        let idle =
            |state: &mut State| state.trouble.is_none() && !state.closing && state.ordered == state.answered;
        let shared = Arc::clone(&self.shared);
        let state = if on_detour {
            shared
                .changed
                .wait_timeout_while(shared.lock(), PROBE_EVERY, idle)
                .unwrap_or_else(PoisonError::into_inner)
                .0
        } else {
            shared.changed.wait_while(shared.lock(), idle).unwrap_or_else(PoisonError::into_inner)
        };
        if state.closing {
            return None;
        }
        self.order = state.ordered;
        if state.ended.is_some() {
            return Some(Cause::Nothing);
        }
        Some(match &state.trouble {
            Some(error) => Cause::Trouble(error.clone()),
            None if state.by_hand && !on_detour => Cause::ByHand,
            None if !state.by_hand && on_detour => Cause::Probe,
            None => Cause::Nothing,
        })
    }

    /// The orders that were seen are carried out, or cannot be.
    fn answer(&self) {
        self.shared.lock().answered = self.order;
        self.shared.changed.notify_all();
    }

    fn act(&mut self, cause: Cause) {
        match cause {
            Cause::Trouble(error) => self.leave_lost(&error),
            Cause::ByHand => self.leave_by_hand(),
            Cause::Probe => self.try_direct(),
            Cause::Nothing => {
                let mut state = self.shared.lock();
                state.status.by_hand = state.by_hand;
            }
        }
    }

    /// Looks whether the direct way works. Requests go on over the detour meanwhile.
    fn try_direct(&mut self) {
        match self.shared.ways.direct() {
            Ok(direct) => {
                self.close("the direct path works again");
                if self.settle() {
                    self.open_direct(direct, true);
                }
            }
            Err(lost) => {
                let mut state = self.shared.lock();
                if std::mem::take(&mut state.status.by_hand) {
                    state.status.reason = format!("{} ({lost})", state.status.reason);
                }
            }
        }
    }

    /// The way in use seems to be lost.
    fn leave_lost(&mut self, error: &IoError) {
        self.close(&error.to_string());
        if !self.settle() {
            return;
        }
        let mut was_direct = self.direct.take();
        let on_detour = was_direct.is_none();
        let mut proven = true;
        if !self.rest() {
            return;
        }
        loop {
            if self.has_ended() {
                return;
            }
            let by_hand = self.shared.lock().by_hand;
            let direct = if by_hand && on_detour { Err(IoError::Closed) } else { self.shared.ways.direct() };
            let why = match direct {
                // The way works: the error was the device's own, and what it remembers of it stays remembered (D6). But not once the
                // way was seen to be lost: what has failed, has failed with it.
                Ok(direct) => return self.open_direct(was_direct.unwrap_or(direct), proven),
                Err(why) => why,
            };
            was_direct = None;
            proven = on_detour;
            match self.shared.ways.detour() {
                Ok(detour) => {
                    let reason = if by_hand {
                        "by hand".to_owned()
                    } else {
                        format!("the direct path is lost: {error}")
                    };
                    return self.open_detour(detour, &reason, by_hand);
                }
                Err(none) if by_hand => {
                    // Nobody can be gone through: an order does not stop the node's I/O.
                    self.shared.lock().by_hand = false;
                    tracing::warn!(%none, "no way through a peer: back to the direct path");
                }
                Err(none) => {
                    self.tell(Route::Closed, format!("{why}; and there is no way through a peer: {none}"));
                }
            }
            if !self.pause() {
                return;
            }
        }
    }

    /// The direct way works, but is not wanted.
    fn leave_by_hand(&mut self) {
        match self.shared.ways.detour() {
            Ok(detour) => {
                self.close("by hand");
                self.direct = None;
                self.open_detour(detour, "by hand", true);
            }
            Err(none) => {
                let mut state = self.shared.lock();
                state.by_hand = false;
                state.status.by_hand = false;
                state.status.reason = format!("not redirected: {none}");
            }
        }
    }

    /// Holds what comes, and waits until nothing is in flight.
    fn close(&self, reason: &str) {
        let mut state = self.shared.lock();
        state.open = None;
        drop(state);
        self.tell(Route::Closed, reason.to_owned());
        let busy = |state: &mut State| state.in_flight > 0;
        let state = self.shared.changed.wait_while(self.shared.lock(), busy);
        state.unwrap_or_else(PoisonError::into_inner).trouble = None;
    }

    /// Whether the right to use the device has ended. Then all that waits is told so, and all that still comes will be: whoever
    /// waits for it could not end otherwise. What a detour may still write is settled by those who go on without this node.
    fn has_ended(&self) -> bool {
        let Some(reason) = self.shared.ways.ended() else { return false };
        let held: Vec<Held> = {
            let mut state = self.shared.lock();
            (state.trouble, state.ended) = (None, Some(reason.clone()));
            state.held.drain(..).collect()
        };
        self.tell(Route::Closed, reason.clone());
        for request in held {
            (request.done)(Err(IoError::NotPermitted { reason: reason.clone() }));
        }
        true
    }

    /// Waits until nothing of the detour can land any more. `false`: the device is being dropped, or no way will be taken.
    fn settle(&mut self) -> bool {
        let Some(detour) = self.detour.take() else { return true };
        while let Err(error) = detour.settle() {
            if self.has_ended() {
                return false;
            }
            self.tell(
                Route::Closed,
                format!("what was sent through {} may still be written: {error}", detour.via()),
            );
            if !self.pause() {
                return false;
            }
        }
        true
    }

    /// A way that works whenever it is tried, and is lost whenever a certain request is sent over it, would be changed without
    /// end: the longer a request has had no luck, the longer is waited before it is sent again. `false`: the device is being
    /// dropped.
    fn rest(&self) -> bool {
        let tries = self.shared.lock().held.iter().map(|request| request.tries).max().unwrap_or(0);
        (0..tries.saturating_sub(TRIES_MAX).min(RESTS_MAX)).all(|_| self.has_ended() || self.pause())
    }

    /// Waits a moment; `false` when the device is being dropped.
    fn pause(&self) -> bool {
        let waited =
            self.shared.changed.wait_timeout_while(self.shared.lock(), AGAIN_AFTER, |state| !state.closing);
        !waited.unwrap_or_else(PoisonError::into_inner).0.closing
    }

    fn open_direct(&mut self, device: Arc<dyn BlockDevice>, proven: bool) {
        self.direct = Some(Arc::clone(&device));
        self.open(&device, Route::Direct, "file data goes straight to the LUN".to_owned(), false, proven);
    }

    fn open_detour(&mut self, detour: Box<dyn Detour>, reason: &str, by_hand: bool) {
        let (device, via) = (detour.device(), detour.via());
        self.detour = Some(detour);
        self.open(&device, Route::Detour, format!("through {via}: {reason}"), by_hand, false);
    }

    /// Opens a way and sends what was held. Over a way that was just proven to work, and has not been seen lost since, what cannot be
    /// blamed on the way any more is told instead.
    fn open(&self, device: &Arc<dyn BlockDevice>, route: Route, reason: String, by_hand: bool, proven: bool) {
        let status = PathStatus { route, reason, by_hand };
        let held: Vec<Held> = {
            let mut state = self.shared.lock();
            state.open = Some(Arc::clone(device));
            state.geometry = device.geometry();
            state.status = status.clone();
            state.in_flight += state.held.len();
            state.held.drain(..).collect()
        };
        self.shared.ways.changed(&status);
        for request in held {
            let told = request.failed.as_ref().filter(|error| {
                let again = is_worth_another_try(&request.op, error, request.tries);
                !again && (proven || request.tries > 1)
            });
            match told.cloned() {
                Some(error) => self.shared.give_up(request, error),
                None => self.shared.submit(
                    device,
                    Held { tries: request.tries + 1, failed: None, ..request },
                    route == Route::Detour,
                ),
            }
        }
    }

    fn tell(&self, route: Route, reason: String) {
        let status = {
            let mut state = self.shared.lock();
            let status = PathStatus { route, reason, by_hand: state.status.by_hand };
            if state.status == status {
                return;
            }
            state.status = status.clone();
            status
        };
        self.shared.ways.changed(&status);
    }

    /// The device is dropped: what waits is told so, what is in flight is waited for.
    fn end(self) {
        let held: Vec<Held> = self.shared.lock().held.drain(..).collect();
        for request in held {
            (request.done)(Err(request.failed.unwrap_or(IoError::Closed)));
        }
        let busy = |state: &mut State| state.in_flight > 0;
        let state = self.shared.changed.wait_while(self.shared.lock(), busy);
        drop(state.unwrap_or_else(PoisonError::into_inner).open.take());
        if let Some(detour) = self.detour {
            // Nothing is in flight; the peer may forget us.
            drop(detour.settle());
        }
    }
}
