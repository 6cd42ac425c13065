//! What a node daemon is to its VMs: a volume with its coordinator, the node socket, the lease page.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use blockio::{BlockDevice, FileDevice, ImageFile, OpenOptions, open_uri};
use bytes::Bytes;
use csvfs::coordinator::{Coordinator, OpenParams, PushTarget};
use csvfs::node::{CoordinatorLink, Creation, LinkError, Node, NodeParams, ROOT_INO, ReplyTo};
use csvfs::proto as pb;
use csvfs::{CreateParams, Volume};
use futures::future::BoxFuture;
use hv_guest::{Ack, Layout, Report};
use hv_runner::config::{BUILTIN_SECTOR_WRITER, DiskSpec, RunnerConfig, VolumePath, VolumeSpec};
use lockmgr::lease::LeasePage;
use lockmgr::{ClientId, ClusterId, Epoch, Millis, NodeId, Term, VolumeId};
use prost::Message;
use tokio::sync::oneshot;
use uuid::Uuid;
use wire::{Connection, Handler, Local, Peer, Refusal, RefusalCode, Server, service};

const LUN_BYTES: u64 = 1 << 30;
const NODE: u16 = 1;
const EPOCH: u64 = 3;
const TERM: u64 = 1;
pub(crate) const LAYOUT: Layout = Layout { range: 512, sectors: 8, seed: 9 };
pub(crate) const CMDLINE: &str =
    "verify=0 write=1 range=512 batch=8 ack=1 pages=64 pace=1 span=64 seed=9 gen=1";

/// Where pushes go to, by the client's serial.
#[derive(Default)]
struct Clients {
    processes: Mutex<HashMap<u64, Connection>>,
    here: Mutex<Option<Arc<Node>>>,
}

impl PushTarget for Clients {
    fn push(&self, to: ClientId, push: pb::Push) {
        if let Some(conn) = self.processes.lock().unwrap().get(&to.serial) {
            let _ = conn.push(service::CSVFS_PUSH, push.encode_to_vec().into());
        } else if let Some(node) = self.here.lock().unwrap().as_ref() {
            node.deliver(push);
        }
    }
    fn overdue(&self, client: ClientId, ino: u64) {
        panic!("client {client} did not give up inode {ino} in time");
    }
}

struct Direct(Arc<Coordinator>);

impl CoordinatorLink for Direct {
    fn send(&self, request: pb::Request, done: ReplyTo) {
        self.0.submit(request, Box::new(move |reply| done(Ok::<_, LinkError>(reply))));
    }
}

struct NodeSocket {
    coordinator: Arc<Coordinator>,
    clients: Arc<Clients>,
}

impl Handler for NodeSocket {
    fn handle(
        &self,
        _from: Peer,
        conn: Connection,
        _service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        let request = pb::Request::decode(body).unwrap();
        if let (Some(pb::request::Op::Attach(_)), Some(client)) = (&request.op, &request.client) {
            self.clients.processes.lock().unwrap().insert(client.serial, conn);
        }
        let (tell, told) = oneshot::channel();
        self.coordinator.submit(request, Box::new(move |reply| drop(tell.send(reply))));
        Box::pin(async move {
            let reply = told.await.map_err(|_| Refusal::new(RefusalCode::NotHere, "no coordinator"))?;
            Ok(reply.encode_to_vec().into())
        })
    }
}

/// A node without its daemon's other duties.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    volume: VolumeId,
    coordinator: Arc<Coordinator>,
    clients: Arc<Clients>,
    node: Arc<Node>,
    lease: Mutex<LeasePage>,
    runtime: tokio::runtime::Runtime,
    server: Mutex<Option<Server>>,
}

impl World {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lun = dir.path().join("lun");
        drop(FileDevice::create(&lun, LUN_BYTES).unwrap());
        let device = || open_uri(&format!("file:{}", lun.display()), OpenOptions::default()).unwrap();
        let cluster = ClusterId(Uuid::new_v4());
        let params = CreateParams { name: "vol1".into(), cluster, force: false };
        let volume = Volume::create(device(), params).unwrap().volume;
        let clients = Arc::new(Clients::default());
        let me = (NodeId(NODE), Epoch(EPOCH), Term(TERM));
        let params = OpenParams::new(device(), volume, me, clients.clone());
        let coordinator = Coordinator::open(params).unwrap();
        let node = Node::attach(NodeParams {
            device: device(),
            link: Arc::new(Direct(coordinator.clone())),
            client: ClientId { node: NodeId(NODE), epoch: Epoch(EPOCH), serial: 1 },
            volume,
            term: Term(TERM),
            name: "test".into(),
        })
        .unwrap();
        *clients.here.lock().unwrap() = Some(node.clone());
        let mut lease = LeasePage::create(&dir.path().join("lease"), NodeId(NODE), Epoch(EPOCH)).unwrap();
        lease.renew(Millis(u64::MAX));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let world = Self {
            dir,
            volume,
            coordinator,
            clients,
            node,
            lease: Mutex::new(lease),
            runtime,
            server: Mutex::default(),
        };
        world.open_socket();
        world
    }

    /// As when the daemon starts, for the first time or again.
    pub(crate) fn open_socket(&self) {
        let _runtime = self.runtime.enter();
        let socket = self.dir.path().join("node.sock");
        drop(std::fs::remove_file(&socket));
        let listener = tokio::net::UnixListener::bind(&socket).unwrap();
        let local = Local { cluster: Uuid::new_v4(), node: NODE, name: "n1".into() };
        let handler = NodeSocket { coordinator: self.coordinator.clone(), clients: self.clients.clone() };
        *self.server.lock().unwrap() = Some(Server::serve_unix(listener, local, Arc::new(handler)));
    }

    /// As when the daemon dies.
    pub(crate) fn close_socket(&self) {
        drop(self.server.lock().unwrap().take());
        self.clients.processes.lock().unwrap().clear();
    }

    /// What the daemon reports when a VM's process is gone: its grants are free.
    pub(crate) fn process_gone(&self, serial: u64) {
        self.clients.processes.lock().unwrap().remove(&serial);
        self.coordinator.client_gone(ClientId { node: NodeId(NODE), epoch: Epoch(EPOCH), serial });
    }

    pub(crate) fn revoke_lease(&self) {
        self.lease.lock().unwrap().revoke();
    }

    /// Two disks: one with known content, one to write to.
    pub(crate) fn make_disks(&self) {
        let source = self.create("source.vhdx");
        vhdx::create(&*source, &vhdx::Spec::dynamic(8 << 20)).unwrap();
        let disk = vhdx::Builder::open(source).writable().unwrap();
        let content: Vec<u8> = (0..64_u32 << 10).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        disk.write_at(0, &content).unwrap();
        disk.close().unwrap();
        vhdx::create(&*self.create("scratch.vhdx"), &vhdx::Spec::dynamic(64 << 20)).unwrap();
    }

    pub(crate) fn create(&self, name: &str) -> Arc<dyn ImageFile> {
        let creation = Creation { mode: 0o600, umask: 0, uid: 0, gid: 0 };
        self.node.create(ROOT_INO, name.as_bytes(), &creation, true).unwrap().1
    }

    pub(crate) fn open(&self, name: &str) -> Arc<dyn ImageFile> {
        let attr = self.node.resolve(name).unwrap();
        self.node.open(attr.ino).unwrap()
    }

    /// What the scratch disk holds against what the guest acknowledged. No VM may have it open.
    pub(crate) fn verify(&self, acked: Ack) -> Report {
        let image = vhdx::Builder::open(self.open("scratch.vhdx")).read_only().unwrap();
        let mut bytes = vec![0; usize::try_from(LAYOUT.range).unwrap() * 4096];
        image.read_at(0, &mut bytes).unwrap();
        hv_guest::verify_image(&bytes[..], LAYOUT, acked).unwrap()
    }

    pub(crate) fn grants(&self, name: &str) -> Vec<pb::GrantInfo> {
        self.node.grants(self.node.resolve(name).unwrap().ino).unwrap().grants
    }

    pub(crate) fn config(&self, serial: u64) -> RunnerConfig {
        let at = |name: &str| self.dir.path().join(name);
        let disk = |path: &str, read_only| DiskSpec {
            volume: "vol1".into(),
            path: path.into(),
            read_only,
            slot: None,
            iops: 0,
            bytes_per_second: 0,
        };
        RunnerConfig {
            devices: hv::DEVICES_VERSION,
            vm: "web".into(),
            vm_id: Uuid::from_u128(7),
            vm_epoch: 1,
            balloon_bytes: 0,
            memory_bytes: 16 << 20,
            cpus: 1,
            kernel: BUILTIN_SECTOR_WRITER.into(),
            initrd: None,
            cmdline: CMDLINE.into(),
            disks: vec![disk("source.vhdx", false), disk("scratch.vhdx", false)],
            net: None,
            volumes: vec![VolumeSpec {
                name: "vol1".into(),
                id: self.volume.0,
                lun_uri: format!("file:{}", at("lun").display()),
                node_socket: at("node.sock"),
                term: TERM,
            }],
            node: NODE,
            node_epoch: EPOCH,
            client_serial: serial,
            lease_page: at("lease"),
            own_user: None,
            control_socket: at(&format!("hv{serial}.sock")),
            console_log_bytes: 1 << 18,
            incoming: false,
            baseline: None,
            host_limit: None,
            restore_from: None,
        }
    }

    pub(crate) fn incoming(&self, serial: u64, state: &str) -> RunnerConfig {
        let from = VolumePath { volume: "vol1".into(), path: state.into() };
        RunnerConfig { restore_from: Some(from), ..self.config(serial) }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.close_socket();
        drop(self.node.detach());
        self.clients.here.lock().unwrap().take();
        drop(self.coordinator.close());
    }
}
