//! Reading directories: pages of the node library into the kernel's buffer.
//!
//! ```text
//!   kernel's offset   0    1 ("." was given)    2 (".." was given)    3 + n (the entry with cookie n + 1 was given)
//! ```
//!
//! What does not fit into the kernel's buffer is kept for its next call; going back to the start reads anew.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::PoisonError;

use csvfs::node::{Attr, DirEntry, FsError, Node};

use fuser::{FileType, Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use crate::attr::{TTL, to_kernel};
use crate::handles::{Ahead, OpenDirectory};

/// Entries per request to the coordinator.
const PAGE_ENTRIES: u32 = 256;
/// Offsets for `.` and `..`, before those of real entries.
const DOTS: u64 = 2;

/// What goes into the kernel's buffer. `true` means that it is full and took nothing.
pub(crate) trait Sink {
    /// `.` or `..`.
    fn dot(&mut self, ino: u64, offset: u64, name: &str) -> bool;
    /// An entry.
    fn entry(&mut self, offset: u64, name: &[u8], attr: &Attr) -> bool;
}

/// Fills `sink` with what comes after `offset`.
pub(crate) fn fill(
    node: &Node,
    ino: u64,
    offset: u64,
    directory: &OpenDirectory,
    sink: &mut dyn Sink,
) -> Result<(), FsError> {
    let mut ahead = directory.ahead.lock().unwrap_or_else(PoisonError::into_inner);
    let after = offset.saturating_sub(DOTS);
    if offset < DOTS || ahead.after != after || (ahead.entries.is_empty() && !ahead.end) {
        *ahead = next_page(node, ino, after)?;
    }
    if (offset < 1 && sink.dot(ino, 1, ".")) || (offset < 2 && sink.dot(ahead.parent, 2, "..")) {
        return Ok(());
    }
    loop {
        while let Some(entry) = ahead.entries.pop_front() {
            if give(&entry, sink) {
                ahead.entries.push_front(entry);
                return Ok(());
            }
            ahead.after = entry.cookie;
        }
        if ahead.end {
            return Ok(());
        }
        *ahead = next_page(node, ino, ahead.after)?;
    }
}

fn give(entry: &DirEntry, sink: &mut dyn Sink) -> bool {
    sink.entry(entry.cookie.saturating_add(DOTS), &entry.name, &entry.attr)
}

fn next_page(node: &Node, ino: u64, after: u64) -> Result<Ahead, FsError> {
    let page = node.readdir(ino, after, PAGE_ENTRIES)?;
    // A page without entries that is not the end would be asked for again and again.
    let end = page.end || page.entries.is_empty();
    Ok(Ahead { after, entries: page.entries.into(), end, parent: page.parent })
}

/// Names and types only.
pub(crate) struct Names(pub(crate) ReplyDirectory);

impl Sink for Names {
    fn dot(&mut self, ino: u64, offset: u64, name: &str) -> bool {
        self.0.add(INodeNo(ino), offset, FileType::Directory, name)
    }
    fn entry(&mut self, offset: u64, name: &[u8], attr: &Attr) -> bool {
        self.0.add(INodeNo(attr.ino), offset, to_kernel(attr).kind, OsStr::from_bytes(name))
    }
}

/// Names with their attributes.
pub(crate) struct NamesPlus {
    pub(crate) reply: ReplyDirectoryPlus,
    /// The directory itself.
    pub(crate) this: Attr,
}

impl Sink for NamesPlus {
    /// The kernel uses only number and type of the dots; the directory's own attributes have the right type.
    fn dot(&mut self, ino: u64, offset: u64, name: &str) -> bool {
        let attr = to_kernel(&Attr { ino, ..self.this });
        self.reply.add(INodeNo(ino), offset, name, &TTL, &attr, Generation(0))
    }
    fn entry(&mut self, offset: u64, name: &[u8], attr: &Attr) -> bool {
        let name = OsStr::from_bytes(name);
        self.reply.add(INodeNo(attr.ino), offset, name, &TTL, &to_kernel(attr), Generation(attr.generation))
    }
}
