//! The folder of an embedded cluster: what lies where, and who is at work in it.
//!
//! **Invariant:** only one dev command works on a folder at a time (`dev.lock`), and `dev.toml` is written last: a folder
//! that has it is complete.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::Error;
use api::config::{FenceConfig, MemberConfig, NodeConfig, TlsConfig, VmUser};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use wire::authority;

use crate::files::{cannot, write_private};

/// What `dev up` was told, kept for the next time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// Id of the cluster.
    pub(crate) cluster: Uuid,
    /// URI of the LUN.
    pub(crate) lun: String,
    /// Size of the LUN's file in bytes, when it is made.
    pub(crate) lun_bytes: u64,
    /// Name of the volume.
    pub(crate) volume: String,
    /// See [`NodeConfig::base_ms`].
    #[serde(default)]
    pub(crate) base_ms: Option<u64>,
    /// The nodes.
    pub(crate) nodes: Vec<PlannedNode>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PlannedNode {
    pub(crate) id: u16,
    pub(crate) name: String,
    pub(crate) address: SocketAddr,
}

/// A folder that this command works on, alone.
#[derive(Debug)]
pub(crate) struct Folder {
    root: PathBuf,
    /// Unlocked when it is closed.
    _lock: File,
}

impl Folder {
    /// Takes the folder, making it when absent.
    pub(crate) fn make(dir: &Path) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(|error| cannot("make the folder", dir, &error))?;
        Self::open(dir)
    }

    /// Takes an existing folder.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let root = fs::canonicalize(dir).map_err(|error| {
            Error::not_found(format!("folder {}: {error}", dir.display()))
                .hint("`csvctl dev up --dir DIR` makes it")
        })?;
        let path = root.join("dev.lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| cannot("open", &path, &error))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { root, _lock: lock }),
            Err(TryLockError::WouldBlock) => {
                Err(Error::conflict(format!("another csvctl dev command is working on {}", root.display()))
                    .hint("wait until it is done"))
            }
            Err(TryLockError::Error(error)) => Err(cannot("lock", &path, &error)),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The plan, when the folder holds a cluster.
    pub(crate) fn plan(&self) -> Result<Option<Plan>, Error> {
        let path = self.plan_path();
        match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).map(Some).map_err(|error| {
                Error::failed(format!("{}: {error}", path.display()))
                    .hint("repair the file, or remove the folder")
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(cannot("read", &path, &error)),
        }
    }

    /// The plan of a folder that must hold a cluster.
    pub(crate) fn existing_plan(&self) -> Result<Plan, Error> {
        self.plan()?.ok_or_else(|| {
            Error::not_found(format!("there is no cluster in {}", self.root.display()))
                .hint("`csvctl dev up --dir DIR` starts one")
        })
    }

    fn plan_path(&self) -> PathBuf {
        self.root.join("dev.toml")
    }

    pub(crate) fn node_dir(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The configuration of a planned node.
    pub(crate) fn node_config(&self, plan: &Plan, node: &PlannedNode) -> NodeConfig {
        let dir = self.node_dir(&node.name);
        let tls = TlsConfig {
            ca: dir.join("ca.crt"),
            cert: dir.join("node.crt"),
            key: dir.join("node.key"),
            ca_key: Some(dir.join("ca.key")),
        };
        NodeConfig {
            cluster: "dev".to_owned(),
            cluster_id: plan.cluster,
            name: node.name.clone(),
            id: node.id,
            listen: node.address,
            dir,
            socket: None,
            bootstrap: node.id == 1,
            witness: false,
            base_ms: plan.base_ms,
            vm_user: VmUser::default(),
            tls,
            fence: FenceConfig::LocalKill,
            members: plan.nodes.iter().map(|member| self.member(member)).collect(),
        }
    }

    fn member(&self, node: &PlannedNode) -> MemberConfig {
        MemberConfig {
            id: node.id,
            name: node.name.clone(),
            address: node.address,
            pid_file: Some(self.node_dir(&node.name).join("csvd.pid")),
        }
    }

    /// Writes authority, certificates, configurations, and last the plan.
    pub(crate) fn furnish(&self, plan: &Plan) -> Result<(), Error> {
        let ca = authority::create_ca("dev").map_err(Error::failed)?;
        self.write_private("ca/ca.crt", &ca.cert_pem)?;
        self.write_private("ca/ca.key", &ca.key_pem)?;
        for node in &plan.nodes {
            let issued = authority::issue(&ca, node.id).map_err(Error::failed)?;
            let config = toml::to_string(&self.node_config(plan, node))
                .map_err(|error| Error::failed(format!("encoding the configuration: {error}")))?;
            self.write_private(&format!("{}/ca.crt", node.name), &ca.cert_pem)?;
            // A copy of its own, as every member of a cluster has: it renews its certificate without the others.
            self.write_private(&format!("{}/ca.key", node.name), &ca.key_pem)?;
            self.write_private(&format!("{}/node.crt", node.name), &issued.cert_pem)?;
            self.write_private(&format!("{}/node.key", node.name), &issued.key_pem)?;
            self.write_private(&format!("{}/csvd.toml", node.name), &config)?;
        }
        let text =
            toml::to_string(plan).map_err(|error| Error::failed(format!("encoding the plan: {error}")))?;
        self.write_private("dev.toml", &text)
    }

    fn write_private(&self, name: &str, text: &str) -> Result<(), Error> {
        write_private(&self.root.join(name), text)
    }

    /// Makes the LUN's file, sparse, when it is a file and absent.
    pub(crate) fn make_lun(plan: &Plan) -> Result<(), Error> {
        let Some(path) = plan.lun.strip_prefix("file:").map(Path::new) else { return Ok(()) };
        match OpenOptions::new().create_new(true).write(true).mode(0o600).open(path) {
            Ok(file) => file.set_len(plan.lun_bytes).map_err(|error| cannot("size", path, &error)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(cannot("make the LUN", path, &error)),
        }
    }
}

/// Listening sockets for `count` nodes, on an address of 127/8 that nobody else is likely to use, so that a node finds
/// its port free again when it is started a second time. The daemons inherit them: between the choice of a port and its
/// use nobody can take it.
pub(crate) fn listeners(count: u16) -> Result<Vec<TcpListener>, Error> {
    let [a, b, ..] = *Uuid::new_v4().as_bytes();
    let address = Ipv4Addr::new(127, a.max(1), b, 1);
    (0..count)
        .map(|_| {
            TcpListener::bind((address, 0))
                .or_else(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)))
                .map_err(|error| Error::failed(format!("listen on {address}: {error}")))
        })
        .collect()
}
