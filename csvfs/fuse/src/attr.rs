//! Attributes, times and error numbers between the node library and the kernel.

use csvfs::node::{Attr, FileKind, FsError, SetAttr};
use csvfs::proto::Timestamp;
use zerocopy::FromZeros;

use crate::wire::abi::{self, SetattrIn, StatxOut, SxTime, fattr};

/// What the kernel calls the preferred size of an I/O.
const IO_BYTES: u32 = 1 << 20;
/// Unit of `st_blocks`.
const SECTOR_BYTES: u64 = 512;

/// Attributes for the kernel.
pub(crate) fn to_kernel(attr: &Attr) -> abi::Attr {
    abi::Attr {
        ino: attr.ino,
        size: attr.size_bytes,
        blocks: attr.allocated_bytes.div_ceil(SECTOR_BYTES),
        atime: attr.atime.seconds.cast_unsigned(),
        mtime: attr.mtime.seconds.cast_unsigned(),
        ctime: attr.ctime.seconds.cast_unsigned(),
        atime_nanos: attr.atime.nanos,
        mtime_nanos: attr.mtime.nanos,
        ctime_nanos: attr.ctime.nanos,
        mode: mode(attr),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: IO_BYTES,
        flags: 0,
    }
}

/// All attributes, for `statx`.
pub(crate) fn to_statx(attr: &Attr) -> StatxOut {
    let time = |time: Timestamp| SxTime { seconds: time.seconds, nanos: time.nanos, _reserved: 0 };
    let rdev = u64::from(attr.rdev);
    StatxOut {
        mask: libc::STATX_BASIC_STATS | libc::STATX_BTIME,
        blksize: IO_BYTES,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: u16::try_from(mode(attr)).expect("kind and permissions have 16 bits"),
        ino: attr.ino,
        size: attr.size_bytes,
        blocks: attr.allocated_bytes.div_ceil(SECTOR_BYTES),
        atime: time(attr.atime),
        btime: time(attr.btime),
        ctime: time(attr.ctime),
        mtime: time(attr.mtime),
        rdev_major: libc::major(rdev),
        rdev_minor: libc::minor(rdev),
        ..StatxOut::new_zeroed()
    }
}

fn mode(attr: &Attr) -> u32 {
    kind_bits(attr.kind) | attr.mode & 0o7777
}

fn kind_bits(kind: FileKind) -> u32 {
    match kind {
        FileKind::Regular => libc::S_IFREG,
        FileKind::Directory => libc::S_IFDIR,
        FileKind::Symlink => libc::S_IFLNK,
        FileKind::Fifo => libc::S_IFIFO,
        FileKind::Socket => libc::S_IFSOCK,
        FileKind::CharDevice => libc::S_IFCHR,
        FileKind::BlockDevice => libc::S_IFBLK,
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

/// What a `setattr` is to change.
pub(crate) fn wanted(args: &SetattrIn) -> SetAttr {
    let has = |bit: u32| args.valid & bit != 0;
    let time = |bit, now, seconds: u64, nanos| {
        let given = Timestamp { seconds: seconds.cast_signed(), nanos };
        has(bit).then(|| if now != 0 && has(now) { wall() } else { given })
    };
    SetAttr {
        mode: has(fattr::MODE).then_some(args.mode & 0o7777),
        uid: has(fattr::UID).then_some(args.uid),
        gid: has(fattr::GID).then_some(args.gid),
        size_bytes: has(fattr::SIZE).then_some(args.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, args.atime, args.atime_nanos),
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, args.mtime, args.mtime_nanos),
        ctime: time(fattr::CTIME, 0, args.ctime, args.ctime_nanos),
    }
}

fn wall() -> Timestamp {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Timestamp { seconds: now.tv_sec, nanos: u32::try_from(now.tv_nsec).unwrap_or(0) }
}

/// The error number for the kernel. What is not the caller's mistake is logged: the number alone does not say enough.
pub(crate) fn errno(error: &FsError) -> i32 {
    let number = error.errno();
    match error {
        FsError::Refused { .. } | FsError::Invalid { .. } => {}
        failure => tracing::warn!(%failure, errno = number, "a call on the mount failed"),
    }
    match number {
        // The kernel takes ENOSYS for "never ask again", which is true of callbacks here, not of a coordinator's answer.
        libc::ENOSYS => libc::EOPNOTSUPP,
        number => number,
    }
}

/// As [`errno`], of a call about an inode that the kernel has looked up before. If it is gone, another node has removed it or
/// put another file in its place: `ESTALE` makes the kernel look its name up again, and find the new file or none.
pub(crate) fn errno_of_inode(error: &FsError) -> i32 {
    match errno(error) {
        libc::ENOENT => libc::ESTALE,
        number => number,
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
            xattrs: 0,
        }
    }

    #[test]
    fn attributes_reach_the_kernel_in_its_units() {
        let kernel = to_kernel(&attr());
        assert_eq!((kernel.size, kernel.blocks, kernel.mode), (5000, 16, libc::S_IFREG | 0o4755));
        assert_eq!((kernel.ino, kernel.nlink, kernel.uid, kernel.gid), (7, 2, 10, 20));
        assert_eq!((kernel.mtime.cast_signed(), kernel.mtime_nanos), (-2, 5));
        let statx = to_statx(&attr());
        assert_eq!((statx.btime.seconds, statx.btime.nanos), (4, 5));
        assert_ne!(statx.mask & libc::STATX_BTIME, 0);
    }

    #[test]
    fn only_what_a_setattr_names_is_changed() {
        let valid = fattr::MODE | fattr::ATIME | fattr::MTIME | fattr::MTIME_NOW;
        let args = SetattrIn {
            valid,
            mode: libc::S_IFREG | 0o640,
            atime: u64::MAX,
            atime_nanos: 7,
            ..SetattrIn::new_zeroed()
        };
        let set = wanted(&args);
        assert_eq!(
            (set.mode, set.uid, set.gid, set.size_bytes, set.ctime),
            (Some(0o640), None, None, None, None)
        );
        assert_eq!(set.atime, Some(Timestamp { seconds: -1, nanos: 7 }), "times before 1970 are times");
        assert!(set.mtime.is_some_and(|now| now.seconds > 1_700_000_000));
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
        assert_eq!(errno(&refused(libc::ENOTEMPTY)), libc::ENOTEMPTY);
        assert_eq!(errno(&refused(libc::ENOSPC)), libc::ENOSPC);
        assert_eq!(errno(&refused(libc::ENOSYS)), libc::EOPNOTSUPP);
        assert_eq!(errno(&FsError::Detached), libc::ENOTCONN);
    }
}
