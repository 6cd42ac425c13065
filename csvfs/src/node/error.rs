//! Why a call of the node library failed, and the error number that a POSIX caller gets for it.

use blockio::IoError;

use crate::proto as pb;

/// Why a call failed. Cloneable, because one failed flush or commit may end many calls.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FsError {
    /// The coordinator refused: the name does not exist, there is no space, ...
    #[error("{message}")]
    Refused {
        /// Linux's error number.
        errno: i32,
        /// In the coordinator's words.
        message: String,
    },
    /// The call itself does not make sense; nothing was sent.
    #[error("{what}")]
    Invalid {
        /// Linux's error number.
        errno: i32,
        /// What is wrong with it.
        what: String,
    },
    /// The LUN failed a request.
    #[error("I/O on the LUN failed: {0}")]
    Io(#[from] IoError),
    /// An earlier failure left the state of the LUN unknown; all writes and flushes fail until the volume is attached anew.
    #[error(
        "this node stopped writing to the volume: {cause}; attach the volume again after the cause is gone"
    )]
    Stopped {
        /// The earlier failure.
        cause: String,
    },
    /// The volume was detached while the call waited.
    #[error("the volume was detached from this client")]
    Detached,
    /// The first attach got no answer.
    #[error("no coordinator of the volume answers ({why}); see `csvctl volume show` for who should")]
    Unreachable {
        /// The last failure.
        why: String,
    },
    /// A message that makes no sense: a bug, or a coordinator of another version.
    #[error("the coordinator sent a reply that does not fit the request: {0}")]
    Protocol(String),
}

impl FsError {
    /// The error number that a POSIX caller gets.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Refused { errno, .. } | Self::Invalid { errno, .. } => *errno,
            Self::Io(error) => error.errno(),
            Self::Stopped { .. } | Self::Unreachable { .. } | Self::Protocol(_) => libc::EIO,
            Self::Detached => libc::ENOTCONN,
        }
    }

    /// The same failure as a block device reports it; `op` and `offset` say which request failed.
    #[must_use]
    pub fn into_io(self, op: &'static str, offset: u64) -> IoError {
        match self {
            Self::Io(error) => error,
            Self::Stopped { cause } => IoError::Poisoned { cause },
            Self::Detached => IoError::Closed,
            other if other.errno() == libc::ENOSPC => IoError::NoSpace { what: other.to_string() },
            other => IoError::Os { op, offset, errno: other.errno() },
        }
    }

    pub(super) fn invalid(errno: i32, what: impl Into<String>) -> Self {
        Self::Invalid { errno, what: what.into() }
    }

    pub(super) fn from_failure(failure: pb::Failure) -> Self {
        let errno = match failure.kind() {
            pb::FailureKind::Unsupported => libc::EOPNOTSUPP,
            pb::FailureKind::Stopped => return Self::Stopped { cause: failure.message },
            // Errno 0 in a failure would look like success.
            _ if failure.errno <= 0 => libc::EIO,
            _ => failure.errno,
        };
        Self::Refused { errno, message: failure.message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_never_looks_like_success() {
        let failure = pb::Failure { kind: pb::FailureKind::Errno.into(), errno: 0, message: String::new() };
        assert_eq!(FsError::from_failure(failure).errno(), libc::EIO);
    }

    #[test]
    fn a_full_volume_is_no_space_for_a_block_device_too() {
        let full = FsError::Refused { errno: libc::ENOSPC, message: "volume data is full".into() };
        assert!(matches!(full.into_io("write", 0), IoError::NoSpace { .. }));
    }
}
