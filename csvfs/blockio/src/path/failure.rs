//! What a failed request says about its way.
//!
//! | error | of the way? | done again over a way that works |
//! |---|---|---|
//! | a severed link, a device that is gone, a lost connection | yes | always; after some tries with a pause that grows |
//! | an I/O error of a read or write | perhaps | a few times |
//! | an I/O error of a flush, or a device stopped by one | perhaps | only when the way proves to be lost |
//! | a reservation conflict, no space, a revoked right, ... | no | never |

use crate::{IoError, IoOp};

/// Times that a request is tried before an error that may be the device's own is believed.
pub(super) const TRIES_MAX: u32 = 4;

/// What to think of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blame {
    /// The way is lost.
    Way,
    /// The way or the device.
    Either,
    /// The device, or the request.
    Device,
}

pub(super) fn blame(error: &IoError) -> Blame {
    match error {
        IoError::Lost { .. } | IoError::NotOpened { .. } | IoError::Closed => Blame::Way,
        IoError::Os { errno, .. } => match *errno {
            libc::ENODEV
            | libc::ENXIO
            | libc::ENOLINK
            | libc::ENOTCONN
            | libc::ETIMEDOUT
            | libc::ESHUTDOWN
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH => Blame::Way,
            libc::EIO | libc::EREMOTEIO => Blame::Either,
            _ => Blame::Device,
        },
        IoError::Poisoned { .. } => Blame::Either,
        IoError::OutOfRange { .. }
        | IoError::NotPermitted { .. }
        | IoError::NoSpace { .. }
        | IoError::Corrupt(_) => Blame::Device,
    }
}

/// Whether a request that has failed on a way which proves to work is done again. Otherwise its error is told.
pub(super) fn is_worth_another_try(op: &IoOp, error: &IoError, tries: u32) -> bool {
    match (blame(error), error) {
        (Blame::Way, _) => true,
        // After a failed flush nothing may be acknowledged: the device has said that it lost something.
        (Blame::Either, IoError::Poisoned { .. }) => false,
        (Blame::Either, _) => tries < TRIES_MAX && !matches!(op, IoOp::Flush),
        (Blame::Device, _) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoBuf;

    fn os(errno: i32) -> IoError {
        IoError::Os { op: "test", offset: 0, errno }
    }

    // Invariants A2 and D6.
    #[test]
    fn a_fence_and_a_failed_flush_are_never_taken_for_a_lost_way() {
        let write = IoOp::Write { offset: 0, buf: IoBuf::zeroed(512), fua: false };
        assert_eq!(blame(&os(libc::EBADE)), Blame::Device, "a reservation conflict means: you are dead");
        assert_eq!(blame(&IoError::NotPermitted { reason: String::new() }), Blame::Device);
        assert!(!is_worth_another_try(&IoOp::Flush, &os(libc::EIO), 1));
        assert!(!is_worth_another_try(&write, &IoError::Poisoned { cause: String::new() }, 1));
        assert!(is_worth_another_try(&IoOp::Flush, &os(libc::ENOLINK), 9), "it did not reach the device");
        assert!(is_worth_another_try(&write, &os(libc::EIO), 1));
        assert!(!is_worth_another_try(&write, &os(libc::EIO), TRIES_MAX), "a bad sector is told in the end");
    }
}
