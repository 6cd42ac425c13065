//! Images made by hand from the format reference, byte by byte, in layouts that no writer of ours would choose.
//!
//! **Invariant:** nothing here comes from the crate under test.

use std::collections::BTreeMap;

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use uuid::{Uuid, uuid};

use crate::common::MIB;

const BAT: Uuid = uuid!("2DC27766-F623-4200-9D64-115E9BFD4A08");
const METADATA: Uuid = uuid!("8B7CA206-4790-4B9A-B8FE-575F050F886E");
const PARAMETERS: Uuid = uuid!("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
const DISK_SIZE: Uuid = uuid!("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
const DISK_ID: Uuid = uuid!("BECA12AB-B2E6-4523-93EF-C309E000C746");
const LOGICAL: Uuid = uuid!("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
const PHYSICAL: Uuid = uuid!("CDA348C7-445D-4471-9CC9-E9885251C556");

/// A metadata item: id, flags, content.
#[derive(Clone)]
pub(crate) struct Item(pub(crate) Uuid, pub(crate) u32, pub(crate) Vec<u8>);

/// A region beside the two known ones: id, place, length, required.
#[derive(Clone, Copy)]
pub(crate) struct Region(pub(crate) Uuid, pub(crate) u64, pub(crate) u32, pub(crate) u32);

/// An image to be.
#[derive(Clone)]
pub(crate) struct Forge {
    pub(crate) block_bytes: u64,
    pub(crate) logical: u32,
    pub(crate) log: (u64, u32),
    pub(crate) log_id: [u8; 16],
    pub(crate) log_version: u16,
    pub(crate) bat: (u64, u32),
    pub(crate) metadata: (u64, u32),
    /// Bit 0 of the known regions in the tables; qemu leaves it clear.
    pub(crate) required: u32,
    pub(crate) sequences: [u64; 2],
    /// Which copies of the region table are whole.
    pub(crate) tables: [bool; 2],
    pub(crate) regions: Vec<Region>,
    pub(crate) items: Vec<Item>,
    /// Bytes left free before each item.
    pub(crate) gap: usize,
    pub(crate) entries: BTreeMap<u64, u64>,
    pub(crate) file_bytes: u64,
    pub(crate) fills: Vec<(u64, Vec<u8>)>,
}

impl Forge {
    /// A disk of 8 blocks of 1 MiB, none of them there, laid out as Windows does.
    pub(crate) fn new() -> Self {
        Self::of(8 * MIB, MIB, 512, 512)
    }

    pub(crate) fn of(disk_bytes: u64, block_bytes: u64, logical: u32, physical: u32) -> Self {
        let number = |value: u32| value.to_le_bytes().to_vec();
        let block = u32::try_from(block_bytes).expect("at most 256 MiB");
        let items = vec![
            Item(PARAMETERS, 4, [block.to_le_bytes(), [0; 4]].concat()),
            Item(DISK_SIZE, 6, disk_bytes.to_le_bytes().to_vec()),
            Item(DISK_ID, 6, vec![3; 16]),
            Item(LOGICAL, 6, number(logical)),
            Item(PHYSICAL, 6, number(physical)),
        ];
        Self {
            block_bytes,
            logical,
            log: (MIB, 1 << 20),
            log_id: [0; 16],
            log_version: 0,
            bat: (3 * MIB, 1 << 20),
            metadata: (2 * MIB, 1 << 20),
            required: 1,
            sequences: [4, 5],
            tables: [true, true],
            regions: Vec::new(),
            items,
            gap: 0,
            entries: BTreeMap::new(),
            file_bytes: 4 * MIB,
            fills: Vec::new(),
        }
    }

    fn slot_of(&self, block: u64) -> u64 {
        let ratio = (1 << 23) * u64::from(self.logical) / self.block_bytes;
        block + block / ratio
    }

    /// What the table says of a block.
    pub(crate) fn says(&mut self, block: u64, entry: u64) -> &mut Self {
        self.entries.insert(self.slot_of(block), entry);
        self
    }

    /// A block full of `byte` at `place`.
    pub(crate) fn holds(&mut self, block: u64, place: u64, byte: u8) -> &mut Self {
        self.fills.push((place, vec![byte; usize::try_from(self.block_bytes.min(2 * MIB)).expect("small")]));
        self.file_bytes = self.file_bytes.max(place + self.block_bytes);
        self.says(block, place | 6)
    }

    /// Bytes anywhere in the file.
    pub(crate) fn puts(&mut self, place: u64, bytes: &[u8]) -> &mut Self {
        self.fills.push((place, bytes.to_vec()));
        self
    }

    /// Bytes in the ring, from `at` on, around its end.
    pub(crate) fn logs(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        let (offset, length) = (self.log.0, u64::from(self.log.1));
        for (at, sector) in (at..).step_by(4096).zip(bytes.chunks(4096)) {
            self.fills.push((offset + at % length, sector.to_vec()));
        }
        self
    }

    /// The word of the table that says that a block lies at `place`, as a page of the table with nothing else in it would.
    pub(crate) fn page_with(&self, words: &[(u64, u64)]) -> Vec<u8> {
        let mut page = vec![0; 4096];
        for (block, word) in words {
            let at = usize::try_from(self.slot_of(*block)).expect("in the first page") * 8;
            page[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        page
    }

    pub(crate) fn made(&self) -> MemoryDevice {
        let file = MemoryDevice::with_block_bytes(0, 1);
        file.set_len(self.file_bytes).expect("memory grows");
        let put = |at: u64, bytes: &[u8]| file.write_at(at, bytes).expect("it lies in the file");
        put(0, b"vhdxfile");
        for (sequence, at) in self.sequences.into_iter().zip([64 << 10, 128 << 10]) {
            put(at, &self.header(sequence));
        }
        let table = self.region_table();
        for (whole, at) in self.tables.into_iter().zip([192 << 10, 256 << 10]) {
            put(at, &table);
            if !whole {
                put(at + 4, &[1; 4]);
            }
        }
        put(self.metadata.0, &self.metadata_region());
        for (slot, entry) in &self.entries {
            put(self.bat.0 + slot * 8, &entry.to_le_bytes());
        }
        for (place, bytes) in &self.fills {
            let room = self.file_bytes.saturating_sub(*place).min(bytes.len() as u64);
            put(*place, &bytes[..usize::try_from(room).expect("small")]);
        }
        file
    }

    fn header(&self, sequence: u64) -> Vec<u8> {
        let mut header = vec![0; 4096];
        header[..4].copy_from_slice(b"head");
        header[8..16].copy_from_slice(&sequence.to_le_bytes());
        header[16..32].fill(7);
        header[32..48].fill(8);
        header[48..64].copy_from_slice(&self.log_id);
        header[64..66].copy_from_slice(&self.log_version.to_le_bytes());
        header[66] = 1;
        header[68..72].copy_from_slice(&self.log.1.to_le_bytes());
        header[72..80].copy_from_slice(&self.log.0.to_le_bytes());
        sealed(header)
    }

    /// The table of regions with the BAT where it is said to be.
    pub(crate) fn region_table(&self) -> Vec<u8> {
        let known = [
            Region(METADATA, self.metadata.0, self.metadata.1, self.required),
            Region(BAT, self.bat.0, self.bat.1, self.required),
        ];
        // Unknown ones first: order means nothing.
        let all: Vec<Region> = self.regions.iter().copied().chain(known).collect();
        let mut table = vec![0; 64 << 10];
        table[..4].copy_from_slice(b"regi");
        table[8..12].copy_from_slice(&u32::try_from(all.len()).expect("few").to_le_bytes());
        for (Region(id, offset, length, required), slot) in all.iter().zip(table[16..].chunks_exact_mut(32)) {
            slot[..16].copy_from_slice(&id.to_bytes_le());
            slot[16..24].copy_from_slice(&offset.to_le_bytes());
            slot[24..28].copy_from_slice(&length.to_le_bytes());
            slot[28..].copy_from_slice(&required.to_le_bytes());
        }
        sealed(table)
    }

    fn metadata_region(&self) -> Vec<u8> {
        let mut region = vec![0; 64 << 10];
        region[..8].copy_from_slice(b"metadata");
        region[10..12].copy_from_slice(&u16::try_from(self.items.len()).expect("few").to_le_bytes());
        for (number, Item(id, flags, content)) in self.items.iter().enumerate() {
            region.resize(region.len() + self.gap, 0xEE);
            let offset = if content.is_empty() { 0 } else { region.len() };
            let at = 32 + number * 32;
            region[at..at + 16].copy_from_slice(&id.to_bytes_le());
            region[at + 16..at + 20].copy_from_slice(&u32::try_from(offset).expect("small").to_le_bytes());
            let length = u32::try_from(content.len()).expect("small");
            region[at + 20..at + 24].copy_from_slice(&length.to_le_bytes());
            region[at + 24..at + 28].copy_from_slice(&flags.to_le_bytes());
            region.extend_from_slice(content);
        }
        region
    }
}

/// What a descriptor of a log entry does.
pub(crate) enum Change {
    Page(u64, Vec<u8>),
    Zero(u64, u64),
}

/// A log entry.
pub(crate) fn entry(
    id: [u8; 16],
    sequence: u64,
    tail: u64,
    file_bytes: (u64, u64),
    changes: &[Change],
) -> Vec<u8> {
    let first = (changes.len() + 2).div_ceil(128) * 4096;
    let mut entry = vec![0; first];
    entry[..4].copy_from_slice(b"loge");
    entry[12..16].copy_from_slice(&u32::try_from(tail).expect("in the ring").to_le_bytes());
    entry[16..24].copy_from_slice(&sequence.to_le_bytes());
    entry[24..28].copy_from_slice(&u32::try_from(changes.len()).expect("few").to_le_bytes());
    entry[32..48].copy_from_slice(&id);
    entry[48..56].copy_from_slice(&file_bytes.0.to_le_bytes());
    entry[56..64].copy_from_slice(&file_bytes.1.to_le_bytes());
    for (number, change) in changes.iter().enumerate() {
        let at = 64 + number * 32;
        let (signature, offset): (&[u8; 4], u64) = match change {
            Change::Page(offset, page) => {
                entry[at + 4..at + 8].copy_from_slice(&page[4092..]);
                entry[at + 8..at + 16].copy_from_slice(&page[..8]);
                let [low, high] = [&sequence.to_le_bytes()[..4], &sequence.to_le_bytes()[4..]];
                entry.extend([b"data", high, &page[8..4092], low].concat());
                (b"desc", *offset)
            }
            Change::Zero(offset, len) => {
                entry[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
                (b"zero", *offset)
            }
        };
        entry[at..at + 4].copy_from_slice(signature);
        entry[at + 16..at + 24].copy_from_slice(&offset.to_le_bytes());
        entry[at + 24..at + 32].copy_from_slice(&sequence.to_le_bytes());
    }
    let len = u32::try_from(entry.len()).expect("small");
    entry[8..12].copy_from_slice(&len.to_le_bytes());
    sealed(entry)
}

/// The same with a checksum that fits.
fn sealed(mut structure: Vec<u8>) -> Vec<u8> {
    structure[4..8].fill(0);
    let sum = crc32c::crc32c(&structure);
    structure[4..8].copy_from_slice(&sum.to_le_bytes());
    structure
}
