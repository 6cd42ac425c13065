//! What went wrong, in a form that a person can act on and a script can test.
//!
//! | kind | exit code | meaning |
//! |---|---|---|
//! | `failed` | 1 | it was tried and did not work |
//! | `usage` | 2 | the request makes no sense |
//! | `not_found` | 3 | what it names does not exist |
//! | `conflict` | 4 | what it names is in the wrong state |
//! | `unreachable` | 5 | no daemon, or no quorum |
//! | `degraded` | 6 | `health` only: it works, but not all of it |
//!
//! **Invariant:** an error survives the socket unchanged.

use std::fmt;

use prost::Message;
use tonic::{Code, Status};

use crate::pb::ErrorDetail;

/// The kinds of errors; each has an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was tried and did not work.
    Failed,
    /// The request makes no sense.
    Usage,
    /// What it names does not exist.
    NotFound,
    /// What it names is in the wrong state, or in use.
    Conflict,
    /// No daemon answers, or the cluster has no quorum.
    Unreachable,
    /// The cluster works, but not all of it.
    Degraded,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Failed, Self::Usage, Self::NotFound, Self::Conflict, Self::Unreachable, Self::Degraded];

    /// The word for it in `--json`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Usage => "usage",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::Unreachable => "unreachable",
            Self::Degraded => "degraded",
        }
    }

    /// The exit code of a command that ends with it.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unreachable => 5,
            Self::Degraded => 6,
        }
    }

    fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }

    fn code(self) -> Code {
        match self {
            Self::Failed | Self::Degraded => Code::Internal,
            Self::Usage => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::Conflict => Code::FailedPrecondition,
            Self::Unreachable => Code::Unavailable,
        }
    }

    fn of_code(code: Code) -> Self {
        match code {
            Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => Self::Usage,
            Code::NotFound => Self::NotFound,
            Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => Self::Conflict,
            Code::Unavailable | Code::DeadlineExceeded => Self::Unreachable,
            _ => Self::Failed,
        }
    }
}

/// A failed request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What kind of failure it is.
    pub kind: Kind,
    /// What was done to what, and why it failed.
    pub message: String,
    /// What to do next. Empty when there is nothing to say.
    pub hint: String,
}

impl Error {
    /// An error of `kind` without a hint.
    pub fn new(kind: Kind, message: impl fmt::Display) -> Self {
        Self { kind, message: message.to_string(), hint: String::new() }
    }

    /// It was tried and did not work.
    pub fn failed(message: impl fmt::Display) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// The request makes no sense.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// What it names does not exist.
    pub fn not_found(message: impl fmt::Display) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// What it names is in the wrong state.
    pub fn conflict(message: impl fmt::Display) -> Self {
        Self::new(Kind::Conflict, message)
    }

    /// No daemon, or no quorum.
    pub fn unreachable(message: impl fmt::Display) -> Self {
        Self::new(Kind::Unreachable, message)
    }

    /// The same error with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = hint.to_string();
        self
    }

    /// The same error, as a part of what was being done: `what: why`.
    #[must_use]
    pub fn during(mut self, what: impl fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// For a frame between daemons.
    #[must_use]
    pub fn to_detail(&self) -> ErrorDetail {
        ErrorDetail {
            kind: self.kind.as_str().to_owned(),
            message: self.message.clone(),
            hint: self.hint.clone(),
        }
    }

    /// From a frame between daemons. A kind of a later version counts as `failed`.
    #[must_use]
    pub fn of_detail(detail: ErrorDetail) -> Self {
        let kind = Kind::parse(&detail.kind).unwrap_or(Kind::Failed);
        Self { kind, message: detail.message, hint: detail.hint }
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let detail = error.to_detail().encode_to_vec();
        Self::with_details(error.kind.code(), error.message, detail.into())
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        match ErrorDetail::decode(status.details()) {
            Ok(detail) if !detail.message.is_empty() => Self::of_detail(detail),
            _ => of_transport(&status),
        }
    }
}

/// A status that no daemon of ours made: the connection broke, or the daemon is of another version.
fn of_transport(status: &Status) -> Error {
    match status.code() {
        Code::Unimplemented => Error::usage("the daemon does not know this request")
            .hint("csvctl is newer than csvd; restart the daemon with the same version"),
        Code::Unknown | Code::Unavailable | Code::Cancelled => {
            Error::unreachable(format!("the connection to the daemon broke: {}", status.message()))
                .hint("look at the daemon's log; is it still running?")
        }
        code => Error::new(Kind::of_code(code), status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_socket() {
        for kind in Kind::ALL {
            let error = Error::new(kind, "volume create vol1: the LUN holds ext4").hint("use --force");
            assert_eq!(Error::from(Status::from(error.clone())), error);
        }
    }

    #[test]
    fn an_unknown_kind_counts_as_failed() {
        let detail = ErrorDetail { kind: "melted".into(), message: "m".into(), hint: String::new() };
        assert_eq!(Error::of_detail(detail).kind, Kind::Failed);
    }

    #[test]
    fn a_foreign_status_still_has_an_exit_code() {
        assert_eq!(Error::from(Status::unavailable("gone")).kind.exit_code(), 5);
        assert_eq!(Error::from(Status::not_found("x")).kind.exit_code(), 3);
    }
}
