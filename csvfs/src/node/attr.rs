//! Attributes as the users of the node library see them, checked when they come from the wire.

use std::time::{Duration, SystemTime};

use crate::proto as pb;
use pb::Timestamp;

use super::FsError;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A file with data.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

impl FileKind {
    fn checked(kind: pb::FileKind) -> Option<Self> {
        Some(match kind {
            pb::FileKind::Unknown => return None,
            pb::FileKind::Regular => Self::Regular,
            pb::FileKind::Directory => Self::Directory,
            pb::FileKind::Symlink => Self::Symlink,
            pb::FileKind::Fifo => Self::Fifo,
            pb::FileKind::Socket => Self::Socket,
            pb::FileKind::CharDevice => Self::CharDevice,
            pb::FileKind::BlockDevice => Self::BlockDevice,
        })
    }

    pub(super) fn to_wire(self) -> pb::FileKind {
        match self {
            Self::Regular => pb::FileKind::Regular,
            Self::Directory => pb::FileKind::Directory,
            Self::Symlink => pb::FileKind::Symlink,
            Self::Fifo => pb::FileKind::Fifo,
            Self::Socket => pb::FileKind::Socket,
            Self::CharDevice => pb::FileKind::CharDevice,
            Self::BlockDevice => pb::FileKind::BlockDevice,
        }
    }
}

/// Attributes of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Distinguishes successive files with the same number.
    pub generation: u64,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky: 0 to 0o7777.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node.
    pub rdev: u32,
    /// Size of a file's data, in bytes.
    pub size_bytes: u64,
    /// Space taken on the LUN, in bytes.
    pub allocated_bytes: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Last change of the attributes.
    pub ctime: Timestamp,
    /// Creation.
    pub btime: Timestamp,
    /// Number of extended attributes.
    pub xattrs: u64,
}

impl Attr {
    pub(super) fn checked(attr: &pb::Attr) -> Result<Self, FsError> {
        let kind = FileKind::checked(attr.kind()).ok_or_else(|| {
            FsError::Protocol(format!("inode {} is of unknown kind {}", attr.ino, attr.kind))
        })?;
        let time = |t: Option<Timestamp>| t.unwrap_or_default();
        Ok(Self {
            ino: attr.ino,
            generation: attr.generation,
            kind,
            mode: attr.mode & 0o7777,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            rdev: attr.rdev,
            size_bytes: attr.size_bytes,
            allocated_bytes: attr.allocated_bytes,
            atime: time(attr.atime),
            mtime: time(attr.mtime),
            ctime: time(attr.ctime),
            btime: time(attr.btime),
            xattrs: attr.xattrs,
        })
    }
}

impl Attr {
    /// What the coordinator says, with what only this node knows: size and times of a file that it has for itself.
    pub(super) fn over(self, fresh: Self) -> Self {
        Self { size_bytes: self.size_bytes, mtime: self.mtime, ctime: self.ctime.later(fresh.ctime), ..fresh }
    }
}

/// Attributes to change; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes: grows with a hole, or shrinks.
    pub size_bytes: Option<u64>,
    /// Last access.
    pub atime: Option<Timestamp>,
    /// Last change of the data.
    pub mtime: Option<Timestamp>,
    /// Last change of the attributes.
    pub ctime: Option<Timestamp>,
}

/// Attributes of something new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Creation {
    /// Permission bits.
    pub mode: u32,
    /// Bits that the mode loses, unless the directory has a default access control list.
    pub umask: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name.
    pub name: Vec<u8>,
    /// Where to go on after it.
    pub cookie: u64,
    /// What it names.
    pub attr: Attr,
}

/// A part of a directory. `.` and `..` are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirPage {
    /// Entries in the directory's order.
    pub entries: Vec<DirEntry>,
    /// Whether nothing follows.
    pub end: bool,
    /// The directory's parent, for `..`.
    pub parent: u64,
}

/// A mode without the bits that make a program run as somebody else. Without group execution, the bit of the group means
/// mandatory locking and stays.
pub(crate) fn without_set_ids(mode: u32) -> u32 {
    const SETUID: u32 = 0o4000;
    const SETGID: u32 = 0o2000;
    const GROUP_EXEC: u32 = 0o010;
    let cleared = mode & !SETUID;
    if mode & GROUP_EXEC != 0 { cleared & !SETGID } else { cleared }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => Self {
                seconds: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                nanos: after.subsec_nanos(),
            },
            Err(error) => before_epoch(error.duration()),
        }
    }
}

fn before_epoch(by: Duration) -> Timestamp {
    let seconds = -i64::try_from(by.as_secs()).unwrap_or(i64::MAX);
    match by.subsec_nanos() {
        0 => Timestamp { seconds, nanos: 0 },
        // Nanoseconds count forward also before the epoch.
        nanos => Timestamp { seconds: seconds.saturating_sub(1), nanos: 1_000_000_000 - nanos },
    }
}

impl From<Timestamp> for SystemTime {
    fn from(time: Timestamp) -> Self {
        let nanos = Duration::from_nanos(u64::from(time.nanos.min(999_999_999)));
        let whole = Duration::from_secs(time.seconds.unsigned_abs());
        let base = if time.seconds >= 0 {
            Self::UNIX_EPOCH.checked_add(whole)
        } else {
            Self::UNIX_EPOCH.checked_sub(whole)
        };
        base.and_then(|base| base.checked_add(nanos)).unwrap_or(Self::UNIX_EPOCH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_way_to_the_wire_and_back() {
        for (seconds, nanos) in [(0, 0), (1, 1), (-1, 1), (-1, 999_999_999), (1 << 33, 5), (-5, 0)] {
            let stamp = Timestamp { seconds, nanos };
            assert_eq!(Timestamp::from(SystemTime::from(stamp)), stamp);
        }
    }

    #[test]
    fn a_time_beyond_the_clock_is_no_panic() {
        let _ = SystemTime::from(Timestamp { seconds: i64::MAX, nanos: u32::MAX });
        let _ = SystemTime::from(Timestamp { seconds: i64::MIN, nanos: u32::MAX });
    }
}
