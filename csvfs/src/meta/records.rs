//! Values of the tables that may grow in later versions: protobuf messages, whose unknown fields older programs skip.
//!
//! **Invariant:** tags are never reused.

use crate::proto::{Attr, FileKind, Timestamp};

/// An inode.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct InodeRecord {
    /// [`FileKind`].
    #[prost(enumeration = "FileKind", tag = "1")]
    pub(crate) kind: i32,
    /// Permission bits, 0 to 07777.
    #[prost(uint32, tag = "2")]
    pub(crate) mode: u32,
    #[prost(uint32, tag = "3")]
    pub(crate) nlink: u32,
    #[prost(uint32, tag = "4")]
    pub(crate) uid: u32,
    #[prost(uint32, tag = "5")]
    pub(crate) gid: u32,
    #[prost(uint32, tag = "6")]
    pub(crate) rdev: u32,
    #[prost(uint64, tag = "7")]
    pub(crate) size_bytes: u64,
    /// Blocks of the data area that its extents take.
    #[prost(uint64, tag = "8")]
    pub(crate) blocks: u64,
    #[prost(message, required, tag = "9")]
    pub(crate) atime: Timestamp,
    #[prost(message, required, tag = "10")]
    pub(crate) mtime: Timestamp,
    #[prost(message, required, tag = "11")]
    pub(crate) ctime: Timestamp,
    #[prost(message, required, tag = "12")]
    pub(crate) btime: Timestamp,
    #[prost(uint64, tag = "13")]
    pub(crate) generation: u64,
    /// Of a directory: the directory that it is in.
    #[prost(uint64, tag = "14")]
    pub(crate) parent: u64,
    /// Of a directory: cookie of the next new entry.
    #[prost(uint64, tag = "15")]
    pub(crate) next_cookie: u64,
    /// Of a symlink: where it points.
    #[prost(bytes = "vec", tag = "16")]
    pub(crate) target: Vec<u8>,
    /// Of a directory: number of entries.
    #[prost(uint64, tag = "17")]
    pub(crate) entries: u64,
    /// Number of extended attributes.
    #[prost(uint64, tag = "30")]
    pub(crate) xattrs: u64,
    /// Made without a name (`O_TMPFILE`), and may get one.
    #[prost(bool, tag = "31")]
    pub(crate) linkable: bool,
}

impl InodeRecord {
    pub(crate) fn is_dir(&self) -> bool {
        self.kind() == FileKind::Directory
    }

    pub(crate) fn is_regular(&self) -> bool {
        self.kind() == FileKind::Regular
    }

    pub(crate) fn attr(&self, ino: u64) -> Attr {
        Attr {
            ino,
            kind: self.kind,
            mode: self.mode,
            nlink: self.nlink,
            uid: self.uid,
            gid: self.gid,
            rdev: self.rdev,
            size_bytes: self.size_bytes,
            allocated_bytes: self.blocks * crate::format::layout::BLOCK_BYTES,
            atime: Some(self.atime),
            mtime: Some(self.mtime),
            ctime: Some(self.ctime),
            btime: Some(self.btime),
            generation: self.generation,
            xattrs: self.xattrs,
        }
    }
}

/// An attached client.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ClientRecord {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    /// Term in which it attached last.
    #[prost(uint64, tag = "2")]
    pub(crate) term: u64,
}

/// What a client was told, until it says that it knows.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct StoredReply {
    /// The encoded reply.
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) reply: bytes::Bytes,
}

/// The intent log of a client, and with it its pool.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct LogRow {
    /// Number of the log; never used twice.
    #[prost(uint64, tag = "1")]
    pub(crate) log: u64,
    /// Where it lies.
    #[prost(uint32, tag = "2")]
    pub(crate) lane: u32,
    /// All records up to this one are in the tables.
    #[prost(uint64, tag = "3")]
    pub(crate) merged_lsn: u64,
}
