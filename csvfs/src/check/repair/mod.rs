//! Repairs a volume's tables: what follows from others is rebuilt, what nobody can know is set aside.
//!
//! ```text
//!   rows     what does not decode goes to the table `quarantine`
//!   names    orders and entries rebuilt from each other; lost inodes get a name in /lost+found; links counted
//!   space    maps within the area; blocks of two files are shared by both from now on; counts, free space rebuilt
//! ```
//! The coordinator runs it in one transaction with nothing else, after it has had everybody lower the grants on the inodes
//! in question. Two files that claim one block both keep it, as clones do: nobody can know whose bytes they are, and neither
//! can harm the other any more.
//!
//! **Invariant:** nothing is dropped silently: a row that goes is in `quarantine` and in the report, and blocks whose owner
//! is not known any more are a file in /lost+found.

mod names;
mod rows;
mod space;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::format::meta_slot::Chunk;
use crate::meta::{InodeRecord, StoreError, Tables};
use crate::proto::{FileKind, Repaired, Timestamp};

pub(crate) use names::LOST_FOUND;

/// Actions that are listed; after as many, the rest is only counted.
const ACTIONS_MAX: usize = 1000;

/// What a repair is made of.
pub(crate) struct Params<'a> {
    /// Blocks of the data area.
    pub(crate) area: Range<u64>,
    /// What the metadata slot lists.
    pub(crate) chunks: Vec<Chunk>,
    pub(crate) now: Timestamp,
    /// Whether nobody holds a grant on an inode, or has buffered anything of it.
    pub(crate) is_quiet: &'a dyn Fn(u64) -> bool,
}

/// A repair under way.
pub(super) struct Repair<'a, 't> {
    tables: &'a mut Tables<'t>,
    params: Params<'a>,
    inodes: BTreeMap<u64, InodeRecord>,
    /// Inodes that are to be written.
    changed: BTreeSet<u64>,
    /// Inodes whose rows were set aside in this repair.
    lost_rows: BTreeSet<u64>,
    next_ino: u64,
    lost_found: Option<u64>,
    actions: Vec<Repaired>,
    unlisted: u64,
}

/// Repairs the tables. Nothing else may have changed them in this transaction, and nothing of the free space that is kept
/// in memory holds afterwards.
pub(crate) fn run(tables: &mut Tables<'_>, params: Params<'_>) -> Result<Vec<Repaired>, StoreError> {
    let mut repair = Repair {
        tables,
        params,
        inodes: BTreeMap::new(),
        changed: BTreeSet::new(),
        lost_rows: BTreeSet::new(),
        next_ino: 0,
        lost_found: None,
        actions: Vec::new(),
        unlisted: 0,
    };
    repair.rows()?;
    repair.load()?;
    repair.names()?;
    repair.space()?;
    repair.store()?;
    Ok(repair.report())
}

impl Repair<'_, '_> {
    fn did(&mut self, ino: u64, what: impl Into<String>) {
        self.note(ino, what, true);
    }

    /// Something that this repair could not do, and why.
    fn left(&mut self, ino: u64, what: impl Into<String>) {
        self.note(ino, what, false);
    }

    fn note(&mut self, ino: u64, what: impl Into<String>, done: bool) {
        if self.actions.len() < ACTIONS_MAX {
            self.actions.push(Repaired { what: what.into(), ino, done });
        } else {
            self.unlisted += 1;
        }
    }

    fn report(mut self) -> Vec<Repaired> {
        if self.unlisted > 0 {
            let what = format!("and {} more", self.unlisted);
            self.actions.push(Repaired { what, ino: 0, done: true });
        }
        self.actions
    }

    fn load(&mut self) -> Result<(), StoreError> {
        let inodes = &mut self.inodes;
        self.tables.each_inode(|ino, inode| {
            inodes.insert(ino, inode);
            Ok(())
        })?;
        let highest = self.inodes.last_key_value().map_or(0, |(ino, _)| *ino);
        let counted = self.tables.globals().ok().map_or(0, |globals| globals.next_ino);
        // A number is never used twice: without the counter some are left out.
        let spare = if counted > highest { 0 } else { 1 << 20 };
        self.next_ino = counted.max(highest + 1 + spare);
        Ok(())
    }

    /// The inode, to be changed.
    fn change(&mut self, ino: u64) -> Option<&mut InodeRecord> {
        let inode = self.inodes.get_mut(&ino)?;
        self.changed.insert(ino);
        Some(inode)
    }

    /// A new inode with plain attributes.
    fn make_inode(&mut self, ino: u64, kind: FileKind) {
        let now = self.params.now;
        let mode = if kind == FileKind::Directory { 0o700 } else { 0o600 };
        let inode = InodeRecord {
            kind: kind.into(),
            mode,
            generation: 1,
            next_cookie: 1,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            ..InodeRecord::default()
        };
        self.inodes.insert(ino, inode);
        self.changed.insert(ino);
    }

    fn store(&mut self) -> Result<(), StoreError> {
        for ino in std::mem::take(&mut self.changed) {
            if let Some(inode) = self.inodes.get(&ino) {
                self.tables.put_inode(ino, inode)?;
            }
        }
        let globals = crate::meta::Globals { next_ino: self.next_ino, inodes: self.inodes.len() as u64 };
        if self.tables.globals().ok() != Some(globals) {
            self.did(
                0,
                format!("{} inodes are counted, the next number is {}", globals.inodes, globals.next_ino),
            );
            self.tables.put_globals(globals)?;
        }
        let area = self.params.area.end;
        if self.tables.area_blocks().ok().flatten() != Some(area) {
            self.did(0, format!("the tables account for {area} blocks"));
            self.tables.put_area_blocks(area)?;
        }
        Ok(())
    }
}
