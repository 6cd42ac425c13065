//! Rows that are no rows of their tables.

use super::Repair;
use crate::meta::{StoreError, TableId};

/// Rows that one repair sets aside; a volume with more is repaired several times.
const ROWS_MAX: usize = 100_000;

impl Repair<'_, '_> {
    /// Sets aside what does not decode: the rest of the repair rebuilds what others tell of it.
    pub(super) fn rows(&mut self) -> Result<(), StoreError> {
        for row in self.tables.damaged_rows(ROWS_MAX)? {
            self.tables.quarantine(row.table, &row.key)?;
            let ino =
                if matches!(row.table, TableId::Inodes | TableId::Extents) { number(&row.key) } else { 0 };
            if row.table == TableId::Inodes {
                self.lost_rows.insert(ino);
            }
            self.did(ino, format!("a row of {} that cannot be read was set aside", row.table.name()));
        }
        Ok(())
    }
}

/// The number that a key begins with.
fn number(key: &[u8]) -> u64 {
    key.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}
