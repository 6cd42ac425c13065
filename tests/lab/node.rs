//! A machine that is a node of a cluster: our own programs, KVM and FUSE on a stock kernel.

use std::path::{Path, PathBuf};
use std::time::Duration;

use cluster_tests::binary;
use serde_json::Value;

use crate::drive;
use crate::kernel::Kernel;
use crate::machine::{Machine, MachineSpec, READY};
use crate::network::Network;
use crate::tool::{Doing, LabError};
use crate::tree::Tree;

/// Network address of machine `number`.
const NET: &str = "10.77.0";
/// The drive with room for the cluster's folder and for what the scenario brings along.
const DATA_MIB: u64 = 4096;
const MEMORY_MIB: u32 = 2560;
const MODULES: &[&str] =
    &["virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "fuse", "tun", "bridge", "kvm-amd"];
const PROGRAMS: &[&str] = &["csvd", "csvctl", "hv"];
/// `csvctl` in an emulated machine is slow.
const CTL_LIMIT: Duration = Duration::from_secs(300);

fn init() -> String {
    format!(
        "hostname node$(word number)
ip link set lo up; ip link set eth0 up; ip addr add {NET}.$(word number)/24 dev eth0
mkdir -p /data; mount -t ext4 /dev/vda /data
echo {READY}
exec setsid cttyhack sh
"
    )
}

/// A running node, without a cluster yet.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) machine: Machine,
}

impl Node {
    /// Boots node `number`; what is in `content` lies below `/data` in it.
    pub(crate) fn boot(
        kernel: &Kernel,
        network: &Network,
        folder: &Path,
        number: u8,
        content: &Path,
    ) -> Result<Self, LabError> {
        let tree = Tree::new(&init())?;
        tree.add_modules(kernel, MODULES)?;
        for program in PROGRAMS {
            tree.add_program(&binary(program))?;
        }
        let name = format!("node{number}");
        let initrd = folder.join(format!("{name}.initrd"));
        tree.pack(&initrd)?;
        let drives: [PathBuf; 1] = [folder.join(format!("{name}.drive"))];
        drive::ext4(&drives[0], DATA_MIB, content)?;
        let spec = MachineSpec {
            name: &name,
            number,
            memory_mib: MEMORY_MIB,
            cpus: 2,
            kernel: &kernel.image(),
            initrd: &initrd,
            words: "role=node",
            drives: &drives,
        };
        Ok(Self { machine: Machine::boot(&spec, network, folder)? })
    }

    /// Runs `csvctl --json` and gives its document. `socket`: the node's, or empty for commands that need none.
    pub(crate) fn ctl(&mut self, socket: &str, command: &str) -> Result<Value, LabError> {
        let connect = if socket.is_empty() { String::new() } else { format!("--connect {socket}") };
        let said = self.machine.run(&format!("csvctl {connect} --json --yes {command}"), CTL_LIMIT)?;
        let document = said.lines().rev().find(|line| line.starts_with('{') || line.starts_with('['));
        let document =
            document.ok_or_else(|| LabError::new(format!("csvctl {command} printed no document: {said}")))?;
        serde_json::from_str(document).doing(format_args!("reading what csvctl {command} printed: {said}"))
    }
}
