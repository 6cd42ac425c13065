//! A volume with its coordinator and mounts in one process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use blockio::{BlockDevice, FileDevice, OpenOptions};
use csvfs::local::{LocalLink, LocalPushes};
use csvfs::node::{Node, NodeParams};
use csvfs::{Coordinator, CreateParams, OpenParams, Volume};
use csvfs_fuse::{Mount, MountError, MountOptions, mount};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term, VolumeId};
use tempfile::TempDir;
use uuid::Uuid;

const LUN_BYTES: u64 = 2 << 30;
/// Programs of a test have closed their files, or are to be told at once that they cannot go on.
const PATIENCE: Duration = Duration::from_millis(1);
const TERM: Term = Term(1);

/// Whether this machine can mount at all; says so when not.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn can_mount() -> bool {
    let possible = Path::new("/dev/fuse").exists() && rustix::process::geteuid().is_root();
    if !possible {
        eprintln!("skipped: needs /dev/fuse and root");
    }
    possible
}

/// A volume on a sparse file. Fields are dropped in their order: mounts, nodes, coordinator, folders.
pub(crate) struct World {
    mounts: Vec<Mounted>,
    link: Arc<LocalLink>,
    pushes: Arc<LocalPushes>,
    device: Arc<dyn BlockDevice>,
    volume: VolumeId,
    serial: AtomicU64,
    /// Mountpoints. Its path is short: a socket's name on a mount must fit into 108 bytes.
    mountpoints: TempDir,
    /// The LUN.
    _folder: TempDir,
}

struct Mounted {
    mount: Option<Mount>,
    node: Arc<Node>,
}

impl World {
    pub(crate) fn new() -> Self {
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for the test");
        let mountpoints = tempfile::Builder::new().prefix("m").tempdir_in("/tmp").expect("mountpoints");
        let path = folder.path().join("lun");
        drop(FileDevice::create(&path, LUN_BYTES).expect("a LUN"));
        let lun = FileDevice::open(&path, OpenOptions::default()).expect("a LUN");
        let device: Arc<dyn BlockDevice> = Arc::new(lun);
        let params = CreateParams { name: "vol".into(), cluster: ClusterId(Uuid::new_v4()), force: false };
        let volume = Volume::create(device.clone(), params).expect("an empty LUN takes a volume").volume;
        let pushes = LocalPushes::new();
        let who = (NodeId(1), Epoch(1), TERM);
        let coordinator = Coordinator::open(OpenParams::new(device.clone(), volume, who, pushes.clone()));
        let link = LocalLink::to(coordinator.expect("a coordinator"));
        Self {
            mounts: Vec::new(),
            link,
            pushes,
            device,
            volume,
            serial: AtomicU64::new(1),
            mountpoints,
            _folder: folder,
        }
    }

    /// One more node with its own mount.
    pub(crate) fn mount(&mut self) -> PathBuf {
        let serial = self.serial.fetch_add(1, Ordering::SeqCst);
        let client = ClientId { node: NodeId(1), epoch: Epoch(1), serial };
        let params = NodeParams {
            device: self.device.clone(),
            link: self.link.clone(),
            client,
            volume: self.volume,
            term: TERM,
            name: format!("node {serial}"),
        };
        let node = Node::attach(params).expect("the coordinator takes a new client");
        self.pushes.add(client, &node);
        let mountpoint = self.mountpoints.path().join(serial.to_string());
        std::fs::create_dir(&mountpoint).expect("a mountpoint");
        let options = MountOptions { volume: "vol".into(), patience: PATIENCE, ..MountOptions::default() };
        let mount = mount(node.clone(), &mountpoint, &options).expect("a mount");
        self.mounts.push(Mounted { mount: Some(mount), node });
        mountpoint
    }

    /// The node of a mount.
    pub(crate) fn node(&self, number: usize) -> &Arc<Node> {
        &self.mounts[number].node
    }

    /// Tries one more mount of the first node.
    pub(crate) fn mount_at(&self, mountpoint: &Path) -> Result<Mount, MountError> {
        mount(self.mounts[0].node.clone(), mountpoint, &MountOptions::default())
    }

    /// Unmounts one, if that was not done before.
    pub(crate) fn unmount(&mut self, number: usize) {
        let mount = self.mounts[number].mount.take();
        mount.map_or(Ok(()), Mount::unmount).expect("unmount");
    }

    /// Unmounts everything and checks that the volume is sound.
    pub(crate) fn end(mut self) {
        (0..self.mounts.len()).for_each(|number| self.unmount(number));
        let report = self.mounts[0].node.check().expect("a check");
        assert!(report.problems.is_empty(), "{:?}", report.problems);
        for mounted in self.mounts.drain(..) {
            mounted.node.detach().expect("detach");
        }
        self.link.set(None).expect("a coordinator").close().expect("an orderly close");
    }
}
