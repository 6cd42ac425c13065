//! The volumes on this node: LUN, heartbeat, mount, and the coordinator when this node owns it.
//!
//! ```text
//!   records --> watch() --> per volume:  local.rs   LUN open -> superblock fits -> heartbeat -> attached -> mounted
//!                                        host.rs    coordinator open exactly while the record says so
//!   balance.rs  which coordinator should move, by load      balancing.rs  asks, and has it moved
//!   moves.rs    planned hand-over      leave.rs   the end of the daemon      create.rs   formatting a LUN
//! ```
//!
//! **Invariant:** a coordinator is opened only for the term that the record gives to this node in this epoch.

mod balance;
pub(crate) mod balancing;
pub(crate) mod create;
mod fence_choice;
mod host;
mod leave;
mod local;
pub(crate) mod moves;
mod phases;
pub(crate) mod status;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lockmgr::cluster::ClusterState;
use lockmgr::{NodeId, Term, VolumeId};

pub(crate) use host::Host;
pub(crate) use leave::leave;
pub(crate) use local::LocalVolume;

use crate::core::Core;
use crate::view;

/// The volumes that this node knows.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// Rank: a leaf; nothing is called under it.
    table: Mutex<HashMap<VolumeId, Arc<LocalVolume>>>,
}

impl Volumes {
    /// The volume on this node.
    pub(crate) fn get(&self, id: VolumeId) -> Option<Arc<LocalVolume>> {
        self.lock().get(&id).cloned()
    }

    /// Where the volume's coordinator lives while it is here.
    pub(crate) fn host(&self, id: VolumeId) -> Option<Arc<Host>> {
        self.lock().get(&id).map(|volume| Arc::clone(&volume.host))
    }

    pub(crate) fn all(&self) -> Vec<Arc<LocalVolume>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VolumeId, Arc<LocalVolume>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes this node's volumes follow the records, until the daemon ends.
pub(crate) async fn run(core: Arc<Core>) {
    let mut state = core.cluster.watch();
    let mut owners: HashMap<VolumeId, (NodeId, Term)> = HashMap::new();
    loop {
        let now = state.borrow_and_update().clone();
        follow(&core, &now, &mut owners);
        tokio::select! {
            () = core.done.cancelled() => return,
            changed = state.changed() => if changed.is_err() { return },
        }
    }
}

fn follow(core: &Arc<Core>, state: &Arc<ClusterState>, owners: &mut HashMap<VolumeId, (NodeId, Term)>) {
    for record in state.volumes.values() {
        let volume = core.volumes.get(record.id).unwrap_or_else(|| appear(core, record.id, &record.name));
        let reign = (record.owner, record.term);
        if owners.insert(record.id, reign) != Some(reign) {
            core.clients.announce(record.id, record.term, record.owner);
        }
        volume.host.settle_soon();
    }
    let gone: Vec<_> = core
        .volumes
        .all()
        .into_iter()
        .filter(|volume| view::volume_by_id(state, volume.id).is_none())
        .collect();
    for volume in gone {
        core.volumes.lock().remove(&volume.id);
        volume.leave();
    }
}

fn appear(core: &Arc<Core>, id: VolumeId, name: &str) -> Arc<LocalVolume> {
    let volume = LocalVolume::new(id, name);
    core.volumes.lock().insert(id, Arc::clone(&volume));
    core.runtime.spawn(host::run(Arc::clone(core), Arc::clone(&volume)));
    core.runtime.spawn(local::run(Arc::clone(core), Arc::clone(&volume)));
    volume
}
