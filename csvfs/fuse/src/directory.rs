//! Reading directories: pages of the node library into the kernel's buffer.
//!
//! ```text
//!   kernel's offset   0    1 ("." was given)    2 (".." was given)    3 + n (the entry with cookie n + 1 was given)
//! ```
//!
//! What does not fit into the kernel's buffer is kept for its next call; going back to the start reads anew.

use std::sync::PoisonError;

use csvfs::node::{DirEntry, Directory, FsError};
use zerocopy::FromZeros;

use crate::attr::to_kernel;
use crate::handles::{Ahead, OpenDirectory};
use crate::known::Known;
use crate::wire::abi;
use crate::wire::listing::Listing;

/// Entries per request to the coordinator.
const PAGE_ENTRIES: u32 = 256;
/// Offsets for `.` and `..`, before those of real entries.
const DOTS: u64 = 2;

/// Fills `listing` with what comes after `offset`; with all attributes where `plus` notes which inodes are named so.
pub(crate) fn fill(
    ino: u64,
    offset: u64,
    open: &OpenDirectory,
    plus: Option<&Known>,
    listing: &mut Listing,
) -> Result<(), FsError> {
    let mut ahead = open.ahead.lock().unwrap_or_else(PoisonError::into_inner);
    let after = offset.saturating_sub(DOTS);
    if offset < DOTS || ahead.after != after || (ahead.entries.is_empty() && !ahead.end) {
        *ahead = next_page(&open.directory, after)?;
    }
    let mut dot = |ino, offset, name: &[u8]| listing.add(&directory_attr(ino), plus.map(|_| 0), offset, name);
    if (offset < 1 && !dot(ino, 1, b".")) || (offset < 2 && !dot(ahead.parent, 2, b"..")) {
        return Ok(());
    }
    loop {
        while let Some(entry) = ahead.entries.pop_front() {
            if !add(&entry, plus, listing) {
                ahead.entries.push_front(entry);
                return Ok(());
            }
            ahead.after = entry.cookie;
        }
        if ahead.end {
            return Ok(());
        }
        *ahead = next_page(&open.directory, ahead.after)?;
    }
}

/// The kernel uses only number and kind of the dots.
fn directory_attr(ino: u64) -> abi::Attr {
    abi::Attr { ino, mode: libc::S_IFDIR, ..abi::Attr::new_zeroed() }
}

fn add(entry: &DirEntry, plus: Option<&Known>, listing: &mut Listing) -> bool {
    let generation = plus.map(|_| entry.attr.generation);
    let fits =
        listing.add(&to_kernel(&entry.attr), generation, entry.cookie.saturating_add(DOTS), &entry.name);
    if let Some(known) = plus.filter(|_| fits) {
        known.named(entry.attr.ino);
    }
    fits
}

fn next_page(directory: &Directory, after: u64) -> Result<Ahead, FsError> {
    let page = directory.read(after, PAGE_ENTRIES)?;
    // A page without entries that is not the end would be asked for again and again.
    let end = page.end || page.entries.is_empty();
    Ok(Ahead { after, entries: page.entries.into(), end, parent: page.parent })
}
