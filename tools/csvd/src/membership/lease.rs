//! This node's lease: prolonged by the answers of a majority, shown on the lease page, obeyed by every writer.
//!
//! **Invariant (B1):** the page's deadline is counted from the moment a heartbeat was *sent*. After [`LeaseKeeper::revoke`]
//! it never grows again.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use api::Error;
use api::config::NodeConfig;
use blockio::{BlockDevice, GatedDevice, Permission, Tripwire, WriteRight};
use lockmgr::clock::boottime_ms;
use lockmgr::lease::{LeasePage, LeaseReader, QuorumLease};
use lockmgr::timing::Timing;
use lockmgr::{Epoch, Millis, NodeId};

/// A device that asks for the lease before each request.
pub(crate) type Gate = GatedDevice<Arc<dyn BlockDevice>>;

/// Keeps the lease page.
#[derive(Debug)]
pub(crate) struct LeaseKeeper {
    /// Rank: below the gates, which are called after it is released.
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    quorum: QuorumLease,
    /// The voters that `quorum` counts.
    voters: Vec<NodeId>,
    page: Option<LeasePage>,
    /// The devices of this process that wait for renewals.
    gates: Vec<Weak<Gate>>,
}

impl LeaseKeeper {
    pub(crate) fn new(config: &NodeConfig, timing: &Timing) -> Self {
        let voters: Vec<_> = config.members.iter().map(|member| NodeId(member.id)).collect();
        let quorum = QuorumLease::new(NodeId(config.id), voters.iter().copied(), timing.holder_stop_ms());
        Self { inner: Mutex::new(Inner { quorum, voters, page: None, gates: Vec::new() }) }
    }

    /// A majority of these prolongs the lease. An empty set is one that is not known yet.
    pub(crate) fn set_voters(&self, voters: &[NodeId]) {
        let mut inner = self.lock();
        if !voters.is_empty() && inner.voters != voters {
            inner.quorum.set_voters(voters.iter().copied());
            inner.voters = voters.to_vec();
        }
    }

    /// Makes the page of a new epoch. Whoever still has the page of an older one mapped learns that its right is over.
    pub(crate) fn open(&self, config: &NodeConfig, epoch: Epoch) -> Result<(), Error> {
        let page =
            LeasePage::create(&config.lease_page(), NodeId(config.id), epoch).map_err(Error::failed)?;
        self.lock().page = Some(page);
        Ok(())
    }

    /// The right of an incarnation to use a LUN, as its devices ask for it.
    pub(crate) fn right(
        &self,
        config: &NodeConfig,
        epoch: Epoch,
        wire: &Arc<Tripwire>,
    ) -> Result<Arc<dyn WriteRight>, Error> {
        let reader = LeaseReader::open(&config.lease_page()).map_err(Error::failed)?;
        Ok(wire.guard(Arc::new(reader.right_of(epoch))))
    }

    /// Puts the lease before a device, and what ends the right to use its LUN.
    pub(crate) fn gate(
        &self,
        config: &NodeConfig,
        epoch: Epoch,
        device: Arc<dyn BlockDevice>,
        wire: &Arc<Tripwire>,
    ) -> Result<Arc<Gate>, Error> {
        let gate = Arc::new(GatedDevice::new(device, self.right(config, epoch, wire)?));
        let mut inner = self.lock();
        inner.gates.retain(|gate| gate.strong_count() > 0);
        inner.gates.push(Arc::downgrade(&gate));
        Ok(gate)
    }

    /// `from` has answered the heartbeat that left at `sent_at`.
    pub(crate) fn answered(&self, from: NodeId, sent_at: Millis) {
        self.advance(|inner, now| inner.quorum.answered(now, from, sent_at));
    }

    /// Time has passed: a cluster of one renews by itself.
    pub(crate) fn tick(&self) {
        self.advance(|inner, now| inner.quorum.advance(now));
    }

    fn advance(&self, step: impl FnOnce(&mut Inner, Millis) -> Option<Millis>) {
        let mut inner = self.lock();
        let Some(deadline) = step(&mut inner, boottime_ms()) else { return };
        let Some(page) = inner.page.as_mut() else { return };
        page.renew(deadline);
        let gates: Vec<_> = inner.gates.iter().filter_map(Weak::upgrade).collect();
        drop(inner);
        reconsider(&gates);
    }

    /// Ends this node's right to write, for good.
    pub(crate) fn revoke(&self) {
        let mut inner = self.lock();
        if let Some(page) = inner.page.as_mut() {
            page.revoke();
        }
        let gates: Vec<_> = inner.gates.iter().filter_map(Weak::upgrade).collect();
        drop(inner);
        reconsider(&gates);
    }

    /// Whether this node may write now.
    pub(crate) fn is_held(&self) -> bool {
        let inner = self.lock();
        let view = inner.page.as_ref().map(LeasePage::view);
        view.is_some_and(|view| !view.revoked && boottime_ms() < view.deadline)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What waits may be behind a gate, where its own count does not show it: all are asked.
/// The right to tell what this node holds without asking: it ends before anybody can have suspected the node, and so before a
/// fence that does not wait for the lease.
pub(crate) struct Unsuspected {
    right: Arc<dyn WriteRight>,
    /// How much sooner than the lease it ends.
    sooner: Duration,
}

impl Unsuspected {
    pub(crate) fn new(right: Arc<dyn WriteRight>, timing: &Timing) -> Self {
        let sooner = timing.holder_stop_ms().saturating_sub(timing.unsuspected_ms());
        Self { right, sooner: Duration::from_millis(sooner) }
    }
}

impl WriteRight for Unsuspected {
    fn check(&self) -> Permission {
        if self.lasts() > Duration::ZERO {
            return Permission::Granted;
        }
        match self.right.check() {
            Permission::Granted => Permission::Wait,
            other => other,
        }
    }

    fn lasts(&self) -> Duration {
        self.right.lasts().saturating_sub(self.sooner)
    }
}

fn reconsider(gates: &[Arc<Gate>]) {
    for gate in gates {
        gate.reconsider();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use blockio::{Geometry, IoRequest};

    use super::*;

    struct Granted;

    impl WriteRight for Granted {
        fn check(&self) -> Permission {
            Permission::Granted
        }
    }

    /// A device with a request that waits for its right.
    #[derive(Default)]
    struct Waiting {
        told: AtomicBool,
    }

    impl BlockDevice for Waiting {
        fn geometry(&self) -> Geometry {
            Geometry { size_bytes: 0, block_bytes: 512, can_discard: false }
        }

        fn submit(&self, _request: IoRequest) {}

        fn rights_changed(&self) {
            self.told.store(true, Ordering::SeqCst);
        }
    }

    /// A lease that ends in so many milliseconds.
    struct Lasts(u64);

    impl WriteRight for Lasts {
        fn check(&self) -> Permission {
            if self.0 > 0 { Permission::Granted } else { Permission::Wait }
        }

        fn lasts(&self) -> Duration {
            Duration::from_millis(self.0)
        }
    }

    // Invariant F5: a fence that is confirmed does not wait for the lease.
    #[test]
    fn what_is_told_from_memory_ends_before_anybody_suspects_this_node() {
        let timing = Timing::DEFAULT;
        let right = |lasts| Unsuspected::new(Arc::new(Lasts(lasts)), &timing);
        let just_renewed = right(timing.holder_stop_ms());
        assert_eq!(just_renewed.check(), Permission::Granted);
        let told_for = u64::try_from(just_renewed.lasts().as_millis()).expect("small");
        assert!(told_for < timing.suspect_after_ms && told_for > 2 * timing.beat_ms, "{told_for} ms");
        let later = right(timing.holder_stop_ms() - timing.suspect_after_ms);
        assert_eq!((later.check(), later.lasts()), (Permission::Wait, Duration::ZERO));
    }

    // Invariant B3: the right is asked twice, so what the gate let through may wait behind it.
    #[test]
    fn a_renewal_reaches_what_waits_behind_a_gate_that_holds_nothing() {
        let device = Arc::new(Waiting::default());
        let behind = Arc::clone(&device) as Arc<dyn BlockDevice>;
        let gate = Arc::new(GatedDevice::new(behind, Arc::new(Granted)));
        assert_eq!(gate.held(), 0);
        reconsider(&[gate]);
        assert!(device.told.load(Ordering::SeqCst));
    }
}
