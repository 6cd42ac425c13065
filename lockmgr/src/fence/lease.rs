//! Fencing by time: nothing can cut the node off, so it stops by itself, and the others wait until it certainly has.
//!
//! ```text
//!   nobody renews it any more                         taker_start = L * (1 + rho) + max_io + margin  (B2)
//!   |---- its lease, at most L ----| stopped |-- its last request lands --| margin |
//!   begun ------------------------------- this clock alone ------------------------> confirmed
//! ```
//! **Invariants:** the wait counts from a moment at which nobody renewed the lease any more, on the waiter's own clock,
//! which counts suspends (B1, B3); it is as long as the *owner's* lease demands.

use rustix::event::poll;

use super::process::left_until;
use super::{Confirmed, Fence, FenceError, FenceKind};
use crate::clock::boottime_ms;
use crate::timing::Timing;
use crate::{Epoch, Millis, NodeId};

/// Waits a lease out.
#[derive(Clone, Copy, Debug)]
pub struct LeaseFence {
    begun: Millis,
    wait_ms: u64,
}

impl LeaseFence {
    /// For a node that advertises a lease of `lease_ms`, which nobody has renewed since `begun`.
    #[must_use]
    pub fn new(timing: &Timing, lease_ms: u64, begun: Millis) -> Self {
        // Whatever the owner says, its lease is never taken for a shorter one than this cluster's.
        Self { begun, wait_ms: timing.taker_start_ms(lease_ms.max(timing.lease_ms)) }
    }

    /// How long others wait before they take over.
    #[must_use]
    pub fn wait_ms(&self) -> u64 {
        self.wait_ms
    }

    fn wait(&self) {
        let end = self.begun.plus(self.wait_ms);
        // Neither a signal nor an early return of the call ends the wait: only the clock does.
        while boottime_ms() < end {
            let _ = poll(&mut [], Some(&left_until(end)));
        }
    }
}

impl Fence for LeaseFence {
    fn kind(&self) -> FenceKind {
        FenceKind::Lease
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        self.wait();
        let how = format!("its lease has not been renewed for {} ms, nor can it be", self.wait_ms);
        Ok(Confirmed::new(node, epoch, how))
    }
}

/// How many of the `others`, voters beside the node itself, must refuse to renew a node's lease, so that no majority can:
/// it needs the answers of half of them.
#[must_use]
pub fn refusals_needed(others: usize) -> usize {
    others - others.div_ceil(2) + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::QuorumLease;

    // Invariants B1 and B2: it is over only when the wait is, by this clock, and never before the owner's own lease is.
    #[test]
    fn a_lease_is_waited_out_from_its_last_renewal_on_the_waiters_clock() {
        let timing = Timing::from_base(10);
        let begun = boottime_ms();
        let fence = LeaseFence::new(&timing, timing.lease_ms, begun);
        assert!(fence.wait_ms() > timing.holder_stop_ms() + timing.max_io_ms);
        let proof = fence.fence(NodeId(2), Epoch(3)).expect("time always passes");
        assert!(boottime_ms().since(begun) >= timing.taker_start_ms(timing.lease_ms), "{proof}");
    }

    // Invariant B2
    #[test]
    fn the_owners_advertised_lease_counts_and_a_short_one_is_not_believed() {
        let timing = Timing::DEFAULT;
        let wait = |lease_ms| LeaseFence::new(&timing, lease_ms, Millis(0)).wait_ms();
        assert_eq!(wait(10_000), timing.taker_start_ms(10_000));
        assert_eq!(wait(1), timing.taker_start_ms(timing.lease_ms));
    }

    // Invariant B1: with so many refusals no lease can be renewed, and with one less it could.
    #[test]
    fn a_node_that_enough_voters_refuse_gets_no_lease() {
        for others in 1..=8_u16 {
            let needed = refusals_needed(others.into());
            for refusing in [needed, needed - 1] {
                let mut lease = QuorumLease::new(NodeId(1), (1..=others + 1).map(NodeId), 1000);
                let answering = usize::from(others) - refusing;
                let renewed = (2..=others + 1)
                    .take(answering)
                    .filter_map(|node| lease.answered(Millis(9), NodeId(node), Millis(5)))
                    .count();
                assert_eq!(renewed > 0, refusing < needed, "{others} others, {refusing} refuse");
            }
        }
    }
}
