//! The right to do I/O, asked when a request goes to the device, and again by the device right before it starts it.
//!
//! ```text
//!   submit -> WriteRight::check -- Granted ------> device: queue -> WriteRight::check -> system call
//!                               -- Wait ---------> held until reconsider()
//!                               -- Revoked ------> NotPermitted
//! ```
//!
//! Reads are asked for too: a node whose lease is over may read blocks that already belong to another file.
//!
//! The second check is what counts: between the two a thread may have been stopped for longer than the lease.
//!
//! **Invariant:** nothing reaches the device unless a check that was made after its submission granted it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::queue::Workers;
use crate::{BlockDevice, Completion, Geometry, IoError, IoRequest, Reservations};

/// Whether I/O may start now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Yes.
    Granted,
    /// Not now, perhaps later: the lease waits for its renewal.
    Wait,
    /// Never again, for this reason.
    Revoked(String),
}

/// Who knows whether I/O may start: the owner of a lease.
pub trait WriteRight: Send + Sync {
    /// The answer of this moment. Called for each request, so it must be quick and must not block.
    fn check(&self) -> Permission;

    /// How long it stays granted, if nothing revokes it. Zero when it is not granted, or nobody can say.
    fn lasts(&self) -> Duration {
        Duration::ZERO
    }
}

/// A device behind a gate.
pub struct GatedDevice<D> {
    inner: D,
    right: Arc<dyn WriteRight>,
    /// Requests that wait for the right. Lock rank: above the right's own lock, below nothing. Checks that end in
    /// `Wait` are made under it, so that a renewal in between cannot miss the request.
    held: Mutex<Vec<IoRequest>>,
    refusals: Workers<(Completion, IoError)>,
}

impl<D: BlockDevice> GatedDevice<D> {
    /// Puts `inner` behind `right`.
    #[must_use]
    pub fn new(inner: D, right: Arc<dyn WriteRight>) -> Self {
        let refusals = Workers::new("io:refused", 1, |(done, error): (Completion, IoError)| done(Err(error)));
        Self { inner, right, held: Mutex::new(Vec::new()), refusals }
    }

    /// Asks again for every held request, and has the device do so: it may hold what this gate let through, which
    /// [`Self::held`] does not show. The owner of the lease calls this whenever the right may have changed.
    pub fn reconsider(&self) {
        let held = std::mem::take(&mut *self.held.lock().unwrap_or_else(PoisonError::into_inner));
        for request in held {
            self.submit(request);
        }
        self.inner.rights_changed();
    }

    /// Number of requests that wait for the right in the gate. The device may hold more.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The device behind the gate, for those who need no right.
    #[must_use]
    pub fn inner(&self) -> &D {
        &self.inner
    }

    /// Holds the request unless the right came back in the meantime.
    fn hold(&self, request: IoRequest) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match self.right.check() {
            Permission::Wait => held.push(request),
            Permission::Granted => {
                drop(held);
                self.inner.submit_under(request, &self.right);
            }
            Permission::Revoked(reason) => {
                drop(held);
                self.refuse(request, reason);
            }
        }
    }

    fn refuse(&self, request: IoRequest, reason: String) {
        self.refusals.push((request.done, IoError::NotPermitted { reason }));
    }
}

impl<D: BlockDevice> BlockDevice for GatedDevice<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn size_now(&self) -> u64 {
        self.inner.size_now()
    }

    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        self.inner.reservations()
    }

    fn submit(&self, request: IoRequest) {
        match self.right.check() {
            Permission::Granted => self.inner.submit_under(request, &self.right),
            Permission::Wait => self.hold(request),
            Permission::Revoked(reason) => self.refuse(request, reason),
        }
    }
}

impl<D> Drop for GatedDevice<D> {
    fn drop(&mut self) {
        let held = std::mem::take(self.held.get_mut().unwrap_or_else(PoisonError::into_inner));
        for request in held {
            self.refusals.push((request.done, IoError::Closed));
        }
    }
}

impl<D> fmt::Debug for GatedDevice<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatedDevice").field("now", &self.right.check()).finish_non_exhaustive()
    }
}
