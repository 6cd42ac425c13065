//! The users of volumes on this node, and the way to each: the daemon's own mounts, and the `hv` processes.
//!
//! **Invariant:** a serial is used once in an epoch, so a push for a client that is gone reaches nobody.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use csvfs::node::Node;
use csvfs::proto as pb;
use hv_runner::PathOrder;
use lockmgr::{NodeId, Term, VolumeId};
use prost::Message;
use wire::{Connection, service};

/// The clients of this node.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    next_serial: AtomicU64,
    /// Rank: a leaf; nothing is called under it.
    table: Mutex<HashMap<(VolumeId, u64), Client>>,
}

/// The way to a client.
#[derive(Clone, Debug)]
pub(crate) enum Client {
    /// The node library inside the daemon.
    Mount(Weak<Node>),
    /// An `hv` process.
    Process(Connection),
}

impl Clients {
    /// A serial that no client of this epoch has had.
    pub(crate) fn new_serial(&self) -> u64 {
        self.next_serial.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn add(&self, volume: VolumeId, serial: u64, client: Client) {
        self.lock().insert((volume, serial), client);
    }

    pub(crate) fn remove(&self, volume: VolumeId, serial: u64) {
        self.lock().remove(&(volume, serial));
    }

    /// Whether the client is there.
    pub(crate) fn has(&self, volume: VolumeId, serial: u64) -> bool {
        self.lock().contains_key(&(volume, serial))
    }

    /// The volumes that a client has attached to.
    pub(crate) fn volumes_of(&self, serial: u64) -> Vec<VolumeId> {
        self.lock().keys().filter(|(_, other)| *other == serial).map(|(volume, _)| *volume).collect()
    }

    /// Hands a push to the client; `false` when it is gone.
    pub(crate) fn deliver(&self, volume: VolumeId, serial: u64, push: pb::Push) -> bool {
        let client = self.lock().get(&(volume, serial)).cloned();
        client.is_some_and(|client| client.deliver(push))
    }

    /// Tells all clients of a volume that they are to attach to the coordinator of `term`.
    pub(crate) fn announce(&self, volume: VolumeId, term: Term, owner: NodeId) {
        let table = self.lock();
        let clients: Vec<_> =
            table.iter().filter(|((of, _), _)| *of == volume).map(|(_, client)| client.clone()).collect();
        drop(table);
        for client in clients {
            client.deliver(pb::Push {
                volume: Bytes::copy_from_slice(volume.0.as_bytes()),
                term: term.0,
                what: Some(pb::push::What::NewCoordinator(pb::NewCoordinator { node: owner.0.into() })),
            });
        }
    }

    /// Tells the processes among a volume's clients how to reach its LUN.
    pub(crate) fn order(&self, volume: VolumeId, order: &PathOrder) {
        let table = self.lock();
        let processes: Vec<_> = table
            .iter()
            .filter_map(|((of, _), client)| match client {
                Client::Process(connection) if *of == volume => Some(connection.clone()),
                _ => None,
            })
            .collect();
        drop(table);
        for process in processes {
            // One that has just ended needs no orders.
            drop(process.push(service::PATHS, order.encode_to_vec().into()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(VolumeId, u64), Client>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    fn deliver(&self, push: pb::Push) -> bool {
        match self {
            Self::Mount(node) => {
                let node: Option<Arc<Node>> = node.upgrade();
                let there = node.is_some();
                if let Some(node) = node {
                    node.deliver(push);
                }
                there
            }
            Self::Process(connection) => {
                connection.push(service::CSVFS_PUSH, push.encode_to_vec().into()).is_ok()
            }
        }
    }
}
