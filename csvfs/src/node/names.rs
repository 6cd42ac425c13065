//! Calls on names and attributes: one request to the coordinator each, where memory does not answer.
//!
//! What another node has changed is seen by the next call: it has recalled the grant before it returned.
//!
//! Most calls wait for the reply. Changes of names come in two forms: `create` waits, `create_then` returns at once and gives its
//! outcome to `done`, which the thread that brings the reply calls, or, when nothing was sent, the caller's: it must not block.

use std::sync::Arc;

use bytes::Bytes;
use lockmgr::ClientId;
use pb::reply::Result as Answer;
use pb::request::Op;

use super::grants::Seq;
use super::remember::Remembered;
use super::session::Answered;
use super::{Attr, Creation, DirEntry, DirPage, File, FileKind, FsError, Node, SetAttr};
use crate::namespace::RENAME_NOREPLACE;
use crate::proto as pb;

/// Inode number of the root directory.
pub const ROOT_INO: u64 = 1;

/// Longest name of a directory entry, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// A file that was created, or found, and opened.
#[derive(Debug)]
pub struct Created {
    /// The file.
    pub file: Arc<File>,
    told: Attr,
    now: Option<Attr>,
}

impl Created {
    /// Its attributes, if they are known without a message.
    #[must_use]
    pub fn attr_at_hand(&self) -> Option<Attr> {
        self.now
    }

    /// Its attributes. May wait.
    #[must_use]
    pub fn attr(&self) -> Attr {
        // Who cannot ask again has at least been told this.
        self.now.unwrap_or_else(|| self.file.inode().attr().unwrap_or(self.told))
    }
}

/// What the coordinator has made.
struct Made {
    attr: Attr,
    /// The answer's place among others, and the attach under which it was given.
    stamp: Seq,
    attempt: u64,
}

/// What is known of a name without a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AtHand {
    /// The inode that has it.
    Is(Box<Attr>),
    /// Nothing has it.
    Absent,
    /// Nothing is known.
    Unknown,
}

impl Node {
    /// What `name` in the directory `parent` is.
    ///
    /// # Errors
    /// `ENOENT` and the like.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Attr, FsError> {
        let name = checked_name(name)?;
        match self.lookup_at_hand(parent, &name) {
            AtHand::Is(attr) => return Ok(*attr),
            AtHand::Absent => return Err(absent(&name)),
            AtHand::Unknown => {}
        }
        self.ask_name(parent, name, false)
    }

    fn ask_name(&self, parent: u64, name: Bytes, at_once: bool) -> Result<Attr, FsError> {
        let asked = pb::Lookup { parent, name: name.clone(), cache: true, at_once };
        let answered = self.core.ask(Op::Lookup(asked))?;
        let attr = attr_of(&answered)?;
        self.core.learn_name(parent, &name, attr.ino, answered.stamp());
        Ok(self.with_local_changes(attr, answered.stamp()))
    }

    /// As [`Node::lookup`], if that takes no message. Never blocks.
    #[must_use]
    pub fn lookup_at_hand(&self, parent: u64, name: &[u8]) -> AtHand {
        if name.len() > NAME_BYTES_MAX {
            // No directory has it, but that is not what is wrong with it.
            return AtHand::Unknown;
        }
        match self.core.remembered_name(parent, name) {
            Remembered::Inode(ino) => match self.attr_at_hand(ino).filter(|attr| attr.nlink > 0) {
                Some(attr) => AtHand::Is(Box::new(attr)),
                None => AtHand::Unknown,
            },
            Remembered::Absent => AtHand::Absent,
            Remembered::Unknown => AtHand::Unknown,
        }
    }

    /// Walks `path` from the root, without following symbolic links.
    ///
    /// # Errors
    /// Those of the lookups.
    pub fn resolve(&self, path: &str) -> Result<Attr, FsError> {
        self.walk(path, |parent, name| self.lookup(parent, name))
    }

    /// The inode that [`Node::resolve`] finds, without waiting for a client that has ended and whose log cannot be read.
    ///
    /// # Errors
    /// As of `resolve`, and `EBUSY`, with the name of such a client, when it holds something on the way.
    pub fn resolve_at_once(&self, path: &str) -> Result<u64, FsError> {
        let looked_up = |parent, name: &[u8]| match self.lookup_at_hand(parent, name) {
            AtHand::Is(attr) => Ok(*attr),
            AtHand::Absent => Err(absent(name)),
            AtHand::Unknown => self.ask_name(parent, checked_name(name)?, true),
        };
        Ok(self.walk(path, looked_up)?.ino)
    }

    fn walk(
        &self,
        path: &str,
        lookup: impl Fn(u64, &[u8]) -> Result<Attr, FsError>,
    ) -> Result<Attr, FsError> {
        let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
        if parts.peek().is_none() {
            return self.getattr(ROOT_INO);
        }
        let mut attr = None;
        for part in parts {
            let parent = attr.map_or(ROOT_INO, |attr: Attr| attr.ino);
            attr = Some(lookup(parent, part.as_bytes())?);
        }
        attr.ok_or_else(|| FsError::invalid(libc::ENOENT, format!("{path}: no such file")))
    }

    /// Creates a regular file and opens it. Without `exclusive` an existing one is opened as it is.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC` and the like.
    pub fn create(
        self: &Arc<Self>,
        parent: u64,
        name: &[u8],
        creation: &Creation,
        exclusive: bool,
    ) -> Result<(Attr, Arc<File>), FsError> {
        let made = wait_for(|done| self.create_then(parent, name, creation, exclusive, done))?;
        Ok((made.attr(), made.file))
    }

    /// As [`Node::create`], without waiting.
    pub fn create_then(
        self: &Arc<Self>,
        parent: u64,
        name: &[u8],
        creation: &Creation,
        exclusive: bool,
        done: impl FnOnce(Result<Created, FsError>) + Send + 'static,
    ) {
        let mut request = match new_inode(parent, name, FileKind::Regular, creation) {
            Ok(request) => request,
            Err(error) => return done(Err(error)),
        };
        request.exclusive = exclusive;
        (request.open, request.cache) = (true, true);
        let node = self.clone();
        self.create_named(request, move |made| {
            let Made { attr: told, stamp, attempt } = match made {
                Ok(made) => made,
                Err(error) => return done(Err(error)),
            };
            if told.kind != FileKind::Regular {
                return done(Err(FsError::invalid(libc::EEXIST, "the name exists and is no regular file")));
            }
            let now = node.local_changes_at_hand(told, stamp);
            match node.opened(told, attempt) {
                Some(file) => done(Ok(Created { file, told, now })),
                // The node has attached anew since.
                None => node.reopen_then(told.ino, move |file| {
                    done(file.map(|file| Created { file, told, now: None }));
                }),
            }
        });
    }

    /// Creates a regular file without a name, and opens it: it goes with its last close, unless it is `linkable` and
    /// [`Node::link`] gives it a name.
    ///
    /// # Errors
    /// `ENOSPC` and the like.
    pub fn create_unnamed(
        self: &Arc<Self>,
        parent: u64,
        creation: &Creation,
        linkable: bool,
    ) -> Result<(Attr, Arc<File>), FsError> {
        let mut request = new_inode(parent, b"unnamed", FileKind::Regular, creation)?;
        request.name = Bytes::new();
        (request.open, request.unnamed, request.linkable) = (true, true, linkable);
        loop {
            let answered = self.core.ask(Op::Create(request.clone()))?;
            let attr = attr_of(&answered)?;
            if let Some(file) = self.opened(attr, answered.attempt) {
                return Ok((attr, file));
            }
            // The node has attached anew since: nobody has it open, and nothing names it.
        }
    }

    /// Creates a directory.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC` and the like.
    pub fn mkdir(&self, parent: u64, name: &[u8], creation: &Creation) -> Result<Attr, FsError> {
        wait_for(|done| self.mkdir_then(parent, name, creation, done))
    }

    /// As [`Node::mkdir`], without waiting.
    pub fn mkdir_then(
        &self,
        parent: u64,
        name: &[u8],
        creation: &Creation,
        done: impl FnOnce(Result<Attr, FsError>) + Send + 'static,
    ) {
        let mut request = match new_inode(parent, name, FileKind::Directory, creation) {
            Ok(request) => request,
            Err(error) => return done(Err(error)),
        };
        (request.exclusive, request.cache) = (true, true);
        let core = self.core.clone();
        self.create_named(request, move |made| {
            done(made.map(|made| {
                core.learn_empty(made.attr.ino, made.stamp);
                made.attr
            }));
        });
    }

    /// Creates a symbolic link to `target`.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC` and the like.
    pub fn symlink(
        &self,
        parent: u64,
        name: &[u8],
        target: &[u8],
        creation: &Creation,
    ) -> Result<Attr, FsError> {
        let mut request = new_inode(parent, name, FileKind::Symlink, creation)?;
        request.target = Bytes::copy_from_slice(target);
        self.make(request)
    }

    /// Creates a pipe, socket, device node or empty file.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC` and the like.
    pub fn mknod(
        &self,
        parent: u64,
        name: &[u8],
        kind: FileKind,
        rdev: u32,
        creation: &Creation,
    ) -> Result<Attr, FsError> {
        let mut request = new_inode(parent, name, kind, creation)?;
        request.rdev = rdev;
        self.make(request)
    }

    fn make(&self, mut request: pb::Create) -> Result<Attr, FsError> {
        request.exclusive = true;
        wait_for(|done| self.create_named(request, done)).map(|made| made.attr)
    }

    fn create_named(&self, request: pb::Create, done: impl FnOnce(Result<Made, FsError>) + Send + 'static) {
        let (parent, name) = (request.parent, request.name.clone());
        let core = self.core.clone();
        self.core.changing_then([parent], false, move |changing| {
            let asking = core.clone();
            asking.ask_then(Op::Create(request), move |outcome| {
                let made = outcome.and_then(|answered| {
                    let (attr, stamp) = (attr_of(&answered)?, answered.stamp());
                    core.changed_unseen(&answered);
                    core.changed_here(parent, &[&name], stamp);
                    core.learn_name(parent, &name, attr.ino, stamp);
                    Ok(Made { attr, stamp, attempt: answered.attempt })
                });
                drop(changing);
                done(made);
            });
        });
    }

    /// Where a symbolic link points.
    ///
    /// # Errors
    /// `EINVAL` when it is none.
    pub fn readlink(&self, ino: u64) -> Result<Vec<u8>, FsError> {
        if let Some(target) = self.core.remembered(ino, super::remember::Names::target) {
            return Ok(target.to_vec());
        }
        let answered = self.core.ask(Op::ReadLink(pb::ReadLink { ino }))?;
        let stamp = answered.stamp();
        match answered.result {
            Answer::LinkTarget(link) => {
                self.core.learn(ino, stamp, |known| known.set_target(link.target.clone()));
                Ok(link.target.to_vec())
            }
            other => Err(unexpected("ReadLink", &other)),
        }
    }

    /// Gives the inode one more name.
    ///
    /// # Errors
    /// `EEXIST`, `EPERM` for a directory, and the like.
    pub fn link(&self, ino: u64, parent: u64, name: &[u8]) -> Result<Attr, FsError> {
        let name = checked_name(name)?;
        let _changing = self.core.changing([ino, parent], false);
        let answered = self.core.ask(Op::Link(pb::Link { ino, parent, name: name.clone() }))?;
        let attr = attr_of(&answered)?;
        self.core.changed_unseen(&answered);
        self.core.changed_here(parent, &[&name], answered.stamp());
        self.core.learn_name(parent, &name, ino, answered.stamp());
        Ok(self.with_local_changes(attr, answered.stamp()))
    }

    /// Removes a name that is not a directory's.
    ///
    /// # Errors
    /// `ENOENT`, `EISDIR` and the like.
    pub fn unlink(&self, parent: u64, name: &[u8]) -> Result<(), FsError> {
        wait_for(|done| self.remove_then(parent, name, false, done))
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`, `ENOTEMPTY` and the like.
    pub fn rmdir(&self, parent: u64, name: &[u8]) -> Result<(), FsError> {
        wait_for(|done| self.remove_then(parent, name, true, done))
    }

    /// As [`Node::rmdir`], or [`Node::unlink`] of what is no `directory`, without waiting.
    pub fn remove_then(
        &self,
        parent: u64,
        name: &[u8],
        directory: bool,
        done: impl FnOnce(Result<(), FsError>) + Send + 'static,
    ) {
        let name = match checked_name(name) {
            Ok(name) => name,
            Err(error) => return done(Err(error)),
        };
        let target = self.core.remembered_name(parent, &name);
        let inos = target.ino().into_iter().chain([parent]);
        let core = self.core.clone();
        self.core.changing_then(inos, target.hides_another(), move |changing| {
            let (asking, removed) = (core.clone(), name.clone());
            let op = |parting| Op::Unlink(pb::Unlink { parent, name: removed, directory, parting });
            asking.ask_parting(target.ino(), op, move |outcome| {
                let removed = outcome.map(|answered| {
                    core.changed_unseen(&answered);
                    core.has_parted(answered.known.first());
                    core.changed_here(parent, &[&name], answered.stamp());
                });
                drop(changing);
                done(removed);
            });
        });
    }

    /// Moves a name; `flags` are those of `renameat2`. What `RENAME_WHITEOUT` leaves behind is root's.
    ///
    /// # Errors
    /// `ENOENT`, `EEXIST`, `ENOTEMPTY` and the like.
    pub fn rename(
        &self,
        parent: u64,
        name: &[u8],
        new_parent: u64,
        new_name: &[u8],
        flags: u32,
    ) -> Result<(), FsError> {
        wait_for(|done| self.rename_then((parent, name), (new_parent, new_name), (flags, [0, 0]), done))
    }

    /// As [`Node::rename`], without waiting, for this user and group.
    pub fn rename_then(
        &self,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
        (flags, [uid, gid]): (u32, [u32; 2]),
        done: impl FnOnce(Result<(), FsError>) + Send + 'static,
    ) {
        let (name, new_name) = match (checked_name(name), checked_name(new_name)) {
            (Ok(name), Ok(new_name)) => (name, new_name),
            (Err(error), _) | (_, Err(error)) => return done(Err(error)),
        };
        let source = self.core.remembered_name(parent, &name);
        let target = self.core.remembered_name(new_parent, &new_name);
        let inos = source.ino().into_iter().chain(target.ino()).chain([parent, new_parent]);
        let others = source.hides_another() || target.hides_another();
        let (from, to) = (name.clone(), new_name.clone());
        let core = self.core.clone();
        // Two names of one inode stay as they are.
        let renames = flags & !RENAME_NOREPLACE == 0 && source.ino() != target.ino();
        let replaced = target.ino().filter(|_| renames && flags == 0 && !source.hides_another());
        let op = move |parting| {
            Op::Rename(pb::Rename { parent, name: from, new_parent, new_name: to, flags, parting, uid, gid })
        };
        self.core.changing_then(inos, others, move |changing| {
            let asking = core.clone();
            asking.ask_parting(replaced, op, move |outcome| {
                let renamed = outcome.map(|answered| {
                    let stamp = answered.stamp();
                    core.changed_unseen(&answered);
                    // The moved one, the replaced one if it has other names, both directories.
                    core.has_parted(answered.known.get(1).filter(|_| answered.known.len() > 3));
                    core.changed_here(parent, &[&name], stamp);
                    core.changed_here(new_parent, &[&new_name], stamp);
                    // Another node may have put another file there before the coordinator came to it, which tells the moved one first.
                    let moved = answered.known.first().map(|attr| attr.ino);
                    match source.ino().filter(|ino| renames && moved == Some(*ino)) {
                        Some(ino) => core.learn_name(new_parent, &new_name, ino, stamp),
                        None => [parent, new_parent].into_iter().for_each(|dir| core.names_missing(dir)),
                    }
                });
                drop(changing);
                done(renamed);
            });
        });
    }

    /// Up to `max_entries` entries after `cookie` (0: from the start).
    ///
    /// # Errors
    /// `ENOTDIR` and the like.
    pub fn readdir(&self, ino: u64, cookie: u64, max_entries: u32) -> Result<DirPage, FsError> {
        if let Some(page) = self.core.remembered_page(ino, cookie, max_entries) {
            return Ok(page);
        }
        let answered = self.core.ask(Op::ReadDir(pb::ReadDir { ino, cookie, max_entries, cache: true }))?;
        let stamp = answered.stamp();
        match answered.result {
            Answer::DirPage(page) => {
                let page = self.checked_page(page, stamp)?;
                self.core.learn_page(ino, cookie, &page, stamp);
                Ok(page)
            }
            other => Err(unexpected("ReadDir", &other)),
        }
    }

    fn checked_page(&self, page: pb::DirPage, stamp: Seq) -> Result<DirPage, FsError> {
        let entries = page.entries.into_iter().map(|entry| {
            let attr =
                entry.attr.ok_or_else(|| FsError::Protocol("a directory entry without attributes".into()))?;
            let attr = self.with_local_changes(Attr::checked(&attr)?, stamp);
            Ok(DirEntry { name: entry.name.to_vec(), cookie: entry.cookie, attr })
        });
        Ok(DirPage { entries: entries.collect::<Result<_, FsError>>()?, end: page.end, parent: page.parent })
    }

    /// Space and inodes of the volume.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn statfs(&self) -> Result<pb::VolumeStat, FsError> {
        match self.ask(Op::StatFs(pb::StatFs {}))? {
            Answer::VolumeStat(stat) => {
                // Of this node's pool the coordinator does not know what files have by now.
                let used = stat.pooled.saturating_sub(self.core.space.bytes() / super::map::BLOCK_BYTES);
                Ok(pb::VolumeStat { blocks_free: stat.blocks_free.saturating_sub(used), ..stat })
            }
            other => Err(unexpected("StatFs", &other)),
        }
    }

    /// Who holds or waits for what on an inode, grants and locks of programs.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn grants(&self, ino: u64) -> Result<pb::GrantList, FsError> {
        match self.ask(Op::ListGrants(pb::ListGrants { ino }))? {
            Answer::GrantList(list) => Ok(list),
            other => Err(unexpected("ListGrants", &other)),
        }
    }

    /// Has the volume use all of a LUN that has grown; gives the sizes before and after.
    ///
    /// # Errors
    /// When the coordinator refuses, as for a LUN that has become smaller.
    pub fn extend(&self) -> Result<(u64, u64), FsError> {
        match self.ask(Op::Extend(pb::Extend {}))? {
            Answer::Extended(sizes) => Ok((sizes.old_bytes, sizes.new_bytes)),
            other => Err(unexpected("Extend", &other)),
        }
    }

    /// Has the coordinator walk all metadata.
    ///
    /// # Errors
    /// When the coordinator refuses; what is wrong with the volume is in the report.
    pub fn check(&self) -> Result<pb::CheckReport, FsError> {
        match self.ask(Op::Check(pb::Check {}))? {
            Answer::CheckReport(report) => Ok(report),
            other => Err(unexpected("Check", &other)),
        }
    }

    /// Has the coordinator repair what a check has found; gives what it did, and what it could not do.
    ///
    /// # Errors
    /// When the coordinator refuses.
    pub fn repair(&self, found: &pb::CheckReport) -> Result<Vec<pb::Repaired>, FsError> {
        let inos: std::collections::BTreeSet<u64> =
            found.problems.iter().map(|problem| problem.ino).collect();
        let inos = inos.into_iter().filter(|ino| *ino != 0).collect();
        match self.ask(Op::Repair(pb::Repair { inos }))? {
            Answer::RepairReport(report) => Ok(report.actions),
            other => Err(unexpected("Repair", &other)),
        }
    }

    /// Ends a client that is gone and whose intent log cannot be read: what it had flushed last may be lost.
    ///
    /// # Errors
    /// `ENOENT` when there is no such client.
    pub fn give_up_log(&self, client: ClientId) -> Result<(), FsError> {
        self.ask_done(Op::GiveUpLog(pb::GiveUpLog { client: Some(client.into()) }))
    }

    /// Attributes in wire form, for a file or anything else.
    pub(super) fn ask_attr(&self, op: Op) -> Result<Attr, FsError> {
        match self.ask(op)? {
            Answer::Attr(attr) => Attr::checked(&attr),
            other => Err(unexpected("a request for attributes", &other)),
        }
    }

    pub(super) fn ask_done(&self, op: Op) -> Result<(), FsError> {
        match self.ask(op)? {
            Answer::Done(_) => Ok(()),
            other => Err(unexpected("a change", &other)),
        }
    }
}

/// Waits for a call that gives its outcome to the `done` that it is begun with.
pub(super) fn wait_for<T: Send + 'static>(begin: impl FnOnce(Outcome<T>)) -> Result<T, FsError> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    begin(Box::new(move |outcome| drop(tell.send(outcome))));
    told.recv().unwrap_or(Err(FsError::Detached))
}

type Outcome<T> = Box<dyn FnOnce(Result<T, FsError>) + Send>;

pub(super) fn attr_of(answered: &Answered) -> Result<Attr, FsError> {
    match &answered.result {
        Answer::Attr(attr) => Attr::checked(attr),
        other => Err(unexpected("a request for attributes", other)),
    }
}

pub(super) fn unexpected(request: &str, answer: &Answer) -> FsError {
    let mut what = format!("{answer:?}");
    what.truncate(what.char_indices().nth(120).map_or(what.len(), |(at, _)| at));
    FsError::Protocol(format!("to {request}: {what}"))
}

pub(super) fn set_attr_request(ino: u64, set: &SetAttr) -> pb::SetAttr {
    pb::SetAttr {
        ino,
        mode: set.mode,
        uid: set.uid,
        gid: set.gid,
        size_bytes: set.size_bytes,
        atime: set.atime,
        mtime: set.mtime,
        ctime: set.ctime,
    }
}

fn new_inode(parent: u64, name: &[u8], kind: FileKind, creation: &Creation) -> Result<pb::Create, FsError> {
    Ok(pb::Create {
        parent,
        name: checked_name(name)?,
        kind: kind.to_wire().into(),
        mode: creation.mode & 0o7777,
        uid: creation.uid,
        gid: creation.gid,
        rdev: 0,
        target: Bytes::new(),
        exclusive: false,
        open: false,
        umask: creation.umask & 0o777,
        unnamed: false,
        linkable: false,
        cache: false,
    })
}

fn absent(name: &[u8]) -> FsError {
    FsError::invalid(libc::ENOENT, format!("'{}' does not exist", String::from_utf8_lossy(name)))
}

fn checked_name(name: &[u8]) -> Result<Bytes, FsError> {
    let shown = || String::from_utf8_lossy(&name[..name.len().min(64)]).into_owned();
    if name.len() > NAME_BYTES_MAX {
        let what = format!("the name {}.. is longer than {NAME_BYTES_MAX} bytes", shown());
        return Err(FsError::invalid(libc::ENAMETOOLONG, what));
    }
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return Err(FsError::invalid(libc::EINVAL, format!("{:?} is no name of a file", shown())));
    }
    Ok(Bytes::copy_from_slice(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_cannot_be_one_is_refused_before_it_is_sent() {
        assert!(checked_name(b"ok").is_ok());
        for bad in [&b""[..], b"a/b", b"a\0", &[b'x'; NAME_BYTES_MAX + 1]] {
            assert!(checked_name(bad).is_err());
        }
        assert_eq!(checked_name(&[b'x'; 256]).expect_err("too long").errno(), libc::ENAMETOOLONG);
    }
}
