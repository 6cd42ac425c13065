//! What a failed start or a refused request says: what was done to what and why it failed, and what to do about it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An error with a hint, also the one JSON line on stderr when the process cannot start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What failed and why.
    pub error: String,
    /// What to do.
    pub hint: String,
}

impl Failure {
    /// A failure with its hint.
    #[must_use]
    pub fn new(error: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { error: error.into(), hint: hint.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.error, self.hint)
    }
}

impl std::error::Error for Failure {}
