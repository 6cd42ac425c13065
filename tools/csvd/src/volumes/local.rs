//! One volume on this node, from its LUN to its mount.
//!
//! ```text
//!   open the LUN -> superblock is this volume's -> heartbeat -> attach to the coordinator -> mount
//! ```
//! Whatever fails is tried again; `volume state` says what is missing.
//!
//! **Invariant:** all I/O of the mount and the coordinator passes the gate of this node's lease; only the heartbeat, on a
//! queue of its own, does not.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use api::Error;
use blockio::{BlockDevice, PathDevice, Route, Ways};
use csvfs::format::layout;
use csvfs::node::{BadRange, Node, NodeParams};
use csvfs_fuse::{Mount, MountOptions};
use lockmgr::cluster::VolumeRecord;
use lockmgr::{Epoch, VolumeId};
use tokio::sync::watch;

use super::host::Host;
use super::status::{Code, State, StatusCell};
use crate::clients::Client;
use crate::core::Core;
use crate::membership::{LunBeats, Unsuspected};
use crate::redirect::Road;
use crate::router::Router;
use crate::view;

/// Pause before another attempt.
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Longest time that a coordinator waits for the LUN to be opened here.
const LUN_WITHIN: Duration = Duration::from_secs(10);

/// Longest time to wait for a coordinator when the mount goes: it may have ended before us.
const DETACH_WITHIN: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug)]
pub(crate) struct LocalVolume {
    pub(crate) id: VolumeId,
    pub(crate) name: String,
    pub(crate) status: StatusCell,
    pub(crate) host: Arc<Host>,
    lun: watch::Sender<Option<Lun>>,
    mounted: Mutex<Option<Mounted>>,
    leaving: AtomicBool,
}

#[derive(Clone)]
struct Lun {
    /// Declared first: it goes first, while the way that it takes is still there.
    path: Arc<PathDevice>,
    road: Arc<Road>,
    _beats: Arc<LunBeats>,
}

impl std::fmt::Debug for Lun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lun")
    }
}

#[derive(Debug)]
struct Mounted {
    node: Arc<Node>,
    mount: Mount,
    serial: u64,
}

impl LocalVolume {
    pub(super) fn new(id: VolumeId, name: &str) -> Arc<Self> {
        Arc::new(Self {
            id,
            name: name.to_owned(),
            status: StatusCell::new(),
            host: Host::new(),
            lun: watch::Sender::new(None),
            mounted: Mutex::new(None),
            leaving: AtomicBool::new(false),
        })
    }

    /// The LUN by whichever way leads to it, behind the gate of the lease, as soon as it is open.
    pub(super) async fn device(&self) -> Result<Arc<dyn BlockDevice>, Error> {
        let mut watch = self.lun.subscribe();
        let opened = tokio::time::timeout(LUN_WITHIN, watch.wait_for(Option::is_some)).await;
        match opened {
            Ok(Ok(lun)) => Ok(Arc::clone(&lun.as_ref().expect("waited for it").path) as Arc<dyn BlockDevice>),
            _ => Err(Error::failed(format!(
                "the LUN of {} is not open: {}",
                self.name,
                self.status.get().reason
            ))),
        }
    }

    /// The ways to the LUN, once it is open.
    pub(crate) fn path(&self) -> Option<Arc<PathDevice>> {
        self.lun.borrow().as_ref().map(|lun| Arc::clone(&lun.path))
    }

    /// Whether this node reaches the LUN without a peer now.
    pub(crate) fn is_direct(&self) -> bool {
        self.path().is_some_and(|path| path.status().route == Route::Direct)
    }

    /// Why no way leads to the LUN now, if so.
    pub(crate) fn no_way(&self) -> Option<String> {
        let status = self.path()?.status();
        (status.route == Route::Closed).then_some(status.reason)
    }

    /// This node's part in finding the ways, once the LUN is open.
    pub(crate) fn road(&self) -> Option<Arc<Road>> {
        self.lun.borrow().as_ref().map(|lun| Arc::clone(&lun.road))
    }

    /// The node library's side of the mount.
    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|it| Arc::clone(&it.node))
    }

    /// The node library's side of the mount, or an error that says why there is none.
    pub(crate) fn node_or_why(&self) -> Result<Arc<Node>, Error> {
        self.node().ok_or_else(|| {
            Error::conflict(format!(
                "volume {} is not usable on this node: {}",
                self.name,
                self.status.get().reason
            ))
            .hint("`csvctl volume state` shows what is missing")
        })
    }

    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Acquire)
    }

    /// The volume is no longer in the records.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
        self.host.settle_soon();
    }

    /// Unmounts and detaches.
    pub(super) async fn unmount(self: &Arc<Self>, core: &Arc<Core>) {
        self.status.set(State::Paused(Code::Leaving), "the node is leaving the volume");
        let Some(mounted) = self.mounted.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        let serial = mounted.serial;
        let ended = tokio::task::spawn_blocking(move || {
            let Mounted { node, mount, .. } = mounted;
            // Its grants go back also when the mount does not end in order: only then may others be told that it is gone.
            let unmounted = mount.unmount().map_err(|error| error.to_string());
            let detached = node.detach_within(DETACH_WITHIN).map_err(|error| error.to_string());
            unmounted.and(detached)
        });
        match ended.await {
            Ok(Ok(())) => tracing::info!(volume = self.name, "unmounted"),
            Ok(Err(error)) => tracing::warn!(volume = self.name, error, "not unmounted in order"),
            Err(error) => tracing::warn!(volume = self.name, %error, "not unmounted in order"),
        }
        core.clients.remove(self.id, serial);
    }

    fn set_status(&self, core: &Core, state: State, reason: &str) {
        if self.status.set(state, reason) {
            tracing::info!(
                volume = self.name,
                state = state.word(),
                code = state.code(),
                reason,
                "volume state"
            );
            core.pulse.beat();
        }
    }
}

/// Opens, attaches and mounts; tries again until it works or the volume is gone.
pub(super) async fn run(core: Arc<Core>, volume: Arc<LocalVolume>) {
    loop {
        if volume.is_leaving() {
            volume.unmount(&core).await;
            return;
        }
        match bring_up(&core, &volume).await {
            Ok(()) => break,
            Err((code, error)) => volume.set_status(&core, State::Paused(code), &error.message),
        }
        tokio::select! {
            () = core.stop.cancelled() => return,
            () = tokio::time::sleep(AGAIN_AFTER) => {}
        }
    }
    volume.set_status(&core, State::Direct, "mounted; file data goes straight to the LUN");
}

async fn bring_up(core: &Arc<Core>, volume: &Arc<LocalVolume>) -> Result<(), (Code, Error)> {
    let state = core.state();
    let epoch = core.epoch().ok_or_else(|| (Code::Starting, Error::failed("the node has not joined yet")))?;
    let record = view::volume(&state, &volume.name).map_err(|error| (Code::Leaving, error))?;
    if volume.lun.borrow().is_none() {
        let lun = open_lun(core, record, epoch).await.map_err(|error| (Code::NoLun, error))?;
        volume.lun.send_replace(Some(lun));
    }
    let device = volume.device().await.map_err(|error| (Code::NoLun, error))?;
    let right = volume.road().map(|road| road.right()).transpose().map_err(|error| (Code::NoLun, error))?;
    let (node, serial) = attach(core, record, device).await.map_err(|error| (Code::NoCoordinator, error))?;
    if let Some(right) = right {
        node.set_right(Arc::new(Unsuspected::new(right, &core.timing)));
    }
    let mount = match mount(core, record, &node).await {
        Ok(mount) => mount,
        Err(error) => {
            drop(tokio::task::spawn_blocking(move || node.detach()).await);
            core.clients.remove(record.id, serial);
            return Err((Code::NoMount, error));
        }
    };
    let mounted = Mounted { node, mount, serial };
    tracing::info!(volume = volume.name, serial = mounted.serial, "mounted");
    *volume.mounted.lock().unwrap_or_else(PoisonError::into_inner) = Some(mounted);
    Ok(())
}

async fn open_lun(core: &Arc<Core>, record: &VolumeRecord, epoch: Epoch) -> Result<Lun, Error> {
    let (core, record) = (Arc::clone(core), record.clone());
    let opening = move || {
        let road = Road::new(&core, &record, epoch);
        let path = PathDevice::open(Arc::clone(&road) as Arc<dyn Ways>)
            .map_err(|error| Error::failed(error).during(format!("opening the LUN of {}", record.name)))?;
        let path = Arc::new(path);
        let suspecting = Arc::downgrade(&path);
        let beats = LunBeats::start(
            &core,
            epoch,
            (layout::HEARTBEAT_OFFSET, record.id),
            Arc::clone(&road),
            move |error| {
                if let Some(path) = suspecting.upgrade() {
                    path.suspect(error.clone());
                }
            },
        )?;
        Ok(Lun { path, road, _beats: Arc::new(beats) })
    };
    tokio::task::spawn_blocking(opening).await.map_err(Error::failed)?
}

async fn attach(
    core: &Arc<Core>,
    record: &VolumeRecord,
    device: Arc<dyn BlockDevice>,
) -> Result<(Arc<Node>, u64), Error> {
    let serial = core.clients.new_serial();
    let params = NodeParams {
        device,
        link: Arc::new(Router::new(core)),
        client: core.client(serial),
        volume: record.id,
        term: record.term,
        name: format!("mount on {}", core.config.name),
    };
    let attached = tokio::task::spawn_blocking(move || Node::attach(params)).await.map_err(Error::failed)?;
    let node = attached
        .map_err(|error| Error::failed(error).during(format!("attaching to volume {}", record.name)))?;
    core.clients.add(record.id, serial, Client::Mount(Arc::downgrade(&node)));
    tell_of_bad_ranges(core, record, &node);
    // Who was appointed while this client could not be told yet: the new coordinator waits for it.
    let state = core.state();
    if let Some(now) = view::volume_by_id(&state, record.id).filter(|now| now.term != record.term) {
        core.clients.announce(now.id, now.term, now.owner);
    }
    Ok((node, serial))
}

/// A place of the LUN that fails is an event: it names the file, so that somebody can restore it.
fn tell_of_bad_ranges(core: &Arc<Core>, record: &VolumeRecord, node: &Node) {
    let (core, volume) = (Arc::downgrade(core), record.name.clone());
    node.on_bad_range(move |bad| {
        let Some(core) = core.upgrade() else { return };
        let (verb, BadRange { ino, offset, length, why, .. }) =
            (if bad.write { "written" } else { "read" }, &bad);
        let text =
            format!("bytes {offset} to {} of inode {ino} cannot be {verb}: {why}", offset + length - 1);
        core.note("volume.bad_range", &volume, text);
    });
}

async fn mount(core: &Arc<Core>, record: &VolumeRecord, node: &Arc<Node>) -> Result<Mount, Error> {
    let point = core.config.mount_point(&record.name);
    let (node, name) = (Arc::clone(node), record.name.clone());
    let mounting = move || {
        std::fs::create_dir_all(&point)
            .map_err(|error| Error::failed(format!("making {}: {error}", point.display())))?;
        let options = MountOptions { volume: name, ..MountOptions::default() };
        csvfs_fuse::mount(node, &point, &options)
            .map_err(|error| Error::failed(error).during(format!("mounting on {}", point.display())))
    };
    tokio::task::spawn_blocking(mounting).await.map_err(Error::failed)?
}
