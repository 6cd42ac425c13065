//! Persistent reservations: the LUN itself decides whose writes it takes.
//!
//! ```text
//!   register (each node, its own key) -> reserve (once) -> preempt and abort (a node's key) -> its writes are refused
//! ```
//! All nodes use one type, write exclusive for all registrants: whoever has a key on the LUN may write, nobody else. A
//! refused write ends with `EBADE` ([`is_conflict`]).
//!
//! [`KernelReservations`] speaks to a SCSI device, [`SharedLun`] is a LUN of several nodes in memory with the same rules.

mod conflict;
mod kernel;
mod shared;

pub use conflict::{ConflictDevice, Tripwire};
pub(crate) use kernel::KernelReservations;
pub use shared::{Nexus, SharedLun};

use crate::IoError;

/// Times that a command is given again which met a unit attention: several may be waiting, each is told once.
const ATTENTIONS_MAX: u32 = 8;

/// Why a reservation command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// The command is not for a node without this key: the node has been cut off, or another one has.
    #[error("{op}: reservation conflict: the LUN does not know this node's key")]
    Conflict {
        /// `register`, `preempt`, ...
        op: &'static str,
    },
    /// The device has something to tell first, and told it: the command was not carried out.
    #[error("{op}: unit attention")]
    Attention {
        /// `register`, `preempt`, ...
        op: &'static str,
    },
    /// The device has no such command.
    #[error("{op}: {why}")]
    Unsupported {
        /// `register`, `preempt`, ...
        op: &'static str,
        /// What is missing.
        why: String,
    },
    /// The device could not be asked, or did not say how it ended.
    #[error("{op}: {why}")]
    Failed {
        /// `register`, `preempt`, ...
        op: &'static str,
        /// What happened.
        why: String,
    },
}

/// The keys that a device knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys {
    /// Grows with each change of the keys; starts anew when the target has lost them.
    pub generation: u32,
    /// A key is listed once for each path that is registered with it.
    pub keys: Vec<u64>,
}

/// What a reservation allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationType {
    /// Writes of registered nodes only: the one that this project uses.
    WriteExclusiveAllRegistrants,
    /// Any other, by its number in the SCSI standard.
    Other(u8),
}

/// The persistent reservations of one device, through one path. Calls block; none of them is repeated by itself.
pub trait Reservations: Send + Sync {
    /// Registers `key` for this node, whatever key it had before. The target shall remember it over a power cut.
    ///
    /// # Errors
    /// See [`ReserveError`].
    fn register(&self, key: u64) -> Result<(), ReserveError>;

    /// Takes this node's `key` off the device.
    ///
    /// # Errors
    /// [`ReserveError::Conflict`] when it is not this node's key.
    fn unregister(&self, key: u64) -> Result<(), ReserveError>;

    /// Makes the reservation, write exclusive for all registrants. Doing it again does no harm.
    ///
    /// # Errors
    /// [`ReserveError::Conflict`] when this node has not registered `key`, or there is a reservation of another type.
    fn reserve(&self, key: u64) -> Result<(), ReserveError>;

    /// Takes `victim` off the device and ends what its nodes have under way there. `own` is this node's key.
    ///
    /// # Errors
    /// [`ReserveError::Conflict`] when `own` is not registered, or `victim` is not any more.
    fn preempt_and_abort(&self, own: u64, victim: u64) -> Result<(), ReserveError>;

    /// Takes all keys and the reservation off the device.
    ///
    /// # Errors
    /// [`ReserveError::Conflict`] when `own` is not registered.
    fn clear(&self, own: u64) -> Result<(), ReserveError>;

    /// The keys that are registered now.
    ///
    /// # Errors
    /// See [`ReserveError`].
    fn read_keys(&self) -> Result<Keys, ReserveError>;

    /// The reservation that is held now.
    ///
    /// # Errors
    /// See [`ReserveError`].
    fn read_reservation(&self) -> Result<Option<ReservationType>, ReserveError>;
}

/// Gives a command again as long as it meets unit attentions (A6): each is told once and then gone.
///
/// # Errors
/// That of the command, and the last unit attention when there is no end of them.
pub fn despite_attentions<T>(
    mut command: impl FnMut() -> Result<T, ReserveError>,
) -> Result<T, ReserveError> {
    for _ in 1..ATTENTIONS_MAX {
        match command() {
            Err(ReserveError::Attention { .. }) => {}
            outcome => return outcome,
        }
    }
    command()
}

/// Whether a device has refused a request because this node has no key on it: the node is cut off (A2).
#[must_use]
pub fn is_conflict(error: &IoError) -> bool {
    matches!(error, IoError::Os { errno: libc::EBADE, .. })
}
