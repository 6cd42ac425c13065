//! Rows that are not what their tables must hold: they are found, and set aside, never thrown away.

use prost::Message;
use redb::ReadableTable;

use super::{
    READ, Raw, TableId, Tables, View, read_dirent, read_extent, read_listed, read_pool_run, read_shared_run,
    read_u64, run_of,
};
use crate::meta::store::engine;
use crate::meta::{ClientRecord, InodeRecord, LogRow, StoreError, StoredReply, keys};

/// Whether a key and a value are a row of a table.
type Decodes = fn(&[u8], &[u8]) -> bool;

/// Each table whose rows have a form, and whether a row is one of it.
const DECODERS: [(TableId, Decodes); 13] = [
    (TableId::Inodes, |k, v| keys::read_number(k).is_some() && InodeRecord::decode(v).is_ok()),
    (TableId::Dirents, |k, v| keys::read_name(k).is_some() && read_dirent(v).is_some()),
    (TableId::Cookies, |k, v| read_listed(k, v).is_some()),
    (TableId::Extents, |k, v| read_extent(k, v).is_some()),
    (TableId::Free, |k, v| run_of(k, v).is_ok()),
    (TableId::Chunks, |k, v| run_of(k, v).is_ok()),
    (TableId::Orphans, |k, _| keys::read_number(k).is_some()),
    (TableId::Clients, |k, v| keys::read_client(k).is_some() && ClientRecord::decode(v).is_ok()),
    (TableId::Replies, |k, v| keys::read_request(k).is_some() && StoredReply::decode(v).is_ok()),
    (TableId::Globals, |_, v| read_u64(v).is_some()),
    (TableId::Pools, |k, v| read_pool_run(k, v).is_ok()),
    (TableId::Logs, |k, v| keys::read_client(k).is_some() && LogRow::decode(v).is_ok()),
    (TableId::Refcounts, |k, v| read_shared_run(k, v).is_ok()),
];

/// A row that is not what its table must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DamagedRow {
    pub(crate) table: TableId,
    pub(crate) key: Vec<u8>,
}

impl<T: ReadableTable<Raw, Raw>> View<T> {
    /// Up to `max` rows that are not what their tables must hold.
    pub(crate) fn damaged_rows(&self, max: usize) -> Result<Vec<DamagedRow>, StoreError> {
        let mut found = Vec::new();
        for (table, decodes) in DECODERS {
            for row in self.table(table).range::<&[u8]>(..).map_err(engine(READ))? {
                let (key, value) = row.map_err(engine(READ))?;
                if found.len() >= max {
                    return Ok(found);
                }
                if !decodes(key.value(), value.value()) {
                    found.push(DamagedRow { table, key: key.value().to_vec() });
                }
            }
        }
        Ok(found)
    }

    /// How many rows repairs have set aside: of one table, or of all.
    pub(crate) fn set_aside(&self, of: Option<TableId>) -> Result<u64, StoreError> {
        let prefix = of.map_or_else(Vec::new, |table| [table.name().as_bytes(), &[0]].concat());
        let mut count = 0;
        self.scan(self.table(TableId::Quarantine), .., |key, _| {
            count += u64::from(key.starts_with(&prefix));
            Ok(true)
        })?;
        Ok(count)
    }
}

impl Tables<'_> {
    /// Takes a row out of its table and keeps it for whoever wants to look at it.
    pub(crate) fn quarantine(&mut self, table: TableId, key: &[u8]) -> Result<(), StoreError> {
        let Some(value) = self.take(table, key)? else { return Ok(()) };
        self.put(TableId::Quarantine, &[table.name().as_bytes(), &[0], key].concat(), &value)
    }

    /// As [`Tables::quarantine`], for an entry of a directory and its place in the order.
    pub(crate) fn quarantine_dirent(
        &mut self,
        parent: u64,
        name: &[u8],
        cookie: u64,
    ) -> Result<(), StoreError> {
        self.quarantine(TableId::Dirents, &keys::name(parent, name))?;
        let listed = self.list(parent, cookie.saturating_sub(1), 1)?.pop();
        match listed.filter(|listed| listed.cookie == cookie && listed.name == name) {
            Some(_) => self.quarantine(TableId::Cookies, &keys::pair(parent, cookie)),
            None => Ok(()),
        }
    }

    /// As [`Tables::quarantine`], for a place in the order of a directory.
    pub(crate) fn quarantine_cookie(&mut self, parent: u64, cookie: u64) -> Result<(), StoreError> {
        self.quarantine(TableId::Cookies, &keys::pair(parent, cookie))
    }

    /// As [`Tables::quarantine`], for an extent.
    pub(crate) fn quarantine_extent(&mut self, ino: u64, file: u64) -> Result<(), StoreError> {
        self.quarantine(TableId::Extents, &keys::pair(ino, file))
    }

    /// As [`Tables::quarantine`], for a run of a pool.
    pub(crate) fn quarantine_pool_run(&mut self, start: u64) -> Result<(), StoreError> {
        self.quarantine(TableId::Pools, &keys::number(start))
    }

    /// As [`Tables::quarantine`], for an orphan.
    pub(crate) fn quarantine_orphan(&mut self, ino: u64) -> Result<(), StoreError> {
        self.quarantine(TableId::Orphans, &keys::number(ino))
    }

    /// As [`Tables::quarantine`], for an extended attribute.
    pub(crate) fn quarantine_xattr(&mut self, ino: u64, name: &[u8]) -> Result<(), StoreError> {
        self.quarantine(TableId::Xattrs, &keys::name(ino, name))
    }

    /// Puts bytes into a table as they are: what a test damages.
    #[cfg(test)]
    pub(crate) fn put_raw(&mut self, table: TableId, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.put(table, key, value)
    }
}
