//! What all requests of a mount share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use csvfs::node::{Attr, File, FsError, Node, SetAttr};

use crate::attr::to_kernel;
use crate::buffers::Buffers;
use crate::handles::{Handles, OpenDirectory, OpenFile};
use crate::interrupts::Interrupts;
use crate::known::Known;
use crate::lockers::Lockers;
use crate::ops::appends;
use crate::wire::reply::Reply;
use crate::wire::request::Header;

/// The node and what is open on the mount.
pub(crate) struct Shared {
    pub(crate) node: Arc<Node>,
    pub(crate) files: Handles<OpenFile>,
    pub(crate) directories: Handles<OpenDirectory>,
    pub(crate) buffers: Arc<Buffers>,
    /// Mappings of files may be shared.
    pub(crate) maps: bool,
    notes_access: bool,
    /// What answers have named to the kernel, if attributes may be promised to it.
    pub(crate) known: Arc<Known>,
    /// Calls that wait for locks.
    pub(crate) interrupts: Interrupts,
    pub(crate) lockers: Lockers,
}

impl Shared {
    pub(crate) fn new(node: Arc<Node>, known: Arc<Known>, maps: bool, notes_access: bool) -> Self {
        Self {
            node,
            maps,
            notes_access,
            known,
            files: Handles::default(),
            directories: Handles::default(),
            buffers: Arc::default(),
            interrupts: Interrupts::default(),
            lockers: Lockers::default(),
        }
    }

    /// Attributes that are known without a message, and how long the kernel may use them.
    pub(crate) fn attr_at_hand(&self, asked: &Header) -> Option<(Attr, Duration)> {
        if self.known.counts() {
            return self.node.promise(asked.ino, asked.thread);
        }
        self.node.attr_at_hand(asked.ino).map(|attr| (attr, Duration::ZERO))
    }

    /// What `attr` says, with a promise if it can be given.
    pub(crate) fn to_keep(&self, attr: Attr, asked: &Header) -> (Attr, Duration) {
        let promised = self.known.counts().then(|| self.node.promise(attr.ino, asked.thread)).flatten();
        promised.filter(|(now, _)| now.nlink > 0).unwrap_or((attr, Duration::ZERO))
    }

    /// Answers with a name that was found and what it stands for.
    pub(crate) fn found(&self, attr: Attr, asked: &Header, reply: Reply) {
        // First: whoever takes a promise back is to know that an answer may be on its way.
        self.known.named(attr.ino);
        let (attr, keep) = self.to_keep(attr, asked);
        reply.entry(&to_kernel(&attr), attr.generation, keep);
    }

    /// The same of one that was made. The kernel takes that answer for newer than whatever it was told before it takes it up.
    pub(crate) fn made(&self, attr: &Attr, reply: Reply) {
        self.known.named(attr.ino);
        reply.entry(&to_kernel(attr), attr.generation, Duration::ZERO);
    }

    /// Whether [`Shared::opened`] may have to wait: for a file that may be mapped and written to.
    pub(crate) fn may_wait_to_open(&self, flags: u32) -> bool {
        self.maps && flags & libc::O_RDWR.cast_unsigned() != 0
    }

    /// A handle for a file that was just opened with `flags`.
    pub(crate) fn opened(&self, file: Arc<File>, flags: u32) -> Result<u64, FsError> {
        let has = |flag: i32| flags & flag.cast_unsigned() != 0;
        let mapper = self.may_wait_to_open(flags).then(|| file.map_writable()).transpose()?;
        Ok(self.files.insert(OpenFile {
            file,
            append: appends(flags),
            _mapper: mapper,
            notes_access: self.notes_access && !has(libc::O_NOATIME),
            direct: has(libc::O_DIRECT),
            may_be_cut: AtomicBool::new(false),
        }))
    }

    /// Sets attributes.
    ///
    /// After an asynchronous direct write beyond the end has failed, the kernel cuts the file to the size that it knew
    /// before. If another node has made the file longer since, that would destroy its data, so a cut that follows a
    /// failed direct write on the same handle is refused once. The kernel ignores the refusal; a program that means it
    /// cuts again.
    pub(crate) fn set_attributes(
        &self,
        ino: u64,
        set: &SetAttr,
        handle: Option<u64>,
    ) -> Result<Attr, FsError> {
        let opened = handle.and_then(|handle| self.files.get(handle));
        if let (Some(size), Some(opened)) = (set.size_bytes, opened)
            && opened.may_be_cut.swap(false, Ordering::AcqRel)
            && self.node.getattr(ino)?.size_bytes > size
        {
            let what = "not cut: a write just failed, and the file is longer than this node's kernel knows";
            return Err(FsError::Invalid { errno: libc::EAGAIN, what: what.to_owned() });
        }
        self.node.setattr(ino, set)
    }
}
