//! The reply to reading a directory: entries one after another, as many as the kernel has room for.

use zerocopy::IntoBytes;

use super::abi::{Attr, Dirent};
use super::reply::entry;

/// Entries begin at multiples of this.
const ALIGN: usize = 8;

/// Entries for one reply.
#[derive(Debug)]
pub(crate) struct Listing {
    bytes: Vec<u8>,
    room: usize,
}

impl Listing {
    /// For at most `room` bytes.
    pub(crate) fn new(room: u32) -> Self {
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        Self { bytes: Vec::with_capacity(room.min(64 << 10)), room }
    }

    /// Adds a name, with all attributes if `plus` gives a generation. `false`: there is no room for it.
    pub(crate) fn add(&mut self, attr: &Attr, plus: Option<u64>, offset: u64, name: &[u8]) -> bool {
        let entry = plus.map(|generation| entry(attr, generation));
        let before = entry.as_ref().map_or(&[][..], IntoBytes::as_bytes);
        let size = (before.len() + size_of::<Dirent>() + name.len()).next_multiple_of(ALIGN);
        if size > self.room - self.bytes.len() {
            return false;
        }
        let end = self.bytes.len() + size;
        let name_len = u32::try_from(name.len()).expect("fits into the room");
        // The kernel wants the type's bits of the mode, moved down.
        let dirent = Dirent { ino: attr.ino, offset, name_len, kind: attr.mode >> 12 };
        self.bytes.extend_from_slice(before);
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
        true
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    #[test]
    fn entries_are_aligned_and_never_exceed_the_room() {
        let attr = Attr { ino: 3, mode: libc::S_IFDIR | 0o755, ..Attr::new_zeroed() };
        let mut listing = Listing::new(70);
        assert!(listing.add(&attr, None, 1, b"."));
        assert_eq!((listing.bytes().len(), listing.bytes()[20], listing.bytes()[24]), (32, 4, b'.'));
        assert!(listing.add(&attr, None, 2, b"eight888"));
        assert_eq!(listing.bytes().len(), 64);
        assert!(!listing.add(&attr, None, 3, b"x"));
        assert_eq!(listing.bytes().len(), 64);
        let mut plus = Listing::new(160);
        assert!(plus.add(&attr, Some(1), 1, b"n") && !plus.add(&attr, Some(1), 2, b"m"));
        assert_eq!(plus.bytes().len(), 160);
    }
}
