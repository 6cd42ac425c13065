//! What the process may do beyond what any program of its user may: nothing.
//!
//! Called while there is one thread: every later one inherits it. The tap is open by then, which is the only thing that
//! needs a capability. **Invariant:** a guest that breaks out of its VM finds a process without capabilities, which no
//! program that it starts can get back.

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities, set_no_new_privs};

use crate::failure::Failure;

/// Gives up all capabilities, for good.
pub(crate) fn drop_all() -> Result<(), Failure> {
    let failed = |error: rustix::io::Errno| {
        Failure::new(
            format!("this process cannot give up its rights: {error}"),
            "is it run in a sandbox that forbids that?",
        )
    };
    set_no_new_privs(true).map_err(failed)?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(failed)
}
