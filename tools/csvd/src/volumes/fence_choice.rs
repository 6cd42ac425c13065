//! How the dead nodes of a new volume are cut off: what was asked for, or the safest that there is.
//!
//! | asked for | LUN | configuration | kind |
//! |---|---|---|---|
//! | nothing | knows persistent reservations | any | `reservation` |
//! | nothing | does not | an agent, or the built-in kill | `agent` |
//! | nothing | does not | none | `lease` |
//! | a kind | must be able to | | that kind, or a refusal with the reason |
//!
//! A LUN on which another cluster, or another program, has keys is refused, whatever was asked for.

use api::Error;
use api::config::FenceConfig;
use api::pb::VolumeCreateRequest;
use blockio::{BlockDevice, ReserveError};
use lockmgr::cluster::FenceKind;
use lockmgr::fence::{EnrollError, ReservationKey, enroll, withdraw};

/// What is wanted, and what there is when that is left open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    asked: Option<FenceKind>,
    fallback: FenceKind,
    key: Option<ReservationKey>,
}

impl Choice {
    pub(super) fn of(asked: &str, config: &FenceConfig, key: Option<ReservationKey>) -> Result<Self, Error> {
        let asked = match asked {
            "" => None,
            "reservation" => Some(FenceKind::Reservation),
            "agent" => Some(FenceKind::Agent),
            "lease" => Some(FenceKind::Lease),
            other => {
                return Err(Error::usage(format!("{other} is no kind of fence"))
                    .hint("there are reservation, agent and lease"));
            }
        };
        let fallback = match config {
            FenceConfig::Operator => FenceKind::Lease,
            FenceConfig::LocalKill | FenceConfig::Agent { .. } => FenceKind::Agent,
        };
        Ok(Self { asked, fallback, key })
    }

    /// The kind for this LUN. For reservations this node then has its key there.
    pub(super) fn settle(
        &self,
        request: &VolumeCreateRequest,
        device: &dyn BlockDevice,
    ) -> Result<FenceKind, Error> {
        match (self.register(device), self.asked) {
            (Ok(()), None | Some(FenceKind::Reservation)) => Ok(FenceKind::Reservation),
            (Ok(()), Some(other)) => {
                self.withdraw(FenceKind::Reservation, device);
                Ok(other)
            }
            (Err(EnrollError::Device(ReserveError::Unsupported { .. })), asked)
                if asked != Some(FenceKind::Reservation) =>
            {
                Ok(asked.unwrap_or(self.fallback))
            }
            (Err(error), _) => Err(self.refused(request, &error)),
        }
    }

    fn register(&self, device: &dyn BlockDevice) -> Result<(), EnrollError> {
        let without = |why: &str| ReserveError::Unsupported { op: "register", why: why.to_owned() };
        let key = self.key.ok_or_else(|| without("the node's epoch has outgrown the keys"))?;
        let hand = device
            .reservations()
            .ok_or_else(|| without("a file or an NBD export has no persistent reservations"))?;
        // Asked first by a command that changes nothing, whose refusal says clearly that there is no such thing.
        blockio::despite_attentions(|| hand.read_keys())?;
        enroll(&*hand, key)
    }

    /// Takes the key back, when nothing comes of it.
    pub(super) fn withdraw(&self, kind: FenceKind, device: &dyn BlockDevice) {
        let (FenceKind::Reservation, Some(key), Some(hand)) = (kind, self.key, device.reservations()) else {
            return;
        };
        if let Err(error) = withdraw(&*hand, key) {
            tracing::warn!(%error, "this node's key stays on the LUN");
        }
    }

    fn refused(&self, request: &VolumeCreateRequest, error: &EnrollError) -> Error {
        let what = format!("volume create {} on {}", request.name, request.lun);
        let asked = self.asked == Some(FenceKind::Reservation);
        let hint = match error {
            EnrollError::Device(ReserveError::Unsupported { .. }) if asked => {
                "choose another LUN, or another kind with --fence"
            }
            EnrollError::Foreign { .. } | EnrollError::OtherType { .. } => {
                "make sure that nobody uses the LUN, then clear it (sg_persist --out --clear)"
            }
            EnrollError::Outlived { .. } => "restart this node's daemon",
            EnrollError::Device(_) | EnrollError::NotKept => {
                "is the path to the LUN whole? --fence agent or lease does without reservations"
            }
        };
        Error::conflict(error).during(what).hint(hint)
    }
}

#[cfg(test)]
mod tests {
    use blockio::{MemoryDevice, SharedLun};
    use lockmgr::{ClusterId, Epoch, NodeId};
    use uuid::Uuid;

    use super::*;

    fn key(cluster: u128) -> Option<ReservationKey> {
        ReservationKey::new(ClusterId(Uuid::from_u128(cluster)), NodeId(1), Epoch(1))
    }

    fn settled(asked: &str, config: &FenceConfig, device: &dyn BlockDevice) -> Result<FenceKind, Error> {
        let choice = Choice::of(asked, config, key(1)).expect("a kind");
        choice.settle(&VolumeCreateRequest::default(), device)
    }

    #[test]
    fn the_safest_kind_that_there_is_is_chosen() {
        let (lun, file) = (SharedLun::new(1 << 20), MemoryDevice::new(1 << 20));
        assert_eq!(settled("", &FenceConfig::Operator, &lun.nexus()).ok(), Some(FenceKind::Reservation));
        assert_eq!(settled("", &FenceConfig::LocalKill, &file).ok(), Some(FenceKind::Agent));
        assert_eq!(settled("", &FenceConfig::Operator, &file).ok(), Some(FenceKind::Lease));
    }

    #[test]
    fn what_was_asked_for_is_done_or_refused_with_the_reason() {
        let (lun, file) = (SharedLun::new(1 << 20), MemoryDevice::new(1 << 20));
        assert_eq!(settled("lease", &FenceConfig::LocalKill, &file).ok(), Some(FenceKind::Lease));
        let refused = settled("reservation", &FenceConfig::LocalKill, &file).expect_err("a file has none");
        assert!(refused.message.contains("persistent reservations"), "{refused:?}");
        let nexus = lun.nexus();
        assert_eq!(settled("agent", &FenceConfig::LocalKill, &nexus).ok(), Some(FenceKind::Agent));
        let left = nexus.reservations().expect("there").read_keys().expect("read");
        assert!(left.keys.is_empty(), "a kind that needs no key leaves none");
        assert!(Choice::of("stonith", &FenceConfig::LocalKill, None).is_err());
    }

    // Invariant G2
    #[test]
    fn a_lun_with_the_keys_of_others_is_refused_whatever_was_asked_for() {
        let lun = SharedLun::new(1 << 20);
        let other = lun.nexus();
        enroll(&*other.reservations().expect("there"), key(2).expect("a key")).expect("enrolled");
        for asked in ["", "reservation", "agent", "lease"] {
            let refused = settled(asked, &FenceConfig::LocalKill, &lun.nexus()).expect_err("in use");
            assert!(refused.message.contains("another cluster"), "{refused:?}");
        }
    }
}
