//! The socket of this node's VM processes: their csvfs requests go to the coordinator, its pushes come back.
//!
//! **Invariant:** a process speaks only for the client that it was started as: the serial that its VM was given, in this
//! node's epoch, and one connection per serial.

use std::collections::HashMap;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex, PoisonError};

use api::Error;
use bytes::Bytes;
use csvfs::proto as pb;
use futures::future::BoxFuture;
use prost::Message;
use tokio::net::UnixListener;
use wire::{Connection, Handler, Local, Peer, Refusal, RefusalCode, Server, Via, service};

use crate::clients::Client;
use crate::core::Core;
use crate::{redirect, router, vms};

/// Listens on the node's socket; only root may connect, and the users of VM processes.
pub(crate) fn serve(core: &Arc<Core>) -> Result<Server, Error> {
    let path = core.config.node_socket();
    make_root(&core.config.vm_root())?;
    let listener = listen(&path, 0o600)?;
    vms::user::open_to_processes(core, &path)?;
    let local =
        Local { cluster: core.config.cluster_id, node: core.config.id, name: core.config.name.clone() };
    Ok(Server::serve_unix(
        listener,
        local,
        Arc::new(Processes { core: Arc::clone(core), serials: Mutex::default() }),
    ))
}

/// The folder of the sockets for VMs: any process may look a name up in it, and no other.
fn make_root(root: &std::path::Path) -> Result<(), Error> {
    let made = std::fs::create_dir_all(root)
        .and_then(|()| std::fs::set_permissions(root, std::fs::Permissions::from_mode(0o711)));
    made.map_err(|error| Error::failed(format!("make {}: {error}", root.display())))
}

/// A Unix socket at `path` with these permissions. What a former daemon left there is replaced: the pid file says that
/// it is gone.
pub(crate) fn listen(path: &std::path::Path, mode: u32) -> Result<UnixListener, Error> {
    let cannot = |error: std::io::Error| {
        let failed = Error::failed(format!("listen on {}: {error}", path.display()));
        match error.kind() {
            std::io::ErrorKind::InvalidInput => {
                failed.hint("the path is too long for a socket; use a shorter folder")
            }
            _ => failed,
        }
    };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(cannot(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(cannot)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(cannot)?;
    Ok(listener)
}

#[derive(Debug)]
struct Processes {
    core: Arc<Core>,
    /// The connection that speaks for a serial. Rank: a leaf.
    serials: Mutex<HashMap<u64, Connection>>,
}

impl Processes {
    /// The serial that a request of this connection speaks for, when it may.
    fn admit(&self, conn: &Connection, client: Option<&pb::ClientId>) -> Result<u64, Refusal> {
        let denied = |why: &str| Refusal::new(RefusalCode::Denied, why.to_owned());
        let client = client.ok_or_else(|| denied("the request names no client"))?;
        let epoch = self.core.epoch().map_or(0, |epoch| epoch.0);
        if client.node != u32::from(self.core.me.0) || client.epoch != epoch {
            return Err(denied("the client is not of this node's present epoch"));
        }
        let pid = match conn.peer().via {
            Via::Unix { pid, .. } => pid,
            Via::Tls => 0,
        };
        if !self.core.vms.owns_serial(client.serial, pid) {
            return Err(denied("the client's serial was not given to this process"));
        }
        let mut serials = self.serials.lock().unwrap_or_else(PoisonError::into_inner);
        let holder = serials.entry(client.serial).or_insert_with(|| conn.clone());
        if !holder.same_as(conn) {
            if !holder.is_closed() {
                return Err(denied("another connection speaks for this client"));
            }
            *holder = conn.clone();
        }
        Ok(client.serial)
    }
}

impl Handler for Processes {
    fn handle(
        &self,
        _from: Peer,
        conn: Connection,
        service: u16,
        body: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, Refusal>> {
        if service != service::CSVFS {
            return Box::pin(async move { Err(Refusal::unsupported(service)) });
        }
        let request = pb::Request::decode(body)
            .map_err(|error| Refusal::new(RefusalCode::Invalid, format!("unreadable request: {error}")))
            .and_then(|request| {
                let serial = self.admit(&conn, request.client.as_ref())?;
                let volume = router::volume_of(&request)
                    .ok_or_else(|| Refusal::new(RefusalCode::Invalid, "the request names no volume"))?;
                if matches!(request.op, Some(pb::request::Op::Attach(_))) {
                    let order = redirect::orders::order(&self.core, volume);
                    // One that has just ended needs no orders.
                    drop(conn.push(service::PATHS, order.encode_to_vec().into()));
                    self.core.clients.add(volume, serial, Client::Process(conn));
                }
                Ok(request)
            });
        let core = Arc::clone(&self.core);
        Box::pin(async move {
            let reply = router::request(&core, request?).await;
            let reply = reply.map_err(|lost| Refusal::new(RefusalCode::NotHere, lost.to_string()))?;
            Ok(reply.encode_to_vec().into())
        })
    }

    fn gone(&self, conn: &Connection, reason: &str) {
        tracing::info!(peer = %conn.peer(), reason, "process disconnected");
        let mut serials = self.serials.lock().unwrap_or_else(PoisonError::into_inner);
        serials.retain(|_, holder| !holder.same_as(conn));
    }
}
