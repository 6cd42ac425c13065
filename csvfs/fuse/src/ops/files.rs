//! Open files: opening, data, space, closing.

use std::sync::Arc;

use csvfs::node::{Attr, File, FsError, SeekFrom};

use super::{Ops, creation};
use crate::attr::{errno, errno_of_inode, to_kernel};
use crate::data::{self, BAD_HANDLE};
use crate::pool::Lane;
use crate::shared::Shared;
use crate::wire::abi::{
    CopyFileRangeIn, CreateIn, FallocateIn, FsyncIn, LseekIn, OpenIn, ReadIn, WriteIn, fopen,
};
use crate::wire::reply::Reply;
use crate::wire::request::{Data, Header};

/// How the kernel treats each file: no page cache, and writes in parallel.
const FILE_FLAGS: u32 = fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES;
const O_APPEND: u32 = libc::O_APPEND.cast_unsigned();
const O_EXCL: u32 = libc::O_EXCL.cast_unsigned();

impl Ops {
    /// `O_TRUNC` arrives as a `setattr` of its own.
    pub(super) fn open(&self, header: Header, args: OpenIn, reply: Reply) {
        if !self.shared.may_wait_to_open(args.flags)
            && let Some(file) = self.shared.node.open_at_hand(header.ino)
            && let Ok(handle) = self.shared.opened(file, args.flags)
        {
            return reply.opened(handle, FILE_FLAGS);
        }
        self.wait(move |shared| {
            match shared.node.open(header.ino).and_then(|file| shared.opened(file, args.flags)) {
                Ok(handle) => reply.opened(handle, FILE_FLAGS),
                Err(error) => reply.error(errno_of_inode(&error)),
            }
        });
    }

    pub(super) fn create(&self, header: Header, args: CreateIn, name: &[u8], reply: Reply) {
        let (exclusive, flags) = (args.flags & O_EXCL != 0, args.flags);
        let creation = creation(&header, args.mode, args.umask);
        let (shared, pool) = (Arc::clone(&self.shared), self.pool.clone());
        self.shared.node.create_then(header.ino, name, &creation, exclusive, move |made| {
            let made = match made {
                Ok(made) => made,
                Err(error) => return reply.error(errno(&error)),
            };
            match made.attr_at_hand().filter(|_| !shared.may_wait_to_open(flags)) {
                Some(attr) => created(&shared, flags, Ok((attr, made.file)), reply),
                None => pool.run(Lane::Names, move || {
                    created(&shared, flags, Ok((made.attr(), made.file)), reply);
                }),
            }
        });
    }

    /// With `O_EXCL` the file can never get a name.
    pub(super) fn tmpfile(&self, header: Header, args: CreateIn, reply: Reply) {
        let creation = creation(&header, args.mode, args.umask);
        let linkable = args.flags & O_EXCL == 0;
        self.wait(move |shared| {
            created(shared, args.flags, shared.node.create_unnamed(header.ino, &creation, linkable), reply);
        });
    }

    pub(super) fn read(&self, args: ReadIn, reply: Reply) {
        match self.shared.files.get(args.fh) {
            Some(file) => data::read(&file, &self.shared, &args, reply),
            None => reply.error(BAD_HANDLE),
        }
    }

    pub(super) fn write(&self, args: WriteIn, data: Data<'_>, reply: Reply) {
        match self.shared.files.get(args.fh) {
            Some(file) => data::write(&file, &self.shared.buffers, &self.pool, &args, data, reply),
            None => reply.error(BAD_HANDLE),
        }
    }

    pub(super) fn fsync(&self, args: FsyncIn, reply: Reply) {
        match self.shared.files.get(args.fh) {
            Some(file) => data::fsync(&file, args.flags, reply),
            None => reply.error(BAD_HANDLE),
        }
    }

    pub(super) fn fallocate(&self, args: FallocateIn, reply: Reply) {
        const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE.cast_unsigned();
        const PUNCH: u32 = libc::FALLOC_FL_PUNCH_HOLE.cast_unsigned() | KEEP_SIZE;
        const ZERO: u32 = libc::FALLOC_FL_ZERO_RANGE.cast_unsigned();
        let Some(open) = self.shared.files.get(args.fh) else { return reply.error(BAD_HANDLE) };
        let FallocateIn { offset, length, mode, .. } = args;
        let keep_size = mode & KEEP_SIZE != 0;
        match mode & !KEEP_SIZE {
            0 => self.done(reply, move |_| open.file.allocate(offset, length, keep_size)),
            ZERO => self.done(reply, move |_| open.file.zero_range(offset, length, keep_size)),
            _ if mode == PUNCH => self.done(reply, move |_| open.file.punch(offset, length)),
            // Moving the rest of a file by a range.
            _ => reply.error(libc::EOPNOTSUPP),
        }
    }

    pub(super) fn lseek(&self, args: LseekIn, reply: Reply) {
        const DATA: u32 = libc::SEEK_DATA.cast_unsigned();
        const HOLE: u32 = libc::SEEK_HOLE.cast_unsigned();
        let Some(open) = self.shared.files.get(args.fh) else { return reply.error(BAD_HANDLE) };
        let from = match args.whence {
            // Before the start, as the kernel's signed offset, there is nothing.
            DATA | HOLE if i64::try_from(args.offset).is_err() => return reply.error(libc::ENXIO),
            DATA => SeekFrom::Data(args.offset),
            HOLE => SeekFrom::Hole(args.offset),
            // The kernel handles the other kinds by itself.
            _ => return reply.error(libc::EINVAL),
        };
        self.wait(move |_| match open.file.seek(from) {
            Ok(found) => reply.offset(found),
            Err(error) => reply.error(errno(&error)),
        });
    }

    /// Shares blocks where it can, see [`csvfs::node::File::copy_range`].
    pub(super) fn copy_file_range(&self, args: CopyFileRangeIn, reply: Reply) {
        let (Some(from), Some(to)) = (self.shared.files.get(args.fh), self.shared.files.get(args.to_fh))
        else {
            return reply.error(BAD_HANDLE);
        };
        let CopyFileRangeIn { offset, to_offset, len, .. } = args;
        self.wait(move |_| match from.file.copy_range(&to.file, offset, to_offset, len) {
            Ok(done) => reply.written(u32::try_from(done).unwrap_or(u32::MAX)),
            Err(error) => reply.error(errno(&error)),
        });
    }

    /// Everything that was written on this mount, as `sync` wants it.
    pub(super) fn syncfs(&self, reply: Reply) {
        self.done(reply, |shared| {
            shared.files.all().into_iter().try_for_each(|open| {
                let (tell, told) = std::sync::mpsc::sync_channel(1);
                open.file.fsync(move |outcome| drop(tell.send(outcome)));
                told.recv().unwrap_or(Err(FsError::Detached))
            })
        });
    }
}

fn created(shared: &Shared, flags: u32, outcome: Result<(Attr, Arc<File>), FsError>, reply: Reply) {
    let opened = outcome.and_then(|(attr, file)| Ok((attr, shared.opened(file, flags)?)));
    match opened {
        Ok((attr, handle)) => {
            shared.known.named(attr.ino);
            reply.created(&to_kernel(&attr), attr.generation, handle, FILE_FLAGS);
        }
        Err(error) => reply.error(errno(&error)),
    }
}

/// Whether the flags of an open file want all writes at its end.
pub(crate) fn appends(flags: u32) -> bool {
    flags & O_APPEND != 0
}
