//! The coordinator of a volume: it alone writes metadata, for all clients.
//!
//! ```text
//!   submit --> queue --> [ batch: admit -> park? -> execute ... ] --> one transaction, committed --> replies, recalls
//!                              |        ^
//!                              v        |  lowered grants, ended clients, time
//!                        lock engine ---+
//! ```
//! One thread drains the queue; whatever waits in it becomes one transaction (group commit), and replies leave only after
//! the commit. A request that must wait for a grant to be lowered is parked and holds up nothing else.
//!
//! **Invariant:** nothing is answered before it is durable, and nothing is done under a term that is over.

mod admit;
mod batch;
mod chores;
mod clones;
mod core;
mod execute;
mod extend;
mod files;
mod grants;
mod lend;
mod locks;
mod mailbox;
mod names;
mod open;
mod pools;
mod punch;
mod quiesce;
mod repair;
mod replay;
mod scarcity;
mod sessions;
mod space;
mod stat;
mod xattrs;

use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use blockio::BlockDevice;
use lockmgr::engine::Limits;
use lockmgr::{ClientId, Epoch, NodeId, Term, VolumeId};

use crate::clock::{Clock, SystemClock};
use crate::meta::StoreError;
use crate::proto as pb;
use crate::refusal::failure;
use crate::volume::VolumeError;
use mailbox::{Asker, Job, Mailbox};

/// Whom to tell what clients did not ask for. Called by the coordinator's thread: it must not block.
pub trait PushTarget: Send + Sync {
    /// Sends `push` to a client.
    fn push(&self, to: ClientId, push: pb::Push);
    /// A client did not answer a recall of `ino` in time, or (`ino` 0) has not attached to this coordinator in time: it is
    /// to be fenced, and then reported with [`Coordinator::client_gone`] or [`Coordinator::node_gone`].
    fn overdue(&self, client: ClientId, ino: u64);
    /// Every client of the former term has attached or is gone: from here on requests are served.
    fn reclaimed(&self) {}
    /// The coordinator has stopped by itself, because of what `reason` says. It answers nothing any more but STOPPED.
    fn stopped(&self, reason: &str) {
        tracing::error!(reason, "coordinator stopped");
    }
}

/// Called once with the reply, by the coordinator's thread: it must not block.
pub type ReplyTo = Box<dyn FnOnce(pb::Reply) + Send>;

/// Times of a coordinator.
#[derive(Clone, Copy, Debug)]
pub struct CoordinatorTiming {
    /// How long clients of the previous term have to attach before they are reported as overdue.
    pub grace_ms: u64,
    /// Longest time between two looks at the owner block.
    pub owner_check_ms: u64,
    /// Times and bounds of grants.
    pub locks: Limits,
}

impl Default for CoordinatorTiming {
    fn default() -> Self {
        Self { grace_ms: 5_000, owner_check_ms: 200, locks: Limits::default() }
    }
}

/// What a coordinator is made of.
pub struct OpenParams {
    /// The LUN.
    pub device: Arc<dyn BlockDevice>,
    /// The volume that must be on it.
    pub volume: VolumeId,
    /// This node.
    pub node: NodeId,
    /// Its incarnation.
    pub epoch: Epoch,
    /// The reign that the cluster gave to this node.
    pub term: Term,
    /// Whom to tell.
    pub pushes: Arc<dyn PushTarget>,
    /// Times.
    pub timing: CoordinatorTiming,
    /// The clocks.
    pub clock: Arc<dyn Clock>,
}

impl OpenParams {
    /// With the machine's clocks and the default times.
    #[must_use]
    pub fn new(
        device: Arc<dyn BlockDevice>,
        volume: VolumeId,
        (node, epoch, term): (NodeId, Epoch, Term),
        pushes: Arc<dyn PushTarget>,
    ) -> Self {
        let (timing, clock) = (CoordinatorTiming::default(), Arc::new(SystemClock));
        Self { device, volume, node, epoch, term, pushes, timing, clock }
    }
}

impl std::fmt::Debug for OpenParams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { volume, node, epoch, term, .. } = self;
        write!(f, "OpenParams(volume {volume}, node {node}.{epoch}, term {term})")
    }
}

/// Why a volume cannot be coordinated from here.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The LUN is not a usable volume.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The metadata store is not usable.
    #[error("cannot open the volume's metadata: {0}")]
    Store(#[from] StoreError),
    /// The LUN holds another volume.
    #[error("the LUN holds volume {found}, not {expected}")]
    WrongVolume {
        /// What is there.
        found: VolumeId,
        /// What should be there.
        expected: VolumeId,
    },
    /// Somebody else has, or had, a right to this volume that ours does not exceed.
    #[error("the LUN says that node {} coordinates since term {found}; term {term} is over", node.map_or(0, |n| n.0))]
    Superseded {
        /// Our term.
        term: Term,
        /// The term on the LUN.
        found: Term,
        /// Its coordinator.
        node: Option<NodeId>,
    },
}

/// What an ordered end has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CloseReport {
    /// Requests that were not done and were told so: their clients send them to the next coordinator.
    pub held_ops: u64,
    /// Attached clients, which the next coordinator waits for.
    pub clients: u64,
}

/// Numbers of a running coordinator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CoordinatorStats {
    /// Requests taken.
    pub requests: u64,
    /// Durable transactions; requests / commits tells how well commits are grouped.
    pub commits: u64,
    /// Requests that wait for a grant to be lowered.
    pub parked: u64,
    /// Recalls sent.
    pub recalls: u64,
    /// Attached clients.
    pub clients: u64,
    /// Clients of the previous term that have not attached yet; nothing is served before this is 0.
    pub missing: u64,
    /// Why it stopped by itself, if it did.
    pub stopped: Option<String>,
}

/// An attached client, as shown to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientInfo {
    /// Who.
    pub id: ClientId,
    /// What it calls itself.
    pub name: String,
    /// Files it has open.
    pub open_files: u64,
    /// False for a client of the previous term that has not come back yet.
    pub attached: bool,
}

/// A running coordinator. See the module.
pub struct Coordinator {
    mailbox: Arc<Mailbox>,
    term: Term,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Coordinator(term {})", self.term)
    }
}

impl Coordinator {
    /// Takes over the volume: writes the term to the owner block, opens the store, and starts to serve.
    ///
    /// # Errors
    /// See [`OpenError`]; nothing was written when the term is over.
    pub fn open(params: OpenParams) -> Result<Arc<Self>, OpenError> {
        let term = params.term;
        let server = open::open(params)?;
        let mailbox = server.mailbox();
        let post = mailbox.clone();
        let serve = move || {
            // A panic is a bug of ours or a damaged page: nobody may be left without an answer.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| server.run()));
            post.ended(ended.is_err());
        };
        let thread = std::thread::Builder::new()
            .name("csvfs-coord".into())
            .spawn(serve)
            .expect("the system can start a thread");
        Ok(Arc::new(Self { mailbox, term, thread: std::sync::Mutex::new(Some(thread)) }))
    }

    /// The reign.
    #[must_use]
    pub fn term(&self) -> Term {
        self.term
    }

    /// Takes a request; `done` gets its reply, whatever happens.
    pub fn submit(&self, request: pb::Request, done: ReplyTo) {
        let asker = Asker::new(done, self.term.0);
        if let Err((refusal, Job::Request(_, asker))) =
            self.mailbox.put(Job::Request(Box::new(request), asker))
        {
            let failure = failure(refusal, "this node does not coordinate the volume any more");
            asker.answer(pb::reply::Result::Failure(failure));
        }
    }

    /// Waits for the reply. Not for the coordinator's own callbacks.
    #[must_use]
    pub fn call(&self, request: pb::Request) -> pb::Reply {
        let (tell, told) = sync_channel(1);
        self.submit(request, Box::new(move |reply| drop(tell.send(reply))));
        told.recv().expect("every request is answered")
    }

    /// A client has ended for certain: it was fenced, or its process is gone. Its grants and open files are dropped.
    pub fn client_gone(&self, client: ClientId) {
        let _ = self.mailbox.put(Job::ClientGone(client));
    }

    /// All clients of `node` up to `epoch` have ended for certain.
    pub fn node_gone(&self, node: NodeId, epoch: Epoch) {
        let _ = self.mailbox.put(Job::NodeGone(node, epoch));
    }

    /// Ends all writing at once and for good, and answers nothing more: the right to coordinate was lost.
    pub fn revoke(&self) {
        self.mailbox.revoke();
        self.mailbox.abandon();
    }

    /// Ends in order: finishes and commits what has begun, answers the rest with NOT_COORDINATOR, leaves the store clean.
    ///
    /// # Errors
    /// When the store had failed before, or fails now; the next coordinator then repairs it as after a crash.
    pub fn close(&self) -> Result<CloseReport, StoreError> {
        let (tell, told) = sync_channel(1);
        let _ = self.mailbox.put(Job::Close(tell));
        let report = told.recv().unwrap_or_else(|_| Ok(CloseReport::default()));
        self.join();
        match self.stats().stopped {
            Some(how) => Err(StoreError::Superseded { how }),
            None => report,
        }
    }

    /// Numbers for people.
    #[must_use]
    pub fn stats(&self) -> CoordinatorStats {
        self.mailbox.stats()
    }

    /// Clients of the volume.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientInfo> {
        let (tell, told) = sync_channel(1);
        let _ = self.mailbox.put(Job::Clients(tell));
        told.recv().unwrap_or_default()
    }

    fn join(&self) {
        let thread = self.thread.lock().expect("no panic while it is held").take();
        // The last handle may be dropped by a callback, on the coordinator's own thread.
        if let Some(thread) = thread.filter(|t| t.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

/// Without `close` it ends as in a crash: what was answered is durable, the next coordinator repairs the rest.
impl Drop for Coordinator {
    fn drop(&mut self) {
        self.revoke();
        self.join();
    }
}
