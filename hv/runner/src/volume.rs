//! A cluster volume as this process uses it: the LUN behind the node's lease, and a csvfs node on it.

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::Tripwire;
use csvfs::node::{Creation, File, FsError, Node, NodeParams, ROOT_INO};
use lockmgr::lease::LeaseReader;
use lockmgr::{ClientId, Epoch, NodeId, Term, VolumeId};
use vhdx::ParentResolver;
use wire::Local;

use crate::config::{RunnerConfig, VolumePath, VolumeSpec};
use crate::failure::Failure;
use crate::link::{NodeLink, VolumeLink};
use crate::path::{Gates, Path};

/// Directories and files that this process makes belong to root alone.
const DIRECTORY: Creation = Creation { mode: 0o700, umask: 0, uid: 0, gid: 0 };
const FILE: Creation = Creation { mode: 0o600, umask: 0, uid: 0, gid: 0 };

/// All volumes of this process.
pub(crate) struct Volumes {
    volumes: BTreeMap<String, Volume>,
    gates: Gates,
}

struct Volume {
    node: Arc<Node>,
    /// Orders for it come over the link as long as it is here.
    _path: Arc<Path>,
}

impl Volumes {
    /// Opens each LUN and attaches to each coordinator.
    /// `wire` trips when a LUN refuses this node's writes.
    pub(crate) fn open(
        config: &RunnerConfig,
        lease: &LeaseReader,
        wire: &Arc<Tripwire>,
    ) -> Result<Self, Failure> {
        let mut links: BTreeMap<_, Arc<NodeLink>> = BTreeMap::new();
        let mut volumes = BTreeMap::new();
        let gates = Gates::default();
        for spec in &config.volumes {
            let link = match links.get(&spec.node_socket) {
                Some(link) => Arc::clone(link),
                None => {
                    let link = NodeLink::connect(spec.node_socket.clone(), local(config))?;
                    links.insert(spec.node_socket.clone(), Arc::clone(&link));
                    link
                }
            };
            volumes.insert(spec.name.clone(), attach(config, spec, (lease, &gates, wire), &link)?);
        }
        Ok(Self { volumes, gates })
    }

    /// The gates, to be asked again when the lease was renewed.
    pub(crate) fn gates(&self) -> Gates {
        self.gates.clone()
    }

    /// Opens an existing file.
    pub(crate) fn open_file(&self, at: &VolumePath) -> Result<Arc<File>, Failure> {
        let node = self.node(&at.volume)?;
        let attr = node.resolve(&at.path).map_err(|error| not_opened(at, &error))?;
        node.open(attr.ino).map_err(|error| not_opened(at, &error))
    }

    /// Where the parents of a disk on `volume` may be.
    pub(crate) fn parents(&self, volume: &str) -> Result<ParentResolver, Failure> {
        Ok(crate::parents::on_volume(volume, self.node(volume)?))
    }

    /// The same, and children are found too.
    pub(crate) fn relatives(&self, volume: &str) -> Result<ParentResolver, Failure> {
        Ok(crate::parents::with_children(volume, self.node(volume)?))
    }

    /// Opens a file for new content, with the directories above it.
    pub(crate) fn create_file(&self, at: &VolumePath) -> Result<Arc<File>, Failure> {
        self.create(at, false)
    }

    /// Makes a file that must not be there yet.
    pub(crate) fn create_new_file(&self, at: &VolumePath) -> Result<Arc<File>, Failure> {
        self.create(at, true)
    }

    /// Removes a file that nobody needs any more; false when it is still there.
    pub(crate) fn remove_file(&self, at: &VolumePath) -> bool {
        let (folder, name) = at.path.rsplit_once('/').unwrap_or(("", &at.path));
        let removed = self.node(&at.volume).map_err(|failure| failure.error).and_then(|node| {
            let folder = node.resolve(folder).map_err(|error| error.to_string())?;
            node.unlink(folder.ino, name.as_bytes()).map_err(|error| error.to_string())
        });
        if let Err(error) = &removed {
            tracing::warn!(volume = at.volume, path = at.path, error, "file not removed");
        }
        removed.is_ok()
    }

    fn create(&self, at: &VolumePath, exclusive: bool) -> Result<Arc<File>, Failure> {
        let node = self.node(&at.volume)?;
        let mut names = at.path.split('/').filter(|name| !name.is_empty()).peekable();
        let mut parent = ROOT_INO;
        while let Some(name) = names.next() {
            let made = match names.peek() {
                Some(_) => directory(node, parent, name).map(|ino| parent = ino).map(|()| None),
                None => node.create(parent, name.as_bytes(), &FILE, exclusive).map(|(_, file)| Some(file)),
            };
            if let Some(file) = made.map_err(|error| not_created(at, &error))? {
                return Ok(file);
            }
        }
        Err(Failure::new(
            format!("{}:{} names no file", at.volume, at.path),
            "give a path below the volume's root",
        ))
    }

    /// Makes the new file `to` a clone of one on the same volume.
    pub(crate) fn clone_file(&self, from: &VolumePath, to: &str) -> Result<(), Failure> {
        let node = self.node(&from.volume)?;
        let at = VolumePath { volume: from.volume.clone(), path: to.to_owned() };
        let cloned = || {
            let attr = node.resolve(&from.path)?;
            node.clone_as(&*node.open(attr.ino)?, to)
        };
        cloned().map(drop).map_err(|error: FsError| not_created(&at, &error))
    }

    /// Leaves all volumes; what was buffered becomes durable.
    pub(crate) fn detach(&self) {
        for (name, volume) in &self.volumes {
            if let Err(error) = volume.node.detach() {
                tracing::warn!(volume = name, %error, "leaving the volume failed; the coordinator will drop this client");
            }
        }
    }

    fn node(&self, volume: &str) -> Result<&Arc<Node>, Failure> {
        self.volumes.get(volume).map(|volume| &volume.node).ok_or_else(|| {
            Failure::new(
                format!("the volume {volume} is not among those of this VM"),
                "disks and saved states must lie on a cluster volume",
            )
        })
    }
}

fn local(config: &RunnerConfig) -> Local {
    Local { cluster: uuid::Uuid::nil(), node: config.node, name: format!("hv {}", config.vm) }
}

fn attach(
    config: &RunnerConfig,
    spec: &VolumeSpec,
    (lease, gates, wire): (&LeaseReader, &Gates, &Arc<Tripwire>),
    link: &Arc<NodeLink>,
) -> Result<Volume, Failure> {
    let path = Path::open(config, spec, lease, gates, wire).map_err(|error| {
        Failure::new(
            format!("cannot open the LUN of volume {}: {error}", spec.name),
            "compare `csvctl volume show` with the LUN's path on this node",
        )
    })?;
    // Before it attaches: with the answer come the orders.
    link.register_path(spec.id.as_bytes(), &path);
    let node = Node::attach(NodeParams {
        device: path.device(),
        link: Arc::new(VolumeLink(Arc::clone(link))),
        client: ClientId {
            node: NodeId(config.node),
            epoch: Epoch(config.node_epoch),
            serial: config.client_serial,
        },
        volume: VolumeId(spec.id),
        term: Term(spec.term),
        name: format!("hv {}", config.vm),
    })
    .map_err(|error| {
        Failure::new(
            format!("cannot attach to volume {}: {error}", spec.name),
            "`csvctl volume show` tells its coordinator and state",
        )
    })?;
    link.register(spec.id.as_bytes(), &node, spec.term);
    Ok(Volume { node, _path: path })
}

fn directory(node: &Arc<Node>, parent: u64, name: &str) -> Result<u64, FsError> {
    match node.mkdir(parent, name.as_bytes(), &DIRECTORY) {
        Ok(attr) => Ok(attr.ino),
        Err(error) if error.errno() == libc::EEXIST => Ok(node.lookup(parent, name.as_bytes())?.ino),
        Err(error) => Err(error),
    }
}

fn not_opened(at: &VolumePath, error: &FsError) -> Failure {
    let shown = format!("{}:{}", at.volume, at.path);
    if error.errno() == libc::ENOENT {
        return Failure::new(
            format!("{shown} does not exist"),
            "look with `ls` in the volume's mount on any node, then correct the VM's disk path",
        );
    }
    Failure::new(format!("cannot open {shown}: {error}"), "is it a regular file?")
}

fn not_created(at: &VolumePath, error: &FsError) -> Failure {
    let hint = match error.errno() {
        libc::EEXIST => "choose another name, or remove the file if nobody needs it",
        libc::ENOSPC => "the volume is full: delete something or choose another volume",
        _ => "look at the volume's state with `csvctl volume show`",
    };
    Failure::new(format!("cannot create {}:{}: {error}", at.volume, at.path), hint)
}
