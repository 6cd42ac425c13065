//! Structures and numbers of the kernel's FUSE protocol, as in its `linux/fuse.h`, version 7.
//!
//! Numbers are in the machine's own byte order: both sides are the same machine. Fields without a use here are named
//! `_…`. **Invariant:** each structure has the size that the header file gives it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub(crate) const MAJOR: u32 = 7;
/// Newest minor version that this program knows: `STATX`.
pub(crate) const MINOR: u32 = 39;
/// Oldest minor version that is enough: `TMPFILE`, extended flags, extended `SETXATTR`. Linux 6.1 has it.
pub(crate) const MINOR_MIN: u32 = 37;
/// Oldest minor version of kernels that may be promised attributes. Since Linux 6.13 an answer about an inode that was forgotten while it
/// was on its way is not taken for what the next inode of that number has; 6.14 is the first with a number of its own.
pub(crate) const MINOR_PROMISES: u32 = 42;

/// What a request asks for.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const IOCTL: u32 = 39;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
}

/// Flags of the handshake.
pub(crate) mod init {
    pub(crate) const ASYNC_READ: u64 = 1;
    pub(crate) const POSIX_LOCKS: u64 = 1 << 1;
    /// Inodes that the kernel has forgotten are looked up by their number, as `.` and `..`: for handles of files.
    pub(crate) const EXPORT_SUPPORT: u64 = 1 << 4;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    /// The umask comes with the request instead of being applied: a default ACL takes its place.
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const FLOCK_LOCKS: u64 = 1 << 10;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    /// The kernel enforces ACLs, and asks for them as extended attributes.
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    /// `flags2` holds the upper half.
    pub(crate) const INIT_EXT: u64 = 1 << 30;
    /// Files without a page cache may be mapped shared: their mappings have one.
    pub(crate) const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    /// Requests come through rings.
    pub(crate) const OVER_IO_URING: u64 = 1 << 41;
}

/// Which fields of a [`SetattrIn`] count.
pub(crate) mod fattr {
    pub(crate) const MODE: u32 = 1;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const CTIME: u32 = 1 << 10;
}

/// How the kernel is to treat an open file.
pub(crate) mod fopen {
    pub(crate) const DIRECT_IO: u32 = 1;
    pub(crate) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Commands of a ring.
pub(crate) mod ring {
    /// Takes an entry's memory, and puts the first request for it there.
    pub(crate) const REGISTER: u32 = 1;
    /// Takes the answer from an entry's memory, and puts the next request there.
    pub(crate) const COMMIT_AND_FETCH: u32 = 2;
}

/// A read by a program; one without is for a page of a mapping.
pub(crate) const READ_LOCKOWNER: u32 = 1 << 1;
/// A write of pages that a program has changed through a mapping.
pub(crate) const WRITE_CACHE: u32 = 1;
/// The writer may not keep set-id bits.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// The lock is one of `flock`.
pub(crate) const LK_FLOCK: u32 = 1;
/// The last descriptor of an open file that had a `flock` is closed.
pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// `fdatasync`.
pub(crate) const FSYNC_FDATASYNC: u32 = 1;
/// The setter of an ACL may not keep the set-group-id bit.
pub(crate) const SETXATTR_ACL_KILL_SGID: u32 = 1;

macro_rules! wire {
    ($(#[$doc:meta])* $name:ident, $size:literal { $($field:ident: $ty:ty),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $ty),* }
        const _: () = assert!(size_of::<$name>() == $size);
    };
}

wire!(
    /// Before every request. `total_extlen` counts units of 8 bytes after the arguments.
    InHeader, 40 { len: u32, opcode: u32, unique: u64, node: u64, uid: u32, gid: u32, pid: u32, extensions: u16, _pad: u16 }
);
wire!(
    /// Before every reply; `error` is 0 or a negative error number.
    OutHeader, 16 { len: u32, error: i32, unique: u64 }
);
wire!(InitIn, 64 { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, _unused: [u32; 11] });
wire!(InitOut, 64 {
    major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
    max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, _unused: [u32; 7],
});
wire!(
    /// Attributes; seconds are signed in truth.
    Attr, 88 {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atime_nanos: u32, mtime_nanos: u32,
        ctime_nanos: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
);
wire!(
    /// A name's answer; the times tell how long the kernel may use it without asking.
    EntryOut, 128 {
        node: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nanos: u32, attr_valid_nanos: u32,
        attr: Attr,
    }
);
wire!(AttrOut, 104 { valid: u64, valid_nanos: u32, _pad: u32, attr: Attr });
wire!(SetattrIn, 88 {
    valid: u32, _pad: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
    atime_nanos: u32, mtime_nanos: u32, ctime_nanos: u32, mode: u32, _unused4: u32, uid: u32, gid: u32, _unused5: u32,
});
wire!(MknodIn, 16 { mode: u32, rdev: u32, umask: u32, _pad: u32 });
wire!(MkdirIn, 8 { mode: u32, umask: u32 });
wire!(RenameIn, 8 { new_dir: u64 });
wire!(Rename2In, 16 { new_dir: u64, flags: u32, _pad: u32 });
wire!(LinkIn, 8 { old_node: u64 });
wire!(OpenIn, 8 { flags: u32, open_flags: u32 });
wire!(CreateIn, 16 { flags: u32, mode: u32, umask: u32, open_flags: u32 });
wire!(OpenOut, 16 { fh: u64, open_flags: u32, backing: u32 });
wire!(ReleaseIn, 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 });
wire!(FlushIn, 24 { fh: u64, _unused: u32, _pad: u32, lock_owner: u64 });
wire!(ReadIn, 40 { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, _pad: u32 });
wire!(WriteIn, 40 { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, _pad: u32 });
wire!(WriteOut, 8 { size: u32, _pad: u32 });
wire!(FsyncIn, 16 { fh: u64, flags: u32, _pad: u32 });
wire!(SetxattrIn, 16 { size: u32, flags: u32, setxattr_flags: u32, _pad: u32 });
wire!(GetxattrIn, 8 { size: u32, _pad: u32 });
wire!(
    /// A range: both ends belong to it.
    FileLock, 24 { start: u64, end: u64, kind: u32, pid: u32 }
);
wire!(LkIn, 48 { fh: u64, owner: u64, lock: FileLock, flags: u32, _pad: u32 });
wire!(ForgetIn, 8 { names: u64 });
wire!(BatchForgetIn, 8 { count: u32, _pad: u32 });
wire!(ForgetOne, 16 { node: u64, names: u64 });
wire!(InterruptIn, 8 { unique: u64 });
wire!(FallocateIn, 32 { fh: u64, offset: u64, length: u64, mode: u32, _pad: u32 });
wire!(LseekIn, 24 { fh: u64, offset: u64, whence: u32, _pad: u32 });
wire!(LseekOut, 8 { offset: u64 });
wire!(CopyFileRangeIn, 56 { fh: u64, offset: u64, to_node: u64, to_fh: u64, to_offset: u64, len: u64, flags: u64 });
wire!(Kstatfs, 80 {
    blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32, _pad: u32,
    _spare: [u32; 6],
});
wire!(
    /// Before the name of a directory's entry.
    Dirent, 24 { ino: u64, offset: u64, name_len: u32, kind: u32 }
);
wire!(StatxIn, 24 { getattr_flags: u32, _reserved: u32, fh: u64, flags: u32, mask: u32 });
wire!(
    /// Of a notification: pages of an inode from `offset` on, all of them for a length of 0, none for an offset before the file. Its
    /// attributes go in any case.
    NotifyInvalInode, 24 { ino: u64, offset: i64, len: i64 }
);
wire!(
    /// Of a ring's command; `commit_id` names the request that is answered.
    RingCommand, 24 { flags: u64, commit_id: u64, queue: u16, _pad: [u8; 6] }
);
wire!(
    /// How a ring's entry is filled, by either side.
    RingEntry, 32 { flags: u64, commit_id: u64, payload_bytes: u32, _pad: u32, _reserved: u64 }
);
wire!(
    /// The first part of a ring's entry. `in_out` holds an [`InHeader`], and the [`OutHeader`] of the answer.
    RingHeaders, 288 { in_out: [u8; 128], fixed: [u8; 128], entry: RingEntry }
);
wire!(SxTime, 16 { seconds: i64, nanos: u32, _reserved: i32 });
wire!(StatxOut, 288 {
    valid: u64, valid_nanos: u32, _flags: u32, _spare: [u64; 2],
    mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, _spare0: u16, ino: u64, size: u64,
    blocks: u64, attributes_mask: u64, atime: SxTime, btime: SxTime, ctime: SxTime, mtime: SxTime, rdev_major: u32,
    rdev_minor: u32, dev_major: u32, dev_minor: u32, _spare2: [u64; 14],
});
