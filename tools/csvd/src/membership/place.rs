//! This node's place on a LUN with reservations: its key, and the end of its right to use the LUN.
//!
//! ```text
//!   first way to the LUN: enroll -> ask the quorum: still in good standing?  no: key taken back, LUN not used
//!   later ways, and each heartbeat: is the key still there?                  no: all I/O of the volume stops, for good
//! ```
//! **Invariant:** an incarnation enrolls only as long as it has not been confirmed on this LUN; a key that is gone after that
//! is not registered again (A2, A3). A fence that begins after the quorum has answered sees the key.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blockio::{BlockDevice, IoError, Reservations, Tripwire, despite_attentions};
use lockmgr::Epoch;
use lockmgr::cluster::{FenceKind, VolumeRecord};
use lockmgr::fence::{EnrollError, ReservationKey, Standing, enroll, look, reserve_again, withdraw};

use super::forgotten;
use crate::core::Core;
use crate::view;

/// See the module. For other kinds of fences it does nothing.
pub(crate) struct Place {
    core: Arc<Core>,
    volume: String,
    epoch: Epoch,
    /// None for other kinds of fences.
    key: Option<ReservationKey>,
    wire: Arc<Tripwire>,
    /// Whether the quorum has confirmed this incarnation with its key on the LUN. Rank: a leaf, held over the LUN's answers.
    confirmed: Mutex<bool>,
    /// Held over each heartbeat on the LUN, and over a trial of the fence: no heartbeat is sent while the key is another.
    /// Rank: above `confirmed`.
    turn: Mutex<()>,
}

impl Place {
    pub(crate) fn new(core: &Arc<Core>, record: &VolumeRecord, epoch: Epoch) -> Self {
        let by_reservation = record.fence_kind == FenceKind::Reservation;
        let key = core.state().cluster.filter(|_| by_reservation);
        let key = key.and_then(|cluster| ReservationKey::new(cluster, core.me, epoch));
        let (teller, volume) = (Arc::downgrade(core), record.name.clone());
        let wire = Tripwire::new(move |reason| {
            if let Some(core) = teller.upgrade() {
                cut_off(&core, &volume, reason);
            }
        });
        Self {
            core: Arc::clone(core),
            volume: record.name.clone(),
            epoch,
            key,
            wire,
            confirmed: Mutex::new(false),
            turn: Mutex::default(),
        }
    }

    /// Trips when this node is cut off from the LUN.
    pub(crate) fn wire(&self) -> &Arc<Tripwire> {
        &self.wire
    }

    /// Whether the LUN decides who may write.
    pub(crate) fn is_reserved(&self) -> bool {
        self.key.is_some()
    }

    /// Why this node may not use the LUN any more, when it may not.
    pub(crate) fn lost(&self) -> Option<String> {
        self.wire.tripped().map(str::to_owned)
    }

    /// This node's key on the LUN, for fences.
    pub(crate) fn key(&self) -> Option<ReservationKey> {
        self.key
    }

    /// Takes the place, or makes sure that it is still there. Blocks; for the direct way to the LUN alone.
    pub(crate) fn hold(&self, device: &dyn BlockDevice) -> Result<(), IoError> {
        let Some(key) = self.key else { return Ok(()) };
        if let Some(reason) = self.lost() {
            return Err(IoError::NotPermitted { reason });
        }
        let hand = device.reservations().ok_or_else(|| self.not_opened("the LUN has no reservations"))?;
        let mut confirmed = self.confirmed();
        if *confirmed {
            return self.look(&*hand, key);
        }
        enroll(&*hand, key).map_err(|error| self.not_enrolled(&error))?;
        self.confirm(&*hand, key)?;
        *confirmed = true;
        tracing::info!(volume = self.volume, key = format!("{:#018x}", key.raw()), "registered on the LUN");
        Ok(())
    }

    /// For a heartbeat, or a trial.
    pub(crate) fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a trial key stand in for this node's own while `cut` has a peer take it off; then enrolls again, as at first:
    /// the quorum has the last word (A3). The caller holds the turn, and no I/O takes the direct way.
    pub(crate) fn try_out(
        &self,
        hand: &dyn Reservations,
        cut: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), String> {
        let key = self.key.ok_or("the volume is not fenced by reservations")?;
        let mut confirmed = self.confirmed();
        // From here on the direct way is closed until the place is taken anew.
        *confirmed = false;
        let registered = despite_attentions(|| hand.register(key.for_trial().raw()));
        let outcome = registered.map_err(|error| error.to_string()).and_then(|()| cut());
        enroll(hand, key).map_err(|error| format!("not enrolled again: {error}"))?;
        self.confirm(hand, key).map_err(|error| error.to_string())?;
        *confirmed = true;
        outcome
    }

    /// Whether the key is still there, with each heartbeat (B4): a node that is cut off learns it also when it is idle.
    pub(crate) fn look_again(&self, device: &dyn BlockDevice) -> Result<(), IoError> {
        let (Some(key), true) = (self.key, *self.confirmed()) else { return Ok(()) };
        match device.reservations() {
            Some(hand) => self.look(&*hand, key),
            None => Ok(()),
        }
    }

    /// Takes this node's key off the LUN, when nothing of it writes any more.
    pub(crate) fn give_up(&self, device: &dyn BlockDevice) {
        let (Some(key), Some(hand)) = (self.key, device.reservations()) else { return };
        if let Err(error) = withdraw(&*hand, key) {
            tracing::warn!(volume = self.volume, %error, "this node's key stays on the LUN");
        }
    }

    fn look(&self, hand: &dyn Reservations, key: ReservationKey) -> Result<(), IoError> {
        let state = self.core.state();
        let seen = look(hand, key, |node, epoch| view::is_over(&state, node, epoch));
        for key in seen.iter().flat_map(|seen| &seen.returned) {
            let node = view::node_name(&state, key.node());
            let text =
                format!("the key of epoch {} of node {node} had come back, and was taken off", key.epoch());
            self.core.note("volume.key-returned", &self.volume, text);
        }
        match seen.map(|seen| seen.standing) {
            Ok(Standing::Good) => Ok(()),
            Ok(Standing::NotReserved) => {
                self.core.note(
                    "volume.reserved-again",
                    &self.volume,
                    "the LUN had lost its reservation".to_owned(),
                );
                reserve_again(hand, key).map_err(|error| self.not_enrolled(&error))
            }
            Ok(Standing::KeyGone) => {
                self.wire.trip(
                    "this node's key is gone from the LUN: it was cut off, or the SAN has forgotten its keys",
                );
                Err(IoError::NotPermitted { reason: self.lost().unwrap_or_default() })
            }
            Err(error) => Err(self.not_opened(&error.to_string())),
        }
    }

    /// The last word on whether this incarnation may use the LUN has the quorum, after the key is there.
    fn confirm(&self, hand: &dyn Reservations, key: ReservationKey) -> Result<(), IoError> {
        let asked = self.core.runtime.block_on(self.core.cluster.read());
        let state = asked.map_err(|error| self.not_opened(&error.to_string()))?;
        if view::is_up(&state, self.core.me, self.epoch) {
            return Ok(());
        }
        drop(withdraw(hand, key));
        let reason = format!("epoch {} of this node is over", self.epoch);
        self.wire.trip(&reason);
        Err(IoError::NotPermitted { reason })
    }

    fn not_enrolled(&self, error: &EnrollError) -> IoError {
        match error {
            EnrollError::Device(_) | EnrollError::NotKept => self.not_opened(&error.to_string()),
            EnrollError::Foreign { .. } | EnrollError::OtherType { .. } => {
                IoError::Corrupt(format!("the LUN of {}: {error}", self.volume))
            }
            EnrollError::Outlived { .. } => IoError::NotPermitted { reason: error.to_string() },
        }
    }

    fn not_opened(&self, why: &str) -> IoError {
        IoError::NotOpened { what: format!("the LUN of {}", self.volume), why: why.to_owned() }
    }

    fn confirmed(&self) -> MutexGuard<'_, bool> {
        self.confirmed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs where the end was noticed, perhaps on an I/O thread.
fn cut_off(core: &Arc<Core>, volume: &str, reason: &str) {
    tracing::error!(volume, reason, "cut off from the LUN: all I/O of the volume stops on this node");
    let text = format!("{}: {reason}; all its I/O on the volume has stopped", core.config.name);
    core.note("volume.cut-off", volume, text);
    core.pulse.beat();
    core.runtime.spawn(forgotten::consider(Arc::clone(core)));
}
