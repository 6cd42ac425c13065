//! Extended attributes: rules about names and sizes, and how access control lists and modes follow each other.
//!
//! ```text
//!   user.*  trusted.*  security.*      any bytes
//!   system.posix_acl_*                 lists, see `acl`; nothing else of system.*
//! ```
//! Who may read or write which is the kernel's business on the caller's node.
//! **Invariant:** the inode counts its attributes, and the permission bits of its mode are those of its access list.

use crate::acl::{ACCESS, Acl, DEFAULT};
use crate::meta::{InodeRecord, Tables};
use crate::proto::{FileKind, SetXattr};
use crate::refusal::{OpError, errno};

/// Longest name in bytes, as in Linux.
const NAME_BYTES_MAX: usize = 255;
/// Longest value in bytes, as in Linux.
const VALUE_BYTES_MAX: usize = 64 << 10;
/// All names of an inode, each with a NUL, as in Linux: the largest list that a caller can read.
const LIST_BYTES_MAX: usize = 64 << 10;
/// Flags of setxattr(2).
const CREATE: u32 = 1;
const REPLACE: u32 = 2;
const SETGID: u32 = 0o2000;

/// Sets an attribute of `inode`, whose record the caller stores.
pub(crate) fn set(
    tables: &mut Tables<'_>,
    ino: u64,
    inode: &mut InodeRecord,
    op: &SetXattr,
) -> Result<(), OpError> {
    check_name(&op.name)?;
    if op.value.len() > VALUE_BYTES_MAX {
        return Err(errno(libc::E2BIG, "an extended attribute has at most 64 KiB"));
    }
    let there = tables.xattr(ino, &op.name)?.is_some();
    match (there, op.flags) {
        (true, CREATE) => return Err(errno(libc::EEXIST, "the attribute exists")),
        (false, REPLACE) => return Err(absent()),
        (_, 0 | CREATE | REPLACE) => {}
        _ => return Err(errno(libc::EINVAL, "these flags make no sense together")),
    }
    match &op.name[..] {
        ACCESS => set_access(tables, ino, inode, op),
        DEFAULT => set_default(tables, ino, inode, &op.value),
        name => put(tables, ino, inode, name, &op.value),
    }
}

/// Removes an attribute of `inode`, whose record the caller stores.
pub(crate) fn remove(
    tables: &mut Tables<'_>,
    ino: u64,
    inode: &mut InodeRecord,
    name: &[u8],
) -> Result<(), OpError> {
    check_name(name)?;
    let there = take(tables, ino, inode, name)?;
    // A list that is not there is as good as removed.
    if there || is_acl(name) { Ok(()) } else { Err(absent()) }
}

/// What an attribute that does not exist is answered with.
pub(crate) fn absent() -> OpError {
    errno(libc::ENODATA, "there is no such attribute")
}

/// Whether an attribute is a list that the rules of modes apply to.
pub(crate) fn is_acl(name: &[u8]) -> bool {
    name == ACCESS || name == DEFAULT
}

fn check_name(name: &[u8]) -> Result<(), OpError> {
    if name.len() > NAME_BYTES_MAX {
        return Err(errno(libc::ERANGE, "the name of an attribute has at most 255 bytes"));
    }
    let spaces: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];
    let known = spaces.iter().any(|space| name.len() > space.len() && name.starts_with(space));
    if (known && !name.contains(&0)) || is_acl(name) {
        Ok(())
    } else {
        Err(errno(libc::EOPNOTSUPP, "only user.*, trusted.*, security.* and POSIX ACLs are kept"))
    }
}

fn put(
    tables: &mut Tables<'_>,
    ino: u64,
    inode: &mut InodeRecord,
    name: &[u8],
    value: &[u8],
) -> Result<(), OpError> {
    if tables.xattr(ino, name)?.is_none() {
        let names = tables.xattr_names(ino)?;
        let bytes: usize = names.iter().map(|name| name.len() + 1).sum();
        if bytes + name.len() + 1 > LIST_BYTES_MAX {
            return Err(errno(libc::ENOSPC, "an inode's attributes may have names of 64 KiB together"));
        }
        inode.xattrs += 1;
    }
    Ok(tables.put_xattr(ino, name, value)?)
}

fn take(tables: &mut Tables<'_>, ino: u64, inode: &mut InodeRecord, name: &[u8]) -> Result<bool, OpError> {
    let there = tables.xattr(ino, name)?.is_some();
    if there {
        inode.xattrs = inode.xattrs.saturating_sub(1);
        tables.remove_xattr(ino, name)?;
    }
    Ok(there)
}

fn parsed(value: &[u8]) -> Result<Acl, OpError> {
    Acl::parse(value).ok_or_else(|| errno(libc::EINVAL, "not a POSIX access control list"))
}

fn set_access(
    tables: &mut Tables<'_>,
    ino: u64,
    inode: &mut InodeRecord,
    op: &SetXattr,
) -> Result<(), OpError> {
    if inode.kind() == FileKind::Symlink {
        return Err(errno(libc::EOPNOTSUPP, "a symlink has no access control list"));
    }
    if Acl::is_empty(&op.value) {
        return take(tables, ino, inode, ACCESS).map(drop);
    }
    let acl = parsed(&op.value)?;
    if acl.is_minimal() {
        take(tables, ino, inode, ACCESS)?;
    } else {
        put(tables, ino, inode, ACCESS, &op.value)?;
    }
    let lost = if op.kill_setgid { SETGID } else { 0 };
    inode.mode = (inode.mode & !0o777 | acl.mode()) & !lost;
    Ok(())
}

fn set_default(
    tables: &mut Tables<'_>,
    ino: u64,
    inode: &mut InodeRecord,
    value: &[u8],
) -> Result<(), OpError> {
    if Acl::is_empty(value) {
        return take(tables, ino, inode, DEFAULT).map(drop);
    }
    if !inode.is_dir() {
        return Err(errno(libc::EACCES, "only directories have default access control lists"));
    }
    parsed(value)?;
    put(tables, ino, inode, DEFAULT, value)
}

/// The mode of an inode has been changed by chmod: its list follows.
pub(crate) fn follow_mode(tables: &mut Tables<'_>, ino: u64, inode: &InodeRecord) -> Result<(), OpError> {
    if inode.xattrs == 0 {
        return Ok(());
    }
    let Some(mut acl) = tables.xattr(ino, ACCESS)?.and_then(|bytes| Acl::parse(&bytes)) else {
        return Ok(());
    };
    acl.set_mode(inode.mode);
    Ok(tables.put_xattr(ino, ACCESS, &acl.bytes())?)
}

/// Gives a new inode in `dir` the mode and lists that it gets from there: the umask counts only without a default list.
pub(crate) fn inherit(
    tables: &mut Tables<'_>,
    (dir_ino, dir): (u64, &InodeRecord),
    (ino, inode): (u64, &mut InodeRecord),
    umask: u32,
) -> Result<(), OpError> {
    if inode.kind() == FileKind::Symlink {
        return Ok(());
    }
    let default = if dir.xattrs == 0 { None } else { tables.xattr(dir_ino, DEFAULT)? };
    let Some((acl, bytes)) = default.and_then(|bytes| Some((Acl::parse(&bytes)?, bytes))) else {
        inode.mode &= !(umask & 0o777);
        return Ok(());
    };
    let (access, mode) = acl.inherited(inode.mode);
    inode.mode = mode;
    if !access.is_minimal() {
        put(tables, ino, inode, ACCESS, &access.bytes())?;
    }
    if inode.is_dir() {
        put(tables, ino, inode, DEFAULT, &bytes)?;
    }
    Ok(())
}
