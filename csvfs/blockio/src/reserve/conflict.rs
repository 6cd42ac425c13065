//! Notices that the LUN refuses this node's writes, and lets nothing more through (A2).
//!
//! ```text
//!   submit -> gate: right and tripwire -> ConflictDevice -> LUN
//!                          ^                    |
//!                          '-- tripped by ------' EBADE
//! ```
//! **Invariant:** once tripped, a wire stays so: a node that was cut off does not come back by itself.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::is_conflict;
use crate::{BlockDevice, Geometry, IoOp, IoRequest, Permission, Reservations, WriteRight};

/// What is done when a wire trips, once. It must not block.
type OnTrip = Box<dyn Fn(&str) + Send + Sync>;

/// Ends the right to use a LUN, for good.
pub struct Tripwire {
    reason: OnceLock<String>,
    tell: OnTrip,
}

impl Tripwire {
    /// A wire that is whole. `tell` hears of its end.
    #[must_use]
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { reason: OnceLock::new(), tell: Box::new(tell) })
    }

    /// Ends the right. Only the first reason counts.
    pub fn trip(&self, reason: &str) {
        let mut first = false;
        let reason = self.reason.get_or_init(|| {
            first = true;
            reason.to_owned()
        });
        if first {
            (self.tell)(reason);
        }
    }

    /// Why the right has ended, when it has.
    #[must_use]
    pub fn tripped(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// `right`, as long as the wire is whole.
    #[must_use]
    pub fn guard(self: &Arc<Self>, right: Arc<dyn WriteRight>) -> Arc<dyn WriteRight> {
        Arc::new(Guarded { wire: Arc::clone(self), right })
    }
}

impl std::fmt::Debug for Tripwire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tripwire").field("tripped", &self.tripped()).finish_non_exhaustive()
    }
}

struct Guarded {
    wire: Arc<Tripwire>,
    right: Arc<dyn WriteRight>,
}

impl WriteRight for Guarded {
    fn check(&self) -> Permission {
        match self.wire.tripped() {
            Some(reason) => Permission::Revoked(reason.to_owned()),
            None => self.right.check(),
        }
    }

    fn lasts(&self) -> Duration {
        if self.wire.tripped().is_some() { Duration::ZERO } else { self.right.lasts() }
    }
}

/// A device that trips a wire when a request meets a reservation conflict.
pub struct ConflictDevice<D> {
    inner: D,
    wire: Arc<Tripwire>,
}

impl<D: BlockDevice> ConflictDevice<D> {
    /// Watches `inner`.
    #[must_use]
    pub fn new(inner: D, wire: Arc<Tripwire>) -> Self {
        Self { inner, wire }
    }

    fn watched(&self, request: IoRequest) -> IoRequest {
        // Reads are not refused by the type of reservation that is used.
        if matches!(request.op, IoOp::Read { .. }) {
            return request;
        }
        let IoRequest { op, done } = request;
        let wire = Arc::clone(&self.wire);
        let done = Box::new(move |outcome: Result<(), crate::IoError>| {
            if let Err(error) = &outcome
                && is_conflict(error)
            {
                wire.trip(&format!("the LUN refuses this node's writes (reservation conflict): {error}"));
            }
            done(outcome);
        });
        IoRequest { op, done }
    }
}

impl<D: BlockDevice> BlockDevice for ConflictDevice<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        self.inner.submit(self.watched(request));
    }

    fn submit_under(&self, request: IoRequest, right: &Arc<dyn WriteRight>) {
        self.inner.submit_under(self.watched(request), right);
    }

    fn rights_changed(&self) {
        self.inner.rights_changed();
    }

    fn size_now(&self) -> u64 {
        self.inner.size_now()
    }

    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        self.inner.reservations()
    }
}

impl<D> std::fmt::Debug for ConflictDevice<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConflictDevice").field("wire", &self.wire).finish_non_exhaustive()
    }
}
