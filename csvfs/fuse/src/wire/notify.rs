//! What the kernel is told unasked: to give up the pages of a file.
//!
//! ```text
//!   a grant is recalled --> queue --> one thread: write(2) returns when the pages are gone --> the recall goes on
//! ```
//! **Invariant:** no thread that answers requests tells the kernel anything: the kernel may wait for such an answer before it
//! gives a page up (F1, F2, F9).

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;

use csvfs::node::KernelPages;
use zerocopy::IntoBytes;

use super::abi::{NotifyInvalInode, OutHeader};
use super::channel::Channel;

/// `FUSE_NOTIFY_INVAL_INODE`, where a reply has its error number.
const INVAL_INODE: i32 = 2;

type Then = Box<dyn FnOnce() + Send>;

/// What is to be given up, and what follows.
struct Told {
    what: NotifyInvalInode,
    then: Then,
}

/// The thread's queue.
#[derive(Debug)]
pub(crate) struct Notifier {
    /// Lock rank: leaf.
    queue: Mutex<Sender<Told>>,
}

impl Notifier {
    /// Starts the thread, which ends when this is dropped.
    pub(crate) fn start(channel_of_mount: Channel) -> io::Result<Self> {
        let (queue, told) = channel();
        Builder::new().name("fuse-notify".into()).spawn(move || serve(&channel_of_mount, &told))?;
        Ok(Self { queue: Mutex::new(queue) })
    }
}

impl KernelPages for Notifier {
    fn give_up(&self, ino: u64, range: Range<u64>, then: Then) {
        let offset = i64::try_from(range.start).unwrap_or(i64::MAX);
        // To the kernel no length is all that follows.
        let len = if range.end == u64::MAX { Some(0) } else { i64::try_from(range.end - range.start).ok() };
        let what = NotifyInvalInode { ino, offset, len: len.unwrap_or(0) };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = queue.send(Told { what, then });
        drop(queue);
        if let Err(unsent) = sent {
            // The thread has ended with the mount, and the kernel's pages with it.
            (unsent.0.then)();
        }
    }
}

fn serve(channel: &Channel, told: &Receiver<Told>) {
    for Told { what, then } in told {
        let len = u32::try_from(size_of::<OutHeader>() + size_of::<NotifyInvalInode>()).expect("small");
        let header = OutHeader { len, error: INVAL_INODE, unique: 0 };
        // An inode that the kernel has forgotten has no pages; a connection that has ended neither.
        channel.send(&[IoSlice::new(header.as_bytes()), IoSlice::new(what.as_bytes())]);
        then();
    }
}
