//! The requests of the kernel, one call of the node library each.
//!
//! ```text
//!   request --+-- data (read, write, fsync): submitted, answered from the completion
//!             +-- create, mkdir, rename, unlink, rmdir: sent, answered by the thread that brings the coordinator's reply
//!             +-- what else may wait for the coordinator: a worker of the pool, which answers
//! ```
//! Permissions are checked by the kernel (`default_permissions`), with supplementary groups and access control lists. Not
//! offered, so that the kernel does it by itself or refuses: ioctl (and with it `FICLONE`, which the kernel passes to no
//! mount), poll, bmap.

mod attributes;
mod directories;
mod files;
mod locks;
mod names;
mod xattrs;

pub(crate) use files::appends;

use std::sync::Arc;

use csvfs::node::{Attr, Creation, FsError, Node};

use crate::attr::errno;
use crate::known::Known;
use crate::pool::{Lane, Pool};
use crate::shared::Shared;
use crate::wire::reply::Reply;
use crate::wire::request::{Header, Op};
use crate::wire::session::Filesystem;

/// The filesystem of one mount.
pub(crate) struct Ops {
    shared: Arc<Shared>,
    pool: Pool,
}

impl Ops {
    /// `maps`: the node's kernel is this mount's. `notes_access`: reading a file is noted in its time of access.
    pub(crate) fn new(node: Arc<Node>, known: Arc<Known>, maps: bool, notes_access: bool) -> Self {
        Self { shared: Arc::new(Shared::new(node, known, maps, notes_access)), pool: Pool::new() }
    }

    /// Runs a call that may wait, on a worker.
    fn wait(&self, job: impl FnOnce(&Shared) + Send + 'static) {
        let shared = Arc::clone(&self.shared);
        self.pool.run(Lane::Names, move || job(&shared));
    }

    /// A call that makes a name, and what it stands for.
    fn make(&self, reply: Reply, call: impl FnOnce(&Node) -> Result<Attr, FsError> + Send + 'static) {
        self.wait(move |shared| match call(&shared.node) {
            Ok(attr) => shared.made(&attr, reply),
            Err(error) => reply.error(errno(&error)),
        });
    }

    /// A call without an answer but its outcome.
    fn done(&self, reply: Reply, call: impl FnOnce(&Shared) -> Result<(), FsError> + Send + 'static) {
        self.wait(move |shared| reply.done(call(shared).map_err(|error| errno(&error))));
    }
}

/// What a new inode begins with.
fn creation(header: &Header, mode: u32, umask: u32) -> Creation {
    Creation { mode: mode & 0o7777, umask, uid: header.uid, gid: header.gid }
}

impl Filesystem for Ops {
    fn request(&self, header: Header, op: Op<'_>, reply: Reply) {
        match op {
            Op::Read(args) => self.read(args, reply),
            Op::Write { args, data } => self.write(args, data, reply),
            Op::Flush(args) => self.flush(header, args, reply),
            Op::Fsync(args) => self.fsync(args, reply),
            Op::Open(args) => self.open(header, args, reply),
            Op::Create { args, name } => self.create(header, args, name, reply),
            Op::TmpFile(args) => self.tmpfile(header, args, reply),
            Op::Release(args) => self.release(header, args, reply),
            Op::Fallocate(args) => self.fallocate(args, reply),
            Op::Lseek(args) => self.lseek(args, reply),
            Op::CopyFileRange(args) => self.copy_file_range(args, reply),
            Op::SyncFs => self.syncfs(reply),
            Op::GetLock(args) => self.getlk(header, &args, reply),
            Op::SetLock { args, wait } => self.setlk(header, &args, wait, reply),
            op => self.about_names(header, op, reply),
        }
    }

    fn maps(&self) -> bool {
        self.shared.maps
    }

    fn may_promise(&self) {
        // Only of the node's own kernel are promises taken back.
        if self.shared.maps {
            self.shared.known.begin();
        }
    }

    fn forgotten(&self, ino: u64, names: u64) {
        self.shared.known.forgotten(ino, names);
    }

    fn interrupt(&self, unique: u64) {
        self.interrupted(unique);
    }

    fn end(&self) {
        // Answers what still runs, then closes what programs left open.
        self.pool.close();
        self.shared.files.clear();
        self.shared.directories.clear();
        if self.shared.maps {
            self.shared.node.unset_kernel();
        }
    }
}

impl Ops {
    fn about_names(&self, header: Header, op: Op<'_>, reply: Reply) {
        match op {
            Op::Lookup { name } => self.lookup(header, name, reply),
            Op::ReadLink => self.readlink(header, reply),
            Op::Symlink { name, target } => self.symlink(header, name, target, reply),
            Op::MkNod { args, name } => self.mknod(header, args, name, reply),
            Op::MkDir { args, name } => self.mkdir(header, args, name, reply),
            Op::Unlink { name } => self.remove(header, name, false, reply),
            Op::RmDir { name } => self.remove(header, name, true, reply),
            Op::Rename { name, new_dir, new_name, flags } => {
                self.rename(header, name, (new_dir, new_name), flags, reply);
            }
            Op::Link { old, name } => self.link(header, old, name, reply),
            Op::OpenDir => self.opendir(header, reply),
            Op::ReadDir(args) => self.readdir(header, args, false, reply),
            Op::ReadDirPlus(args) => self.readdir(header, args, true, reply),
            Op::ReleaseDir(args) => self.releasedir(args, reply),
            // An acknowledged change of a name is durable already. The kernel asks once, and never again.
            Op::FsyncDir => reply.error(libc::ENOSYS),
            op => self.about_attributes(header, op, reply),
        }
    }

    fn about_attributes(&self, header: Header, op: Op<'_>, reply: Reply) {
        match op {
            Op::GetAttr => self.getattr(header, reply),
            Op::Statx => self.statx(header, reply),
            Op::SetAttr(args) => self.setattr(header, args, reply),
            Op::StatFs => self.statfs(reply),
            Op::SetXattr { args, name, value } => self.setxattr(header, args, name, value, reply),
            Op::GetXattr { size, name } => self.getxattr(header, size, name, reply),
            Op::ListXattr { size } => self.listxattr(header, size, reply),
            Op::RemoveXattr { name } => self.removexattr(header, name, reply),
            // No command is known.
            Op::Ioctl => reply.error(libc::ENOTTY),
            // The kernel does without from now on.
            _ => reply.error(libc::ENOSYS),
        }
    }
}
