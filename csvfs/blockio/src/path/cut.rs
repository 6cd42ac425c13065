//! A path that can be cut, for rehearsals: every request fails as on a severed link.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::queue::Workers;
use crate::{BlockDevice, Completion, Geometry, IoError, IoOp, IoRequest, Reservations, WriteRight};

/// Cuts and mends all devices that were given it.
#[derive(Clone, Debug, Default)]
pub struct Switch(Arc<AtomicBool>);

impl Switch {
    /// Cuts the path, or mends it.
    pub fn set(&self, cut: bool) {
        self.0.store(cut, Ordering::Release);
    }

    /// Whether the path is cut.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A device behind a path that can be cut. Requests that are on their way when it is cut still complete.
pub struct CutDevice<D> {
    inner: D,
    switch: Switch,
    refusals: Workers<(Completion, IoError)>,
}

impl<D: BlockDevice> CutDevice<D> {
    /// Puts `switch` before `inner`.
    #[must_use]
    pub fn new(inner: D, switch: Switch) -> Self {
        let refusals = Workers::new("io:cut", 1, |(done, error): (Completion, IoError)| done(Err(error)));
        Self { inner, switch, refusals }
    }
}

impl<D: BlockDevice> BlockDevice for CutDevice<D> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        if self.switch.is_cut() { self.refuse(request) } else { self.inner.submit(request) }
    }

    fn submit_under(&self, request: IoRequest, right: &Arc<dyn WriteRight>) {
        if self.switch.is_cut() { self.refuse(request) } else { self.inner.submit_under(request, right) }
    }

    fn rights_changed(&self) {
        self.inner.rights_changed();
    }

    fn size_now(&self) -> u64 {
        self.inner.size_now()
    }

    /// None behind a cut path.
    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        if self.switch.is_cut() { None } else { self.inner.reservations() }
    }
}

impl<D> CutDevice<D> {
    fn refuse(&self, request: IoRequest) {
        let (op, offset) = match request.op {
            IoOp::Read { offset, .. } => ("read", offset),
            IoOp::Write { offset, .. } => ("write", offset),
            IoOp::Flush => ("flush", 0),
            IoOp::Discard { offset, .. } => ("discard", offset),
            IoOp::WriteZeroes { offset, .. } => ("write-zeroes", offset),
        };
        self.refusals.push((request.done, IoError::Os { op, offset, errno: libc::ENOLINK }));
    }
}

impl<D> std::fmt::Debug for CutDevice<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CutDevice").field("cut", &self.switch.is_cut()).finish_non_exhaustive()
    }
}
