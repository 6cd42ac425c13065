//! Single images that were shaped to do harm.

use std::sync::OnceLock;

use blockio::{BlockDevice, MemoryDevice};

use super::feed::Feed;
use crate::common::{MIB, bytes_at};
use crate::damage::Base;
use crate::trial::try_image;

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
const LOG: u64 = MIB;
const RING_BYTES: u64 = MIB;
const LOG_ID: [u8; 16] = [0x5a; 16];

/// Windows of the file in which damage reaches code, as our writer lays an image out: start and length.
const WINDOWS: [(u64, u64); 8] = [
    (HEADERS[0], 80),
    (HEADERS[1], 80),
    (REGIONS[0], 16 + 4 * 32),
    (REGIONS[1], 16 + 4 * 32),
    (2 * MIB, 32 + 8 * 32),
    (2 * MIB + (64 << 10), 64),
    (3 * MIB, 64 * 8),
    (LOG, 6 * 4096),
];

fn bases() -> &'static [Base] {
    static BASES: OnceLock<Vec<Base>> = OnceLock::new();
    BASES.get_or_init(Base::all)
}

/// A good image with damages: where, how many bytes, which. Checksums are made right again, unless the input says no.
pub(crate) fn open(data: &[u8]) {
    let (mut feed, bases) = (Feed::new(data), bases());
    let base = &bases[usize::from(feed.byte()) % bases.len()];
    let image = base.copy();
    let sealed = feed.byte();
    for _ in 0..16 {
        if feed.is_empty() {
            break;
        }
        let (start, len) = WINDOWS[usize::from(feed.byte()) % WINDOWS.len()];
        let at = start + feed.below(len);
        let bytes = usize::from(feed.byte() % 9);
        put(&image, at, feed.bytes(bytes));
    }
    // A bit that is set leaves the checksum of one structure wrong.
    let structures = HEADERS.map(|at| (at, 4096)).into_iter().chain(REGIONS.map(|at| (at, 64 << 10)));
    for (bit, (at, len)) in (0..).zip(structures) {
        if sealed >> bit & 1 == 0 {
            seal(&image, at, len);
        }
    }
    if sealed >> 4 & 1 == 0 {
        seal_entries(&image);
    }
    try_image(&image, &format!("open {data:02x?}"));
}

/// A ring made of pieces: sectors of entries whose fields the input changes, in places that it chooses.
pub(crate) fn replay(data: &[u8]) {
    let mut feed = Feed::new(data);
    let image = bases()[0].copy();
    for header in HEADERS {
        put(&image, header + 48, &LOG_ID);
        seal(&image, header, 4096);
    }
    let mut sequence = 1;
    for _ in 0..12 {
        if feed.is_empty() {
            break;
        }
        let place = LOG + feed.below(RING_BYTES / 4096) * 4096;
        sequence += u64::from(feed.byte() % 3);
        let count = u32::from(feed.byte() % 4);
        let mut entry = vec![0; 4096 * (1 + count as usize)];
        entry[..4].copy_from_slice(b"loge");
        entry[8..12].copy_from_slice(&(4096 * (1 + count)).to_le_bytes());
        entry[12..16].copy_from_slice(&u32::try_from(place - LOG).expect("in the ring").to_le_bytes());
        entry[16..24].copy_from_slice(&sequence.to_le_bytes());
        entry[24..28].copy_from_slice(&count.to_le_bytes());
        entry[32..48].copy_from_slice(&LOG_ID);
        for field in [48, 56] {
            entry[field..field + 8].copy_from_slice(&image.geometry().size_bytes.to_le_bytes());
        }
        for number in 0..count as usize {
            descriptor(&mut entry, number, sequence, &mut feed);
        }
        // And now the damage.
        for _ in 0..feed.byte() % 3 {
            let at = usize::try_from(feed.below(256)).expect("small");
            let len = usize::from(feed.byte() % 9);
            let bytes = feed.bytes(len);
            entry[at..at + bytes.len()].copy_from_slice(bytes);
        }
        put_wrapping(&image, place, &entry);
    }
    seal_entries(&image);
    try_image(&image, &format!("replay {data:02x?}"));
}

/// Zeroes or rewrites a page of the table, the metadata, or wherever the input says.
fn descriptor(entry: &mut [u8], number: usize, sequence: u64, feed: &mut Feed<'_>) {
    let at = 64 + number * 32;
    let target = match feed.byte() % 4 {
        0 => 3 * MIB,
        1 => 2 * MIB + (64 << 10),
        2 => feed.below(10 * 256) * 4096,
        _ => feed.number() << 40,
    };
    let zero = feed.byte().is_multiple_of(2);
    entry[at..at + 4].copy_from_slice(if zero { b"zero" } else { b"desc" });
    if zero {
        entry[at + 8..at + 16].copy_from_slice(&(feed.below(4) * 4096).to_le_bytes());
    }
    entry[at + 16..at + 24].copy_from_slice(&target.to_le_bytes());
    entry[at + 24..at + 32].copy_from_slice(&sequence.to_le_bytes());
    let sector = 4096 * (1 + number);
    entry[sector..sector + 4].copy_from_slice(b"data");
    entry[sector + 4..sector + 8].copy_from_slice(&sequence.to_le_bytes()[4..]);
    entry[sector + 4092..sector + 4096].copy_from_slice(&sequence.to_le_bytes()[..4]);
}

/// Bytes inside the file; what would lie outside stays undone.
pub(super) fn put(image: &MemoryDevice, offset: u64, bytes: &[u8]) {
    let inside = offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= image.geometry().size_bytes);
    if inside {
        image.write_at(offset, bytes).expect("it lies in the file");
    }
}

fn put_wrapping(image: &MemoryDevice, place: u64, entry: &[u8]) {
    for (at, sector) in (place..).step_by(4096).zip(entry.chunks(4096)) {
        put(image, LOG + (at - LOG) % RING_BYTES, sector);
    }
}

/// Makes the checksum of a structure right.
pub(super) fn seal(image: &MemoryDevice, offset: u64, len: usize) {
    put(image, offset + 4, &[0; 4]);
    if offset + len as u64 <= image.geometry().size_bytes {
        let sum = crc32c::crc32c(&bytes_at(image, offset, len));
        put(image, offset + 4, &sum.to_le_bytes());
    }
}

/// Makes the checksums of all entries of the ring right whose length makes sense, wrapped ones included.
fn seal_entries(image: &MemoryDevice) {
    if image.geometry().size_bytes < LOG + RING_BYTES {
        return;
    }
    let ring = bytes_at(image, LOG, usize::try_from(RING_BYTES).expect("small"));
    for (number, sector) in ring.chunks(4096).enumerate() {
        let len = u32::from_le_bytes(sector[8..12].try_into().expect("4 bytes")) as usize;
        if !sector.starts_with(b"loge") || !(64..=64 << 10).contains(&len) {
            continue;
        }
        let start = number * 4096;
        let mut entry: Vec<u8> = ring[start..].iter().chain(&ring[..start]).take(len).copied().collect();
        entry[4..8].fill(0);
        let sum = crc32c::crc32c(&entry);
        put(image, LOG + start as u64 + 4, &sum.to_le_bytes());
    }
}
