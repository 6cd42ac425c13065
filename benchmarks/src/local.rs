//! A volume with its coordinator and one node in this process, on a LUN in a file.

use std::path::Path;
use std::sync::Arc;

use blockio::{BlockDevice, FileDevice, ImageFile, IoBuf, IoOp};
use csvfs::local::{LocalLink, LocalPushes};
use csvfs::node::{Node, NodeParams};
use csvfs::{Coordinator, CreateParams, OpenParams, Volume};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term};
use uuid::Uuid;

type Failure = Box<dyn std::error::Error>;

/// See the module.
#[derive(Debug)]
pub struct LocalVolume {
    /// The LUN.
    pub device: Arc<FileDevice>,
    /// A client of the volume.
    pub node: Arc<Node>,
    _coordinator: Arc<Coordinator>,
}

impl LocalVolume {
    /// Makes a LUN of `bytes` bytes in a new file, a volume on it, and a client of that.
    ///
    /// # Errors
    /// When the file or the volume cannot be made.
    pub fn new(lun: &Path, bytes: u64) -> Result<Self, Failure> {
        let device = Arc::new(FileDevice::create(lun, bytes)?);
        let params =
            CreateParams { name: "bench".into(), cluster: ClusterId(Uuid::from_u128(1)), force: true };
        let volume = Volume::create(device.clone(), params)?.volume;
        let pushes = LocalPushes::new();
        let who = (NodeId(1), Epoch(1), Term(1));
        let coordinator = Coordinator::open(OpenParams::new(device.clone(), volume, who, pushes.clone()))?;
        let client = ClientId { node: NodeId(1), epoch: Epoch(1), serial: 1 };
        let link = LocalLink::to(coordinator.clone());
        let params =
            NodeParams { device: device.clone(), link, client, volume, term: Term(1), name: "bench".into() };
        let node = Node::attach(params)?;
        pushes.add(client, &node);
        Ok(Self { device, node, _coordinator: coordinator })
    }
}

/// Writes the first `bytes` of a device once, and flushes it.
///
/// # Errors
/// Those of the device.
pub fn write_once(device: &dyn BlockDevice, bytes: u64) -> Result<(), Failure> {
    let chunk = IoBuf::zeroed(4 << 20);
    let content: Vec<u8> = (0..chunk.len()).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect();
    chunk.copy_from(&content);
    for offset in (0..bytes).step_by(chunk.len()) {
        device.run(IoOp::Write { offset, buf: chunk.clone(), fua: false })?;
    }
    Ok(device.flush()?)
}

/// Makes a file of the volume `bytes` long, in one piece where the volume is fresh, and writes it once.
///
/// # Errors
/// Those of the file.
pub fn fill(file: &csvfs::node::File, bytes: u64) -> Result<(), Failure> {
    ImageFile::set_len(file, bytes)?;
    file.allocate(0, bytes, false)?;
    write_once(file, bytes)
}
