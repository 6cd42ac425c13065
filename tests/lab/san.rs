//! The machine that is a SAN: an iSCSI target of the Linux kernel (LIO), set up through configfs.
//!
//! ```text
//!   host: san.lun (raw) --/dev/vda--> fileio --> iqn.2026-11.lab:san, LUN 0 --iSCSI--> /dev/sda of the nodes
//!   host: san.keep (ext4) --/dev/vdb--> /var/target/pr: reservations, given back to the kernel after a power cut,
//!                                                         unless the scenario has the SAN forget them
//! ```
//! The LUN is a file of the host, so that a scenario can look at it past all machines.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::drive;
use crate::kernel::Kernel;
use crate::machine::{Machine, MachineSpec, READY};
use crate::network::Network;
use crate::tool::{Doing, LabError};
use crate::tree::Tree;

/// Its place in the network: machines have numbers from 1.
const NUMBER: u8 = 9;
/// Where it listens: a network beside the one of the cluster.
pub(crate) const ADDRESS: &str = "10.78.0.9";
pub(crate) const STORAGE_NET: &str = "10.78.0";
const LUN_MIB: u64 = 512;
const KEEP_MIB: u64 = 16;
const MEMORY_MIB: u32 = 384;
const BLOCK: usize = 4096;
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "ext4",
    "crc32c_generic",
    "target_core_mod",
    "target_core_file",
    "iscsi_target_mod",
];

fn init() -> String {
    format!(
        "hostname san
ip link set lo up; ip link set eth0 up; ip addr add {ADDRESS}/24 dev eth0
mkdir -p /var /etc/target /persist; mount -t ext4 -o sync /dev/vdb /persist; mkdir -p /persist/pr; ln -s /persist /var/target
[ -n \"$(word forgets)\" ] && rm -f /persist/pr/*
mount -t configfs configfs /sys/kernel/config
T=/sys/kernel/config/target; B=$T/core/fileio_0/lun; P=$T/iscsi/iqn.2026-11.lab:san/tpgt_1
mkdir -p $B
echo fd_dev_name=/dev/vda,fd_dev_size={bytes} > $B/control
echo lab-lun > $B/wwn/vpd_unit_serial
echo 1 > $B/enable
for file in /var/target/pr/aptpl_*; do
  [ -f $file ] || continue
  echo \"reservations kept in $file:\"; cat $file
  while read line; do case \"$line\" in
    PR_REG_START*) kept= ;;
    PR_REG_END*) echo \"$kept\" > $B/pr/res_aptpl_metadata ;;
    *) kept=\"$kept${{kept:+,}}$line\" ;;
  esac; done < $file
done
mkdir -p $P/lun/lun_0; ln -s $B $P/lun/lun_0/lun
for set in authentication=0 generate_node_acls=1 cache_dynamic_acls=1 demo_mode_write_protect=0; do
  echo ${{set#*=}} > $P/attrib/${{set%=*}}
done
mkdir -p $P/np/{ADDRESS}:3260
echo 1 > $P/enable
echo {READY}
exec setsid sh -c 'exec sh < /dev/ttyS0 > /dev/ttyS0 2>&1'
",
        bytes = LUN_MIB << 20
    )
}

/// What outlives a power cut of the SAN.
#[derive(Debug)]
pub(crate) struct Storage {
    initrd: PathBuf,
    drives: [PathBuf; 2],
}

impl Storage {
    pub(crate) fn make(kernel: &Kernel, folder: &Path) -> Result<Self, LabError> {
        let tree = Tree::new(&init())?;
        tree.add_modules(kernel, MODULES)?;
        let initrd = folder.join("san.initrd");
        tree.pack(&initrd)?;
        let drives = [folder.join("san.lun"), folder.join("san.keep")];
        drive::empty(&drives[0], LUN_MIB)?;
        let empty = tempfile::tempdir().doing("making a temporary folder")?;
        drive::ext4(&drives[1], KEEP_MIB, empty.path())?;
        Ok(Self { initrd, drives })
    }

    /// Boots the SAN on it, with the registrations and the reservation that it had, unless it `forgets` them.
    pub(crate) fn boot(
        &self,
        kernel: &Kernel,
        network: &Network,
        folder: &Path,
        forgets: bool,
    ) -> Result<Machine, LabError> {
        let spec = MachineSpec {
            name: "san",
            number: NUMBER,
            memory_mib: MEMORY_MIB,
            cpus: 1,
            kernel: &kernel.image(),
            initrd: &self.initrd,
            words: if forgets { "role=san forgets=all" } else { "role=san" },
            drives: &self.drives,
        };
        Machine::boot(&spec, network, folder)
    }

    /// How many blocks on the LUN itself begin with `mark`.
    pub(crate) fn blocks_with(&self, mark: &str) -> Result<usize, LabError> {
        let mut lun = std::fs::File::open(&self.drives[0]).doing("opening the LUN")?;
        let (mut found, mut part) = (0, vec![0; 256 * BLOCK]);
        loop {
            let len = lun.read(&mut part).doing("reading the LUN")?;
            if len == 0 {
                return Ok(found);
            }
            found += part[..len].chunks(BLOCK).filter(|block| block.starts_with(mark.as_bytes())).count();
        }
    }
}
