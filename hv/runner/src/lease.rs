//! Watches the node's lease: I/O that waited for a renewal goes on, and a lease that is over ends the VM.

use std::path::Path;
use std::thread;
use std::time::Duration;

use blockio::Permission;
use lockmgr::Epoch;
use lockmgr::lease::LeaseReader;

use crate::failure::Failure;
use crate::path::Gates;

/// A look at the page at least this often, should a wake-up be missed.
const LOOK: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 128 << 10;

pub(crate) fn open(path: &Path) -> Result<LeaseReader, Failure> {
    LeaseReader::open(path).map_err(|error| {
        Failure::new(error.to_string(), "the node daemon makes the lease page when it starts")
    })
}

/// Starts the watching thread. It lives as long as the process; `over` is called once, with the reason.
pub(crate) fn watch(
    lease: LeaseReader,
    epoch: Epoch,
    gates: Gates,
    over: impl FnOnce(String) + Send + 'static,
) -> Result<(), Failure> {
    thread::Builder::new()
        .name("lease".into())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let mut seen = lease.renewals();
            loop {
                match lease.check(epoch) {
                    Permission::Revoked(why) => {
                        gates.all().iter().for_each(|gate| gate.reconsider());
                        return over(why);
                    }
                    Permission::Granted => {
                        gates.all().iter().filter(|gate| gate.held() > 0).for_each(|gate| gate.reconsider());
                    }
                    Permission::Wait => {}
                }
                seen = lease.wait_change(seen, LOOK);
            }
        })
        .map(drop)
        .map_err(|error| Failure::new(format!("cannot start a thread: {error}"), "check the limits"))
}
