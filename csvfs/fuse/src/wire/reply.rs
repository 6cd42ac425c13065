//! Replies to the kernel: types to bytes, each request answered once.
//!
//! **Invariant:** a reply that is dropped unused tells the caller `EIO`: nobody waits for ever.

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use blockio::IoBuf;
use zerocopy::{Immutable, IntoBytes};

use super::abi::{
    Attr, AttrOut, EntryOut, FileLock, Kstatfs, LseekOut, OpenOut, OutHeader, StatxOut, WriteOut,
};
use super::channel::Channel;
use super::request::Header;
use super::ring::Entry;

/// Where the answer to one request goes.
#[must_use]
#[derive(Debug)]
pub(crate) struct Reply {
    way: Way,
    unique: u64,
    answered: bool,
}

/// How the kernel is told.
#[derive(Debug)]
enum Way {
    Device(Arc<Channel>),
    Ring(Entry),
}

impl Reply {
    pub(super) fn new(channel: &Arc<Channel>, header: &Header) -> Self {
        Self { way: Way::Device(Arc::clone(channel)), unique: header.unique, answered: false }
    }

    /// To a request of a ring.
    pub(super) fn of_entry(entry: Entry, header: &Header) -> Self {
        Self { way: Way::Ring(entry), unique: header.unique, answered: false }
    }

    /// Memory from which an answer of up to a request's length is sent without a copy, if there is any: see [`Self::filled`].
    pub(crate) fn memory(&self) -> Option<IoBuf> {
        match &self.way {
            Way::Device(_) => None,
            Way::Ring(entry) => Some(entry.payload()),
        }
    }

    /// The first `len` bytes of [`Self::memory`] are the answer.
    pub(crate) fn filled(mut self, len: usize) {
        self.answered = true;
        let Way::Ring(entry) = &self.way else { unreachable!("only an entry of a ring has memory") };
        entry.answer(self.unique, 0, len);
    }

    /// Names the request.
    pub(crate) fn unique(&self) -> u64 {
        self.unique
    }

    /// The request wants no answer.
    pub(super) fn none(mut self) {
        self.answered = true;
    }

    fn send(&mut self, error: i32, parts: &[&[u8]]) {
        self.answered = true;
        let channel = match &self.way {
            Way::Device(channel) => channel,
            Way::Ring(entry) => return entry.answer_with(self.unique, error, parts),
        };
        let size = size_of::<OutHeader>() + parts.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(size).expect("replies are bounded by what the kernel asks for");
        let header = OutHeader { len, error, unique: self.unique };
        let mut slices = [IoSlice::new(header.as_bytes()), IoSlice::new(&[]), IoSlice::new(&[])];
        for (slice, part) in slices[1..].iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
        }
        channel.send(&slices[..=parts.len()]);
    }

    fn plain<T: IntoBytes + Immutable>(mut self, answer: &T) {
        self.send(0, &[answer.as_bytes()]);
    }

    /// Refuses, with one of Linux's error numbers.
    pub(crate) fn error(mut self, errno: i32) {
        self.send(-errno, &[]);
    }

    /// Done.
    pub(crate) fn ok(mut self) {
        self.send(0, &[]);
    }

    /// Done, or not.
    pub(crate) fn done(self, outcome: Result<(), i32>) {
        match outcome {
            Ok(()) => self.ok(),
            Err(errno) => self.error(errno),
        }
    }

    /// A name and what it stands for. The name may not be used again without asking, the attributes for that long.
    pub(crate) fn entry(self, attr: &Attr, generation: u64, keep: Duration) {
        let entry = EntryOut {
            attr_valid: keep.as_secs(),
            attr_valid_nanos: keep.subsec_nanos(),
            ..entry(attr, generation)
        };
        self.plain(&entry);
    }

    /// Attributes, which may be used again for that long without asking.
    pub(crate) fn attr(self, attr: &Attr, keep: Duration) {
        self.plain(&AttrOut {
            valid: keep.as_secs(),
            valid_nanos: keep.subsec_nanos(),
            _pad: 0,
            attr: *attr,
        });
    }

    /// The same, in the form of statx(2).
    pub(crate) fn statx(self, statx: &StatxOut, keep: Duration) {
        self.plain(&StatxOut { valid: keep.as_secs(), valid_nanos: keep.subsec_nanos(), ..*statx });
    }

    /// Bytes: of a file, a link, a directory, an attribute.
    pub(crate) fn data(mut self, data: &[u8]) {
        self.send(0, &[data]);
    }

    /// An open file or directory, to be treated as `flags` say.
    pub(crate) fn opened(self, fh: u64, flags: u32) {
        self.plain(&OpenOut { fh, open_flags: flags, backing: 0 });
    }

    /// A new file, opened.
    pub(crate) fn created(mut self, attr: &Attr, generation: u64, fh: u64, flags: u32) {
        let (entry, open) = (entry(attr, generation), OpenOut { fh, open_flags: flags, backing: 0 });
        self.send(0, &[entry.as_bytes(), open.as_bytes()]);
    }

    /// So many bytes were written.
    pub(crate) fn written(self, size: u32) {
        self.plain(&WriteOut { size, _pad: 0 });
    }

    pub(crate) fn statfs(self, statfs: &Kstatfs) {
        self.plain(statfs);
    }

    /// A lock that stands in the way, or one of the kind `F_UNLCK`.
    pub(crate) fn lock(self, lock: &FileLock) {
        self.plain(lock);
    }

    /// Where a seek ends.
    pub(crate) fn offset(self, offset: u64) {
        self.plain(&LseekOut { offset });
    }

    /// An extended attribute for a caller with room for `room` bytes; without room it is told the size.
    pub(crate) fn xattr(self, room: u32, value: &[u8]) {
        let size = u32::try_from(value.len()).unwrap_or(u32::MAX);
        match room {
            0 => self.plain(&super::abi::GetxattrIn { size, _pad: 0 }),
            room if size > room => self.error(libc::ERANGE),
            _ => self.data(value),
        }
    }
}

/// A name and what it stands for, neither to be used again without asking.
pub(super) fn entry(attr: &Attr, generation: u64) -> EntryOut {
    EntryOut {
        node: attr.ino,
        generation,
        entry_valid: 0,
        attr_valid: 0,
        entry_valid_nanos: 0,
        attr_valid_nanos: 0,
        attr: *attr,
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.answered {
            self.send(-libc::EIO, &[]);
        }
    }
}
