//! Why a request is not done: a refusal that the client is told, or a failure of the store that ends the coordinator.
//!
//! **Invariant:** a refused request has changed nothing; operations check everything before their first change.

use crate::meta::StoreError;
use crate::proto::{Failure, FailureKind};

/// See the module.
#[derive(Debug)]
pub(crate) enum OpError {
    /// Told to the client.
    Refused(Failure),
    /// Cannot be done now, but when what this transaction frees has become usable: try in the next one.
    Later,
    /// Cannot be done now, but perhaps when what clients have in their pools was asked back.
    Scarce,
    /// The store is not to be trusted any more.
    Store(StoreError),
}

impl From<StoreError> for OpError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A refusal with an error number of POSIX.
pub(crate) fn errno(errno: i32, message: impl Into<String>) -> OpError {
    OpError::Refused(Failure { kind: FailureKind::Errno.into(), errno, message: message.into() })
}

/// A refusal of another kind.
pub(crate) fn refused(kind: FailureKind, message: impl Into<String>) -> OpError {
    OpError::Refused(failure(kind, message))
}

/// What the client is told.
pub(crate) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind: kind.into(), errno: libc::EIO, message: message.into() }
}
