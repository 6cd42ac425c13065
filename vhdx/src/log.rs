//! Writing the log: half a ring per generation, each under its own id.
//!
//! ```text
//! ring:  | empty | entry | entry | ...  free  | empty | entry | ...          |
//!        ^ first half: generation A            ^ second half: generation B
//!          id A, tail at its empty entry         id B, taken up when A is full and in place
//! ```
//! Nothing ever wraps, and stale entries never bear the live id; every reader finds the run, the weak ones included.
//!
//! **Invariant:** a generation's id is put into the header only after its empty first entry is durable.

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::format::{LogDataSector, LogDescriptor, LogEntryHeader, PAGE, bytes, checksum_without, index};
use crate::replay::{descriptor_sectors, halves};

/// Pages in one entry: as many descriptors as fit beside the entry header in its first sector.
pub(crate) const PAGES_PER_ENTRY: usize = 126;

/// A page of metadata and where it belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    /// Its place in the file.
    pub(crate) file_offset: u64,
    /// 4 KiB.
    pub(crate) content: Vec<u8>,
}

/// Where the next entry goes.
#[derive(Clone, Debug)]
pub(crate) struct LogWriter {
    ring_offset: u64,
    half_bytes: u64,
    /// Ring offset of the generation's first entry.
    start: u64,
    /// Ring offset of the next entry.
    head: u64,
    sequence: u64,
    /// The generation's id.
    pub(crate) id: Uuid,
}

/// The bytes of an entry and where they go in the file.
pub(crate) struct Encoded {
    pub(crate) file_offset: u64,
    pub(crate) content: Vec<u8>,
}

impl LogWriter {
    /// The first generation of a session, in the first half.
    pub(crate) fn new(ring_offset: u64, ring_bytes: u64) -> Self {
        let half_bytes = ring_bytes / 2 / PAGE * PAGE;
        Self { ring_offset, half_bytes, start: 0, head: 0, sequence: 1, id: Uuid::new_v4() }
    }

    /// The generation after this one, in the other half.
    pub(crate) fn successor(&self) -> Self {
        let start = if self.start == 0 { self.half_bytes } else { 0 };
        Self { start, head: start, id: Uuid::new_v4(), ..*self }
    }

    /// What would be the generation after this one if it took the same half.
    pub(crate) fn restarted(&self) -> Self {
        Self { head: self.start, id: Uuid::new_v4(), ..*self }
    }

    /// Whether an entry with `pages` pages fits into what is left of the half.
    pub(crate) fn fits(&self, pages: usize) -> bool {
        self.head + entry_bytes(pages) <= self.start + self.half_bytes
    }

    /// Encodes the next entry. `file_bytes` is a durable size of the file that everything allocated fits in.
    pub(crate) fn append(&mut self, pages: &[Page], file_bytes: u64) -> Encoded {
        debug_assert!(
            pages.len() <= PAGES_PER_ENTRY && self.fits(pages.len()),
            "the caller ends the generation first"
        );
        let content = self.encode(pages, file_bytes);
        let file_offset = self.ring_offset + self.head;
        self.head += bytes(content.len());
        self.sequence += 1;
        Encoded { file_offset, content }
    }

    fn encode(&self, pages: &[Page], file_bytes: u64) -> Vec<u8> {
        let len = entry_bytes(pages.len());
        let mut header = LogEntryHeader {
            signature: *b"loge",
            checksum: 0.into(),
            entry_length: u32::try_from(len).expect("an entry is shorter than its half-ring").into(),
            tail: u32::try_from(self.start).expect("the ring is shorter than 4 GiB").into(),
            sequence: self.sequence.into(),
            descriptor_count: u32::try_from(pages.len()).expect("at most 126").into(),
            reserved: 0.into(),
            log_id: self.id.to_bytes_le(),
            flushed_file_bytes: file_bytes.into(),
            last_file_bytes: file_bytes.into(),
        };
        let mut entry = vec![0; index(len)];
        entry[..64].copy_from_slice(header.as_bytes());
        let data_start = descriptor_sectors(pages.len()) * index(PAGE);
        for (number, page) in pages.iter().enumerate() {
            let at = 64 + number * 32;
            entry[at..at + 32].copy_from_slice(self.descriptor(page).as_bytes());
            let at = data_start + number * index(PAGE);
            entry[at..at + index(PAGE)].copy_from_slice(self.data_sector(page).as_bytes());
        }
        header.checksum = checksum_without(&entry, 4).into();
        entry[..64].copy_from_slice(header.as_bytes());
        entry
    }

    fn descriptor(&self, page: &Page) -> LogDescriptor {
        LogDescriptor {
            signature: *b"desc",
            trailing: page.content[4092..].try_into().expect("a page has 4096 bytes"),
            leading: page.content[..8].try_into().expect("a page has 4096 bytes"),
            file_offset: page.file_offset.into(),
            sequence: self.sequence.into(),
        }
    }

    fn data_sector(&self, page: &Page) -> LogDataSector {
        let (high, low) = halves(self.sequence);
        LogDataSector {
            signature: *b"data",
            sequence_high: high.into(),
            middle: page.content[8..4092].try_into().expect("a page has 4096 bytes"),
            sequence_low: low.into(),
        }
    }
}

fn entry_bytes(pages: usize) -> u64 {
    bytes(descriptor_sectors(pages) + pages) * PAGE
}
