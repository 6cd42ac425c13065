//! The callbacks of the kernel, one call of the node library each.
//!
//! Data calls are submitted and answered from the completion; calls that wait for the coordinator run on the pool.
//! Deliberately not offered, so that the kernel does it by itself or refuses: locks (local to each node until the
//! cluster has range locks), extended attributes, ioctl, poll, bmap, `copy_file_range` (the kernel copies), `access`
//! (the kernel checks permissions, `default_permissions`).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use csvfs::node::{Attr, Creation, FsError, Node, SeekFrom, SetAttr};
use fuser::{
    AccessFlags, BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLock, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use crate::attr::{TTL, errno, kind_of_mode, to_kernel, to_timestamp};
use crate::data::{self, BAD_HANDLE};
use crate::directory::{self, Names, NamesPlus};
use crate::handles::OpenDirectory;
use crate::pool::{Lane, Pool};
use crate::shared::Shared;

/// Largest read or write of the kernel.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Asynchronous requests of one mount in flight; the kernel's default of 12 would hold deep queues back.
const BACKGROUND_MAX: u16 = 512;
const NAME_BYTES_MAX: u32 = 255;

/// How the kernel treats each file: no page cache, writes in parallel, no request at `close`, because nothing is
/// buffered that a close could lose.
const FILE_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO
    .union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES)
    .union(FopenFlags::FOPEN_NOFLUSH);

/// The filesystem as fuser sees it.
pub(crate) struct Ops {
    shared: Arc<Shared>,
    pool: Pool,
}

impl Ops {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { shared: Arc::new(Shared::new(node)), pool: Pool::new() }
    }

    /// Runs a call that may wait, on a worker.
    fn wait(&self, job: impl FnOnce(&Shared) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        self.pool.run(Lane::Names, move || job(&shared));
    }

    fn entry(&self, reply: ReplyEntry, call: impl FnOnce(&Node) -> Result<Attr, FsError> + Send + 'static) {
        self.wait(move |shared| match call(&shared.node) {
            Ok(attr) => reply.entry(&TTL, &to_kernel(&attr), Generation(attr.generation)),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn done(&self, reply: ReplyEmpty, call: impl FnOnce(&Node) -> Result<(), FsError> + Send + 'static) {
        self.wait(move |shared| match call(&shared.node) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        });
    }
}

fn bytes(name: &OsStr) -> Vec<u8> {
    name.as_bytes().to_vec()
}

fn creation(request: &Request, mode: u32) -> Creation {
    // The kernel has applied the umask.
    Creation { mode: mode & 0o7777, uid: request.uid(), gid: request.gid() }
}

impl Filesystem for Ops {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
        ];
        for flag in wanted {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::info!(?missing, "the kernel's FUSE does not offer this");
            }
        }
        // Both refuse only what is out of their range, and say what is in it.
        config
            .set_max_write(REQUEST_BYTES_MAX)
            .map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL))?;
        config
            .set_max_background(BACKGROUND_MAX)
            .map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(())
    }

    fn destroy(&mut self) {
        // Answers what still runs, then closes what programs left open.
        self.pool.close();
        self.shared.files.clear();
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = bytes(name);
        self.entry(reply, move |node| node.lookup(parent.0, &name));
    }

    /// Inodes are not counted here: the node library caches under grants, not for the kernel's references.
    fn forget(&self, _request: &Request, _ino: INodeNo, _count: u64) {}

    fn getattr(&self, _request: &Request, ino: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.wait(move |shared| match shared.node.getattr(ino.0) {
            Ok(attr) => reply.attr(&TTL, &to_kernel(&attr)),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size_bytes: size,
            atime: atime.map(to_timestamp),
            mtime: mtime.map(to_timestamp),
            ctime: ctime.map(SystemTime::into),
        };
        self.wait(move |shared| match shared.set_attributes(ino.0, &set, handle) {
            Ok(attr) => reply.attr(&TTL, &to_kernel(&attr)),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        self.wait(move |shared| match shared.node.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let Some(kind) = kind_of_mode(mode) else { return reply.error(Errno::EINVAL) };
        let (name, creation) = (bytes(name), creation(request, mode));
        self.entry(reply, move |node| node.mknod(parent.0, &name, kind, rdev, &creation));
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (name, creation) = (bytes(name), creation(request, mode));
        self.entry(reply, move |node| node.mkdir(parent.0, &name, &creation));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        self.done(reply, move |node| node.unlink(parent.0, &name));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        self.done(reply, move |node| node.rmdir(parent.0, &name));
    }

    fn symlink(&self, request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let (name, target) = (bytes(name), bytes(target.as_os_str()));
        let creation = creation(request, 0o777);
        self.entry(reply, move |node| node.symlink(parent.0, &name, &target, &creation));
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (bytes(name), bytes(new_name));
        self.done(reply, move |node| node.rename(parent.0, &name, new_parent.0, &new_name, flags.bits()));
    }

    fn link(&self, _request: &Request, ino: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = bytes(name);
        self.entry(reply, move |node| node.link(ino.0, parent.0, &name));
    }

    /// `O_TRUNC` arrives as a `setattr` of its own.
    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.wait(move |shared| match shared.node.open(ino.0) {
            Ok(file) => reply.opened(shared.opened(file, flags.0), FILE_FLAGS),
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (name, creation) = (bytes(name), creation(request, mode));
        let exclusive = flags & libc::O_EXCL != 0;
        self.wait(move |shared| match shared.node.create(parent.0, &name, &creation, exclusive) {
            Ok((attr, file)) => {
                let handle = shared.opened(file, flags);
                reply.created(&TTL, &to_kernel(&attr), Generation(attr.generation), handle, FILE_FLAGS);
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.shared.files.get(handle) {
            Some(file) => data::read(&file, &self.shared.buffers, offset, size, reply),
            None => reply.error(BAD_HANDLE),
        }
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.shared.files.get(handle) {
            Some(file) => data::write(&file, &self.shared.buffers, offset, data, reply),
            None => reply.error(BAD_HANDLE),
        }
    }

    /// Nothing is buffered that closing could lose; the kernel was told not to ask (`FOPEN_NOFLUSH`).
    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.shared.files.get(handle) {
            Some(file) => data::fsync(&file, datasync, reply),
            None => reply.error(BAD_HANDLE),
        }
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let closed = self.shared.files.remove(handle);
        // The node's last handle gives grants back, which may wait for the coordinator.
        self.pool.run(Lane::Closing, move || {
            drop(closed);
            reply.ok();
        });
    }

    fn opendir(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(self.shared.directories.insert(OpenDirectory::default()), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let Some(open) = self.shared.directories.get(handle) else { return reply.error(BAD_HANDLE) };
        self.wait(move |shared| {
            let mut sink = Names(reply);
            match directory::fill(&shared.node, ino.0, offset, &open, &mut sink) {
                Ok(()) => sink.0.ok(),
                Err(error) => sink.0.error(errno(&error)),
            }
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let Some(open) = self.shared.directories.get(handle) else { return reply.error(BAD_HANDLE) };
        self.wait(move |shared| match shared.node.getattr(ino.0) {
            Ok(this) => {
                let mut sink = NamesPlus { reply, this };
                match directory::fill(&shared.node, ino.0, offset, &open, &mut sink) {
                    Ok(()) => sink.reply.ok(),
                    Err(error) => sink.reply.error(errno(&error)),
                }
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        drop(self.shared.directories.remove(handle));
        reply.ok();
    }

    /// An acknowledged change of a name is durable already.
    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.wait(move |shared| match shared.node.statfs() {
            Ok(stat) => {
                let (total, free) = (stat.blocks, stat.blocks_free);
                let block = u32::try_from(stat.block_bytes).unwrap_or(u32::MAX);
                // Inodes are made as needed: as many as there is room for.
                let inodes = stat.inodes.saturating_add(free);
                reply.statfs(total, free, free, inodes, free, block, NAME_BYTES_MAX, block);
            }
            Err(error) => reply.error(errno(&error)),
        });
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode & !libc::FALLOC_FL_KEEP_SIZE != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let Some(open) = self.shared.files.get(handle) else { return reply.error(BAD_HANDLE) };
        let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
        self.done(reply, move |_| open.file.allocate(offset, length, keep_size));
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let Some(open) = self.shared.files.get(handle) else { return reply.error(BAD_HANDLE) };
        // Before the start there is no data; the kernel handles the other kinds by itself.
        let from = match (u64::try_from(offset), whence) {
            (Ok(offset), libc::SEEK_DATA) => SeekFrom::Data(offset),
            (Ok(offset), libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            (Err(_), libc::SEEK_DATA | libc::SEEK_HOLE) => return reply.error(Errno::ENXIO),
            _ => return reply.error(Errno::EINVAL),
        };
        self.wait(move |_| match open.file.seek(from) {
            Ok(found) => match i64::try_from(found) {
                Ok(found) => reply.offset(found),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
            Err(error) => reply.error(errno(&error)),
        });
    }

    /// The kernel checks permissions by the attributes (`default_permissions`) and never asks.
    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    /// `ENOSYS` makes the kernel keep locks by itself: they hold among the programs of this node.
    fn getlk(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        _start: u64,
        _end: u64,
        _kind: i32,
        _pid: u32,
        reply: ReplyLock,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// As for `getlk`.
    fn setlk(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        _start: u64,
        _end: u64,
        _kind: i32,
        _pid: u32,
        _sleep: bool,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// `ENOSYS` tells the kernel once that there are no extended attributes; programs get `EOPNOTSUPP`.
    fn setxattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// As for `setxattr`.
    fn getxattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    /// As for `setxattr`.
    fn listxattr(&self, _request: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    /// As for `setxattr`.
    fn removexattr(&self, _request: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    /// A block of a file here has no place in the kernel's sense.
    fn bmap(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _block_bytes: u32,
        _index: u64,
        reply: fuser::ReplyBmap,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// No request of this kind is known; programs get `ENOTTY`.
    fn ioctl(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _flags: fuser::IoctlFlags,
        _command: u32,
        _data: &[u8],
        _out_size: u32,
        reply: fuser::ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    /// Files are always ready; the kernel says so by itself from now on.
    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _notifier: fuser::PollNotifier,
        _events: fuser::PollEvents,
        _flags: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// The kernel copies by reading and writing.
    fn copy_file_range(
        &self,
        _request: &Request,
        _from: INodeNo,
        _from_handle: FileHandle,
        _from_offset: u64,
        _to: INodeNo,
        _to_handle: FileHandle,
        _to_offset: u64,
        _len: u64,
        _flags: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
