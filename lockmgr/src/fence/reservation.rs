//! Fencing by the LUN: a node's key is taken off it, and the LUN refuses the node's writes.
//!
//! ```text
//!   enroll: foreign keys? -> register own key -> reserve -> read back
//!   cut:    read keys -> preempt and abort each of the victim -> read again, until none is left -> confirmed
//! ```
//! A key says whose it is: `cluster (16 bits) | node (16 bits) | epoch (32 bits)`. A node has a new one in each incarnation
//! (A3), so that a fence of an old one does not touch its successor.
//!
//! **Invariants:** a node enrolls once in an incarnation, before the quorum has confirmed it for the last time; a key that
//! is gone is never registered again (A2, A3). A fence is confirmed only when the keys were read back on every device, and
//! by a node that still has its own key there (A1, A7).

use std::sync::Arc;

use blockio::{ReservationType, Reservations, ReserveError, despite_attentions};

use super::{Confirmed, Fence, FenceError, FenceKind};
use crate::{ClusterId, Epoch, NodeId};

/// Rounds of preempting and reading back: others may fence the same node at the same time.
const ROUNDS_MAX: usize = 8;

/// Whose key it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReservationKey(u64);

impl ReservationKey {
    /// The key of a node's incarnation; none when the epoch has outgrown it.
    #[must_use]
    pub fn new(cluster: ClusterId, node: NodeId, epoch: Epoch) -> Option<Self> {
        let epoch = u32::try_from(epoch.0).ok()?;
        Some(Self(u64::from(tag_of(cluster)) << 48 | u64::from(node.0) << 32 | u64::from(epoch)))
    }

    /// As the device has it.
    #[must_use]
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The key that stands in for this one while the fence is tried out: of an epoch that no node ever has, so that a fence
    /// of this node in any epoch takes it off.
    #[must_use]
    pub fn for_trial(self) -> Self {
        Self(self.0 >> 32 << 32)
    }

    /// The node.
    #[must_use]
    pub fn node(self) -> NodeId {
        NodeId(u16::try_from(self.0 >> 32 & 0xffff).expect("16 bits"))
    }

    /// Its incarnation.
    #[must_use]
    pub fn epoch(self) -> Epoch {
        Epoch(self.0 & 0xffff_ffff)
    }

    fn is_of_cluster(self, other: Self) -> bool {
        self.0 >> 48 == other.0 >> 48
    }

    /// Whether a fence of `node` in `epoch` takes this key off.
    fn falls_with(self, own: Self, node: NodeId, epoch: Epoch) -> bool {
        self.is_of_cluster(own) && self.node() == node && self.epoch() <= epoch
    }
}

/// 16 bits of a cluster's id, never 0.
fn tag_of(cluster: ClusterId) -> u16 {
    let digest = crc32c::crc32c(cluster.0.as_bytes());
    u16::try_from((digest >> 16) ^ (digest & 0xffff)).expect("16 bits").max(1)
}

/// Why a node has no place on a LUN.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnrollError {
    /// The device cannot do it, or could not be asked.
    #[error("persistent reservations: {0}")]
    Device(#[from] ReserveError),
    /// Somebody else uses the LUN.
    #[error(
        "key {key:#018x} on the LUN is not of this cluster: another cluster, or another program, uses it"
    )]
    Foreign {
        /// The key.
        key: u64,
    },
    /// A later incarnation of this node is there already.
    #[error("epoch {found} of this node is registered on the LUN: this incarnation is over")]
    Outlived {
        /// The later epoch.
        found: Epoch,
    },
    /// The LUN is reserved in another way.
    #[error("the LUN has a reservation of type {found}, not write exclusive for all registrants")]
    OtherType {
        /// Its number in the SCSI standard.
        found: u8,
    },
    /// The device said that it did, and did not.
    #[error("the LUN has taken the key and does not show it")]
    NotKept,
}

/// Gives a node's incarnation its place on a LUN. Whoever calls this asks the quorum afterwards whether the incarnation is
/// still in good standing: a fence that begins after that sees the key.
///
/// # Errors
/// See [`EnrollError`]; the node must not use the LUN then.
pub fn enroll(device: &dyn Reservations, own: ReservationKey) -> Result<(), EnrollError> {
    let known = despite_attentions(|| device.read_keys())?;
    for key in known.keys.iter().copied().map(ReservationKey) {
        if !key.is_of_cluster(own) {
            return Err(EnrollError::Foreign { key: key.raw() });
        }
        if key.node() == own.node() && key.epoch() > own.epoch() {
            return Err(EnrollError::Outlived { found: key.epoch() });
        }
    }
    despite_attentions(|| device.register(own.raw()))?;
    reserve(device, own)?;
    match standing(device, own)? {
        Standing::Good => Ok(()),
        Standing::KeyGone | Standing::NotReserved => Err(EnrollError::NotKept),
    }
}

fn reserve(device: &dyn Reservations, own: ReservationKey) -> Result<(), EnrollError> {
    match despite_attentions(|| device.read_reservation())? {
        Some(ReservationType::WriteExclusiveAllRegistrants) => Ok(()),
        Some(ReservationType::Other(found)) => Err(EnrollError::OtherType { found }),
        None => Ok(despite_attentions(|| device.reserve(own.raw()))?),
    }
}

/// How a node stands with a LUN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is registered, and the unregistered cannot write.
    Good,
    /// Its key is gone: it was cut off, or the target has forgotten.
    KeyGone,
    /// It is registered, but the reservation is gone: the unregistered can write too.
    NotReserved,
}

/// Asks the LUN how a node stands with it.
///
/// # Errors
/// When it cannot be asked.
pub fn standing(device: &dyn Reservations, own: ReservationKey) -> Result<Standing, ReserveError> {
    look(device, own, |_, _| false).map(|seen| seen.standing)
}

/// What a node saw on a LUN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How it stands itself.
    pub standing: Standing,
    /// Keys of incarnations that are over; they have been taken off.
    pub returned: Vec<ReservationKey>,
}

/// Asks the LUN how a node stands with it, and takes the keys of incarnations off that are `over`. A target that was restarted
/// may list a key only when its node has come back, so that a fence in between has not seen it (A6).
///
/// # Errors
/// When the LUN cannot be asked.
pub fn look(
    device: &dyn Reservations,
    own: ReservationKey,
    over: impl Fn(NodeId, Epoch) -> bool,
) -> Result<Seen, ReserveError> {
    let known = despite_attentions(|| device.read_keys())?;
    if !known.keys.contains(&own.raw()) {
        return Ok(Seen { standing: Standing::KeyGone, returned: Vec::new() });
    }
    let returned = returned(&known.keys, own, over);
    for key in &returned {
        match despite_attentions(|| device.preempt_and_abort(own.raw(), key.raw())) {
            // Another node was faster.
            Ok(()) | Err(ReserveError::Conflict { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let held = despite_attentions(|| device.read_reservation())?;
    let reserved = held == Some(ReservationType::WriteExclusiveAllRegistrants);
    Ok(Seen { standing: if reserved { Standing::Good } else { Standing::NotReserved }, returned })
}

/// The keys of ended incarnations; a trial key belongs to none.
fn returned(keys: &[u64], own: ReservationKey, over: impl Fn(NodeId, Epoch) -> bool) -> Vec<ReservationKey> {
    let keys = keys.iter().copied().map(ReservationKey);
    let ended =
        keys.filter(|key| key.is_of_cluster(own) && *key != key.for_trial() && over(key.node(), key.epoch()));
    let mut ended: Vec<_> = ended.collect();
    ended.dedup();
    ended
}

/// Makes the reservation again that a target has lost, for a node that still has its key.
///
/// # Errors
/// When the device refuses.
pub fn reserve_again(device: &dyn Reservations, own: ReservationKey) -> Result<(), EnrollError> {
    reserve(device, own)
}

/// Takes a node's place on a LUN away, when it leaves in order.
///
/// # Errors
/// When the device refuses; a key that is gone already is no error.
pub fn withdraw(device: &dyn Reservations, own: ReservationKey) -> Result<(), ReserveError> {
    match despite_attentions(|| device.unregister(own.raw())) {
        Err(ReserveError::Conflict { .. }) => Ok(()),
        outcome => outcome,
    }
}

/// Makes certain that a LUN takes no write of `node` in `epoch` or before. Says what was done.
///
/// # Errors
/// Why that is not certain.
fn cut(device: &dyn Reservations, own: ReservationKey, node: NodeId, epoch: Epoch) -> Result<String, String> {
    if node == own.node() {
        return Err("a node does not fence itself from outside".to_owned());
    }
    let mut taken = 0_usize;
    for _ in 0..ROUNDS_MAX {
        let known = despite_attentions(|| device.read_keys()).map_err(|error| error.to_string())?;
        if !known.keys.contains(&own.raw()) {
            return Err("this node's own key is gone: it has been cut off itself".to_owned());
        }
        let victims = victims(&known.keys, own, node, epoch);
        if victims.is_empty() {
            reserve(device, own).map_err(|error| error.to_string())?;
            return match standing(device, own) {
                Ok(Standing::Good) => Ok(format!("{taken} keys taken, generation {}", known.generation)),
                Ok(other) => Err(format!("the LUN does not keep the reservation ({other:?})")),
                Err(error) => Err(error.to_string()),
            };
        }
        for victim in victims {
            match despite_attentions(|| device.preempt_and_abort(own.raw(), victim)) {
                Ok(()) => taken += 1,
                // Somebody else was faster, or this node is cut off itself: reading the keys tells.
                Err(ReserveError::Conflict { .. }) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }
    Err(format!("the key is still there after {ROUNDS_MAX} attempts to take it"))
}

fn victims(keys: &[u64], own: ReservationKey, node: NodeId, epoch: Epoch) -> Vec<u64> {
    let mut found: Vec<u64> =
        keys.iter().copied().filter(|key| ReservationKey(*key).falls_with(own, node, epoch)).collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// One device on which nodes can be cut off: here, or by way of a node that reaches it.
pub trait Cutter: Send + Sync {
    /// The volume on it, for people.
    fn name(&self) -> String;

    /// Makes certain that the device takes no write of `node` in `epoch` or before; blocks. Says what was done.
    ///
    /// # Errors
    /// Why that is not certain.
    fn cut(&self, node: NodeId, epoch: Epoch) -> Result<String, String>;
}

/// A device that this node reaches itself.
pub struct OwnPath {
    own: ReservationKey,
    name: String,
    device: Arc<dyn Reservations>,
}

impl OwnPath {
    /// `own` is this node's key on the device.
    #[must_use]
    pub fn new(own: ReservationKey, name: String, device: Arc<dyn Reservations>) -> Self {
        Self { own, name, device }
    }
}

impl std::fmt::Debug for OwnPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OwnPath").field("own", &self.own).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Cutter for OwnPath {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn cut(&self, node: NodeId, epoch: Epoch) -> Result<String, String> {
        cut(&*self.device, self.own, node, epoch)
    }
}

/// Cuts nodes off on all devices that it is given.
pub struct ReservationFence {
    devices: Vec<Box<dyn Cutter>>,
}

impl ReservationFence {
    /// A fence for nodes that may write to these devices.
    #[must_use]
    pub fn new(devices: Vec<Box<dyn Cutter>>) -> Self {
        Self { devices }
    }
}

impl std::fmt::Debug for ReservationFence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.devices.iter().map(|device| device.name()).collect();
        f.debug_struct("ReservationFence").field("devices", &names).finish()
    }
}

impl Fence for ReservationFence {
    fn kind(&self) -> FenceKind {
        FenceKind::Reservation
    }

    fn fence(&self, node: NodeId, epoch: Epoch) -> Result<Confirmed, FenceError> {
        let mut said = Vec::new();
        for device in &self.devices {
            let name = device.name();
            let how = device.cut(node, epoch).map_err(|why| FenceError::NotConfirmed {
                node,
                epoch,
                reason: format!("the LUN of volume {name}: {why}"),
            })?;
            said.push(format!("{name}: {how}"));
        }
        Ok(Confirmed::new(node, epoch, format!("the LUNs refuse its writes ({})", said.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use blockio::{
        BlockDevice, ConflictDevice, GatedDevice, IoError, Nexus, Permission, SharedLun, Tripwire, WriteRight,
    };
    use uuid::Uuid;

    use super::super::Ledger;
    use super::*;

    const CLUSTER: ClusterId = ClusterId(Uuid::from_u128(77));

    fn key(node: u16, epoch: u64) -> ReservationKey {
        ReservationKey::new(CLUSTER, NodeId(node), Epoch(epoch)).expect("a small epoch")
    }

    /// A node with its place on the LUN.
    fn enrolled(lun: &SharedLun, node: u16, epoch: u64) -> Nexus {
        let nexus = lun.nexus();
        enroll(&*hand(&nexus), key(node, epoch)).expect("enrolled");
        nexus
    }

    fn hand(nexus: &Nexus) -> Arc<dyn Reservations> {
        nexus.reservations().expect("a LUN with reservations")
    }

    fn fence_of(nexus: &Nexus, node: u16, epoch: u64) -> ReservationFence {
        ReservationFence::new(vec![path(nexus, node, epoch)])
    }

    fn path(nexus: &Nexus, node: u16, epoch: u64) -> Box<dyn Cutter> {
        Box::new(OwnPath::new(key(node, epoch), "vol1".to_owned(), hand(nexus)))
    }

    fn refused(outcome: Result<(), IoError>) -> bool {
        outcome.is_err_and(|error| blockio::is_conflict(&error))
    }

    // Invariant A3
    #[test]
    fn a_key_names_cluster_node_and_incarnation() {
        let own = key(64, 0xffff_ffff);
        assert_eq!((own.node(), own.epoch()), (NodeId(64), Epoch(0xffff_ffff)));
        assert_eq!(ReservationKey::new(CLUSTER, NodeId(1), Epoch(1 << 32)), None);
        let other = ReservationKey::new(ClusterId(Uuid::from_u128(78)), NodeId(64), Epoch(1)).expect("a key");
        assert!(!own.is_of_cluster(other) && other.raw() != 0);
    }

    // Invariants A1 and A2: what a node that was cut off still sends does not land, and others go on.
    #[test]
    fn a_fenced_nodes_write_is_refused_by_the_lun_and_its_key_is_gone() {
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        second.write_at(0, &[2; 512]).expect("registered");
        let proof = fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).expect("confirmed");
        assert!(proof.covers(NodeId(2), Epoch(3)), "{proof}");
        assert!(refused(second.write_at(0, &[9; 512])));
        assert_eq!(lun.content().to_bytes()[..512], [2; 512]);
        assert_eq!(standing(&*hand(&second), key(2, 3)), Ok(Standing::KeyGone));
        first.write_at(512, &[1; 512]).expect("the others go on");
    }

    // Invariant A2: one refused write ends all I/O of the volume on that node.
    #[test]
    fn one_reservation_conflict_stops_all_io_of_the_volume_for_good() {
        struct Always;
        impl WriteRight for Always {
            fn check(&self) -> Permission {
                Permission::Granted
            }
        }
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        let wire = Tripwire::new(|_| {});
        let gate =
            GatedDevice::new(ConflictDevice::new(second, Arc::clone(&wire)), wire.guard(Arc::new(Always)));
        gate.write_at(0, &[2; 512]).expect("registered");
        fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).expect("confirmed");
        assert!(wire.tripped().is_none());
        assert!(refused(gate.write_at(0, &[9; 512])));
        assert!(wire.tripped().is_some_and(|why| why.contains("reservation conflict")));
        // Not even when the key were there again.
        enroll(&*gate.reservations().expect("there"), key(2, 4)).expect("as somebody else might");
        let after = gate.write_at(0, &[9; 512]).expect_err("stopped");
        assert!(matches!(after, IoError::NotPermitted { .. }), "{after}");
        assert!(
            gate.read_at(0, &mut [0; 512]).is_err(),
            "reads too: the blocks may be another file's by now"
        );
    }

    // Invariant A4
    #[test]
    fn fencing_a_node_twice_is_no_error_and_does_not_touch_its_next_incarnation() {
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        let fence = fence_of(&first, 1, 5);
        for _ in 0..2 {
            fence.fence(NodeId(2), Epoch(3)).expect("confirmed");
        }
        enroll(&*hand(&second), key(2, 4)).expect("a new incarnation");
        fence.fence(NodeId(2), Epoch(3)).expect("the old one is as dead as before");
        second.write_at(0, &[4; 512]).expect("the new one is not");
    }

    // Invariant A7: of two nodes that fence each other, the loser does not complete.
    #[test]
    fn who_lost_the_race_confirms_nothing() {
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).expect("the winner");
        let error = fence_of(&second, 2, 3).fence(NodeId(1), Epoch(5)).expect_err("the loser");
        assert!(error.to_string().contains("own key is gone"), "{error}");
        first.write_at(0, &[1; 512]).expect("the winner goes on");
    }

    // Invariant A8
    #[test]
    fn a_node_does_not_take_its_own_key() {
        let lun = SharedLun::new(1 << 20);
        let first = enrolled(&lun, 1, 5);
        fence_of(&first, 1, 5).fence(NodeId(1), Epoch(4)).expect_err("not by this path");
        first.write_at(0, &[1; 512]).expect("it is still there");
    }

    // Invariant A6
    #[test]
    fn unit_attentions_are_asked_through() {
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        lun.raise_attentions(3);
        fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).expect("confirmed in spite of them");
        assert!(refused(second.write_at(0, &[9; 512])));
        lun.raise_attentions(100);
        assert!(fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).is_err(), "no end of them is an error");
    }

    // Invariant A4: nothing is reused after a fence that failed, until a later one succeeds or an operator vouches.
    #[test]
    fn a_lun_that_cannot_be_asked_leaves_the_node_in_quarantine() {
        let lun = SharedLun::new(1 << 20);
        let (first, _second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        let (ledger, fence) = (Ledger::default(), fence_of(&first, 1, 5));
        lun.fail_commands(1);
        let error = ledger.fence(&fence, NodeId(2), Epoch(3)).expect_err("the path is lost");
        assert!(error.to_string().contains("vol1"), "{error}");
        assert_eq!((ledger.quarantined().len(), ledger.proof(NodeId(2), Epoch(3))), (1, None));
        ledger.accept(Confirmed::by_operator(NodeId(2), Epoch(3), "admin"));
        assert!(ledger.quarantined().is_empty());
        ledger.fence(&fence, NodeId(2), Epoch(4)).expect("a later one succeeds");
    }

    // Invariant A1: every device of the node is asked, and one that fails leaves the whole fence unconfirmed.
    #[test]
    fn a_node_is_fenced_only_when_every_lun_refuses_it() {
        let luns = [SharedLun::new(1 << 20), SharedLun::new(1 << 20)];
        let first = luns.each_ref().map(|lun| enrolled(lun, 1, 5));
        let second = luns.each_ref().map(|lun| enrolled(lun, 2, 3));
        let fence = ReservationFence::new(first.iter().map(|nexus| path(nexus, 1, 5)).collect());
        luns[1].fail_commands(1);
        fence.fence(NodeId(2), Epoch(3)).expect_err("one LUN does not answer");
        fence.fence(NodeId(2), Epoch(3)).expect("both do");
        assert!(second.iter().all(|nexus| refused(nexus.write_at(0, &[9; 512]))));
    }

    // Invariant G2
    #[test]
    fn the_lun_of_another_cluster_is_left_alone() {
        let lun = SharedLun::new(1 << 20);
        let _first = enrolled(&lun, 1, 5);
        let stranger = lun.nexus();
        let foreign =
            ReservationKey::new(ClusterId(Uuid::from_u128(78)), NodeId(1), Epoch(1)).expect("a key");
        assert_eq!(enroll(&*hand(&stranger), foreign), Err(EnrollError::Foreign { key: key(1, 5).raw() }));
        assert!(refused(stranger.write_at(0, &[9; 512])));
    }

    // Invariant A1: a fence that comes while a node tries its fence out takes the trial key off too.
    #[test]
    fn the_trial_key_of_a_node_falls_with_any_of_its_incarnations_and_takes_no_other_along() {
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        let third = enrolled(&lun, 3, 1);
        hand(&second).register(key(2, 3).for_trial().raw()).expect("registered");
        second.write_at(0, &[2; 512]).expect("a trial key is a key");
        fence_of(&first, 1, 5).fence(NodeId(2), Epoch(0)).expect("the trial");
        assert!(refused(second.write_at(0, &[9; 512])));
        third.write_at(0, &[3; 512]).expect("the others stay");
        // The LUN tells the node first that it was cut off.
        despite_attentions(|| hand(&second).register(key(2, 3).for_trial().raw())).expect("registered");
        fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).expect("a real fence in between");
        assert!(refused(second.write_at(0, &[9; 512])));
    }

    // Invariant A3
    #[test]
    fn an_incarnation_that_was_followed_by_another_does_not_enroll_any_more() {
        let lun = SharedLun::new(1 << 20);
        let nexus = enrolled(&lun, 1, 5);
        assert_eq!(enroll(&*hand(&nexus), key(1, 4)), Err(EnrollError::Outlived { found: Epoch(5) }));
    }

    // Invariant A6: what a target has forgotten over a power cut is noticed, not assumed.
    #[test]
    fn a_target_that_has_forgotten_its_keys_is_noticed() {
        let lun = SharedLun::new(1 << 20);
        let nexus = enrolled(&lun, 1, 5);
        assert_eq!(standing(&*hand(&nexus), key(1, 5)), Ok(Standing::Good));
        lun.forget_reservations();
        assert_eq!(standing(&*hand(&nexus), key(1, 5)), Ok(Standing::KeyGone));
    }

    // Invariant A6: a target that was restarted lists a key only when its node is back; whoever looks next takes it off.
    #[test]
    fn a_key_that_a_fence_has_not_seen_is_taken_off_when_it_shows_up() {
        let lun = SharedLun::new(1 << 20);
        let (first, second, third) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3), enrolled(&lun, 3, 1));
        withdraw(&*hand(&second), key(2, 3)).expect("as if the target had forgotten it");
        fence_of(&first, 1, 5).fence(NodeId(2), Epoch(3)).expect("there is nothing to take");
        hand(&second).register(key(2, 3).raw()).expect("the target remembers it");
        hand(&third).register(key(3, 1).for_trial().raw()).expect("a trial");
        second.write_at(0, &[2; 512]).expect("not seen yet");
        let over = |node: NodeId, epoch: Epoch| epoch.0 < [5, 4, 1][usize::from(node.0) - 1];
        let seen = look(&*hand(&first), key(1, 5), over).expect("looked");
        assert_eq!(seen, Seen { standing: Standing::Good, returned: vec![key(2, 3)] });
        assert!(refused(second.write_at(0, &[9; 512])));
        third.write_at(0, &[3; 512]).expect("a trial key stays");
        enroll(&*hand(&second), key(2, 4)).expect("the next incarnation");
        let seen = look(&*hand(&first), key(1, 5), over).expect("looked");
        assert_eq!(seen.returned, []);
        second.write_at(0, &[4; 512]).expect("it is not over");
    }

    #[test]
    fn a_node_that_leaves_in_order_takes_its_key_along_and_may_do_so_twice() {
        let lun = SharedLun::new(1 << 20);
        let (first, second) = (enrolled(&lun, 1, 5), enrolled(&lun, 2, 3));
        withdraw(&*hand(&second), key(2, 3)).expect("withdrawn");
        withdraw(&*hand(&second), key(2, 3)).expect("no longer there");
        assert!(refused(second.write_at(0, &[9; 512])));
        first.write_at(0, &[1; 512]).expect("the others stay");
    }
}
