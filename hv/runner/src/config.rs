//! What an hv process is told when it is started: one JSON file, written by the node daemon.
//!
//! The process opens what the file names and nothing else. Unknown fields are refused, so that a daemon newer than the
//! runner learns about it before a guest runs with half of its settings.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::failure::Failure;

/// What the names of the guests that are built into the runner begin with; the role follows.
pub const BUILTIN: &str = "builtin:";
/// The guest that writes disks.
pub const BUILTIN_SECTOR_WRITER: &str = "builtin:sector-writer";
/// A configuration is a page of text; anything much larger is not one.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Disks of one VM: that many virtio-mmio slots.
const DISKS_MAX: usize = hv::DISKS_MAX;

/// Everything about one run of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunnerConfig {
    /// Name of the VM.
    pub vm: String,
    /// Its id, also in saved states.
    pub vm_id: Uuid,
    /// Epoch of the VM record that allows this run.
    pub vm_epoch: u64,
    /// Guest RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// What of it the guest is asked to give back.
    #[serde(default)]
    pub balloon_bytes: u64,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// `builtin:ROLE` for a test guest, or the path of a kernel (ELF or bzImage).
    pub kernel: String,
    /// Path of an initial RAM disk for a Linux kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line; the devices are appended.
    pub cmdline: String,
    /// Disks in the order of their slots.
    pub disks: Vec<DiskSpec>,
    /// Its network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<NetSpec>,
    /// Volumes that hold the disks and the saved state.
    pub volumes: Vec<VolumeSpec>,
    /// This node.
    pub node: u16,
    /// Its incarnation; the lease page must show the same.
    pub node_epoch: u64,
    /// Serial of the csvfs client that this process is; never reused within the node's epoch.
    pub client_serial: u64,
    /// The node's lease page, read right before each write to a LUN.
    pub lease_page: PathBuf,
    /// Give up the daemon's user; without it the process stays what the daemon is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_user: Option<OwnUser>,
    /// Where to listen for control requests; made with mode 0600.
    pub control_socket: PathBuf,
    /// Console output that is kept, in bytes.
    pub console_log_bytes: usize,
    /// Version of the devices that its drivers find, as `hv::DEVICES_VERSION` counts them.
    #[serde(default)]
    pub devices: u32,
    /// The processor that the guest gets; without one all that the host can give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<ProcessorSpec>,
    /// What the host is held to have at most, in a rehearsal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_limit: Option<ProcessorSpec>,
    /// Start as the target of a live migration: RAM and state come from outside, then wait for Activate.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incoming: bool,
    /// Start as the target of a migration: load this state, wait for Activate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_from: Option<VolumePath>,
}

/// The first of the users that VM processes become, each the one that is as far behind it as the process's number says. Numbers
/// from here to 2^31 are given to nobody else.
pub const VM_USER_FIRST: u32 = 0x7000_0000;
/// The group of all of them: who may use the daemon's sockets for VMs.
pub const VM_GROUP: u32 = 0x7000_0000;

/// A process that does not stay the daemon's user: it becomes one that nobody else is, and finds files below `root` alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnUser {
    /// The folder of the daemon's sockets for VMs.
    pub root: PathBuf,
}

/// A disk of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Name of the volume.
    pub volume: String,
    /// Path of the VHDX below the volume's root.
    pub path: String,
    /// Whether the guest may only read.
    #[serde(default)]
    pub read_only: bool,
    /// Its slot; without one it is its place in the list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u32>,
    /// Requests in a second; 0 is no limit.
    #[serde(default)]
    pub iops: u64,
    /// Bytes in a second; 0 is no limit.
    #[serde(default)]
    pub bytes_per_second: u64,
}

/// A processor, as `hv::Cpu` encodes it, in hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ProcessorSpec(String);

impl From<&hv::Cpu> for ProcessorSpec {
    fn from(cpu: &hv::Cpu) -> Self {
        Self(cpu.encode().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl ProcessorSpec {
    /// The processor.
    ///
    /// # Errors
    /// When it is none.
    pub fn cpu(&self) -> Result<hv::Cpu, Failure> {
        let digit = |at: usize| self.0.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        let bytes: Option<Vec<u8>> = (0..self.0.len()).step_by(2).map(digit).collect();
        let cpu =
            bytes.ok_or("it is no hexadecimal number".to_owned()).and_then(|bytes| hv::Cpu::decode(&bytes));
        cpu.map_err(|why| {
            Failure::new(
                format!("the processor of the VM cannot be read: {why}"),
                "is hv of the same version as csvd?",
            )
        })
    }
}

/// A network card of the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Name of the tap on this node.
    pub tap: String,
}

/// A cluster volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Name of the volume.
    pub name: String,
    /// Its id, as in the superblock.
    pub id: Uuid,
    /// The LUN: `/dev/...` or `file:PATH`.
    pub lun_uri: String,
    /// The node daemon's socket, which carries csvfs requests to the coordinator.
    pub node_socket: PathBuf,
    /// Term of the coordinator that the daemon believes in.
    pub term: u64,
}

/// A file on a cluster volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumePath {
    /// Name of the volume.
    pub volume: String,
    /// Path below the volume's root.
    pub path: String,
}

/// Where the daemon that listens at `node_socket` gives its processes a way to LUNs that they have lost.
#[must_use]
pub fn blocks_socket(node_socket: &Path) -> PathBuf {
    node_socket.with_file_name("blocks.sock")
}

/// Where the daemon that listens at `node_socket` gives its processes the LUNs that they cannot open.
#[must_use]
pub fn luns_socket(node_socket: &Path) -> PathBuf {
    node_socket.with_file_name("luns.sock")
}

impl RunnerConfig {
    /// The sockets, as a process sees them whose root folder is theirs.
    pub(crate) fn see_from_root(&mut self) {
        for volume in &mut self.volumes {
            if let Some(name) = volume.node_socket.file_name() {
                volume.node_socket = Path::new("/").join(name);
            }
        }
    }

    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// A failure that names the file and the field.
    pub fn load(path: &Path) -> Result<Self, Failure> {
        let shown = path.display();
        let metadata = std::fs::metadata(path).map_err(|error| {
            Failure::new(
                format!("cannot read the configuration {shown}: {error}"),
                "the node daemon writes it before it starts a VM",
            )
        })?;
        if metadata.len() > CONFIG_BYTES_MAX {
            return Err(Failure::new(
                format!("the configuration {shown} has {} bytes", metadata.len()),
                "give a JSON configuration file",
            ));
        }
        let text = std::fs::read(path).map_err(|error| {
            Failure::new(
                format!("cannot read the configuration {shown}: {error}"),
                "check the file's permissions",
            )
        })?;
        let config: Self = serde_json::from_slice(&text).map_err(|error| {
            Failure::new(
                format!("the configuration {shown} is not valid: {error}"),
                "is the daemon newer than this runner?",
            )
        })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// A failure that names the field.
    pub fn check(&self) -> Result<(), Failure> {
        if !(1..=hv::CPUS_MAX).contains(&self.cpus) {
            return Err(Failure::new(
                format!("{} virtual CPUs were asked for", self.cpus),
                format!("a VM has 1 to {}", hv::CPUS_MAX),
            ));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(Failure::new(
                format!("{} disks were asked for", self.disks.len()),
                format!("a VM has at most {DISKS_MAX}"),
            ));
        }
        if self.incoming && self.restore_from.is_some() {
            return Err(Failure::new(
                "the VM is to come from a saved state and from another node at once",
                "give one of `incoming` and `restore_from`",
            ));
        }
        let volumes = self.disks.iter().map(|disk| &disk.volume);
        for name in volumes.chain(self.restore_from.iter().map(|from| &from.volume)) {
            self.volume(name)?;
        }
        Ok(())
    }

    /// The volume of that name.
    ///
    /// # Errors
    /// A failure that names it.
    pub fn volume(&self, name: &str) -> Result<&VolumeSpec, Failure> {
        self.volumes.iter().find(|volume| volume.name == name).ok_or_else(|| {
            Failure::new(
                format!("the volume {name} is not among those of VM {}", self.vm),
                "disks and saved states must lie on a cluster volume",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RunnerConfig {
        RunnerConfig {
            vm: "web".into(),
            vm_id: Uuid::nil(),
            vm_epoch: 3,
            memory_bytes: 64 << 20,
            balloon_bytes: 0,
            cpus: 1,
            kernel: BUILTIN_SECTOR_WRITER.into(),
            initrd: None,
            devices: 0,
            baseline: None,
            host_limit: None,
            cmdline: "seed=7".into(),
            disks: vec![DiskSpec {
                volume: "vol1".into(),
                path: "web.vhdx".into(),
                read_only: false,
                slot: None,
                iops: 0,
                bytes_per_second: 0,
            }],
            net: None,
            volumes: vec![VolumeSpec {
                name: "vol1".into(),
                id: Uuid::nil(),
                lun_uri: "file:/tmp/lun".into(),
                node_socket: "/tmp/node.sock".into(),
                term: 1,
            }],
            node: 1,
            node_epoch: 1,
            client_serial: 5,
            lease_page: "/tmp/lease".into(),
            own_user: None,
            control_socket: "/tmp/control.sock".into(),
            console_log_bytes: 65536,
            incoming: false,
            restore_from: None,
        }
    }

    fn saved(config: &RunnerConfig) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), serde_json::to_vec(config).unwrap()).unwrap();
        file
    }

    #[test]
    fn what_was_written_is_what_is_read() {
        let config = sample();
        assert_eq!(RunnerConfig::load(saved(&config).path()).unwrap(), config);
    }

    #[test]
    fn a_disk_outside_the_volumes_is_refused_by_name() {
        let mut config = sample();
        config.disks[0].volume = "other".into();
        let failure = RunnerConfig::load(saved(&config).path()).unwrap_err();
        assert!(failure.error.contains("other"), "{failure}");
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let mut value = serde_json::to_value(sample()).unwrap();
        value["turbo"] = true.into();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), value.to_string()).unwrap();
        assert!(RunnerConfig::load(file.path()).unwrap_err().error.contains("turbo"));
    }
}
