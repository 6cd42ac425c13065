//! The saved state of a VM as our own versioned messages, and the checks that hostile ones meet (H7).
//!
//! The messages are generated from `proto/state.proto`; who owns a part of the machine converts it: `kvm/` the
//! processors and chips, `devices/` the devices. Nothing here or there trusts a length or an address of a saved state.

#![expect(missing_docs, reason = "generated messages; their documentation is in proto/state.proto")]

include!(concat!(env!("OUT_DIR"), "/hv.state.rs"));

/// Version of the state that this build writes; it reads this one and all before it.
pub const STATE_VERSION: u32 = 2;

/// Why a saved state was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The state is from a newer build.
    #[error("the saved state has version {found}, this build reads up to {STATE_VERSION}")]
    Version {
        /// Its version.
        found: u32,
    },
    /// A part that must be there is missing.
    #[error("the saved state lacks its {0}")]
    Missing(&'static str),
    /// A value is out of bounds.
    #[error("the saved state is damaged: {0}")]
    Invalid(&'static str),
    /// The state is of a VM with another shape.
    #[error("the saved state does not fit this VM: {what} is {found}, the VM has {expected}")]
    Mismatch {
        /// What differs.
        what: String,
        /// In the state.
        found: String,
        /// In the VM.
        expected: String,
    },
}

impl StateError {
    pub(crate) fn mismatch(what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Self::Mismatch { what: what.into(), found: found.to_string(), expected: expected.to_string() }
    }
}

/// An 8-bit register.
pub(crate) fn byte(value: u32) -> Result<u8, StateError> {
    u8::try_from(value).map_err(|_| StateError::Invalid("a byte register is above 255"))
}

/// A 16-bit register.
pub(crate) fn half(value: u32) -> Result<u16, StateError> {
    u16::try_from(value).map_err(|_| StateError::Invalid("a 16-bit register is above 65535"))
}

/// A list with a fixed number of elements.
pub(crate) fn exactly<T: Copy, const N: usize>(list: &[T], what: &'static str) -> Result<[T; N], StateError> {
    list.try_into().map_err(|_| StateError::Invalid(what))
}

/// A part that must be there.
pub(crate) fn part<'a, T>(part: Option<&'a T>, name: &'static str) -> Result<&'a T, StateError> {
    part.ok_or(StateError::Missing(name))
}

impl SavedMachine {
    /// Checks what can be checked without a VM.
    ///
    /// # Errors
    /// [`StateError::Version`] for the state of a newer build.
    pub fn check_version(&self) -> Result<(), StateError> {
        if self.version == 0 || self.version > STATE_VERSION {
            return Err(StateError::Version { found: self.version });
        }
        Ok(())
    }
}
