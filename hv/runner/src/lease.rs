//! Watches the node's lease: I/O that waited for a renewal goes on, and a lease that is over ends the VM.

use std::path::Path;
use std::thread::Builder;
use std::time::Duration;

use blockio::Permission;
use lockmgr::Epoch;
use lockmgr::lease::LeaseReader;
use threads::Kind;

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
    let work = move || {
        let mut seen = lease.renewals();
        loop {
            match lease.check(epoch) {
                Permission::Revoked(why) => {
                    gates.all().iter().for_each(|gate| gate.reconsider());
                    return over(why);
                }
                // What waits may be behind the gate, where its own count does not show it.
                Permission::Granted => gates.all().iter().for_each(|gate| gate.reconsider()),
                Permission::Wait => {}
            }
            seen = lease.wait_change(seen, LOOK);
        }
    };
    threads::spawn(Kind::Watch, Builder::new().name("lease".into()).stack_size(STACK_BYTES), work)
        .map(drop)
        .map_err(|error| Failure::new(format!("cannot start a thread: {error}"), "check the limits"))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};
    use std::sync::{Arc, Mutex};

    use blockio::{BlockDevice, GatedDevice, Geometry, IoRequest};
    use lockmgr::clock::boottime_ms;
    use lockmgr::lease::LeasePage;
    use lockmgr::{Millis, NodeId};

    use super::*;

    /// A bound, not a pause.
    const PATIENCE: Duration = Duration::from_secs(300);

    /// A device with a request that waits for its right.
    struct Waiting(Mutex<Sender<()>>);

    impl BlockDevice for Waiting {
        fn geometry(&self) -> Geometry {
            Geometry { size_bytes: 0, block_bytes: 512, can_discard: false }
        }

        fn submit(&self, _request: IoRequest) {}

        fn rights_changed(&self) {
            // Who was told once does not wait any more.
            let _ = self.0.lock().expect("no panic while it is held").send(());
        }
    }

    // Invariant B3: the right is asked twice, so what the gate let through may wait behind it.
    #[test]
    fn a_request_that_waits_behind_the_gate_goes_on_when_the_lease_is_there() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let (path, epoch) = (folder.path().join("lease"), Epoch(1));
        let mut page = LeasePage::create(&path, NodeId(1), epoch).expect("a page");
        page.renew(Millis(boottime_ms().0 + 3_600_000));
        let lease = open(&path).expect("it is there");
        let (tell, told) = channel();
        let device: Arc<dyn BlockDevice> = Arc::new(Waiting(Mutex::new(tell)));
        let gate = Arc::new(GatedDevice::new(device, Arc::new(lease.clone().right_of(epoch))));
        let gates = Gates::default();
        gates.add(&gate);
        watch(lease, epoch, gates, |_| ()).expect("a thread");
        told.recv_timeout(PATIENCE).expect("it hears of the lease");
        assert_eq!(gate.held(), 0, "the gate knows of nothing that waits");
    }
}
