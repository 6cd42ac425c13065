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
const CPUS: u32 = 2;
const MODULES: &[&str] =
    &["virtio_pci", "virtio_blk", "virtio_net", "ext4", "crc32c_generic", "fuse", "tun", "bridge"];
const PROGRAMS: &[&str] = &["csvd", "csvctl"];
/// `csvctl` in an emulated machine is slow.
const CTL_LIMIT: Duration = Duration::from_secs(300);

fn drive_of(folder: &Path, number: u8) -> PathBuf {
    folder.join(format!("node{number}.drive"))
}

fn init(extra: &str) -> String {
    format!(
        "hostname node$(word number)
ip link set lo up; ip link set eth0 up; ip addr add {NET}.$(word number)/24 dev eth0
{extra}
mkdir -p /data; mount -t ext4 /dev/vda /data
echo {READY}
exec setsid sh -c 'exec sh < /dev/ttyS0 > /dev/ttyS0 2>&1'
"
    )
}

/// What a scenario's nodes have beside our programs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Extra<'a> {
    pub(crate) modules: &'a [&'a str],
    pub(crate) programs: &'a [&'a str],
    /// Path and content.
    pub(crate) files: &'a [(&'a str, &'a str)],
    /// Lines of the init, run once the network is up.
    pub(crate) init: &'a str,
    /// Whether they run guests, which takes room and time to boot.
    pub(crate) guests: bool,
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
        let extra = Extra { guests: true, ..Extra::default() };
        let initrd = Self::pack(kernel, folder, &format!("node{number}"), &extra)?;
        Self::make_drive(folder, number, DATA_MIB, content)?;
        Self::boot_from(kernel, network, folder, number, &initrd, (MEMORY_MIB, CPUS))
    }

    /// Packs the initial RAM disk of nodes.
    pub(crate) fn pack(
        kernel: &Kernel,
        folder: &Path,
        name: &str,
        extra: &Extra<'_>,
    ) -> Result<PathBuf, LabError> {
        let tree = Tree::new(&init(extra.init))?;
        let (hv, kvm): (&[&str], &[&str]) = if extra.guests { (&["hv"], &["kvm-amd"]) } else { (&[], &[]) };
        tree.add_modules(kernel, &[MODULES, kvm, extra.modules].concat())?;
        for program in [PROGRAMS, hv].concat() {
            tree.add_program(&binary(program))?;
        }
        for program in extra.programs {
            tree.add_program(Path::new(program))?;
        }
        for (path, content) in extra.files {
            tree.add_text(path, content, 0o644)?;
        }
        let initrd = folder.join(format!("{name}.initrd"));
        tree.pack(&initrd)?;
        Ok(initrd)
    }

    /// Makes the drive that is `/data` in node `number`.
    pub(crate) fn make_drive(folder: &Path, number: u8, mib: u64, content: &Path) -> Result<(), LabError> {
        drive::ext4(&drive_of(folder, number), mib, content)
    }

    /// Boots node `number` from what was made for it; also again after a power cut.
    pub(crate) fn boot_from(
        kernel: &Kernel,
        network: &Network,
        folder: &Path,
        number: u8,
        initrd: &Path,
        (memory_mib, cpus): (u32, u32),
    ) -> Result<Self, LabError> {
        let spec = MachineSpec {
            name: &format!("node{number}"),
            number,
            memory_mib,
            cpus,
            kernel: &kernel.image(),
            initrd,
            words: "role=node",
            drives: &[drive_of(folder, number)],
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
