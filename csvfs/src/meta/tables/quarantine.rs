//! Rows that are not what their tables must hold: they are found, and set aside, never thrown away.

use prost::Message;
use redb::{ReadableTable, Table};

use super::{
    READ, Raw, Tables, View, WRITE, put, read_dirent, read_extent, read_listed, read_pool_run,
    read_shared_run, read_u64, run_of,
};
use crate::meta::store::engine;
use crate::meta::{ClientRecord, InodeRecord, LogRow, StoreError, StoredReply, keys};

/// Whether a key and a value are a row of a table.
type Decodes = fn(&[u8], &[u8]) -> bool;

/// A row that is not what its table must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DamagedRow {
    pub(crate) table: &'static str,
    pub(crate) key: Vec<u8>,
}

impl<T: ReadableTable<Raw, Raw>> View<T> {
    /// Up to `max` rows that are not what their tables must hold.
    pub(crate) fn damaged_rows(&self, max: usize) -> Result<Vec<DamagedRow>, StoreError> {
        let mut found = Vec::new();
        for (name, table, decodes) in self.decoders() {
            for row in table.range::<&[u8]>(..).map_err(engine(READ))? {
                let (key, value) = row.map_err(engine(READ))?;
                if found.len() >= max {
                    return Ok(found);
                }
                if !decodes(key.value(), value.value()) {
                    found.push(DamagedRow { table: name, key: key.value().to_vec() });
                }
            }
        }
        Ok(found)
    }

    /// Each table, and whether a row is one of it.
    fn decoders(&self) -> [(&'static str, &T, Decodes); 13] {
        [
            ("inodes", &self.inodes, |k, v| keys::read_number(k).is_some() && InodeRecord::decode(v).is_ok()),
            ("dirents", &self.dirents, |k, v| keys::read_name(k).is_some() && read_dirent(v).is_some()),
            ("cookies", &self.cookies, |k, v| read_listed(k, v).is_some()),
            ("extents", &self.extents, |k, v| read_extent(k, v).is_some()),
            ("free", &self.free, |k, v| run_of(k, v).is_ok()),
            ("chunks", &self.chunks, |k, v| run_of(k, v).is_ok()),
            ("orphans", &self.orphans, |k, _| keys::read_number(k).is_some()),
            ("clients", &self.clients, |k, v| {
                keys::read_client(k).is_some() && ClientRecord::decode(v).is_ok()
            }),
            ("replies", &self.replies, |k, v| {
                keys::read_request(k).is_some() && StoredReply::decode(v).is_ok()
            }),
            ("globals", &self.globals, |_, v| read_u64(v).is_some()),
            ("pools", &self.pools, |k, v| read_pool_run(k, v).is_ok()),
            ("logs", &self.logs, |k, v| keys::read_client(k).is_some() && LogRow::decode(v).is_ok()),
            ("refcounts", &self.refcounts, |k, v| read_shared_run(k, v).is_ok()),
        ]
    }

    /// How many rows repairs have set aside, and of a table among them.
    pub(crate) fn set_aside(&self, table: &str) -> Result<(u64, u64), StoreError> {
        let (mut all, mut of) = (0, 0);
        self.scan(&self.quarantine, .., |key, _| {
            all += 1;
            of += u64::from(key.starts_with(table.as_bytes()) && key.get(table.len()) == Some(&0));
            Ok(true)
        })?;
        Ok((all, of))
    }
}

impl<'t> Tables<'t> {
    fn table(&mut self, name: &str) -> &mut Table<'t, Raw, Raw> {
        match name {
            "inodes" => &mut self.inodes,
            "dirents" => &mut self.dirents,
            "cookies" => &mut self.cookies,
            "extents" => &mut self.extents,
            "free" => &mut self.free,
            "chunks" => &mut self.chunks,
            "orphans" => &mut self.orphans,
            "clients" => &mut self.clients,
            "replies" => &mut self.replies,
            "globals" => &mut self.globals,
            "pools" => &mut self.pools,
            "logs" => &mut self.logs,
            "xattrs" => &mut self.xattrs,
            _ => &mut self.refcounts,
        }
    }

    /// Takes a row out of its table and keeps it for whoever wants to look at it.
    pub(crate) fn quarantine(&mut self, table: &str, key: &[u8]) -> Result<(), StoreError> {
        self.changed = true;
        let value = self.table(table).remove(key).map_err(engine(WRITE))?.map(|guard| guard.value().to_vec());
        let Some(value) = value else { return Ok(()) };
        put(&mut self.quarantine, &[table.as_bytes(), &[0], key].concat(), &value)
    }

    /// As [`Tables::quarantine`], for an entry of a directory and its place in the order.
    pub(crate) fn quarantine_dirent(
        &mut self,
        parent: u64,
        name: &[u8],
        cookie: u64,
    ) -> Result<(), StoreError> {
        self.quarantine("dirents", &keys::name(parent, name))?;
        let listed = self.list(parent, cookie.saturating_sub(1), 1)?.pop();
        match listed.filter(|listed| listed.cookie == cookie && listed.name == name) {
            Some(_) => self.quarantine("cookies", &keys::pair(parent, cookie)),
            None => Ok(()),
        }
    }

    /// As [`Tables::quarantine`], for a place in the order of a directory.
    pub(crate) fn quarantine_cookie(&mut self, parent: u64, cookie: u64) -> Result<(), StoreError> {
        self.quarantine("cookies", &keys::pair(parent, cookie))
    }

    /// As [`Tables::quarantine`], for an extent.
    pub(crate) fn quarantine_extent(&mut self, ino: u64, file: u64) -> Result<(), StoreError> {
        self.quarantine("extents", &keys::pair(ino, file))
    }

    /// As [`Tables::quarantine`], for a run of a pool.
    pub(crate) fn quarantine_pool_run(&mut self, start: u64) -> Result<(), StoreError> {
        self.quarantine("pools", &keys::number(start))
    }

    /// As [`Tables::quarantine`], for an orphan.
    pub(crate) fn quarantine_orphan(&mut self, ino: u64) -> Result<(), StoreError> {
        self.quarantine("orphans", &keys::number(ino))
    }

    /// As [`Tables::quarantine`], for an extended attribute.
    pub(crate) fn quarantine_xattr(&mut self, ino: u64, name: &[u8]) -> Result<(), StoreError> {
        self.quarantine("xattrs", &keys::name(ino, name))
    }

    /// Puts bytes into a table as they are: what a test damages.
    #[cfg(test)]
    pub(crate) fn put_raw(&mut self, table: &str, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
        self.changed = true;
        put(self.table(table), key, value)
    }
}
