//! A volume with its coordinator, one node and a mount in one process, for measurements.
//!
//! `one_node LUN_FILE MOUNTPOINT`: makes a new volume on the file (which must not hold one), mounts it, and unmounts when
//! the standard input ends.
#![expect(clippy::print_stdout, reason = "it tells the script that the mount is there")]

use std::sync::Arc;

use blockio::{BlockDevice, FileDevice, OpenOptions};
use csvfs::local::{LocalLink, LocalPushes};
use csvfs::node::{Node, NodeParams};
use csvfs::{Coordinator, CreateParams, OpenParams, Volume};
use csvfs_fuse::{MountOptions, mount};
use lockmgr::{ClientId, ClusterId, Epoch, NodeId, Term};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(lun), Some(mountpoint)) = (args.next(), args.next()) else {
        return Err("one_node LUN_FILE MOUNTPOINT".into());
    };
    let device: Arc<dyn BlockDevice> = Arc::new(FileDevice::open(lun, OpenOptions::default())?);
    let cluster = ClusterId(uuid::Uuid::new_v4());
    let params = CreateParams { name: "vol".into(), cluster, force: true };
    let volume = Volume::create(device.clone(), params)?.volume;
    let (pushes, term) = (LocalPushes::new(), Term(1));
    let who = (NodeId(1), Epoch(1), term);
    let coordinator = Coordinator::open(OpenParams::new(device.clone(), volume, who, pushes.clone()))?;
    let link = LocalLink::to(coordinator.clone());
    let client = ClientId { node: NodeId(1), epoch: Epoch(1), serial: 1 };
    let node = Node::attach(NodeParams { device, link, client, volume, term, name: "one".into() })?;
    pushes.add(client, &node);
    let mounted = mount(node.clone(), mountpoint, &MountOptions::default())?;
    println!("mounted");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    mounted.unmount()?;
    node.detach()?;
    coordinator.close()?;
    Ok(())
}
