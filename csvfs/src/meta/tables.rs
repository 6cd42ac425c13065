//! The tables and their typed access.
//!
//! | table | key | value |
//! |---|---|---|
//! | inodes | inode | `InodeRecord` |
//! | dirents | directory, name | inode, cookie, kind |
//! | cookies | directory, cookie | inode, kind, name |
//! | extents | inode, file block | LUN block, blocks, state |
//! | free | LUN block | blocks |
//! | chunks | LUN block | blocks: owned by the metadata store |
//! | orphans | inode | empty: without a name, kept until closed |
//! | clients | client | `ClientRecord` |
//! | replies | client, request | `StoredReply` |
//! | globals | name | number |
//! | pools | LUN block | blocks, number of the log that goes with the pool |
//! | logs | client | `LogRow` |
//! | xattrs | inode, name | bytes of the attribute |
//! | quarantine | name of a table, 0, key | a row of it that a repair has set aside |
//! | refcounts | LUN block | blocks, number of extents that have them: two or more |
//!
//! **Invariant:** a value that does not decode is `Damaged`, never a default.

mod quarantine;

use std::collections::BTreeSet;
use std::ops::{Bound, Range, RangeBounds};

use bytes::Bytes;
use lockmgr::{ClientId, Term};
use prost::Message;
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, Table, TableDefinition, WriteTransaction};

use super::changes::{self, Changes};
use super::journal::Head;
use super::store::engine;
use super::{ClientRecord, InodeRecord, LogRow, StoreError, StoredReply, keys};
use crate::extents::{Extent, State};
use crate::proto::FileKind;
use crate::refcounts::SharedRun;

type Raw = &'static [u8];
pub(crate) type ReadTable = ReadOnlyTable<Raw, Raw>;
pub(crate) type Tables<'t> = View<Table<'t, Raw, Raw>>;

const AREA_BLOCKS: &[u8] = b"area_blocks";
const JOURNAL_TERM: &[u8] = b"journal_term";
const JOURNAL_NEXT: &[u8] = b"journal_next";
const READ: &str = "read metadata";
const WRITE: &str = "write metadata";

/// Which table. **Invariant:** the numbers are on the LUN, in the journal: they never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum TableId {
    Inodes = 0,
    Dirents = 1,
    Cookies = 2,
    Extents = 3,
    Free = 4,
    Chunks = 5,
    Orphans = 6,
    Clients = 7,
    Replies = 8,
    Globals = 9,
    Pools = 10,
    Logs = 11,
    Xattrs = 12,
    Quarantine = 13,
    Refcounts = 14,
}

/// All tables and their names in the store, in the order of their numbers.
const TABLES: [(TableId, &str); 15] = [
    (TableId::Inodes, "inodes"),
    (TableId::Dirents, "dirents"),
    (TableId::Cookies, "cookies"),
    (TableId::Extents, "extents"),
    (TableId::Free, "free"),
    (TableId::Chunks, "chunks"),
    (TableId::Orphans, "orphans"),
    (TableId::Clients, "clients"),
    (TableId::Replies, "replies"),
    (TableId::Globals, "globals"),
    (TableId::Pools, "pools"),
    (TableId::Logs, "logs"),
    (TableId::Xattrs, "xattrs"),
    (TableId::Quarantine, "quarantine"),
    (TableId::Refcounts, "refcounts"),
];

// A record of the journal goes into the table whose number it has.
const _: () = {
    let mut number = 0;
    while number < TABLES.len() {
        assert!(TABLES[number].0 as usize == number);
        number += 1;
    }
};

impl TableId {
    pub(super) fn from_number(number: u8) -> Option<Self> {
        TABLES.get(usize::from(number)).map(|(id, _)| *id)
    }

    pub(crate) fn name(self) -> &'static str {
        TABLES[self as usize].1
    }
}

/// All tables, to be read through any transaction.
#[derive(Debug)]
pub(crate) struct View<T> {
    /// By number.
    tables: [T; TABLES.len()],
    changes: Changes,
    pass_over: bool,
}

/// Opens every table in the order of their numbers.
fn open_all<T, E: Into<redb::Error>>(
    open: impl Fn(TableDefinition<'static, Raw, Raw>) -> Result<T, E>,
) -> Result<View<T>, StoreError> {
    let opened =
        TABLES.iter().map(|(_, name)| open(TableDefinition::new(name)).map_err(engine("open a table")));
    let opened: Vec<T> = opened.collect::<Result<_, _>>()?;
    let tables = opened.try_into().unwrap_or_else(|_| unreachable!("one of each"));
    Ok(View { tables, changes: Changes::default(), pass_over: false })
}

pub(super) fn open_write(txn: &WriteTransaction) -> Result<Tables<'_>, StoreError> {
    open_all(|definition| txn.open_table(definition))
}

pub(super) fn open_read(txn: &ReadTransaction) -> Result<View<ReadTable>, StoreError> {
    open_all(|definition| txn.open_table(definition))
}

/// A directory's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dirent {
    pub(crate) ino: u64,
    pub(crate) cookie: u64,
    pub(crate) kind: FileKind,
}

/// Counters of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Globals {
    /// Number of the next inode; numbers are never used twice.
    pub(crate) next_ino: u64,
    /// How many inodes there are.
    pub(crate) inodes: u64,
}

fn damaged(what: impl Into<String>) -> StoreError {
    StoreError::Damaged { what: what.into() }
}

fn get<T: ReadableTable<Raw, Raw>>(table: &T, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(table.get(key).map_err(engine(READ))?.map(|guard| guard.value().to_vec()))
}

fn decode<M: Message + Default>(bytes: &[u8], what: impl FnOnce() -> String) -> Result<M, StoreError> {
    M::decode(bytes).map_err(|error| damaged(format!("{}: {error}", what())))
}

fn read_u64(bytes: &[u8]) -> Option<u64> {
    bytes.first_chunk().map(|b| u64::from_le_bytes(*b))
}

fn dirent_value(d: Dirent) -> [u8; 17] {
    let mut value = [0; 17];
    value[..8].copy_from_slice(&d.ino.to_le_bytes());
    value[8..16].copy_from_slice(&d.cookie.to_le_bytes());
    value[16] = kind_byte(d.kind);
    value
}

fn read_dirent(bytes: &[u8]) -> Option<Dirent> {
    let (ino, cookie) = (read_u64(bytes)?, read_u64(bytes.get(8..)?)?);
    Some(Dirent { ino, cookie, kind: read_kind(*bytes.get(16)?)? })
}

fn kind_byte(kind: FileKind) -> u8 {
    u8::try_from(i32::from(kind)).expect("there are fewer than ten kinds")
}

fn read_kind(byte: u8) -> Option<FileKind> {
    FileKind::try_from(i32::from(byte)).ok().filter(|kind| *kind != FileKind::Unknown)
}

fn extent_value(e: &Extent) -> [u8; 17] {
    let mut value = [0; 17];
    value[..8].copy_from_slice(&e.lun.to_le_bytes());
    value[8..16].copy_from_slice(&e.blocks.to_le_bytes());
    value[16] = match e.state {
        State::Data => 1,
        State::Fresh => 2,
        State::Shared => 3,
    };
    value
}

fn read_extent(key: &[u8], value: &[u8]) -> Option<(u64, Extent)> {
    let (ino, file) = keys::read_pair(key)?;
    let (lun, blocks) = (read_u64(value)?, read_u64(value.get(8..)?)?);
    let state = match value.get(16)? {
        1 => State::Data,
        2 => State::Fresh,
        3 => State::Shared,
        _ => return None,
    };
    let sane = blocks > 0 && file.checked_add(blocks).is_some() && lun.checked_add(blocks).is_some();
    sane.then_some((ino, Extent { file, blocks, lun, state }))
}

fn run_of(key: &[u8], value: &[u8]) -> Result<(u64, u64), StoreError> {
    let run = keys::read_number(key).zip(read_u64(value));
    run.filter(|(start, blocks)| *blocks > 0 && start.checked_add(*blocks).is_some())
        .ok_or_else(|| damaged("a run of blocks"))
}

/// Free blocks that a client may place by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolRun {
    pub(crate) start: u64,
    pub(crate) blocks: u64,
    /// Number of the log that goes with the pool.
    pub(crate) log: u64,
}

fn read_pool_run(key: &[u8], value: &[u8]) -> Result<PoolRun, StoreError> {
    let (start, blocks) = run_of(key, value)?;
    let log = value.get(8..).and_then(read_u64).ok_or_else(|| damaged("a run of a pool"))?;
    Ok(PoolRun { start, blocks, log })
}

fn read_shared_run(key: &[u8], value: &[u8]) -> Result<SharedRun, StoreError> {
    let (start, blocks) = run_of(key, value)?;
    let count = value.get(8..).and_then(read_u64).filter(|count| *count >= 2);
    let count = count.ok_or_else(|| damaged(format!("the count of references to block {start}")))?;
    Ok(SharedRun { start, blocks, count })
}

/// One entry as a directory listing gives it.
#[derive(Clone, Debug)]
pub(crate) struct ListedEntry {
    pub(crate) cookie: u64,
    pub(crate) ino: u64,
    pub(crate) kind: FileKind,
    pub(crate) name: Vec<u8>,
}

fn read_listed(key: &[u8], value: &[u8]) -> Option<(u64, ListedEntry)> {
    let (parent, cookie) = keys::read_pair(key)?;
    let (ino, kind) = (read_u64(value)?, read_kind(*value.get(8)?)?);
    let name = value.get(9..).filter(|name| !name.is_empty())?.to_vec();
    Some((parent, ListedEntry { cookie, ino, kind, name }))
}

impl<T> View<T> {
    fn table(&self, id: TableId) -> &T {
        &self.tables[id as usize]
    }

    fn table_mut(&mut self, id: TableId) -> &mut T {
        &mut self.tables[id as usize]
    }
}

impl<T: ReadableTable<Raw, Raw>> View<T> {
    /// Rows that do not decode are passed over from here on: for who tells of them by itself.
    pub(crate) fn passing_over_damage(mut self) -> Self {
        self.pass_over = true;
        self
    }

    /// Calls `visit` with the rows of `range` until it answers false.
    fn scan<'k>(
        &self,
        table: &T,
        range: impl RangeBounds<&'k [u8]> + 'k,
        mut visit: impl FnMut(&[u8], &[u8]) -> Result<bool, StoreError>,
    ) -> Result<(), StoreError> {
        for row in table.range::<&[u8]>(range).map_err(engine(READ))? {
            let (key, value) = row.map_err(engine(READ))?;
            match visit(key.value(), value.value()) {
                Ok(true) => {}
                Err(StoreError::Damaged { .. }) if self.pass_over => {}
                Ok(false) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(crate) fn inode(&self, ino: u64) -> Result<Option<InodeRecord>, StoreError> {
        let bytes = get(self.table(TableId::Inodes), &keys::number(ino))?;
        bytes.map(|b| decode(&b, || format!("inode {ino}"))).transpose()
    }

    /// Visits all inodes in order.
    pub(crate) fn each_inode(
        &self,
        mut visit: impl FnMut(u64, InodeRecord) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.scan(self.table(TableId::Inodes), .., |key, value| {
            let ino = keys::read_number(key).ok_or_else(|| damaged("a key of the inodes"))?;
            visit(ino, decode(value, || format!("inode {ino}"))?).map(|()| true)
        })
    }

    pub(crate) fn dirent(&self, parent: u64, name: &[u8]) -> Result<Option<Dirent>, StoreError> {
        let Some(value) = get(self.table(TableId::Dirents), &keys::name(parent, name))? else {
            return Ok(None);
        };
        read_dirent(&value).map(Some).ok_or_else(|| damaged(format!("an entry of directory {parent}")))
    }

    /// Visits all entries of all directories.
    pub(crate) fn each_dirent(
        &self,
        mut visit: impl FnMut(u64, &[u8], Dirent) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.scan(self.table(TableId::Dirents), .., |key, value| {
            let row = keys::read_name(key).zip(read_dirent(value));
            let ((parent, name), dirent) = row.ok_or_else(|| damaged("a directory entry"))?;
            visit(parent, name, dirent).map(|()| true)
        })
    }

    /// Up to `max` entries of a directory after `cookie`.
    pub(crate) fn list(&self, parent: u64, cookie: u64, max: usize) -> Result<Vec<ListedEntry>, StoreError> {
        let (from, to) = (keys::pair(parent, cookie), keys::pair(parent, u64::MAX));
        let mut entries = Vec::new();
        let range = (Bound::Excluded(&from[..]), Bound::Included(&to[..]));
        self.scan(self.table(TableId::Cookies), range, |key, value| {
            let (_, entry) =
                read_listed(key, value).ok_or_else(|| damaged(format!("a cookie of directory {parent}")))?;
            entries.push(entry);
            Ok(entries.len() < max)
        })?;
        Ok(entries)
    }

    /// Visits all cookies of all directories.
    pub(crate) fn each_cookie(
        &self,
        mut visit: impl FnMut(u64, ListedEntry) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.scan(self.table(TableId::Cookies), .., |key, value| {
            let (parent, entry) = read_listed(key, value).ok_or_else(|| damaged("a directory cookie"))?;
            visit(parent, entry).map(|()| true)
        })
    }

    /// Up to `max` extents of a file that reach beyond block `from` and start before `to`.
    pub(crate) fn extents(
        &self,
        ino: u64,
        from: u64,
        to: u64,
        max: usize,
    ) -> Result<Vec<Extent>, StoreError> {
        let mut extents = Vec::new();
        let decode = |key: &[u8], value: &[u8]| {
            read_extent(key, value).ok_or_else(|| damaged(format!("an extent of inode {ino}")))
        };
        let (low, at) = (keys::pair(ino, 0), keys::pair(ino, from));
        let before =
            self.table(TableId::Extents).range::<&[u8]>(&low[..]..&at[..]).map_err(engine(READ))?.next_back();
        if let Some(row) = before {
            let (key, value) = row.map_err(engine(READ))?;
            let (_, extent) = decode(key.value(), value.value())?;
            extents.extend(Some(extent).filter(|e| e.end() > from));
        }
        let high = keys::pair(ino, to);
        if from < to {
            self.scan(self.table(TableId::Extents), &at[..]..&high[..], |key, value| {
                if extents.len() >= max {
                    return Ok(false);
                }
                extents.push(decode(key, value)?.1);
                Ok(true)
            })?;
        }
        Ok(extents)
    }

    /// Visits all extents of all files.
    pub(crate) fn each_extent(
        &self,
        mut visit: impl FnMut(u64, Extent) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.scan(self.table(TableId::Extents), .., |key, value| {
            let (ino, extent) = read_extent(key, value).ok_or_else(|| damaged("an extent"))?;
            visit(ino, extent).map(|()| true)
        })
    }

    /// All free runs, in order.
    pub(crate) fn free(&self) -> Result<Vec<(u64, u64)>, StoreError> {
        let mut runs = Vec::new();
        self.scan(self.table(TableId::Free), .., |key, value| {
            runs.push(run_of(key, value)?);
            Ok(true)
        })?;
        Ok(runs)
    }

    /// All runs that belong to the metadata store, in order.
    pub(crate) fn chunks(&self) -> Result<Vec<(u64, u64)>, StoreError> {
        let mut runs = Vec::new();
        self.scan(self.table(TableId::Chunks), .., |key, value| {
            runs.push(run_of(key, value)?);
            Ok(true)
        })?;
        Ok(runs)
    }

    /// All runs of all pools, in order.
    pub(crate) fn pools(&self) -> Result<Vec<PoolRun>, StoreError> {
        let mut runs = Vec::new();
        self.scan(self.table(TableId::Pools), .., |key, value| {
            runs.push(read_pool_run(key, value)?);
            Ok(true)
        })?;
        Ok(runs)
    }

    /// Up to `max` runs with counts that touch the blocks `range`, in order.
    pub(crate) fn shared_runs(&self, range: &Range<u64>, max: usize) -> Result<Vec<SharedRun>, StoreError> {
        let mut runs = Vec::new();
        let (low, high) = (keys::number(range.start), keys::number(range.end.saturating_add(1)));
        let before =
            self.table(TableId::Refcounts).range::<&[u8]>(..&low[..]).map_err(engine(READ))?.next_back();
        if let Some(row) = before {
            let (key, value) = row.map_err(engine(READ))?;
            let run = read_shared_run(key.value(), value.value())?;
            runs.extend(Some(run).filter(|run| run.end() >= range.start));
        }
        self.scan(self.table(TableId::Refcounts), &low[..]..&high[..], |key, value| {
            if runs.len() >= max {
                return Ok(false);
            }
            runs.push(read_shared_run(key, value)?);
            Ok(true)
        })?;
        Ok(runs)
    }

    /// Visits all runs with counts.
    pub(crate) fn each_shared_run(
        &self,
        mut visit: impl FnMut(SharedRun) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.scan(self.table(TableId::Refcounts), .., |key, value| {
            visit(read_shared_run(key, value)?).map(|()| true)
        })
    }

    /// The intent logs in use, and whose they are.
    pub(crate) fn logs(&self) -> Result<Vec<(ClientId, LogRow)>, StoreError> {
        let mut logs = Vec::new();
        self.scan(self.table(TableId::Logs), .., |key, value| {
            let id = keys::read_client(key).ok_or_else(|| damaged("a key of the intent logs"))?;
            logs.push((id, decode(value, || format!("the intent log of client {id}"))?));
            Ok(true)
        })?;
        Ok(logs)
    }

    /// All inodes without a name.
    pub(crate) fn orphans(&self) -> Result<Vec<u64>, StoreError> {
        let mut orphans = Vec::new();
        self.scan(self.table(TableId::Orphans), .., |key, _| {
            orphans.push(keys::read_number(key).ok_or_else(|| damaged("a key of the orphans"))?);
            Ok(true)
        })?;
        Ok(orphans)
    }

    /// As `orphans`, without those that cannot be read: they take space until a repair, and harm nobody.
    pub(crate) fn readable_orphans(&self) -> Result<Vec<u64>, StoreError> {
        let mut orphans = Vec::new();
        self.scan(self.table(TableId::Orphans), .., |key, _| {
            orphans.extend(keys::read_number(key));
            Ok(true)
        })?;
        Ok(orphans)
    }

    /// All attached clients.
    pub(crate) fn clients(&self) -> Result<Vec<(ClientId, ClientRecord)>, StoreError> {
        let mut clients = Vec::new();
        self.scan(self.table(TableId::Clients), .., |key, value| {
            let id = keys::read_client(key).ok_or_else(|| damaged("a key of the clients"))?;
            clients.push((id, decode(value, || format!("client {id}"))?));
            Ok(true)
        })?;
        Ok(clients)
    }

    /// The encoded reply that `client` got to its request.
    pub(crate) fn reply(&self, client: ClientId, request_id: u64) -> Result<Option<Bytes>, StoreError> {
        let Some(value) = get(self.table(TableId::Replies), &keys::request(client, request_id))? else {
            return Ok(None);
        };
        let stored: StoredReply = decode(&value, || format!("a reply to client {client}"))?;
        Ok(Some(stored.reply))
    }

    /// Ids of the requests of `client` whose replies are kept, below `below`.
    pub(crate) fn reply_ids(&self, client: ClientId, below: u64) -> Result<Vec<u64>, StoreError> {
        let (from, to) = (keys::request(client, 0), keys::request(client, below));
        let mut ids = Vec::new();
        self.scan(self.table(TableId::Replies), &from[..]..&to[..], |key, _| {
            let (_, id) = keys::read_request(key).ok_or_else(|| damaged("a key of the replies"))?;
            ids.push(id);
            Ok(true)
        })?;
        Ok(ids)
    }

    pub(crate) fn xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        get(self.table(TableId::Xattrs), &keys::name(ino, name))
    }

    /// Names of all extended attributes of an inode, in order.
    pub(crate) fn xattr_names(&self, ino: u64) -> Result<Vec<Vec<u8>>, StoreError> {
        let (from, to) = (keys::number(ino), keys::number(ino.saturating_add(1)));
        let mut names = Vec::new();
        self.scan(self.table(TableId::Xattrs), &from[..]..&to[..], |key, _| {
            let (_, name) = keys::read_name(key).ok_or_else(|| damaged("a key of the attributes"))?;
            names.push(name.to_vec());
            Ok(true)
        })?;
        Ok(names)
    }

    /// Visits all extended attributes of all inodes.
    pub(crate) fn each_xattr(
        &self,
        mut visit: impl FnMut(u64, &[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.scan(self.table(TableId::Xattrs), .., |key, value| {
            let (ino, name) = keys::read_name(key).ok_or_else(|| damaged("a key of the attributes"))?;
            visit(ino, name, value).map(|()| true)
        })
    }

    pub(crate) fn globals(&self) -> Result<Globals, StoreError> {
        let read = |name: &str| -> Result<u64, StoreError> {
            let value = get(self.table(TableId::Globals), name.as_bytes())?;
            value.as_deref().and_then(read_u64).ok_or_else(|| damaged(format!("the counter {name}")))
        };
        Ok(Globals { next_ino: read("next_ino")?, inodes: read("inodes")? })
    }
}

impl<T: ReadableTable<Raw, Raw>> View<T> {
    /// How much of the LUN the tables account for, in blocks; none in a volume of an older version.
    pub(crate) fn area_blocks(&self) -> Result<Option<u64>, StoreError> {
        let value = get(self.table(TableId::Globals), AREA_BLOCKS)?;
        value.map(|bytes| read_u64(&bytes).ok_or_else(|| damaged("the size of the data area"))).transpose()
    }
}

impl<T: ReadableTable<Raw, Raw>> View<T> {
    /// Where the journal goes on; none in a volume that has none yet.
    pub(super) fn journal_head(&self) -> Result<Option<Head>, StoreError> {
        let read = |name: &[u8]| -> Result<Option<u64>, StoreError> {
            let value = get(self.table(TableId::Globals), name)?;
            value
                .map(|bytes| read_u64(&bytes).ok_or_else(|| damaged("where the journal goes on")))
                .transpose()
        };
        let rows = read(JOURNAL_TERM)?.zip(read(JOURNAL_NEXT)?);
        Ok(rows.map(|(term, next)| Head { term: Term(term), next }))
    }
}

impl Tables<'_> {
    /// Says where the journal goes on: what it has before that is in this transaction or the ones before it.
    pub(super) fn put_journal_head(&mut self, head: Head) -> Result<(), StoreError> {
        self.put(TableId::Globals, JOURNAL_TERM, &head.term.0.to_le_bytes())?;
        self.put(TableId::Globals, JOURNAL_NEXT, &head.next.to_le_bytes())
    }

    /// Does again what a record of the journal tells of.
    pub(super) fn redo(&mut self, record: &[u8]) -> Result<(), StoreError> {
        changes::each(record, |change| match change.value {
            Some(value) => self.put(change.table, change.key, value),
            None => self.remove(change.table, change.key),
        })
    }

    pub(crate) fn put_area_blocks(&mut self, blocks: u64) -> Result<(), StoreError> {
        self.put(TableId::Globals, AREA_BLOCKS, &blocks.to_le_bytes())
    }

    /// Whether anything was written since the tables were opened.
    pub(crate) fn changed(&self) -> bool {
        self.changes.any()
    }

    /// Ends the access. What was written is what a commit wants.
    pub(crate) fn into_changes(self) -> Changes {
        self.changes
    }

    fn put(&mut self, table: TableId, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.changes.put(table, key, value);
        self.table_mut(table).insert(key, value).map(drop).map_err(engine(WRITE))
    }

    /// Gives what was there.
    fn take(&mut self, table: TableId, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.changes.remove(table, key);
        let row = self.table_mut(table).remove(key).map_err(engine(WRITE))?;
        Ok(row.map(|guard| guard.value().to_vec()))
    }

    fn remove(&mut self, table: TableId, key: &[u8]) -> Result<(), StoreError> {
        self.take(table, key).map(drop)
    }

    pub(crate) fn put_inode(&mut self, ino: u64, inode: &InodeRecord) -> Result<(), StoreError> {
        self.put(TableId::Inodes, &keys::number(ino), &inode.encode_to_vec())
    }

    /// Removes an inode and its extended attributes.
    pub(crate) fn remove_inode(&mut self, ino: u64) -> Result<(), StoreError> {
        for name in self.xattr_names(ino)? {
            self.remove_xattr(ino, &name)?;
        }
        self.remove(TableId::Inodes, &keys::number(ino))
    }

    pub(crate) fn put_xattr(&mut self, ino: u64, name: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.put(TableId::Xattrs, &keys::name(ino, name), value)
    }

    pub(crate) fn remove_xattr(&mut self, ino: u64, name: &[u8]) -> Result<(), StoreError> {
        self.remove(TableId::Xattrs, &keys::name(ino, name))
    }

    pub(crate) fn put_dirent(&mut self, parent: u64, name: &[u8], dirent: Dirent) -> Result<(), StoreError> {
        self.put(TableId::Dirents, &keys::name(parent, name), &dirent_value(dirent))?;
        let mut value = dirent.ino.to_le_bytes().to_vec();
        value.push(kind_byte(dirent.kind));
        value.extend_from_slice(name);
        self.put(TableId::Cookies, &keys::pair(parent, dirent.cookie), &value)
    }

    pub(crate) fn remove_dirent(&mut self, parent: u64, name: &[u8], cookie: u64) -> Result<(), StoreError> {
        self.remove(TableId::Dirents, &keys::name(parent, name))?;
        self.remove(TableId::Cookies, &keys::pair(parent, cookie))
    }

    /// Stores the difference between two windows of a file's map.
    pub(crate) fn replace_extents(
        &mut self,
        ino: u64,
        old: &[Extent],
        new: &[Extent],
    ) -> Result<(), StoreError> {
        let mut kept = new.iter().peekable();
        for extent in old {
            while kept.next_if(|n| n.file < extent.file).is_some() {}
            if kept.peek().is_none_or(|n| n.file != extent.file) {
                self.remove(TableId::Extents, &keys::pair(ino, extent.file))?;
            }
        }
        let mut known = old.iter().peekable();
        for extent in new {
            while known.next_if(|o| o.file < extent.file).is_some() {}
            if known.peek().is_none_or(|o| *o != extent) {
                self.put(TableId::Extents, &keys::pair(ino, extent.file), &extent_value(extent))?;
            }
        }
        Ok(())
    }

    /// Stores the difference between two windows of the counts of references.
    pub(crate) fn replace_shared_runs(
        &mut self,
        old: &[SharedRun],
        new: &[SharedRun],
    ) -> Result<(), StoreError> {
        let starts: BTreeSet<u64> = new.iter().map(|run| run.start).collect();
        for run in old.iter().filter(|run| !starts.contains(&run.start)) {
            self.remove(TableId::Refcounts, &keys::number(run.start))?;
        }
        let known: BTreeSet<SharedRun> = old.iter().copied().collect();
        for run in new.iter().filter(|run| !known.contains(run)) {
            let mut value = run.blocks.to_le_bytes().to_vec();
            value.extend_from_slice(&run.count.to_le_bytes());
            self.put(TableId::Refcounts, &keys::number(run.start), &value)?;
        }
        Ok(())
    }

    pub(crate) fn put_free(&mut self, start: u64, blocks: u64) -> Result<(), StoreError> {
        self.put(TableId::Free, &keys::number(start), &blocks.to_le_bytes())
    }

    pub(crate) fn remove_free(&mut self, start: u64) -> Result<(), StoreError> {
        self.remove(TableId::Free, &keys::number(start))
    }

    pub(crate) fn put_chunk(&mut self, start: u64, blocks: u64) -> Result<(), StoreError> {
        self.put(TableId::Chunks, &keys::number(start), &blocks.to_le_bytes())
    }

    pub(crate) fn put_pool_run(&mut self, run: PoolRun) -> Result<(), StoreError> {
        let mut value = run.blocks.to_le_bytes().to_vec();
        value.extend_from_slice(&run.log.to_le_bytes());
        self.put(TableId::Pools, &keys::number(run.start), &value)
    }

    pub(crate) fn remove_pool_run(&mut self, start: u64) -> Result<(), StoreError> {
        self.remove(TableId::Pools, &keys::number(start))
    }

    pub(crate) fn put_log(&mut self, id: ClientId, row: &LogRow) -> Result<(), StoreError> {
        self.put(TableId::Logs, &keys::client(id), &row.encode_to_vec())
    }

    pub(crate) fn remove_log(&mut self, id: ClientId) -> Result<(), StoreError> {
        self.remove(TableId::Logs, &keys::client(id))
    }

    pub(crate) fn put_orphan(&mut self, ino: u64) -> Result<(), StoreError> {
        self.put(TableId::Orphans, &keys::number(ino), &[])
    }

    pub(crate) fn remove_orphan(&mut self, ino: u64) -> Result<(), StoreError> {
        self.remove(TableId::Orphans, &keys::number(ino))
    }

    pub(crate) fn put_client(&mut self, id: ClientId, record: &ClientRecord) -> Result<(), StoreError> {
        self.put(TableId::Clients, &keys::client(id), &record.encode_to_vec())
    }

    pub(crate) fn remove_client(&mut self, id: ClientId) -> Result<(), StoreError> {
        self.remove(TableId::Clients, &keys::client(id))
    }

    pub(crate) fn put_reply(
        &mut self,
        id: ClientId,
        request_id: u64,
        reply: Bytes,
    ) -> Result<(), StoreError> {
        let value = StoredReply { reply }.encode_to_vec();
        self.put(TableId::Replies, &keys::request(id, request_id), &value)
    }

    pub(crate) fn remove_reply(&mut self, id: ClientId, request_id: u64) -> Result<(), StoreError> {
        self.remove(TableId::Replies, &keys::request(id, request_id))
    }

    pub(crate) fn put_globals(&mut self, globals: Globals) -> Result<(), StoreError> {
        self.put(TableId::Globals, b"next_ino", &globals.next_ino.to_le_bytes())?;
        self.put(TableId::Globals, b"inodes", &globals.inodes.to_le_bytes())
    }
}
