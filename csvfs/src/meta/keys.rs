//! Keys of the tables: bytes whose order is the order of what they stand for.
//!
//! Numbers are big-endian, so that neighbours in a directory, or in a file, are neighbours in the tree.
//! **Invariant:** a decoder answers `None` to bytes that its encoder cannot have made.

use lockmgr::{ClientId, Epoch, NodeId};

/// One number.
pub(super) fn number(n: u64) -> [u8; 8] {
    n.to_be_bytes()
}

/// Two numbers: (inode, block) or (directory, cookie).
pub(super) fn pair(a: u64, b: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&a.to_be_bytes());
    key[8..].copy_from_slice(&b.to_be_bytes());
    key
}

/// (directory, name).
pub(super) fn name(parent: u64, name: &[u8]) -> Vec<u8> {
    let mut key = Vec::with_capacity(8 + name.len());
    key.extend_from_slice(&parent.to_be_bytes());
    key.extend_from_slice(name);
    key
}

/// A client.
pub(super) fn client(id: ClientId) -> [u8; 18] {
    let mut key = [0; 18];
    key[..2].copy_from_slice(&id.node.0.to_be_bytes());
    key[2..10].copy_from_slice(&id.epoch.0.to_be_bytes());
    key[10..].copy_from_slice(&id.serial.to_be_bytes());
    key
}

/// (client, request).
pub(super) fn request(id: ClientId, request_id: u64) -> [u8; 26] {
    let mut key = [0; 26];
    key[..18].copy_from_slice(&client(id));
    key[18..].copy_from_slice(&request_id.to_be_bytes());
    key
}

pub(super) fn read_number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*key.first_chunk()?)).filter(|_| key.len() == 8)
}

pub(super) fn read_pair(key: &[u8]) -> Option<(u64, u64)> {
    let (a, b) = key.split_at_checked(8)?;
    Some((read_number(a)?, read_number(b)?))
}

pub(super) fn read_name(key: &[u8]) -> Option<(u64, &[u8])> {
    let (parent, name) = key.split_at_checked(8)?;
    Some((read_number(parent)?, name)).filter(|_| !name.is_empty())
}

pub(super) fn read_client(key: &[u8]) -> Option<ClientId> {
    let (node, rest) = key.split_at_checked(2)?;
    let (epoch, serial) = read_pair(rest)?;
    let node = NodeId(u16::from_be_bytes(*node.first_chunk()?));
    Some(ClientId { node, epoch: Epoch(epoch), serial })
}

pub(super) fn read_request(key: &[u8]) -> Option<(ClientId, u64)> {
    let (client, request_id) = key.split_at_checked(18)?;
    Some((read_client(client)?, read_number(request_id)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_like_what_they_stand_for() {
        assert!(pair(1, u64::MAX) < pair(2, 0));
        assert!(name(1, b"zz") < name(2, b"a"));
        assert!(name(1, b"a") < name(1, b"ab"));
        assert!(number(255) < number(256));
    }

    #[test]
    fn keys_read_back_and_others_do_not() {
        let id = ClientId { node: NodeId(3), epoch: Epoch(4), serial: 5 };
        assert_eq!(read_request(&request(id, 6)), Some((id, 6)));
        assert_eq!(read_pair(&pair(1, 2)), Some((1, 2)));
        assert_eq!(read_name(&name(1, b"x")), Some((1, &b"x"[..])));
        assert_eq!(read_client(&[0; 17]), None);
        assert_eq!(read_pair(&[0; 15]), None);
        assert_eq!(read_name(&[0; 8]), None);
    }
}
