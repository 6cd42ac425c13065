//! The file that tells a daemon who it is and whom it works with.
//!
//! Written by `csvctl dev up` (one per node) or by an administrator, read by `csvd --config`.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One node's configuration, in TOML.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Name of the cluster.
    pub cluster: String,
    /// Its id; nodes and volumes of another cluster are refused.
    pub cluster_id: Uuid,
    /// Name of this node.
    pub name: String,
    /// Its number, 1 to 64; also its slot on each LUN.
    pub id: u16,
    /// Where the other nodes reach it.
    pub listen: SocketAddr,
    /// Folder of everything that this daemon keeps: sockets, log, mounts, the Raft log.
    pub dir: PathBuf,
    /// The admin socket, where it is not `csvd.sock` in that folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Whether this node founds the cluster when it has no state yet. Exactly one node does.
    #[serde(default)]
    pub bootstrap: bool,
    /// Whether this node only votes: it has no volumes and no VMs.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
    /// The base of all time limits, in milliseconds (the network heartbeat's period).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_ms: Option<u64>,
    /// Which user a VM's process is.
    #[serde(default, skip_serializing_if = "VmUser::is_default")]
    pub vm_user: VmUser,
    /// Certificates.
    pub tls: TlsConfig,
    /// How dead nodes are made certain to be dead.
    pub fence: FenceConfig,
    /// All nodes, this one too.
    pub members: Vec<MemberConfig>,
}

/// Which user the process of a VM is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmUser {
    /// Each one that nobody else is, where the daemon is root; else the daemon's.
    #[default]
    Own,
    /// The daemon's.
    Daemon,
}

impl VmUser {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// PEM files of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The cluster's authority.
    pub ca: PathBuf,
    /// This node's certificate, signed by it.
    pub cert: PathBuf,
    /// The key of the certificate.
    pub key: PathBuf,
    /// The authority's key, on nodes that let others join.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_key: Option<PathBuf>,
}

/// How dead nodes are made certain to be dead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum FenceConfig {
    /// Nothing can cut a node off: a silent one stays in quarantine until an operator confirms that it is off.
    Operator,
    /// The nodes share a machine: kill the process group named in the node's pid file.
    LocalKill,
    /// A program that powers a node off, see lockmgr/PROTOCOL.md.
    Agent {
        /// The program.
        program: PathBuf,
        /// Longest time that it may take, in milliseconds.
        timeout_ms: u64,
    },
}

/// The part of the configuration that all nodes of a cluster share; a joining node gets it from the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedConfig {
    /// See [`NodeConfig::base_ms`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_ms: Option<u64>,
    /// How dead nodes are made certain to be dead.
    pub fence: FenceConfig,
}

/// A member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// Its number.
    pub id: u16,
    /// Its name.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// Its pid file, when it runs on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<PathBuf>,
}

impl NodeConfig {
    /// The admin socket.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| self.dir.join("csvd.sock"))
    }

    /// The socket of this node's VM processes.
    #[must_use]
    pub fn node_socket(&self) -> PathBuf {
        self.vm_root().join("node.sock")
    }

    /// What a VM's process finds as its root folder, where it has a user of its own: the daemon's sockets for it.
    #[must_use]
    pub fn vm_root(&self) -> PathBuf {
        self.dir.join("hv")
    }

    /// Names the daemon's process group; locked as long as it lives.
    #[must_use]
    pub fn pid_file(&self) -> PathBuf {
        self.dir.join("csvd.pid")
    }

    /// The page that says until when this node may write.
    #[must_use]
    pub fn lease_page(&self) -> PathBuf {
        self.dir.join("lease")
    }

    /// The daemon's log.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.dir.join("log").join("csvd.log")
    }

    /// Where the volume is mounted.
    #[must_use]
    pub fn mount_point(&self, volume: &str) -> PathBuf {
        self.dir.join("mnt").join(volume)
    }

    /// Folder of the Raft log.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Folder of the VM processes' configurations and control sockets.
    #[must_use]
    pub fn vm_dir(&self) -> PathBuf {
        self.dir.join("vm")
    }
}
