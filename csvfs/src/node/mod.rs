//! The client side of a volume: what FUSE and the virtual machines use. It holds grants and maps, and moves data
//! between its callers and the LUN by itself.
//!
//! ```text
//!   names (lookup, create, ..)      File: read, write, fsync
//!            |                        |  resolve: interval map, under a grant; holes filled from the pool
//!            |                        |  submit the pieces                     no message, no thread, no copy
//!            |                        v
//!            |                     blockio::BlockDevice (the LUN)
//!            v                        ^  fsync: flush, then the intent log
//!         session  <--- what the map does not know: Acquire, GetMap, recalls; later: Merge of the log, TakePool
//!            |
//!      CoordinatorLink ---> coordinator (here or on another node)
//! ```
//!
//! Locks are taken in the order of their ranks (`rank`), and none is held over I/O, a message or a callback.
//!
//! **Invariant:** data is read or written only under a grant that permits it, and a grant is given back only when no
//! request of it is in flight and what it buffered is with the coordinator (C6, E3).

mod access;
mod advance;
mod attr;
mod bad;
mod cache;
mod clones;
mod core;
mod directory;
mod error;
mod file;
mod grants;
mod growth;
mod hold;
mod inode;
mod io;
mod link;
mod locks;
mod log;
mod map;
mod names;
mod pages;
mod parting;
mod pool;
mod promise;
mod punch;
mod ranges;
mod rank;
mod refill;
mod remember;
mod session;
mod space;
mod sync;
mod times;
mod transfer;
mod workers;
mod xattrs;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;

use self::core::{Core, Pin};
use blockio::{BlockDevice, WriteRight};
use bytes::Bytes;
use lockmgr::{ClientId, Term, VolumeId};
use pb::request::Op;
use session::{Holder, Session};
use workers::Workers;

use crate::proto as pb;

pub(crate) use attr::without_set_ids;
pub use attr::{Attr, Creation, DirEntry, DirPage, FileKind, SetAttr};
pub use bad::BadRange;
pub use cache::CacheStats;
pub use directory::Directory;
pub use error::FsError;
pub use file::{Extent, ExtentState, File, SeekFrom};
pub use link::{CoordinatorLink, LinkError, ReplyTo};
pub use locks::{Lock, LockInTheWay};
pub use names::{AtHand, Created, NAME_BYTES_MAX, ROOT_INO};
pub use pages::{KernelCache, Mapper};
pub use xattrs::XattrFlags;

/// How long the first attach waits for a coordinator.
const ATTACH_PATIENCE: Duration = Duration::from_secs(30);

/// How long a detach waits for what is buffered to be durable.
const DETACH_PATIENCE: Duration = Duration::from_secs(30);

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
    /// Writes of the intent log.
    pub log_writes: u64,
    /// Bytes in the pool: free, and this client's to place.
    pub pool_bytes: u64,
}

/// A client of a volume. Dropping it without [`Node::detach`] leaves what it holds to the coordinator, as a crash would.
pub struct Node {
    core: Arc<Core>,
    volume: VolumeId,
}

impl std::fmt::Debug for NodeParams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeParams")
            .field("client", &self.client)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("term", &self.core.session.term()).finish_non_exhaustive()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.core.end(&FsError::Detached);
    }
}

impl Node {
    /// Attaches to the volume's coordinator.
    ///
    /// # Errors
    /// When the coordinator refuses, none answers for a while, or the LUN's blocks are larger than the volume's.
    pub fn attach(params: NodeParams) -> Result<Arc<Self>, FsError> {
        let unit = params.device.geometry().block_bytes;
        if u64::from(unit) > map::BLOCK_BYTES {
            let what =
                format!("the LUN's blocks have {unit} bytes, more than the volume's {}", map::BLOCK_BYTES);
            return Err(FsError::invalid(libc::EINVAL, what));
        }
        let workers = Arc::new(Workers::new());
        let volume = Bytes::copy_from_slice(params.volume.0.as_bytes());
        let who = (params.client.into(), volume, params.name);
        let identity = (params.client, params.volume);
        let session = Session::new(params.link, who, params.term.0, workers.clone());
        let core = Core::new(params.device, session, workers, identity);
        let node = Arc::new(Self { core, volume: params.volume });
        let (tell, told) = mpsc::sync_channel(1);
        let holder: Weak<dyn Holder> = Arc::downgrade(&node.core) as Weak<dyn Holder>;
        node.core.session.start(holder, move |outcome| drop(tell.send(outcome)));
        match told.recv_timeout(ATTACH_PATIENCE) {
            Ok(outcome) => outcome.map(|_| node),
            Err(_) => Err(FsError::Unreachable { why: format!("waited {} s", ATTACH_PATIENCE.as_secs()) }),
        }
    }

    /// A push for this client: a recall, or a new coordinator. Never blocks.
    pub fn deliver(&self, push: pb::Push) {
        let term = push.term;
        match push.what {
            Some(pb::push::What::NewCoordinator(_)) => self.core.session.new_coordinator(term),
            // What is held was claimed from the next coordinator, which recalls it itself: an answer to an older one would
            // give up what the newer one is granting.
            Some(pb::push::What::Recall(_)) if term < self.core.session.term() => {}
            Some(pb::push::What::Recall(recall)) => {
                let core = self.core.clone();
                let to = recall.to().into();
                self.core.workers.run(move || core.recalled(recall.ino, to, (term, recall.seq)));
            }
            Some(pb::push::What::PoolRecall(_)) => {
                let core = self.core.clone();
                self.core.workers.run(move || core.pool_recalled());
            }
            None => {}
        }
    }

    /// Opens a regular file. Handles of one file share everything.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR` and the like.
    pub fn open(self: &Arc<Self>, ino: u64) -> Result<Arc<File>, FsError> {
        let (pin, kind) = self.register(ino)?;
        match kind {
            FileKind::Regular => Ok(File::new(self.clone(), pin)),
            FileKind::Directory => Err(FsError::invalid(libc::EISDIR, format!("inode {ino} is a directory"))),
            _ => Err(FsError::invalid(libc::EINVAL, format!("inode {ino} is no regular file"))),
        }
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`.
    pub fn open_directory(self: &Arc<Self>, ino: u64) -> Result<Directory, FsError> {
        match self.register(ino)? {
            (pin, FileKind::Directory) => Ok(Directory::new(self.clone(), pin)),
            _ => Err(FsError::invalid(libc::ENOTDIR, format!("inode {ino} is no directory"))),
        }
    }

    /// Has the coordinator count an inode as open here, unless it does already. What kind it is of.
    fn register(&self, ino: u64) -> Result<(Pin, FileKind), FsError> {
        if let Some(known) = self.registered(ino) {
            return Ok(known);
        }
        let pin = self.core.pin(ino);
        loop {
            let answered = self.core.ask(Op::Open(pb::Open { ino }))?;
            let kind = names::attr_of(&answered)?.kind;
            if pin.opened_as(kind, answered.attempt) {
                return Ok((pin, kind));
            }
        }
    }

    /// A file that the coordinator has counted as opened in an answer under the attach `attempt`; none if that does not count any more.
    fn opened(self: &Arc<Self>, attr: Attr, attempt: u64) -> Option<Arc<File>> {
        let pin = self.core.pin(attr.ino);
        pin.opened_as(attr.kind, attempt).then(|| File::new(self.clone(), pin))
    }

    /// Has the coordinator count a regular file as open, until that counts.
    fn reopen_then(
        self: &Arc<Self>,
        ino: u64,
        done: impl FnOnce(Result<Arc<File>, FsError>) + Send + 'static,
    ) {
        let node = self.clone();
        self.core.ask_then(Op::Open(pb::Open { ino }), move |outcome| {
            let answer = outcome.and_then(|answered| Ok((names::attr_of(&answered)?, answered.attempt)));
            match answer.map(|(attr, attempt)| node.opened(attr, attempt)) {
                Ok(Some(file)) => done(Ok(file)),
                Ok(None) => node.reopen_then(ino, done),
                Err(error) => done(Err(error)),
            }
        });
    }

    /// As [`Node::open`], if that takes no message. Never blocks.
    #[must_use]
    pub fn open_at_hand(self: &Arc<Self>, ino: u64) -> Option<Arc<File>> {
        let (pin, _) = self.registered(ino).filter(|(_, kind)| *kind == FileKind::Regular)?;
        Some(File::new(self.clone(), pin))
    }

    /// As [`Node::open_directory`], if that takes no message. Never blocks.
    #[must_use]
    pub fn open_directory_at_hand(self: &Arc<Self>, ino: u64) -> Option<Directory> {
        let (pin, _) = self.registered(ino).filter(|(_, kind)| *kind == FileKind::Directory)?;
        Some(Directory::new(self.clone(), pin))
    }

    /// An inode that the coordinator counts as open here, and its kind.
    fn registered(&self, ino: u64) -> Option<(Pin, FileKind)> {
        let pin = self.core.find(ino)?;
        let state = pin.inode.lock();
        let kind = state.opened_as.filter(|_| state.registered > 0);
        drop(state);
        kind.map(|kind| (pin, kind))
    }

    /// As [`Node::getattr`], if that takes no message. Never blocks.
    #[must_use]
    pub fn attr_at_hand(&self, ino: u64) -> Option<Attr> {
        self.core.peek(ino)?.attr_at_hand()
    }

    /// Attributes now. Of what was asked for before and was not changed elsewhere since, without a message.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn getattr(&self, ino: u64) -> Result<Attr, FsError> {
        let Some(inode) = self.core.peek(ino) else { return self.ask_for(ino) };
        if let Some(attr) = inode.attr_at_hand() {
            return Ok(attr);
        }
        match self.core.find(ino).filter(|pin| pin.inode.lock().grant.mode != lockmgr::Mode::Null) {
            Some(pin) => pin.inode.attr(),
            None => self.ask_for(ino),
        }
    }

    fn ask_for(&self, ino: u64) -> Result<Attr, FsError> {
        let answered = self.core.ask(Op::GetAttr(pb::GetAttr { ino, cache: true }))?;
        let attr = names::attr_of(&answered)?;
        Ok(self.with_local_changes(attr, answered.stamp()))
    }

    /// As [`Node::attr_at_hand`], for the kernel that this node was given, and how long it may tell them without asking: until it is
    /// asked to forget them, or that time is over. Zero: not at all. `asker` is the thread that asks the kernel, 0 if it is not known: it
    /// has taken up what it was told when it asks again, and only then it is promised the same. Never blocks.
    #[must_use]
    pub fn promise(&self, ino: u64, asker: u32) -> Option<(Attr, Duration)> {
        self.core.peek(ino)?.promise(asker)
    }

    /// Names who knows whether others may suspect this node, and have it fenced: nothing is told from memory then. `false` when somebody
    /// is known already.
    pub fn set_right(&self, right: Arc<dyn WriteRight>) -> bool {
        self.core.set_right(right)
    }

    /// Names the kernel that keeps pages and attributes of files; `false` when there is one already.
    pub fn set_kernel(&self, kernel: Arc<dyn KernelCache>) -> bool {
        let mut place = self.core.kernel();
        let free = place.is_none();
        if free {
            *place = Some(kernel);
        }
        free
    }

    /// That kernel keeps nothing any more.
    pub fn unset_kernel(&self) {
        let gone = self.core.kernel().take();
        drop(gone);
    }

    /// How many inodes that nobody uses may be remembered, with their names; what is asked for beyond that is forgotten
    /// again, and what is remembered beyond it now.
    pub fn set_memory(&self, inodes: usize) {
        self.core.bound_memory(inodes);
    }

    /// How many inodes that nobody uses may be remembered.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.core.memory.bound()
    }

    /// Changes attributes and gives the new ones.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn setattr(&self, ino: u64, set: &SetAttr) -> Result<Attr, FsError> {
        if set.size_bytes.is_some() {
            return self.core.pin(ino).inode.set_attr(set);
        }
        match self.core.find(ino) {
            Some(pin) => pin.inode.set_attr(set),
            None => {
                let _changing = self.core.changing([ino], false);
                self.ask_attr(Op::SetAttr(names::set_attr_request(ino, set)))
            }
        }
    }

    /// Gives everything back and leaves the volume. Waiting calls fail with [`FsError::Detached`].
    ///
    /// # Errors
    /// When buffered changes could not be made durable, or no coordinator answers in half a minute.
    pub fn detach(&self) -> Result<(), FsError> {
        self.detach_within(DETACH_PATIENCE)
    }

    /// The same with another bound than half a minute: giving back and saying goodbye may each take `patience`. A client
    /// that went without a goodbye stays known to the coordinator until its node attaches anew or is fenced.
    ///
    /// # Errors
    /// As [`Node::detach`].
    pub fn detach_within(&self, patience: Duration) -> Result<(), FsError> {
        // What has stopped can give nothing back: the coordinator gets it when it knows that this client has ended.
        let given_back = self.core.stopped().is_none() && self.core.give_back(patience);
        let outcome = if given_back {
            self.core.session.call_within(Op::Detach(pb::Detach {}), patience).map(drop)
        } else {
            let why = "not everything could be given back before the detach".to_owned();
            Err(self.core.stopped().unwrap_or(FsError::Unreachable { why }))
        };
        self.core.end(&FsError::Detached);
        outcome
    }

    /// Counters since the attach.
    #[must_use]
    pub fn stats(&self) -> NodeStats {
        NodeStats {
            requests_sent: self.core.session.requests_sent(),
            recalls: self.core.recalls.load(Ordering::Relaxed),
            files: self.core.files_count() as u64,
            flushes: self.core.flushes.load(Ordering::Relaxed),
            log_writes: self.core.log.writes(),
            pool_bytes: self.core.space.bytes(),
        }
    }

    /// Gives reads of this node up to `bytes` of memory for blocks of the LUN; 0 takes it away. `right` is asked before
    /// anything is answered from there: the same that guards the LUN.
    pub fn set_read_cache(&self, bytes: u64, right: Option<Arc<dyn WriteRight>>) {
        self.core.cache.resize(bytes, right);
    }

    /// Numbers of the read cache.
    #[must_use]
    pub fn read_cache(&self) -> CacheStats {
        self.core.cache.stats()
    }

    /// Ranges of files whose places on the LUN have failed since the attach, as far as they are remembered.
    #[must_use]
    pub fn bad_ranges(&self) -> Vec<BadRange> {
        self.core.bad.all()
    }

    /// Tells of each such range when it is found; for one listener, which must not block.
    pub fn on_bad_range(&self, listener: impl Fn(BadRange) + Send + Sync + 'static) {
        drop(self.core.bad.listener.set(Box::new(listener)));
    }

    /// Why this node stopped writing to the volume, if it did.
    #[must_use]
    pub fn stopped(&self) -> Option<FsError> {
        self.core.stopped()
    }

    fn ask(&self, op: Op) -> Result<pb::reply::Result, FsError> {
        self.core.ask(op).map(|answered| answered.result)
    }

    /// What an answer at `stamp` said of an inode, with what only this node knows yet. An answer that was given before this
    /// node's own last changes had arrived does not count: it is asked again.
    fn with_local_changes(&self, attr: Attr, stamp: grants::Seq) -> Attr {
        let known = self.local_changes_at_hand(attr, stamp);
        // Who cannot ask again has at least been told this.
        known.unwrap_or_else(|| self.core.pin(attr.ino).inode.attr().unwrap_or(attr))
    }

    /// The same, if the answer counts.
    fn local_changes_at_hand(&self, attr: Attr, stamp: grants::Seq) -> Option<Attr> {
        match self.core.peek(attr.ino) {
            Some(inode) => inode.with_local_changes(attr, stamp),
            None => (self.core.memory.written_up_to(attr.ino) <= stamp).then_some(attr),
        }
    }
}
