//! The fence of a reservation, tried out while the volume is in use.
//!
//! ```text
//!   I/O goes through a peer -> own key gives way to a trial key -> the peer takes that off the LUN -> a write must be refused
//!     -> enrolled again, with the quorum's word -> I/O goes straight again
//! ```
//! **Invariant:** during the trial nothing but the trial's own write takes the direct way. A fence of this node that comes
//! in between finds no key or the trial key, and the quorum then refuses the node its place (A3).

use std::sync::Arc;
use std::time::Duration;

use api::Error;
use blockio::{BlockDevice, PathDevice, Route, is_conflict};
use csvfs::format::layout;
use lockmgr::cluster::{ClusterState, VolumeRecord};
use lockmgr::fence::Cutter;
use lockmgr::{Epoch, NodeId, VolumeId};
use uuid::Uuid;

use super::Outcome;
use super::probe::{BLOCK, Found};
use crate::core::Core;
use crate::messages::{CutOff, NodeOp};
use crate::redirect::Road;
use crate::volumes::LocalVolume;
use crate::{forward, membership, view};

/// Longest time that a peer may take to take the trial key off.
const CUT_WITHIN: Duration = Duration::from_secs(15);
/// Nobody's block.
const REFUSED_AT: u64 = layout::TRIAL_OFFSET + layout::NODE_SLOTS * layout::BLOCK_BYTES;

/// Tries the fence of this node on one LUN.
pub(super) async fn run(
    core: &Arc<Core>,
    state: &ClusterState,
    record: &VolumeRecord,
    volume: &Arc<LocalVolume>,
) -> Found {
    let untried = |why: &str| {
        (
            Outcome::Warning,
            format!("reservation: this node is registered; the fence was not tried out: {why}"),
        )
    };
    if state.vms.values().any(|vm| vm.owner == core.me && view::runs(vm)) {
        return untried("VMs run here, which reach the LUN by themselves; try it when none does");
    }
    let peer =
        state.serving().find(|member| member.id != core.me && core.membership.hears(member.id, member.epoch));
    let Some(peer) = peer else { return untried("there is no other node") };
    let Some((path, road)) = volume.path().zip(volume.road()) else {
        return (Outcome::Failed, "the LUN is not open".to_owned());
    };
    let order = CutOff {
        volume: record.id.0.as_bytes().to_vec(),
        node: core.me.0.into(),
        epoch: 0,
        applied: state.applied,
    };
    let (trying, peer) = (Arc::clone(core), peer.id);
    let tried = tokio::task::spawn_blocking(move || aside(&path, || by_peer(&trying, &road, peer, order)));
    match tried.await.unwrap_or_else(|error| Some(Err(error.to_string()))) {
        Some(Ok(())) => (
            Outcome::Ok,
            "reservation: a peer took a key off, and the LUN refused the write after that".to_owned(),
        ),
        Some(Err(why)) => (Outcome::Failed, format!("reservation: {why}")),
        None => untried("I/O could not go through a peer meanwhile"),
    }
}

/// Has all I/O go through a peer during `trial`; nothing when it cannot.
fn aside<T>(path: &PathDevice, trial: impl FnOnce() -> T) -> Option<T> {
    let by_hand_before = path.status().by_hand;
    let outcome = (path.redirect_by_hand(true).route == Route::Detour).then(trial);
    if !by_hand_before {
        path.redirect_by_hand(false);
    }
    outcome
}

fn by_peer(core: &Arc<Core>, road: &Road, peer: NodeId, order: CutOff) -> Result<(), String> {
    let _turn = road.place().take_turn();
    let device = road.trial_way().map_err(|error| error.to_string())?;
    let hand = device.reservations().ok_or("the LUN has no reservations")?;
    road.place().try_out(&*hand, || {
        let asked = forward::ask(core, peer, NodeOp::CutTrial(order));
        let cut = core.runtime.block_on(async { tokio::time::timeout(CUT_WITHIN, asked).await });
        match cut {
            Ok(Ok(_)) => refused_write(&*device),
            Ok(Err(error)) => Err(format!("the peer has not taken the key off: {}", error.message)),
            Err(_) => Err("the peer has not answered".to_owned()),
        }
    })
}

/// The write that must not land.
fn refused_write(device: &dyn BlockDevice) -> Result<(), String> {
    match device.write_at(REFUSED_AT, &[0xff; BLOCK]) {
        Err(error) if is_conflict(&error) => Ok(()),
        Err(error) => Err(format!("the write failed in another way: {error}")),
        Ok(()) => Err("the LUN let a write of a node without a key through: it protects nothing".to_owned()),
    }
}

/// Takes the trial key of a node off a LUN. Epoch 0 is nobody's, so no other key goes with it.
pub(crate) async fn cut(core: &Arc<Core>, asked: CutOff) -> Result<(), Error> {
    let node = u16::try_from(asked.node).map(NodeId).map_err(|_| Error::usage("no such node"))?;
    let volume = Uuid::from_slice(&asked.volume).map_err(|_| Error::usage("no such volume"))?;
    let core = Arc::clone(core);
    let cutting =
        move || membership::own_path(&core, VolumeId(volume)).and_then(|path| path.cut(node, Epoch(0)));
    let cut = tokio::task::spawn_blocking(cutting).await.map_err(Error::failed)?;
    cut.map(drop).map_err(Error::failed)
}

#[cfg(test)]
mod tests {
    use blockio::SharedLun;

    use super::*;

    // Invariant A2: a LUN that lets the unregistered write is found, whatever it says about its keys.
    #[test]
    fn only_a_refused_write_counts_as_a_fence_that_works() {
        let lun = SharedLun::new(64 << 20);
        let (holder, other) = (lun.nexus(), lun.nexus());
        assert!(refused_write(&other).is_err_and(|why| why.contains("protects nothing")));
        let hand = holder.reservations().expect("there");
        hand.register(7).and_then(|()| hand.reserve(7)).expect("reserved");
        assert_eq!(refused_write(&other), Ok(()));
    }
}
