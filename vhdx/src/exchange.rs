//! Changing an image behind the back of those who use the disk.
//!
//! ```text
//!   submit --> | running | --> core                       exchange: hold --> drain --> close cleanly
//!              |  held   | --> waits here    <--------------+            change the closed file
//!              +---------+                                               load it again --> resume what waits
//! ```
//! Whatever is too large for a log entry beside running requests is done to a closed file, whose log is empty and whose every
//! byte is in place; the guest sees a pause of a few flushes and, perhaps, another geometry.
//!
//! **Invariant:** a request is admitted by the core that was running when it came, or waits for the next one; none is lost,
//! none reaches a core that is being closed. Locks: `one_at_a_time` (rank 0), then `slot` (rank 0), then those of the core.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use blockio::{Geometry, ImageFile, IoError, IoRequest};

use crate::core::{Core, Ticket, lock};
use crate::error::VhdxError;
use crate::flush::Closed;
use crate::open::Options;
use crate::running::Running;

/// What stands behind a disk.
pub(crate) struct Exchange {
    /// How the image is opened. Held during an exchange, and by those who wait for its end.
    one_at_a_time: Mutex<Options>,
    slot: RwLock<Slot>,
}

/// Another image that takes the place of the one that was closed.
pub(crate) struct Next<'a> {
    pub(crate) file: Arc<dyn ImageFile>,
    pub(crate) options: Options,
    /// The last thing before it serves: where it fails, the old image goes on.
    pub(crate) commit: Commit<'a>,
}

/// Makes an exchange known elsewhere, or prevents it.
pub(crate) type Commit<'a> = Box<dyn FnOnce() -> Result<(), VhdxError> + 'a>;

impl Next<'_> {
    /// An image that nobody else has to know of.
    pub(crate) fn new(file: Arc<dyn ImageFile>, options: Options) -> Self {
        Self { file, options, commit: Box::new(|| Ok(())) }
    }
}

enum Slot {
    Running(Running),
    /// Requests wait for the image to be open again.
    Held(Geometry, Mutex<Vec<IoRequest>>),
}

/// Who takes a request.
pub(crate) enum Admitted {
    /// Go ahead.
    Start(Ticket, IoRequest),
    /// The request waits for the end of an exchange.
    Waits,
    /// The disk was closed or stopped.
    Refused(IoError, IoRequest),
}

impl Exchange {
    pub(crate) fn new(running: Running, options: Options) -> Self {
        Self { one_at_a_time: Mutex::new(options), slot: RwLock::new(Slot::Running(running)) }
    }

    fn with<T>(&self, look: impl FnOnce(&Slot) -> T) -> T {
        look(&self.slot.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The geometry that the guest sees now.
    pub(crate) fn geometry(&self) -> Geometry {
        self.with(|slot| match slot {
            Slot::Running(running) => running.core.geometry(),
            Slot::Held(geometry, _) => *geometry,
        })
    }

    /// Admits a request. Never waits.
    pub(crate) fn admit(&self, request: IoRequest) -> Admitted {
        // Admitted under the lock, so that an exchange either holds the request or waits for it.
        self.with(|slot| match slot {
            Slot::Running(running) => match running.core.admit() {
                Ok(ticket) => Admitted::Start(ticket, request),
                Err(error) => Admitted::Refused(error, request),
            },
            Slot::Held(_, waiting) => {
                lock(waiting).push(request);
                Admitted::Waits
            }
        })
    }

    /// Admits a caller that may wait.
    pub(crate) fn enter(&self) -> Result<Ticket, IoError> {
        loop {
            let admitted = self.with(|slot| match slot {
                Slot::Running(running) => Some(running.core.admit()),
                Slot::Held(..) => None,
            });
            if let Some(outcome) = admitted {
                return outcome;
            }
            drop(lock(&self.one_at_a_time));
        }
    }

    /// The core as it is when no exchange runs.
    pub(crate) fn core(&self) -> Arc<Core> {
        let _no_exchange = lock(&self.one_at_a_time);
        self.with(|slot| match slot {
            Slot::Running(running) => Arc::clone(&running.core),
            Slot::Held(..) => unreachable!("an exchange ends with a running core"),
        })
    }

    /// Closes the image for good.
    pub(crate) fn close(&self) -> Result<Closed, VhdxError> {
        let _no_exchange = lock(&self.one_at_a_time);
        self.with(|slot| match slot {
            Slot::Running(running) => running.close(),
            Slot::Held(..) => unreachable!("an exchange ends with a running core"),
        })
    }

    /// How the image is opened, as it is when no exchange runs.
    pub(crate) fn options(&self) -> Options {
        lock(&self.one_at_a_time).clone()
    }

    /// Closes the image cleanly, lets `change` have the file, and opens it again, or another that `change` names. Requests
    /// that come meanwhile wait.
    ///
    /// When `change` fails, or what it names cannot be opened, the image is served again as it then is. When that cannot be
    /// opened again, the disk stops.
    pub(crate) fn exchange<'a, T>(
        &self,
        change: impl FnOnce(&Arc<dyn ImageFile>, &Options) -> Result<(T, Option<Next<'a>>), VhdxError>,
    ) -> Result<T, VhdxError> {
        let mut options = lock(&self.one_at_a_time);
        let old = self.hold()?;
        let core = Arc::clone(&old.core);
        let outcome = old.close().and_then(|_| {
            let changed = change(&core.file, &options).and_then(|(value, next)| match next {
                Some(next) => {
                    let running = Running::open(&next.file, &next.options)?;
                    // Nothing can fail from here on.
                    (next.commit)()?;
                    *options = next.options;
                    Ok((value, Some(running)))
                }
                None => Ok((value, None)),
            });
            match changed {
                Ok((value, Some(running))) => Ok((Ok(value), running)),
                changed => {
                    let same = Running::open(&core.file, &options).map_err(|error| core.poison(&error))?;
                    Ok((changed.map(|(value, _)| value), same))
                }
            }
        });
        match outcome {
            Ok((outcome, next)) => {
                drop(old);
                self.resume(next);
                outcome
            }
            // The old core refuses everything now, with the reason.
            Err(error) => {
                core.poison(&error);
                self.resume(old);
                Err(error)
            }
        }
    }

    fn hold(&self) -> Result<Running, VhdxError> {
        let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
        let geometry = match &*slot {
            Slot::Running(running) => {
                // Not held for nothing: a closed or stopped disk stays what it is.
                running.core.check_usable().map_err(|source| VhdxError::Io {
                    doing: "changing an image that is in use".to_owned(),
                    source,
                })?;
                running.core.geometry()
            }
            Slot::Held(..) => unreachable!("exchanges run one at a time"),
        };
        match std::mem::replace(&mut *slot, Slot::Held(geometry, Mutex::default())) {
            Slot::Running(running) => Ok(running),
            Slot::Held(..) => unreachable!("it was just looked at"),
        }
    }

    fn resume(&self, next: Running) {
        let core = Arc::clone(&next.core);
        let held = {
            let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *slot, Slot::Running(next))
        };
        let Slot::Held(_, waiting) = held else { unreachable!("this exchange held it") };
        for request in waiting.into_inner().unwrap_or_else(PoisonError::into_inner) {
            match core.admit() {
                Ok(ticket) => crate::disk::start(ticket, request),
                Err(error) => (request.done)(Err(error)),
            }
        }
    }
}
