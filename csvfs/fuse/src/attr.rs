//! Attributes, times and error numbers between the node library and the kernel.

use std::time::{Duration, SystemTime};

use csvfs::node::{Attr, FileKind, FsError};
use csvfs::proto::Timestamp;
use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};

/// How long the kernel may use attributes and names without asking: not at all, another node may change them.
pub(crate) const TTL: Duration = Duration::ZERO;

/// What the kernel calls the preferred size of an I/O.
const IO_BYTES: u32 = 1 << 20;
/// Unit of `st_blocks`.
const SECTOR_BYTES: u64 = 512;

/// Attributes for the kernel.
pub(crate) fn to_kernel(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size_bytes,
        blocks: attr.allocated_bytes.div_ceil(SECTOR_BYTES),
        atime: attr.atime.into(),
        mtime: attr.mtime.into(),
        ctime: attr.ctime.into(),
        crtime: attr.btime.into(),
        kind: kind_to_kernel(attr.kind),
        perm: u16::try_from(attr.mode & 0o7777).expect("twelve bits"),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: IO_BYTES,
        flags: 0,
    }
}

fn kind_to_kernel(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind that `mknod` asks for in its mode; none for what has calls of its own or does not exist.
pub(crate) fn kind_of_mode(mode: u32) -> Option<FileKind> {
    match mode & libc::S_IFMT {
        // POSIX: no type means a regular file.
        0 | libc::S_IFREG => Some(FileKind::Regular),
        libc::S_IFIFO => Some(FileKind::Fifo),
        libc::S_IFSOCK => Some(FileKind::Socket),
        libc::S_IFCHR => Some(FileKind::CharDevice),
        libc::S_IFBLK => Some(FileKind::BlockDevice),
        _ => None,
    }
}

/// A time to set.
pub(crate) fn to_timestamp(time: TimeOrNow) -> Timestamp {
    match time {
        TimeOrNow::SpecificTime(time) => SystemTime::into(time),
        TimeOrNow::Now => {
            let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
            Timestamp { seconds: now.tv_sec, nanos: u32::try_from(now.tv_nsec).unwrap_or(0) }
        }
    }
}

/// The error number for the kernel. What is not the caller's mistake is logged: the number alone does not say enough.
pub(crate) fn errno(error: &FsError) -> Errno {
    let number = error.errno();
    match error {
        FsError::Refused { .. } | FsError::Invalid { .. } => {}
        failure => tracing::warn!(%failure, errno = number, "a call on the mount failed"),
    }
    match number {
        // The kernel takes ENOSYS for "never ask again", which is true of callbacks here, not of a coordinator's answer.
        libc::ENOSYS => Errno::EOPNOTSUPP,
        number => Errno::from_i32(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr() -> Attr {
        let time = |seconds| Timestamp { seconds, nanos: 5 };
        Attr {
            ino: 7,
            generation: 3,
            kind: FileKind::Regular,
            mode: 0o4755,
            nlink: 2,
            uid: 10,
            gid: 20,
            rdev: 0,
            size_bytes: 5000,
            allocated_bytes: 8192,
            atime: time(1),
            mtime: time(-2),
            ctime: time(3),
            btime: time(4),
        }
    }

    #[test]
    fn attributes_reach_the_kernel_in_its_units() {
        let kernel = to_kernel(&attr());
        assert_eq!((kernel.size, kernel.blocks, kernel.perm), (5000, 16, 0o4755));
        assert_eq!((kernel.ino, kernel.nlink, kernel.uid, kernel.gid), (INodeNo(7), 2, 10, 20));
        assert_eq!(Timestamp::from(kernel.mtime), Timestamp { seconds: -2, nanos: 5 });
    }

    #[test]
    fn every_kind_that_mknod_can_make_is_known_and_no_other() {
        assert_eq!(kind_of_mode(0o644), Some(FileKind::Regular));
        assert_eq!(kind_of_mode(libc::S_IFIFO | 0o600), Some(FileKind::Fifo));
        assert_eq!(kind_of_mode(libc::S_IFSOCK), Some(FileKind::Socket));
        assert_eq!(kind_of_mode(libc::S_IFCHR), Some(FileKind::CharDevice));
        assert_eq!(kind_of_mode(libc::S_IFBLK), Some(FileKind::BlockDevice));
        assert_eq!(kind_of_mode(libc::S_IFDIR), None);
        assert_eq!(kind_of_mode(libc::S_IFLNK), None);
    }

    #[test]
    fn an_error_keeps_its_number_except_the_one_that_switches_calls_off() {
        let refused = |errno| FsError::Refused { errno, message: String::new() };
        assert_eq!(errno(&refused(libc::ENOTEMPTY)).code(), libc::ENOTEMPTY);
        assert_eq!(errno(&refused(libc::ENOSPC)).code(), libc::ENOSPC);
        assert_eq!(errno(&refused(libc::ENOSYS)).code(), libc::EOPNOTSUPP);
        assert_eq!(errno(&FsError::Detached).code(), libc::ENOTCONN);
    }
}
