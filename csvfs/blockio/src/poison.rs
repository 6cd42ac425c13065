//! The memory of a failed flush.
//!
//! **Invariant:** once a flush has failed, no later write or flush is reported as done: the kernel may have dropped the
//! dirty data and a second flush would succeed without it.

use std::sync::OnceLock;

use crate::IoError;

/// Set once, by the first failed flush.
#[derive(Debug, Default)]
pub(crate) struct Poison(OnceLock<String>);

impl Poison {
    /// Remembers the failure.
    pub(crate) fn set(&self, cause: &IoError) {
        if self.0.set(cause.to_string()).is_ok() {
            tracing::error!(%cause, "flush failed: no further write is accepted until the device is opened anew");
        }
    }

    /// An error when a flush has failed before.
    pub(crate) fn check(&self) -> Result<(), IoError> {
        match self.0.get() {
            Some(cause) => Err(IoError::Poisoned { cause: cause.clone() }),
            None => Ok(()),
        }
    }
}
