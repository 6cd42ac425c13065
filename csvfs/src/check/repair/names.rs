//! Entries, orders, links, and the way of everything to the root.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::Repair;
use crate::ROOT_INO;
use crate::meta::{Dirent, StoreError};
use crate::proto::FileKind;

pub(crate) const LOST_FOUND: &[u8] = b"lost+found";

/// All entries: by directory and name.
type Entries = BTreeMap<(u64, Vec<u8>), Dirent>;

impl Repair<'_, '_> {
    pub(super) fn names(&mut self) -> Result<(), StoreError> {
        self.root();
        self.inodes_that_others_have()?;
        self.entries_from_order()?;
        self.entries()?;
        self.orphans()?;
        self.everything_has_a_way()?;
        self.links()?;
        self.attributes()
    }

    fn root(&mut self) {
        let is_dir = self.inodes.get(&ROOT_INO).is_some_and(|root| root.is_dir());
        if !is_dir {
            self.make_inode(ROOT_INO, FileKind::Directory);
            if let Some(root) = self.change(ROOT_INO) {
                root.mode = 0o755;
                root.parent = ROOT_INO;
            }
            self.did(ROOT_INO, "the root directory was made anew");
        }
    }

    /// Inodes that are not there, though extents or entries speak of them: what is left is theirs.
    fn inodes_that_others_have(&mut self) -> Result<(), StoreError> {
        let mut ends: BTreeMap<u64, u64> = BTreeMap::new();
        let inodes = &self.inodes;
        self.tables.each_extent(|ino, extent| {
            if !inodes.contains_key(&ino) {
                let end = ends.entry(ino).or_default();
                *end = (*end).max(extent.end());
            }
            Ok(())
        })?;
        let mut folders = BTreeSet::new();
        let mut named: BTreeMap<u64, FileKind> = BTreeMap::new();
        let lost = &self.lost_rows;
        self.tables.each_dirent(|parent, _, dirent| {
            if !inodes.contains_key(&parent) {
                folders.insert(parent);
            }
            if lost.contains(&dirent.ino) && dirent.kind != FileKind::Symlink {
                named.insert(dirent.ino, dirent.kind);
            }
            Ok(())
        })?;
        for (ino, end) in ends {
            self.make_inode(ino, FileKind::Regular);
            if let Some(inode) = self.change(ino) {
                inode.size_bytes =
                    end.saturating_mul(crate::format::layout::BLOCK_BYTES).min(i64::MAX as u64);
            }
            self.did(
                ino,
                "a file was made anew for the blocks that it has; its size is that of its last block",
            );
        }
        let folders = folders.into_iter().map(|ino| (ino, FileKind::Directory));
        for (ino, kind) in folders.chain(named) {
            if !self.inodes.contains_key(&ino) {
                self.make_inode(ino, kind);
                self.did(ino, "an inode that entries speak of was made anew, without its attributes");
            }
        }
        Ok(())
    }

    /// Entries that only the order of a directory has.
    fn entries_from_order(&mut self) -> Result<(), StoreError> {
        let mut alone = Vec::new();
        let tables = &*self.tables;
        tables.each_cookie(|parent, listed| {
            let entry = tables.dirent(parent, &listed.name)?;
            let same =
                entry.is_some_and(|e| (e.cookie, e.ino, e.kind) == (listed.cookie, listed.ino, listed.kind));
            if !same {
                alone.push((parent, listed, entry.is_some()));
            }
            Ok(())
        })?;
        for (parent, listed, has_entry) in alone {
            let told = String::from_utf8_lossy(&listed.name).into_owned();
            if has_entry || !self.inodes.contains_key(&listed.ino) {
                self.tables.quarantine_cookie(parent, listed.cookie)?;
                self.did(
                    parent,
                    format!("the place of '{told}' in the order of its directory was set aside"),
                );
            } else {
                let dirent = Dirent { ino: listed.ino, cookie: listed.cookie, kind: listed.kind };
                self.tables.put_dirent(parent, &listed.name, dirent)?;
                self.did(parent, format!("entry '{told}' was rebuilt from the order of its directory"));
            }
        }
        Ok(())
    }

    fn all_entries(&self) -> Result<Entries, StoreError> {
        let mut entries = Entries::new();
        self.tables.each_dirent(|parent, name, dirent| {
            entries.insert((parent, name.to_vec()), dirent);
            Ok(())
        })?;
        Ok(entries)
    }

    /// Each entry is in a directory, names an inode of its kind, and has a place of its own.
    fn entries(&mut self) -> Result<(), StoreError> {
        let mut folders: BTreeSet<u64> = BTreeSet::new();
        for ((parent, name), dirent) in self.all_entries()? {
            let told = String::from_utf8_lossy(&name).into_owned();
            let in_directory = self.inodes.get(&parent).is_some_and(|dir| dir.is_dir());
            let kind = self.inodes.get(&dirent.ino).map(|inode| inode.kind());
            let again = kind == Some(FileKind::Directory) && !folders.insert(dirent.ino);
            let Some(kind) = kind.filter(|_| in_directory && !again && dirent.ino != ROOT_INO) else {
                self.tables.quarantine_dirent(parent, &name, dirent.cookie)?;
                let ino = dirent.ino;
                self.did(
                    parent,
                    format!("entry '{told}' to inode {ino}, which cannot be there, was set aside"),
                );
                continue;
            };
            self.entry(parent, &name, Dirent { kind, ..dirent }, dirent)?;
        }
        Ok(())
    }

    fn entry(&mut self, parent: u64, name: &[u8], mut wanted: Dirent, was: Dirent) -> Result<(), StoreError> {
        let listed = match wanted.cookie.checked_sub(1) {
            Some(before) => self.tables.list(parent, before, 1)?.pop().filter(|l| l.cookie == wanted.cookie),
            None => None,
        };
        let told = String::from_utf8_lossy(name).into_owned();
        let next_cookie = self.inodes.get(&parent).map_or(1, |dir| dir.next_cookie).max(1);
        let others = listed.as_ref().is_some_and(|listed| listed.name != name);
        if wanted.cookie == 0 || others {
            wanted.cookie = next_cookie;
        }
        if wanted.cookie >= next_cookie
            && let Some(dir) = self.change(parent)
        {
            dir.next_cookie = wanted.cookie + 1;
        }
        let in_order = listed.is_some_and(|l| l.name == name && l.ino == wanted.ino && l.kind == wanted.kind);
        if wanted != was || !in_order {
            self.tables.put_dirent(parent, name, wanted)?;
            self.did(parent, format!("entry '{told}' was made to agree with its inode and its place"));
        }
        if let Some(inode) = self.inodes.get(&wanted.ino)
            && inode.is_dir()
            && inode.parent != parent
        {
            if let Some(inode) = self.change(wanted.ino) {
                inode.parent = parent;
            }
            self.did(wanted.ino, format!("directory '{told}' was told its parent"));
        }
        Ok(())
    }

    /// Orphans have an inode and no name.
    fn orphans(&mut self) -> Result<(), StoreError> {
        let named: BTreeSet<u64> = self.all_entries()?.values().map(|dirent| dirent.ino).collect();
        for ino in self.tables.orphans()? {
            if !self.inodes.contains_key(&ino) {
                self.tables.quarantine_orphan(ino)?;
                self.did(ino, "an orphan without an inode was set aside");
            } else if named.contains(&ino) {
                self.tables.remove_orphan(ino)?;
                self.did(ino, "a file with a name is no orphan any more");
            }
        }
        Ok(())
    }

    /// What has no name, or no way to the root, gets a name in /lost+found.
    fn everything_has_a_way(&mut self) -> Result<(), StoreError> {
        loop {
            let entries = self.all_entries()?;
            let reached = reached(&entries);
            let orphans: BTreeSet<u64> = self.tables.orphans()?.into_iter().collect();
            let lost = |ino: &&u64| !reached.contains(*ino) && !orphans.contains(*ino);
            let lost: Vec<u64> = self.inodes.keys().filter(lost).copied().collect();
            let named: BTreeMap<u64, (u64, Vec<u8>, u64)> = entries
                .iter()
                .map(|((parent, name), dirent)| (dirent.ino, (*parent, name.clone(), dirent.cookie)))
                .collect();
            // Those without a name first: with them come the names that are in them.
            let nameless: Vec<u64> = lost.iter().copied().filter(|ino| !named.contains_key(ino)).collect();
            if let Some(ino) = nameless.first() {
                for ino in &nameless {
                    self.give_name(*ino)?;
                }
                debug_assert!(reached.contains(&ROOT_INO) && *ino != ROOT_INO, "the root is always reached");
                continue;
            }
            // Directories in a circle: one of them leaves it.
            let is_dir = |ino: &u64| self.inodes.get(ino).is_some_and(|inode| inode.is_dir());
            let Some(first) = lost.iter().copied().find(is_dir) else { return Ok(()) };
            if let Some((parent, name, cookie)) = named.get(&first) {
                self.tables.quarantine_dirent(*parent, name, *cookie)?;
                self.did(first, "a directory that lies in itself was taken out, its old entry set aside");
            }
            self.give_name(first)?;
        }
    }

    /// A name in /lost+found.
    pub(super) fn give_name(&mut self, ino: u64) -> Result<(), StoreError> {
        let folder = self.lost_found()?;
        let mut name = format!("inode-{ino}");
        while self.tables.dirent(folder, name.as_bytes())?.is_some() {
            name.push('+');
        }
        self.put_name(folder, name.as_bytes(), ino)?;
        self.did(ino, format!("it had no way from the root and is /lost+found/{name} now"));
        Ok(())
    }

    pub(super) fn put_name(&mut self, folder: u64, name: &[u8], ino: u64) -> Result<(), StoreError> {
        let kind = self.inodes.get(&ino).map_or(FileKind::Regular, |inode| inode.kind());
        let cookie = self.change(folder).map_or(1, |dir| {
            dir.next_cookie = dir.next_cookie.max(1) + 1;
            dir.next_cookie - 1
        });
        self.tables.put_dirent(folder, name, Dirent { ino, cookie, kind })?;
        if let Some(inode) = self.change(ino)
            && inode.is_dir()
        {
            inode.parent = folder;
        }
        Ok(())
    }

    pub(super) fn lost_found(&mut self) -> Result<u64, StoreError> {
        if let Some(ino) = self.lost_found {
            return Ok(ino);
        }
        let there = self.tables.dirent(ROOT_INO, LOST_FOUND)?;
        let usable = there.filter(|d| self.inodes.get(&d.ino).is_some_and(|inode| inode.is_dir()));
        let ino = match (usable, there) {
            (Some(dirent), _) => dirent.ino,
            (None, taken) => {
                let ino = self.next_ino;
                self.next_ino += 1;
                self.make_inode(ino, FileKind::Directory);
                let name: &[u8] = if taken.is_some() { b"lost+found+" } else { LOST_FOUND };
                self.put_name(ROOT_INO, name, ino)?;
                ino
            }
        };
        self.lost_found = Some(ino);
        Ok(ino)
    }

    /// Counts what is counted: names, subdirectories, entries.
    pub(super) fn links(&mut self) -> Result<(), StoreError> {
        let (mut names, mut entries, mut subdirs) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for ((parent, _), dirent) in self.all_entries()? {
            *names.entry(dirent.ino).or_insert(0_u32) += 1;
            *entries.entry(parent).or_insert(0_u64) += 1;
            *subdirs.entry(parent).or_insert(0_u32) += u32::from(dirent.kind == FileKind::Directory);
        }
        let orphans: BTreeSet<u64> = self.tables.orphans()?.into_iter().collect();
        let count = |counts: &BTreeMap<u64, u32>, ino: u64| counts.get(&ino).copied().unwrap_or(0);
        let all: Vec<u64> = self.inodes.keys().copied().collect();
        for ino in all {
            let Some(inode) = self.inodes.get(&ino) else { continue };
            let nlink = match inode.is_dir() {
                _ if orphans.contains(&ino) => 0,
                true => 2 + count(&subdirs, ino),
                false => count(&names, ino),
            };
            let there = if inode.is_dir() { entries.get(&ino).copied().unwrap_or(0) } else { inode.entries };
            if inode.nlink == nlink && inode.entries == there {
                continue;
            }
            let told = format!(
                "{nlink} links and {there} entries are counted, not {} and {}",
                inode.nlink, inode.entries
            );
            if let Some(inode) = self.change(ino) {
                (inode.nlink, inode.entries) = (nlink, there);
            }
            self.did(ino, told);
        }
        Ok(())
    }

    /// Attributes have an inode, which counts them.
    fn attributes(&mut self) -> Result<(), StoreError> {
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        let mut strays = Vec::new();
        let inodes = &self.inodes;
        self.tables.each_xattr(|ino, name, _| {
            if inodes.contains_key(&ino) {
                *counts.entry(ino).or_default() += 1;
            } else {
                strays.push((ino, name.to_vec()));
            }
            Ok(())
        })?;
        for (ino, name) in strays {
            self.tables.quarantine_xattr(ino, &name)?;
            self.did(ino, "an attribute of an inode that is not there was set aside");
        }
        let all: Vec<u64> = self.inodes.keys().copied().collect();
        for ino in all {
            let there = counts.get(&ino).copied().unwrap_or(0);
            if self.inodes.get(&ino).is_some_and(|inode| inode.xattrs != there) {
                if let Some(inode) = self.change(ino) {
                    inode.xattrs = there;
                }
                self.did(ino, format!("{there} extended attributes are counted"));
            }
        }
        Ok(())
    }
}

/// What can be reached from the root.
fn reached(entries: &Entries) -> BTreeSet<u64> {
    let mut reached: BTreeSet<u64> = [ROOT_INO].into();
    let mut ahead: VecDeque<u64> = [ROOT_INO].into();
    while let Some(folder) = ahead.pop_front() {
        for dirent in entries.range((folder, Vec::new())..(folder + 1, Vec::new())).map(|(_, dirent)| dirent)
        {
            if reached.insert(dirent.ino) && dirent.kind == FileKind::Directory {
                ahead.push_back(dirent.ino);
            }
        }
    }
    reached
}
