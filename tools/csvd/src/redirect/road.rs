//! This node's ways to one LUN: the device itself, and the peers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::Error;
use blockio::{
    BlockDevice, ConflictDevice, CutDevice, Detour, IoError, NbdDevice, NbdOptions, OpenOptions, PathStatus,
    Permission, Reservations, Route, Ways, WriteRight, open_uri,
};
use csvfs::format::superblock::Superblock;
use lockmgr::clock::boottime_ms;
use lockmgr::cluster::{ClusterState, Member, VolumeRecord};
use lockmgr::fence::ReservationKey;
use lockmgr::{Epoch, Millis, NodeId, VolumeId};

use crate::core::Core;
use crate::membership::Place;
use crate::messages::{NodeOp, SessionOf};
use crate::redirect::protected::protected;
use crate::volumes::status::unix_ms;
use crate::{forward, view};

/// Longest time for the handshake with a peer that may be gone.
const CONNECT_WITHIN: Duration = Duration::from_secs(1);
/// Longest wait for a peer to say that a session has ended, before it is asked again.
const SETTLE_WITHIN: Duration = Duration::from_secs(2);

/// Longest transfer that a peer is asked for at once. A MiB in one piece is at the disk, at the cipher or on the way, one
/// after the other; in four these go on at the same time.
const PIECE_BYTES_MAX: u32 = 256 << 10;

/// See the module.
pub(crate) struct Road {
    core: Arc<Core>,
    volume: VolumeId,
    name: String,
    lun_uri: String,
    epoch: Epoch,
    place: Place,
    /// Rank: a leaf.
    seen: Mutex<Seen>,
}

struct Seen {
    /// The direct way as it was opened last; peers are served over it while it is the one in use.
    direct: Option<Arc<dyn BlockDevice>>,
    route: Route,
    since_ms: u64,
    /// When requests began to wait, on the clock that counts suspend.
    closed_at: Option<Millis>,
    /// Whether any way was open before.
    begun: bool,
}

impl Road {
    pub(crate) fn new(core: &Arc<Core>, record: &VolumeRecord, epoch: Epoch) -> Arc<Self> {
        let seen =
            Seen { direct: None, route: Route::Closed, since_ms: unix_ms(), closed_at: None, begun: false };
        Arc::new(Self {
            core: Arc::clone(core),
            volume: record.id,
            name: record.name.clone(),
            lun_uri: record.lun_uri.clone(),
            epoch,
            place: Place::new(core, record, epoch),
            seen: Mutex::new(seen),
        })
    }

    /// The LUN without the gate of the lease, behind the switch that rehearses a lost path.
    fn open_raw(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        let device = open_uri(&self.lun_uri, OpenOptions::default())?;
        let device = CutDevice::new(device, self.core.lun_cut.clone());
        if self.place.is_reserved() {
            return Ok(Arc::new(ConflictDevice::new(device, Arc::clone(self.place.wire()))));
        }
        Ok(Arc::new(device))
    }

    /// The direct way past the gate and the tripwire: for the trial of a fence alone.
    pub(crate) fn trial_way(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        let device = open_uri(&self.lun_uri, OpenOptions::default())?;
        self.check(&*device)?;
        Ok(device)
    }

    /// The same, once it has proven to be the right LUN, and this node has its place there: nothing is written before.
    pub(crate) fn open_held(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        let raw = self.open_raw()?;
        self.check(&*raw)?;
        self.place.hold(&*raw)?;
        Ok(raw)
    }

    /// This node's place on the LUN.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// What the gate of every way asks: whether this node may use the LUN.
    pub(crate) fn right(&self) -> Result<Arc<dyn WriteRight>, Error> {
        self.core.membership.lease.right(&self.core.config, self.epoch, self.place.wire())
    }

    /// The volume.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// This node's key and the LUN's reservations, by the direct way.
    pub(crate) fn reservations(&self) -> Result<(ReservationKey, Arc<dyn Reservations>), String> {
        let key = self.place.key().ok_or("the volume is not fenced by reservations")?;
        let device = self.direct_for_peers()?;
        Ok((key, device.reservations().ok_or("the way to the LUN has no reservations")?))
    }

    /// The direct way, proven to work now; an error when this node goes through a peer itself.
    pub(crate) fn direct_for_peers(&self) -> Result<Arc<dyn BlockDevice>, String> {
        let direct = {
            let seen = self.seen();
            seen.direct.clone().filter(|_| seen.route == Route::Direct)
        };
        let direct = direct.ok_or("this node does not reach the LUN directly")?;
        Superblock::read(&*direct).map_err(|error| format!("this node does not reach the LUN: {error}"))?;
        Ok(direct)
    }

    /// Since when the way is the one that it is, in milliseconds since 1970.
    pub(crate) fn since_ms(&self) -> u64 {
        self.seen().since_ms
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The LUN must be the one that the records mean: a path may lead to another one after a reboot.
    fn check(&self, device: &dyn BlockDevice) -> Result<(), IoError> {
        let found = Superblock::read(device).map_err(|error| match error {
            csvfs::VolumeError::Io { source, .. } => source,
            other => IoError::Corrupt(format!("{}: {other}", self.lun_uri)),
        })?;
        if found.volume != self.volume {
            return Err(IoError::Corrupt(format!(
                "{} holds volume {}, not {} ({}): another LUN has this path on this node",
                self.lun_uri, found.volume, self.name, self.volume
            )));
        }
        if Some(found.cluster) != self.core.state().cluster {
            return Err(IoError::Corrupt(format!(
                "{} belongs to cluster {}: two clusters must not use one LUN",
                self.lun_uri, found.cluster
            )));
        }
        Ok(())
    }

    fn gate(&self, device: Arc<dyn BlockDevice>) -> Result<Arc<dyn BlockDevice>, IoError> {
        let gate = self.core.membership.lease.gate(&self.core.config, self.epoch, device, self.place.wire());
        gate.map(|gate| gate as Arc<dyn BlockDevice>).map_err(|error| self.not_opened(&error.message))
    }

    fn not_opened(&self, why: &str) -> IoError {
        IoError::NotOpened { what: format!("the LUN of {}", self.name), why: why.to_owned() }
    }

    fn through(&self, peer: &Member) -> Result<Box<dyn Detour>, String> {
        let stream = self.core.runtime.block_on(async {
            let stream = wire::connect_blocks(&peer.address, self.core.mesh.endpoint(), peer.id.0);
            tokio::time::timeout(CONNECT_WITHIN, stream).await
        });
        let stream = stream.map_err(|_| "it does not answer")?.map_err(|error| error.explain())?;
        let (stream, _) = protected(stream);
        let export = format!("{}/{}", self.volume, self.epoch);
        let what = format!("{} through {}", self.name, peer.name);
        // A peer hands everything on to the LUN.
        let options = NbdOptions {
            writes_outlive_server: true,
            piece_bytes_max: PIECE_BYTES_MAX,
            ..NbdOptions::default()
        };
        let nbd = NbdDevice::over(stream, &export, &what, options);
        let nbd = Arc::new(nbd.map_err(|error| error.to_string())?);
        let device = self.gate(nbd.clone()).map_err(|error| error.to_string())?;
        Ok(Box::new(Through {
            core: Arc::clone(&self.core),
            nbd,
            device,
            peer: (peer.id, peer.epoch),
            name: peer.name.clone(),
            volume: self.volume,
            epoch: self.epoch,
        }))
    }

    /// The peers that may reach the LUN: those that are heard, the owner of the volume before the others.
    fn peers<'a>(&self, state: &'a ClusterState) -> Vec<&'a Member> {
        let owner = view::volume_by_id(state, self.volume).map(|record| record.owner);
        let mut peers: Vec<_> = state
            .members
            .values()
            .filter(|member| member.id != self.core.me && view::is_up(state, member.id, member.epoch))
            .collect();
        peers.sort_by_key(|member| {
            (!self.core.membership.hears(member.id, member.epoch), Some(member.id) != owner, member.id)
        });
        peers
    }
}

impl std::fmt::Debug for Road {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Road").field("volume", &self.name).finish_non_exhaustive()
    }
}

impl Ways for Road {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        let device = self.gate(self.open_held()?)?;
        self.seen().direct = Some(Arc::clone(&device));
        Ok(device)
    }

    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        let state = self.core.state();
        let mut refusals = Vec::new();
        for peer in self.peers(&state) {
            match self.through(peer) {
                Ok(detour) => return Ok(detour),
                Err(why) => refusals.push(format!("{}: {why}", peer.name)),
            }
        }
        let why = if refusals.is_empty() { "no other node is up".to_owned() } else { refusals.join("; ") };
        Err(self.not_opened(&why))
    }

    fn ended(&self) -> Option<String> {
        match self.right().ok()?.check() {
            Permission::Revoked(reason) => Some(reason),
            Permission::Granted | Permission::Wait => None,
        }
    }

    fn changed(&self, status: &PathStatus) {
        let (news, held_ms) = {
            let mut seen = self.seen();
            if status.route == Route::Closed {
                seen.closed_at.get_or_insert_with(boottime_ms);
            }
            let news = seen.begun && seen.route != status.route;
            if seen.route != status.route {
                seen.since_ms = unix_ms();
            }
            seen.route = status.route;
            seen.begun |= status.route != Route::Closed;
            let opened = status.route != Route::Closed;
            let closed_at = if opened { seen.closed_at.take() } else { None };
            (news, closed_at.map_or(0, |at| boottime_ms().0.saturating_sub(at.0)))
        };
        let node = &self.core.config.name;
        match status.route {
            Route::Detour => self.core.note(
                "volume_redirected",
                &self.name,
                format!("{node} reaches it {}; I/O waited {held_ms} ms", status.reason),
            ),
            Route::Direct if news => self.core.note(
                "volume_direct",
                &self.name,
                format!("{node} reaches it directly again; I/O waited {held_ms} ms"),
            ),
            Route::Direct => {}
            Route::Closed => {
                tracing::warn!(volume = self.name, reason = status.reason, "I/O on the LUN waits");
            }
        }
        self.core.pulse.beat();
    }
}

/// A way through a peer.
struct Through {
    core: Arc<Core>,
    nbd: Arc<NbdDevice>,
    device: Arc<dyn BlockDevice>,
    peer: (NodeId, Epoch),
    name: String,
    volume: VolumeId,
    epoch: Epoch,
}

impl Detour for Through {
    fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    fn via(&self) -> String {
        self.name.clone()
    }

    fn settle(&self) -> Result<(), IoError> {
        self.nbd.abort();
        let (peer, peer_epoch) = self.peer;
        if view::is_over(&self.core.state(), peer, peer_epoch) {
            return Ok(());
        }
        let session = SessionOf {
            volume: self.volume.0.as_bytes().to_vec(),
            node: self.core.me.0.into(),
            epoch: self.epoch.0,
        };
        let asked = forward::ask(&self.core, peer, NodeOp::EndSession(session));
        let answer = self.core.runtime.block_on(async { tokio::time::timeout(SETTLE_WITHIN, asked).await });
        let why = match answer {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => error.message,
            Err(_) => "it does not answer".to_owned(),
        };
        Err(IoError::Lost { what: self.name.clone(), why })
    }
}
