//! What the kernel is told unasked: to give up the pages of a file, and to forget attributes that it was promised.
//!
//! ```text
//!   a grant is recalled --> queue --> one thread: write(2) returns when the pages are gone --> the recall goes on
//!   or a change begins  --> queue --> another: forgotten, or not known and in no answer on its way --> it goes on
//! ```
//! An answer that names an inode which the kernel does not have makes one only when a program takes it up. What the kernel was told
//! to forget before that is lost: it is told again until it knows the inode, or has said that it forgot it.
//!
//! **Invariants:** no thread that answers requests tells the kernel anything: the kernel may wait for such an answer before it gives a
//! page up (F1, F2, F9). To forget attributes waits for no page, beyond those of an inode that is going, which are written back
//! without a word from here.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use csvfs::node::KernelCache;
use zerocopy::IntoBytes;

use super::abi::{NotifyInvalInode, OutHeader};
use super::channel::Channel;
use crate::known::Known;

/// `FUSE_NOTIFY_INVAL_INODE`, where a reply has its error number.
const INVAL_INODE: i32 = 2;
/// Where in a file it is to give up nothing.
const NO_PAGES: i64 = -1;
/// Until it is told again to forget what it did not know yet. Nobody says when an answer was taken up.
const AGAIN: Duration = Duration::from_millis(1);
/// How often, ten seconds: no answer takes that long to be taken up, nor the word that an inode was forgotten.
const PAUSES_MAX: u32 = 10_000;

type Then = Box<dyn FnOnce() + Send>;

/// What is to be given up, and what follows.
struct Told {
    what: NotifyInvalInode,
    then: Then,
}

/// The threads' queues.
#[derive(Debug)]
pub(crate) struct Notifier {
    /// Lock rank: leaf.
    pages: Mutex<Sender<Told>>,
    /// Lock rank: leaf.
    attributes: Mutex<Sender<Told>>,
}

impl Notifier {
    /// Starts the threads, which end when this is dropped. `known`: what answers have named to the kernel.
    pub(crate) fn start(of_mount: &Channel, known: Arc<Known>) -> io::Result<Self> {
        let (pages, told) = channel();
        let way = of_mount.try_clone()?;
        Builder::new().name("fuse-pages".into()).spawn(move || give_up_pages(&way, &told))?;
        let (attributes, told) = channel();
        let way = of_mount.try_clone()?;
        Builder::new().name("fuse-forget".into()).spawn(move || Forgetting { way, known }.serve(&told))?;
        Ok(Self { pages: Mutex::new(pages), attributes: Mutex::new(attributes) })
    }
}

fn queue(queue: &Mutex<Sender<Told>>, told: Told) {
    let sent = queue.lock().unwrap_or_else(PoisonError::into_inner).send(told);
    if let Err(unsent) = sent {
        // The thread has ended with the mount, and what the kernel had with it.
        (unsent.0.then)();
    }
}

impl KernelCache for Notifier {
    fn give_up(&self, ino: u64, range: Range<u64>, then: Then) {
        let offset = i64::try_from(range.start).unwrap_or(i64::MAX);
        // To the kernel no length is all that follows.
        let len = if range.end == u64::MAX { Some(0) } else { i64::try_from(range.end - range.start).ok() };
        let what = NotifyInvalInode { ino, offset, len: len.unwrap_or(0) };
        queue(&self.pages, Told { what, then });
    }

    fn forget_attributes(&self, ino: u64, then: Then) {
        queue(&self.attributes, Told { what: NotifyInvalInode { ino, offset: NO_PAGES, len: 0 }, then });
    }
}

/// Whether the kernel knows the inode.
fn tell(way: &Channel, what: &NotifyInvalInode) -> bool {
    let len = u32::try_from(size_of::<OutHeader>() + size_of::<NotifyInvalInode>()).expect("small");
    let header = OutHeader { len, error: INVAL_INODE, unique: 0 };
    way.tell(&[IoSlice::new(header.as_bytes()), IoSlice::new(what.as_bytes())])
}

fn give_up_pages(way: &Channel, told: &Receiver<Told>) {
    for Told { what, then } in told {
        // An inode that the kernel has forgotten has no pages.
        tell(way, &what);
        then();
    }
}

/// The thread that has attributes forgotten.
struct Forgetting {
    way: Channel,
    known: Arc<Known>,
}

/// What the kernel did not know when it was told, although an answer has named it.
struct Unsure {
    told: Told,
    /// Pauses since.
    pauses: u32,
}

impl Forgetting {
    fn serve(&self, queue: &Receiver<Told>) {
        let mut unsure: Vec<Unsure> = Vec::new();
        loop {
            let next = if unsure.is_empty() {
                queue.recv().map_err(RecvTimeoutError::from)
            } else {
                queue.recv_timeout(AGAIN)
            };
            match next {
                Ok(told) => unsure.push(Unsure { told, pauses: 0 }),
                Err(RecvTimeoutError::Timeout) => unsure.iter_mut().for_each(|unsure| unsure.pauses += 1),
                Err(RecvTimeoutError::Disconnected) => break,
            }
            unsure = unsure.into_iter().filter_map(|unsure| self.forget(unsure)).collect();
        }
        // The mount has ended, and what the kernel had with it.
        unsure.into_iter().for_each(|unsure| (unsure.told.then)());
    }

    /// Tells the kernel; what may have been in vain comes back.
    fn forget(&self, unsure: Unsure) -> Option<Unsure> {
        let ino = unsure.told.what.ino;
        let in_vain = !tell(&self.way, &unsure.told.what) && self.known.has(ino);
        if in_vain && unsure.pauses < PAUSES_MAX {
            return Some(unsure);
        }
        if in_vain {
            tracing::error!(ino, "the kernel neither has an inode that it was told of nor has forgotten it");
        }
        (unsure.told.then)();
        None
    }
}
