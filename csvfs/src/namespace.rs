//! Names: directories, links, and the rules of POSIX about them.
//!
//! ```text
//!   dirents (directory, name) -> inode      inodes: kind, mode, nlink, ...      orphans: nlink 0, perhaps still open
//!   cookies (directory, cookie) -> name     a directory knows its parent, so a loop is found by walking up
//! ```
//! **Invariant:** after each function the tables agree: every entry has its cookie, nlink counts the entries (of a
//! directory: 2 and its subdirectories), every inode is reachable from the root or is an orphan.

use crate::meta::{Dirent, Globals, InodeRecord, StoreError, Tables};
use crate::node::without_set_ids;
use crate::proto::{Create, FileKind, Rename, SetAttr, Timestamp};
use crate::refusal::{OpError, errno};
use crate::xattrs;

/// Longest name in bytes.
const NAME_BYTES_MAX: usize = 255;
/// Longest target of a symlink in bytes.
const TARGET_BYTES_MAX: usize = 4095;
const SETGID: u32 = 0o2000;
const MODE_BITS: u32 = 0o7777;
/// Entries on the way to the root before the tree is taken to be damaged.
const DEPTH_MAX: usize = 1 << 20;

/// Flags of rename(2).
pub(crate) const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;
/// A whiteout takes the place of what was moved: a character device 0, 0, which hides a name of a lower layer of overlayfs.
const RENAME_WHITEOUT: u32 = 4;

/// The namespace within one transaction.
#[derive(Debug)]
pub(crate) struct Names<'a, 't> {
    pub(crate) tables: &'a mut Tables<'t>,
    pub(crate) globals: &'a mut Globals,
    pub(crate) now: Timestamp,
}

/// An inode and what it is.
pub(crate) type Found = (u64, InodeRecord);

/// An inode that must be there.
pub(crate) fn existing(tables: &Tables<'_>, ino: u64) -> Result<InodeRecord, OpError> {
    tables.inode(ino)?.ok_or_else(|| errno(libc::ENOENT, format!("inode {ino} does not exist")))
}

/// A directory that must be there.
pub(crate) fn directory(tables: &Tables<'_>, ino: u64) -> Result<InodeRecord, OpError> {
    let inode = existing(tables, ino)?;
    if inode.is_dir() { Ok(inode) } else { Err(errno(libc::ENOTDIR, format!("inode {ino} is no directory"))) }
}

/// The entry `name` of `parent`, and its inode.
pub(crate) fn lookup(tables: &Tables<'_>, parent: u64, name: &[u8]) -> Result<Option<Found>, OpError> {
    directory(tables, parent)?;
    if name.len() > NAME_BYTES_MAX {
        return Err(errno(libc::ENAMETOOLONG, "a name has at most 255 bytes"));
    }
    let Some(dirent) = tables.dirent(parent, name)? else { return Ok(None) };
    Ok(Some((dirent.ino, target_of(tables, dirent)?)))
}

fn target_of(tables: &Tables<'_>, dirent: Dirent) -> Result<InodeRecord, StoreError> {
    let missing =
        || StoreError::Damaged { what: format!("an entry names inode {}, which is missing", dirent.ino) };
    tables.inode(dirent.ino)?.ok_or_else(missing)
}

fn check_name(name: &[u8]) -> Result<(), OpError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(errno(libc::ENAMETOOLONG, "a name has at most 255 bytes"));
    }
    let bad = name.is_empty() || name == b"." || name == b".." || name.iter().any(|b| matches!(b, 0 | b'/'));
    if bad { Err(errno(libc::EINVAL, "not a name of a directory entry")) } else { Ok(()) }
}

fn not_found(name: &[u8]) -> OpError {
    errno(libc::ENOENT, format!("'{}' does not exist", String::from_utf8_lossy(name)))
}

fn exists(name: &[u8]) -> OpError {
    errno(libc::EEXIST, format!("'{}' exists", String::from_utf8_lossy(name)))
}

impl Names<'_, '_> {
    /// A directory that can take a new entry.
    fn open_directory(&self, ino: u64) -> Result<InodeRecord, OpError> {
        let dir = directory(self.tables, ino)?;
        if dir.nlink == 0 { Err(errno(libc::ENOENT, "the directory was removed")) } else { Ok(dir) }
    }

    /// Makes an inode with a name, or answers the existing regular file when the caller can live with that.
    pub(crate) fn create(&mut self, op: &Create) -> Result<Found, OpError> {
        check_name(&op.name)?;
        let kind = op.kind();
        if kind == FileKind::Unknown {
            return Err(errno(libc::EINVAL, "a file must be of some kind"));
        }
        let mut dir = self.open_directory(op.parent)?;
        if let Some(found) = lookup(self.tables, op.parent, &op.name)? {
            let reuse = !op.exclusive && kind == FileKind::Regular && found.1.is_regular();
            return if reuse { Ok(found) } else { Err(exists(&op.name)) };
        }
        check_target(kind, &op.target)?;
        if kind == FileKind::Directory && dir.nlink == u32::MAX {
            return Err(errno(libc::EMLINK, "too many subdirectories"));
        }
        let (ino, inode) = self.store_new(op, kind, &dir)?;
        self.add_entry(op.parent, &mut dir, &op.name, ino, kind)?;
        self.tables.put_inode(op.parent, &dir)?;
        Ok((ino, inode))
    }

    /// Makes a regular file without a name: an orphan from the start, kept by who has it open.
    pub(crate) fn create_unnamed(&mut self, op: &Create) -> Result<Found, OpError> {
        let dir = self.open_directory(op.parent)?;
        let (ino, mut inode) = self.store_new(op, FileKind::Regular, &dir)?;
        inode.nlink = 0;
        inode.linkable = op.linkable;
        self.tables.put_inode(ino, &inode)?;
        self.tables.put_orphan(ino)?;
        Ok((ino, inode))
    }

    /// Gives a new inode its number and what it inherits from its directory, and stores it.
    fn store_new(&mut self, op: &Create, kind: FileKind, dir: &InodeRecord) -> Result<Found, OpError> {
        let mut inode = self.new_inode(op, kind, dir);
        let ino = self.globals.next_ino;
        xattrs::inherit(self.tables, (op.parent, dir), (ino, &mut inode), op.umask)?;
        self.globals.next_ino += 1;
        self.globals.inodes += 1;
        self.tables.put_inode(ino, &inode)?;
        Ok((ino, inode))
    }

    fn new_inode(&self, op: &Create, kind: FileKind, dir: &InodeRecord) -> InodeRecord {
        let is_dir = kind == FileKind::Directory;
        let inherits = dir.mode & SETGID != 0;
        InodeRecord {
            kind: kind.into(),
            mode: op.mode & MODE_BITS | if inherits && is_dir { SETGID } else { 0 },
            nlink: if is_dir { 2 } else { 1 },
            uid: op.uid,
            gid: if inherits { dir.gid } else { op.gid },
            rdev: op.rdev,
            size_bytes: op.target.len() as u64 * u64::from(kind == FileKind::Symlink),
            atime: self.now,
            mtime: self.now,
            ctime: self.now,
            btime: self.now,
            generation: 1,
            parent: if is_dir { op.parent } else { 0 },
            next_cookie: u64::from(is_dir),
            target: if kind == FileKind::Symlink { op.target.clone().into() } else { Vec::new() },
            ..InodeRecord::default()
        }
    }

    /// Adds an entry; the caller stores `dir`.
    fn add_entry(
        &mut self,
        parent: u64,
        dir: &mut InodeRecord,
        name: &[u8],
        ino: u64,
        kind: FileKind,
    ) -> Result<(), StoreError> {
        let cookie = dir.next_cookie;
        dir.next_cookie += 1;
        dir.entries += 1;
        dir.nlink += u32::from(kind == FileKind::Directory);
        self.touch(dir);
        self.tables.put_dirent(parent, name, Dirent { ino, cookie, kind })
    }

    /// Removes an entry; the caller stores `dir`.
    fn take_entry(
        &mut self,
        parent: u64,
        dir: &mut InodeRecord,
        name: &[u8],
        dirent: Dirent,
    ) -> Result<(), StoreError> {
        dir.entries = dir.entries.saturating_sub(1);
        dir.nlink = dir.nlink.saturating_sub(u32::from(dirent.kind == FileKind::Directory));
        self.touch(dir);
        self.tables.remove_dirent(parent, name, dirent.cookie)
    }

    fn touch(&self, dir: &mut InodeRecord) {
        dir.mtime = self.now;
        dir.ctime = self.now;
    }

    /// Gives an inode one more name.
    pub(crate) fn link(&mut self, ino: u64, parent: u64, name: &[u8]) -> Result<Found, OpError> {
        check_name(name)?;
        let mut inode = existing(self.tables, ino)?;
        if inode.is_dir() {
            return Err(errno(libc::EPERM, "a directory has one name"));
        }
        if inode.nlink == 0 && !inode.linkable {
            return Err(errno(libc::ENOENT, "the file was removed"));
        }
        if inode.nlink == u32::MAX {
            return Err(errno(libc::EMLINK, "too many links"));
        }
        let mut dir = self.open_directory(parent)?;
        if self.tables.dirent(parent, name)?.is_some() {
            return Err(exists(name));
        }
        if inode.nlink == 0 {
            self.tables.remove_orphan(ino)?;
        }
        inode.linkable = false;
        inode.nlink += 1;
        inode.ctime = self.now;
        let kind = inode.kind();
        self.tables.put_inode(ino, &inode)?;
        self.add_entry(parent, &mut dir, name, ino, kind)?;
        self.tables.put_inode(parent, &dir)?;
        Ok((ino, inode))
    }

    /// Removes a name; the answer is the inode when that was its last one (it is an orphan then).
    pub(crate) fn unlink(&mut self, parent: u64, name: &[u8], as_dir: bool) -> Result<Option<u64>, OpError> {
        check_name(name)?;
        let mut dir = directory(self.tables, parent)?;
        let dirent = self.tables.dirent(parent, name)?.ok_or_else(|| not_found(name))?;
        let inode = target_of(self.tables, dirent)?;
        check_removable(&inode, as_dir, name)?;
        self.take_entry(parent, &mut dir, name, dirent)?;
        self.tables.put_inode(parent, &dir)?;
        Ok(self.drop_link(dirent.ino, inode)?)
    }

    /// Counts one name less.
    fn drop_link(&mut self, ino: u64, mut inode: InodeRecord) -> Result<Option<u64>, StoreError> {
        inode.nlink = if inode.is_dir() { 0 } else { inode.nlink.saturating_sub(1) };
        inode.ctime = self.now;
        self.tables.put_inode(ino, &inode)?;
        if inode.nlink > 0 {
            return Ok(None);
        }
        self.tables.put_orphan(ino)?;
        Ok(Some(ino))
    }

    /// Renames; the answer is the inode that lost its last name by being replaced.
    pub(crate) fn rename(&mut self, op: &Rename) -> Result<Option<u64>, OpError> {
        let (from, to) = ((op.parent, &op.name[..]), (op.new_parent, &op.new_name[..]));
        let flags = op.flags;
        check_name(from.1)?;
        check_name(to.1)?;
        let known = RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT;
        if flags & !known != 0 || flags & RENAME_EXCHANGE != 0 && flags != RENAME_EXCHANGE {
            return Err(errno(libc::EINVAL, "these flags of rename are not known together"));
        }
        directory(self.tables, from.0)?;
        self.open_directory(to.0)?;
        let source = self.tables.dirent(from.0, from.1)?.ok_or_else(|| not_found(from.1))?;
        let target = self.tables.dirent(to.0, to.1)?;
        self.check_loop(source, to.0)?;
        match target {
            None if flags & RENAME_EXCHANGE != 0 => Err(not_found(to.1)),
            Some(_) if flags & RENAME_NOREPLACE != 0 => Err(exists(to.1)),
            Some(target) if target.ino == source.ino => Ok(None),
            Some(target) if flags & RENAME_EXCHANGE != 0 => {
                self.check_loop(target, from.0)?;
                self.exchange(from, source, to, target)?;
                Ok(None)
            }
            target => {
                let nameless = self.replace(from, source, to, target)?;
                if flags & RENAME_WHITEOUT != 0 {
                    self.put_whiteout(op)?;
                }
                Ok(nameless)
            }
        }
    }

    /// Hides the name that was moved away.
    fn put_whiteout(&mut self, op: &Rename) -> Result<(), OpError> {
        let kind = FileKind::CharDevice;
        let (parent, name) = (op.parent, op.name.clone());
        let create =
            Create { parent, name, kind: kind.into(), uid: op.uid, gid: op.gid, ..Create::default() };
        self.create(&create).map(drop)
    }

    /// A directory must not become its own descendant.
    fn check_loop(&self, moved: Dirent, into: u64) -> Result<(), OpError> {
        if moved.kind != FileKind::Directory {
            return Ok(());
        }
        let mut at = into;
        for _ in 0..DEPTH_MAX {
            if at == moved.ino {
                return Err(errno(libc::EINVAL, "a directory cannot be moved into itself"));
            }
            if at == crate::ROOT_INO {
                return Ok(());
            }
            at = directory(self.tables, at)?.parent;
        }
        Err(StoreError::Damaged { what: format!("directory {into} does not lead to the root") }.into())
    }

    fn replace(
        &mut self,
        from: (u64, &[u8]),
        source: Dirent,
        to: (u64, &[u8]),
        target: Option<Dirent>,
    ) -> Result<Option<u64>, OpError> {
        let replaced = target.map(|t| target_of(self.tables, t)).transpose()?;
        if let Some(inode) = &replaced {
            check_removable(inode, source.kind == FileKind::Directory, to.1)?;
        }
        self.with_dir(from.0, |names, dir| names.take_entry(from.0, dir, from.1, source))?;
        if let Some(target) = target {
            self.with_dir(to.0, |names, dir| names.take_entry(to.0, dir, to.1, target))?;
        }
        self.with_dir(to.0, |names, dir| names.add_entry(to.0, dir, to.1, source.ino, source.kind))?;
        self.moved(source, to.0)?;
        match target.zip(replaced) {
            Some((target, inode)) => Ok(self.drop_link(target.ino, inode)?),
            None => Ok(None),
        }
    }

    fn exchange(
        &mut self,
        from: (u64, &[u8]),
        source: Dirent,
        to: (u64, &[u8]),
        target: Dirent,
    ) -> Result<(), OpError> {
        self.with_dir(from.0, |names, dir| {
            names.take_entry(from.0, dir, from.1, source)?;
            names.add_entry(from.0, dir, from.1, target.ino, target.kind)
        })?;
        self.with_dir(to.0, |names, dir| {
            names.take_entry(to.0, dir, to.1, target)?;
            names.add_entry(to.0, dir, to.1, source.ino, source.kind)
        })?;
        self.moved(source, to.0)?;
        self.moved(target, from.0)
    }

    fn with_dir(
        &mut self,
        ino: u64,
        change: impl FnOnce(&mut Self, &mut InodeRecord) -> Result<(), StoreError>,
    ) -> Result<(), OpError> {
        let mut dir = directory(self.tables, ino)?;
        change(self, &mut dir)?;
        Ok(self.tables.put_inode(ino, &dir)?)
    }

    fn moved(&mut self, entry: Dirent, into: u64) -> Result<(), OpError> {
        let mut inode = target_of(self.tables, entry)?;
        inode.ctime = self.now;
        if inode.is_dir() {
            inode.parent = into;
        }
        Ok(self.tables.put_inode(entry.ino, &inode)?)
    }

    /// Changes attributes other than the size.
    pub(crate) fn set_attr(&self, inode: &mut InodeRecord, op: &SetAttr) {
        let new_owner = op.uid.is_some() || op.gid.is_some();
        inode.mode = match op.mode {
            Some(mode) => mode & MODE_BITS,
            // A new owner does not get a program that runs as somebody else.
            None if new_owner && inode.is_regular() => without_set_ids(inode.mode),
            None => inode.mode,
        };
        inode.uid = op.uid.unwrap_or(inode.uid);
        inode.gid = op.gid.unwrap_or(inode.gid);
        inode.atime = op.atime.unwrap_or(inode.atime);
        inode.mtime = op.mtime.unwrap_or(inode.mtime);
        inode.ctime = op.ctime.unwrap_or(self.now);
    }
}

fn check_target(kind: FileKind, target: &[u8]) -> Result<(), OpError> {
    if kind == FileKind::Symlink && target.is_empty() {
        return Err(errno(libc::ENOENT, "a symlink must point somewhere"));
    }
    if target.len() > TARGET_BYTES_MAX {
        return Err(errno(libc::ENAMETOOLONG, "the target of a symlink has at most 4095 bytes"));
    }
    Ok(())
}

/// Whether the name of `inode` may go, by unlink or (`as_dir`) by rmdir, or by being replaced.
fn check_removable(inode: &InodeRecord, as_dir: bool, name: &[u8]) -> Result<(), OpError> {
    let told = String::from_utf8_lossy(name);
    match (inode.is_dir(), as_dir) {
        (true, false) => Err(errno(libc::EISDIR, format!("'{told}' is a directory"))),
        (false, true) => Err(errno(libc::ENOTDIR, format!("'{told}' is no directory"))),
        (true, true) if inode.entries > 0 => Err(errno(libc::ENOTEMPTY, format!("'{told}' is not empty"))),
        _ => Ok(()),
    }
}
