//! The ways from this process to a LUN: straight, or through the node's daemon, which knows how to go on.
//!
//! ```text
//!   csvfs File -> PathDevice -- direct -> gate -> LUN
//!                            \- detour -> gate -> NBD on blocks.sock -> csvd -> its own way
//! ```
//! **Invariant:** both ways lie behind the lease; a request that waited for a way asks for the right again.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use blockio::{
    BlockDevice, ConflictDevice, CutDevice, Detour, FileDevice, GatedDevice, IoError, NbdDevice, NbdOptions,
    OpenOptions, PathDevice, PathStatus, Permission, Switch, Tripwire, Ways, WriteRight, file_of_uri,
    open_uri,
};
use csvfs::Superblock;
use lockmgr::lease::LeaseReader;
use lockmgr::{Epoch, VolumeId};
use prost::Message;

use crate::config::{RunnerConfig, VolumeSpec, blocks_socket, luns_socket};
use crate::lun::{self, LunQuestion};

/// Requests of one VM in flight on one LUN.
const QUEUE_DEPTH: u32 = 128;

/// A way to the LUN behind the lease.
pub(crate) type Gate = GatedDevice<Arc<dyn BlockDevice>>;

/// What the node's daemon orders about a LUN, as a push of service `PATHS`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct PathOrder {
    /// Id of the volume.
    #[prost(bytes = "vec", tag = "1")]
    pub volume: Vec<u8>,
    /// Go through the daemon, by hand of an administrator.
    #[prost(bool, tag = "2")]
    pub redirected: bool,
    /// The direct path is cut, for a rehearsal.
    #[prost(bool, tag = "3")]
    pub cut: bool,
}

/// All gates of the process, to be asked again when the lease was renewed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gates(Arc<Mutex<Vec<Weak<Gate>>>>);

impl Gates {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Gate>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, gate: &Arc<Gate>) {
        let mut gates = self.lock();
        gates.retain(|gate| gate.strong_count() > 0);
        gates.push(Arc::downgrade(gate));
    }

    /// Those that are there now.
    pub(crate) fn all(&self) -> Vec<Arc<Gate>> {
        self.lock().iter().filter_map(Weak::upgrade).collect()
    }
}

/// The device of one volume, and how its orders are followed.
pub(crate) struct Path {
    device: Arc<PathDevice>,
    cut: Switch,
}

impl Path {
    /// Opens the LUN by the way that leads to it.
    pub(crate) fn open(
        config: &RunnerConfig,
        spec: &VolumeSpec,
        lease: &LeaseReader,
        gates: &Gates,
        wire: &Arc<Tripwire>,
    ) -> Result<Arc<Self>, IoError> {
        let cut = Switch::default();
        let road = Road {
            spec: spec.clone(),
            serial: config.client_serial,
            asks: config.own_user.is_some(),
            epoch: Epoch(config.node_epoch),
            lease: lease.clone(),
            gates: gates.clone(),
            cut: cut.clone(),
            wire: Arc::clone(wire),
        };
        let device = Arc::new(PathDevice::open(Arc::new(road))?);
        Ok(Arc::new(Self { device, cut }))
    }

    pub(crate) fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device) as Arc<dyn BlockDevice>
    }

    /// Follows an order, without waiting for what comes of it.
    pub(crate) fn follow(&self, order: &PathOrder) {
        self.cut.set(order.cut);
        self.device.order_redirected(order.redirected);
    }
}

/// Finds the ways.
struct Road {
    spec: VolumeSpec,
    serial: u64,
    /// This process cannot open LUNs: the daemon does.
    asks: bool,
    epoch: Epoch,
    lease: LeaseReader,
    gates: Gates,
    cut: Switch,
    /// Trips when the LUN refuses this node's writes: the VM ends (A2).
    wire: Arc<Tripwire>,
}

impl Road {
    /// The LUN must be the one that the records mean: a path may lead to another one after a reboot.
    fn check(&self, device: &dyn BlockDevice) -> Result<(), IoError> {
        let (lun, spec) = (&self.spec.lun_uri, &self.spec);
        let found = Superblock::read(device).map_err(|error| match error {
            csvfs::VolumeError::Io { source, .. } => source,
            other => IoError::Corrupt(format!("the LUN {lun} does not hold volume {}: {other}", spec.name)),
        })?;
        if found.volume == VolumeId(spec.id) {
            return Ok(());
        }
        Err(IoError::Corrupt(format!(
            "the LUN {lun} holds volume {} ({}), not {} ({})",
            found.name, found.volume, spec.name, spec.id
        )))
    }

    fn right(&self) -> Arc<dyn WriteRight> {
        self.wire.guard(Arc::new(self.lease.clone().right_of(self.epoch)))
    }

    fn gate(&self, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        let gate = Arc::new(GatedDevice::new(device, self.right()));
        self.gates.add(&gate);
        gate
    }

    /// The LUN as the daemon has opened it.
    fn ask(&self, options: OpenOptions) -> Result<Arc<dyn BlockDevice>, IoError> {
        let (uri, socket) = (&self.spec.lun_uri, luns_socket(&self.spec.node_socket));
        let lun = lun::ask(&socket, LunQuestion { volume: self.spec.id, serial: self.serial });
        let lun = lun.map_err(|error| IoError::NotOpened { what: uri.clone(), why: error.to_string() })?;
        let path = file_of_uri(uri).unwrap_or(uri.as_ref());
        Ok(Arc::new(FileDevice::of_file(lun.file, path, options, lun.can_discard)?))
    }

    /// A session with the daemon. It begins when all that the former one of this process had begun is done.
    fn session(&self) -> Result<NbdDevice, IoError> {
        let socket: PathBuf = blocks_socket(&self.spec.node_socket);
        let stream = UnixStream::connect(&socket).map_err(|error| IoError::NotOpened {
            what: socket.display().to_string(),
            why: format!("{error} (is csvd running on this node?)"),
        })?;
        let export = format!("{}/{}", self.spec.id, self.serial);
        NbdDevice::over(
            stream,
            &export,
            &format!("{} through csvd", self.spec.name),
            // The daemon hands everything on to the LUN, by its own way or a peer's.
            NbdOptions { writes_outlive_server: true, ..NbdOptions::default() },
        )
    }
}

impl Ways for Road {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        let options = OpenOptions { queue_depth: QUEUE_DEPTH, ..OpenOptions::default() };
        let lun = if self.asks { self.ask(options)? } else { open_uri(&self.spec.lun_uri, options)? };
        let device = CutDevice::new(lun, self.cut.clone());
        self.check(&device)?;
        // The node's daemon has registered the node; processes of the same machine share its way.
        if device.reservations().is_some() {
            return Ok(self.gate(Arc::new(ConflictDevice::new(device, Arc::clone(&self.wire)))));
        }
        Ok(self.gate(Arc::new(device)))
    }

    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        let nbd = Arc::new(self.session()?);
        let device = self.gate(nbd.clone());
        let road = Self {
            spec: self.spec.clone(),
            lease: self.lease.clone(),
            gates: self.gates.clone(),
            cut: self.cut.clone(),
            wire: Arc::clone(&self.wire),
            ..*self
        };
        Ok(Box::new(ThroughDaemon { nbd, device, road }))
    }

    fn ended(&self) -> Option<String> {
        match self.right().check() {
            Permission::Revoked(reason) => Some(reason),
            Permission::Granted | Permission::Wait => None,
        }
    }

    fn changed(&self, status: &PathStatus) {
        tracing::warn!(volume = self.spec.name, route = ?status.route, reason = status.reason, "way to the LUN");
    }
}

struct ThroughDaemon {
    nbd: Arc<NbdDevice>,
    device: Arc<dyn BlockDevice>,
    road: Road,
}

impl Detour for ThroughDaemon {
    fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }

    fn via(&self) -> String {
        "the node's daemon".to_owned()
    }

    /// A further session begins only when this one has ended with all that it had begun. A daemon that has died is waited
    /// for; with its lease this process ends.
    fn settle(&self) -> Result<(), IoError> {
        self.nbd.abort();
        self.road.session().map(drop)
    }
}
