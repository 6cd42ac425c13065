//! What one batch writes into the tables, as bytes that do the same again.
//!
//! ```text
//!   table 1 | 0 removed, 1 put 1 | length of the key 2 | length of the value 4 | key | value
//! ```
//! **Invariant:** done in order, over what was there or over itself, they give the same rows.

use super::StoreError;
use super::tables::TableId;

const HEAD_BYTES: usize = 8;
const REMOVED: u8 = 0;
const PUT: u8 = 1;
/// More are not kept: such a batch is too large for the journal.
pub(super) const BYTES_MAX: usize = 512 * 1024;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    bytes: Vec<u8>,
    any: bool,
    too_many: bool,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change<'b> {
    pub(super) table: TableId,
    pub(super) key: &'b [u8],
    /// None: the row was removed.
    pub(super) value: Option<&'b [u8]>,
}

impl Changes {
    pub(super) fn put(&mut self, table: TableId, key: &[u8], value: &[u8]) {
        self.add(table, PUT, key, value);
    }

    pub(super) fn remove(&mut self, table: TableId, key: &[u8]) {
        self.add(table, REMOVED, key, &[]);
    }

    fn add(&mut self, table: TableId, kind: u8, key: &[u8], value: &[u8]) {
        self.any = true;
        let lengths = u16::try_from(key.len()).ok().zip(u32::try_from(value.len()).ok());
        let grown = self.bytes.len() + HEAD_BYTES + key.len() + value.len();
        let (false, Some((key_len, value_len)), true) = (self.too_many, lengths, grown <= BYTES_MAX) else {
            self.too_many = true;
            self.bytes = Vec::new();
            return;
        };
        self.bytes.extend_from_slice(&[table as u8, kind]);
        self.bytes.extend_from_slice(&key_len.to_le_bytes());
        self.bytes.extend_from_slice(&value_len.to_le_bytes());
        self.bytes.extend_from_slice(key);
        self.bytes.extend_from_slice(value);
    }

    /// Whether anything was written.
    pub(crate) fn any(&self) -> bool {
        self.any
    }

    /// All of them; none if they are too many.
    pub(super) fn bytes(&self) -> Option<&[u8]> {
        (!self.too_many).then_some(&self.bytes)
    }
}

/// Calls `visit` with each change that `bytes` tell of, in order.
pub(super) fn each(
    mut bytes: &[u8],
    mut visit: impl FnMut(Change<'_>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    while !bytes.is_empty() {
        let (change, rest) = first(bytes)
            .ok_or_else(|| StoreError::Damaged { what: "a change in the journal that cannot be".into() })?;
        visit(change)?;
        bytes = rest;
    }
    Ok(())
}

fn first(bytes: &[u8]) -> Option<(Change<'_>, &[u8])> {
    let (&[table, kind, k0, k1, v0, v1, v2, v3], rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
    let key_len = usize::from(u16::from_le_bytes([k0, k1]));
    let value_len = usize::try_from(u32::from_le_bytes([v0, v1, v2, v3])).ok()?;
    let (key, rest) = rest.split_at_checked(key_len)?;
    let (value, rest) = rest.split_at_checked(value_len)?;
    let value = match kind {
        PUT => Some(value),
        REMOVED if value.is_empty() => None,
        _ => return None,
    };
    Some((Change { table: TableId::from_number(table)?, key, value }, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Row = (TableId, Vec<u8>, Option<Vec<u8>>);

    fn all(bytes: &[u8]) -> Result<Vec<Row>, StoreError> {
        let mut found = Vec::new();
        each(bytes, |c| {
            found.push((c.table, c.key.to_vec(), c.value.map(<[u8]>::to_vec)));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn changes_read_back_in_order() {
        let mut changes = Changes::default();
        assert!(!changes.any());
        changes.put(TableId::Inodes, b"1", b"one");
        changes.remove(TableId::Refcounts, b"22");
        changes.put(TableId::Xattrs, b"", b"");
        assert!(changes.any());
        let wanted = vec![
            (TableId::Inodes, b"1".to_vec(), Some(b"one".to_vec())),
            (TableId::Refcounts, b"22".to_vec(), None),
            (TableId::Xattrs, Vec::new(), Some(Vec::new())),
        ];
        assert_eq!(all(changes.bytes().expect("few")).expect("whole"), wanted);
    }

    #[test]
    fn what_is_too_much_is_not_kept_in_part() {
        let mut changes = Changes::default();
        changes.put(TableId::Inodes, b"1", &vec![0; BYTES_MAX]);
        changes.put(TableId::Inodes, b"2", b"two");
        assert!(changes.any() && changes.bytes().is_none());
    }

    proptest! {
        // Invariant E: what is on the LUN may be anything.
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = all(&bytes);
        }

        #[test]
        fn a_part_is_never_taken_for_the_whole(cut in 1_usize..40) {
            let mut changes = Changes::default();
            changes.put(TableId::Dirents, &[1; 20], &[2; 40]);
            let bytes = changes.bytes().expect("few");
            prop_assert!(all(&bytes[..bytes.len() - cut]).is_err());
        }
    }
}
