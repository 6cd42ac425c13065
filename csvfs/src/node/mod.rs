//! The client side of a volume: what FUSE and the virtual machines use. It holds grants and maps, and moves data
//! between its callers and the LUN by itself.
//!
//! ```text
//!   names (lookup, create, ..)      File: read, write, fsync
//!            |                        |  resolve: interval map, under a grant
//!            |                        |  submit the pieces                     no message, no thread, no copy
//!            |                        v
//!            |                     blockio::BlockDevice (the LUN)
//!            v                        ^
//!         session  <--- what the map does not know: Acquire, GetMap, Allocate, Commit, recalls
//!            |
//!      CoordinatorLink ---> coordinator (here or on another node)
//! ```
//!
//! Lock ranks, taken in this order and none held over I/O, a message or a callback: files table 1, file 2,
//! flusher 4, session 5, workers 9.
//!
//! **Invariant:** data is read or written only under a grant that permits it, and a grant is given back only when no
//! request of it is in flight and what it buffered is with the coordinator (C6, E3).

mod attr;
mod error;
mod file;
mod link;
mod names;
mod session;
mod workers;

use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;

use blockio::BlockDevice;
use bytes::Bytes;
use lockmgr::{ClientId, Term, VolumeId};
use pb::request::Op;
use session::{Holder, Holdings, Session};
use workers::Workers;

use crate::proto as pb;

pub use attr::{Attr, Creation, DirEntry, DirPage, FileKind, SetAttr};
pub use error::FsError;
pub use file::{Extent, ExtentState, File, SeekFrom};
pub use link::{CoordinatorLink, LinkError, ReplyTo};
pub use names::{NAME_BYTES_MAX, ROOT_INO};

/// How long the first attach waits for a coordinator.
const ATTACH_PATIENCE: Duration = Duration::from_secs(30);

/// What a node needs to use a volume.
pub struct NodeParams {
    /// The LUN.
    pub device: Arc<dyn BlockDevice>,
    /// The way to the coordinator.
    pub link: Arc<dyn CoordinatorLink>,
    /// Who this is: unique among all users of the volume.
    pub client: ClientId,
    /// Which volume.
    pub volume: VolumeId,
    /// The coordinator's term, as far as known.
    pub term: Term,
    /// For people, in lists of who holds what.
    pub name: String,
}

/// Counters since the attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeStats {
    /// Requests sent to coordinators, each attempt counted.
    pub requests_sent: u64,
    /// Recalls answered.
    pub recalls: u64,
    /// Files in the table.
    pub files: u64,
    /// Flushes of the LUN.
    pub flushes: u64,
}

/// A client of a volume.
pub struct Node {
    session: Arc<Session>,
    device: Arc<dyn BlockDevice>,
    workers: Arc<Workers>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("term", &self.session.term()).finish_non_exhaustive()
    }
}

impl Node {
    /// Attaches to the volume's coordinator.
    ///
    /// # Errors
    /// When the coordinator refuses, or none answers for a while.
    pub fn attach(params: NodeParams) -> Result<Arc<Self>, FsError> {
        let workers = Arc::new(Workers::new());
        let volume = Bytes::copy_from_slice(params.volume.0.as_bytes());
        let who = (params.client.into(), volume, params.name);
        let session = Session::new(params.link, who, params.term.0, workers.clone());
        let node = Arc::new(Self { session, device: params.device, workers });
        let (tell, told) = mpsc::sync_channel(1);
        let holder: Weak<dyn Holder> = Arc::downgrade(&node) as Weak<dyn Holder>;
        node.session.start(holder, move |outcome| drop(tell.send(outcome)));
        match told.recv_timeout(ATTACH_PATIENCE) {
            Ok(outcome) => outcome.map(|_| node),
            Err(_) => {
                let why = FsError::Unreachable { why: format!("waited {} s", ATTACH_PATIENCE.as_secs()) };
                node.session.close(&why);
                Err(why)
            }
        }
    }

    /// A push for this client: a recall, or a new coordinator. Never blocks.
    pub fn deliver(&self, push: pb::Push) {
        match push.what {
            Some(pb::push::What::NewCoordinator(_)) => self.session.new_coordinator(push.term),
            Some(pb::push::What::Recall(_)) | None => {}
        }
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR` and the like.
    pub fn open(self: &Arc<Self>, ino: u64) -> Result<Arc<File>, FsError> {
        let attr = self.ask_attr(Op::Open(pb::Open { ino }))?;
        Ok(self.opened(attr))
    }

    /// Attributes now.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn getattr(&self, ino: u64) -> Result<Attr, FsError> {
        self.ask_attr(Op::GetAttr(pb::GetAttr { ino }))
    }

    /// Changes attributes and gives the new ones.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn setattr(&self, ino: u64, set: &SetAttr) -> Result<Attr, FsError> {
        self.ask_attr(Op::SetAttr(names::set_attr_request(ino, set)))
    }

    /// Gives everything back and leaves the volume. Waiting calls fail with [`FsError::Detached`].
    ///
    /// # Errors
    /// When buffered changes could not be made durable.
    pub fn detach(&self) -> Result<(), FsError> {
        let outcome = self.ask_done(Op::Detach(pb::Detach {}));
        self.session.close(&FsError::Detached);
        self.workers.close();
        outcome
    }

    /// Counters since the attach.
    #[must_use]
    pub fn stats(&self) -> NodeStats {
        NodeStats { requests_sent: self.session.requests_sent(), ..NodeStats::default() }
    }

    fn ask(&self, op: Op) -> Result<pb::reply::Result, FsError> {
        self.session.call_blocking(op)
    }

    fn opened(self: &Arc<Self>, attr: Attr) -> Arc<File> {
        File::new(self.clone(), attr.ino)
    }

    fn with_local_changes(&self, attr: Attr) -> Attr {
        attr
    }

    fn names_changed(&self) {}

    fn file_identity(&self, ino: u64) -> String {
        format!("csvfs:{:x}:{ino}:{}", self.session.volume(), self.device.geometry().size_bytes)
    }
}

impl Holder for Node {
    fn holdings(&self) -> Holdings {
        Holdings::default()
    }
    fn attached(&self, _term: u64) {}
    fn refused(&self, _why: &FsError) {}
}
