//! Places of the LUN that cannot be read or written: they cost their own range of the file, and are told.
//!
//! A read that fails is tried again in halves: what lies before the bad place is the answer, and the next read, which
//! begins there, gets the error. Of a read that must be whole, the halves only find the place.
//! **Invariant:** a short answer ends where the bad block begins, so whoever hears of an error has asked for that block.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use blockio::{IoBuf, IoError};

use super::FsError;
use super::inode::Inode;
use super::io::{DataOp, Done, What};
use super::map::BLOCK_BYTES;

/// Places that are remembered.
const PLACES_MAX: usize = 256;

/// A range of a file whose place on the LUN failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRange {
    /// Which file.
    pub ino: u64,
    /// Where in it.
    pub offset: u64,
    /// How long: one block of a read, the whole request of a write or of a page.
    pub length: u64,
    /// Whether a write failed.
    pub write: bool,
    /// In the words of the device.
    pub why: String,
}

/// Told of each place once.
pub(super) type Listener = Box<dyn Fn(BadRange) + Send + Sync>;

/// What has failed so far.
#[derive(Default)]
pub(super) struct BadRanges {
    /// Rank: leaf.
    places: Mutex<BTreeMap<(u64, u64), BadRange>>,
    pub(super) listener: OnceLock<Listener>,
}

impl BadRanges {
    pub(super) fn all(&self) -> Vec<BadRange> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(super) fn note(&self, bad: BadRange) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if places.len() >= PLACES_MAX || places.contains_key(&(bad.ino, bad.offset)) {
            return;
        }
        places.insert((bad.ino, bad.offset), bad.clone());
        drop(places);
        let BadRange { ino, offset, length, write, ref why } = bad;
        tracing::error!(ino, offset, length, write, why, "the LUN failed a range of a file");
        if let Some(listener) = self.listener.get() {
            listener(bad);
        }
    }
}

/// Whether the medium failed, and not the way to it or the right to use it.
pub(super) fn is_medium(error: &FsError) -> bool {
    let FsError::Io(error @ IoError::Os { .. }) = error else { return false };
    matches!(error.errno(), libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO)
}

/// A read that can be done again.
#[derive(Debug)]
pub(super) struct Again {
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    pub(super) exact: bool,
    pub(super) page: bool,
}

impl Inode {
    /// A read has failed on the medium: finds out where, before anybody hears of it.
    pub(super) fn look_closer(self: &Arc<Self>, read: Again, error: FsError, done: Done) {
        let Again { offset, buf, exact, page } = read;
        let len = buf.len() as u64;
        let in_block = offset % BLOCK_BYTES;
        // For a page the kernel may be waiting in a way that a second request would wait for.
        if page || in_block + len <= BLOCK_BYTES {
            let why = error.to_string();
            self.core.bad.note(BadRange { ino: self.ino, offset, length: len, write: false, why });
            return done(Err(error));
        }
        // Whole blocks up to the middle, one at least.
        let half = ((in_block + len) / 2 / BLOCK_BYTES).max(1) * BLOCK_BYTES - in_block;
        let half = usize::try_from(half).unwrap_or_default().min(buf.len());
        let (first, rest) = (buf.slice(0..half), buf.slice(half..buf.len()));
        if !exact {
            return self.read_again(offset, first, false, done);
        }
        let inode = self.clone();
        let then = move |outcome: Result<u64, FsError>| match outcome {
            Err(error) => done(Err(error)),
            Ok(before) => {
                let whole = Box::new(move |outcome: Result<u64, FsError>| done(outcome.map(|n| n + before)));
                inode.read_again(offset + before, rest, true, whole);
            }
        };
        self.read_again(offset, first, true, Box::new(then));
    }

    /// From a device's I/O thread too.
    fn read_again(self: &Arc<Self>, offset: u64, buf: IoBuf, exact: bool, done: Done) {
        let inode = self.clone();
        let op = DataOp { what: What::Read, offset, buf, exact, page: false, done };
        self.core.workers.run(move || inode.submit(op));
    }
}
