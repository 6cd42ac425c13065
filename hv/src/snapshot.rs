//! A saved VM in one file: RAM at fixed offsets, then the state.
//!
//! ```text
//!   0        header (4 KiB): magic, version, where the rest is; written last
//!   1 MiB    RAM, byte for byte, each page at its own offset: it can be written while the guest runs, and again
//!   ...      contents: SavedImage (state; a bit for each page that is in the file, and the CRC-32C of each of those)
//! ```
//! **Invariant:** a header that reads well promises that everything it points to is on stable media. Nothing in the file is
//! trusted: sizes are bounded before memory is taken, and no page is used before its checksum was compared (H7).

use std::sync::mpsc;

use blockio::{BlockDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest};
use prost::Message;

use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::state::{SavedImage, SavedMachine, StateError};

/// A page as the length of a buffer.
const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE_BYTES);

const MAGIC: &[u8; 8] = b"CSVHVSAV";
const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4096;
/// RAM starts here; a round number, so that large pages of a file fit pages of RAM.
const RAM_OFFSET: u64 = 1 << 20;
/// Longest single transfer, in pages.
const RUN_PAGES_MAX: u64 = 256;
/// State of processors and devices; most of it is the guest's console.
const STATE_BYTES_MAX: u64 = 32 << 20;
/// Largest RAM that is taken from a header.
const MEMORY_BYTES_MAX: u64 = 1 << 39;
const SUM_BYTES: usize = 4;
const WORD_BITS: u64 = 64;
/// Transfers under way at once.
const DEPTH: usize = 8;

/// Whose state it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedBy {
    /// Id of the VM.
    pub vm: Vec<u8>,
    /// Epoch in which it was saved.
    pub epoch: u64,
}

/// What a save has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SaveStats {
    /// RAM of the VM.
    pub memory_bytes_total: u64,
    /// What of it was not zero.
    pub memory_bytes_written: u64,
    /// The state and the tables of pages.
    pub contents_bytes: u64,
}

/// Why a saved VM could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file is not a saved VM, or was not written to its end.
    #[error("the file is not a completely saved VM: {0}")]
    NotSaved(&'static str),
    /// It is, but of a newer format.
    #[error("the saved VM has format {found}, this build reads {VERSION}")]
    Version {
        /// Its format.
        found: u32,
    },
    /// It is damaged.
    #[error("the saved VM is damaged: {0}")]
    Damaged(&'static str),
    /// Reading or writing failed.
    #[error("{what} of the saved VM failed")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why.
        #[source]
        source: IoError,
    },
    /// The state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// RAM could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

trait Doing<T> {
    fn doing(self, what: &'static str) -> Result<T, SnapshotError>;
}

impl<T> Doing<T> for Result<T, IoError> {
    fn doing(self, what: &'static str) -> Result<T, SnapshotError> {
        self.map_err(|source| SnapshotError::Io { what, source })
    }
}

/// RAM on its way into a file. Pages may be written again; the last time counts.
#[derive(Debug)]
pub struct RamWriter {
    ram: GuestRam,
    pages: PageSums,
    bytes_written: u64,
}

/// RAM that is in a file, for the state that follows.
#[derive(Debug)]
pub struct SavedRam {
    pages: PageSums,
    bytes_written: u64,
}

impl RamWriter {
    /// Begins. What the file held before is gone.
    ///
    /// # Errors
    /// When there is no room.
    pub fn begin(file: &dyn ImageFile, ram: GuestRam) -> Result<Self, SnapshotError> {
        // Empty first: no old header, and everything that is not written reads as zeros.
        file.set_len(0).doing("emptying the file")?;
        file.set_len(RAM_OFFSET + ram.bytes()).doing("sizing the file")?;
        let pages = PageSums::none(ram.bytes());
        Ok(Self { ram, pages, bytes_written: 0 })
    }

    /// Writes what the pages hold now: a bit each, from page `first` on. A guest that writes meanwhile makes them written
    /// again: what is in the file is what was summed, not necessarily what is in RAM.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write(&mut self, file: &dyn ImageFile, first: u64, bits: &[u64]) -> Result<(), SnapshotError> {
        let mut writes = Pipeline::new(file, "writing RAM");
        let mut whole = vec![0; run_bytes(RUN_PAGES_MAX)];
        for (page, count) in runs_of_bits(bits, RUN_PAGES_MAX) {
            let bytes = &mut whole[..run_bytes(count)];
            self.ram.read_linear((first + page) * PAGE_BYTES, bytes)?;
            let present = self.pages.note(first + page, bytes);
            for (at, count) in runs_of_bits(&present, RUN_PAGES_MAX) {
                let piece = run_bytes(at)..run_bytes(at + count);
                let buf = IoBuf::zeroed(piece.len());
                buf.copy_from(&bytes[piece]);
                self.bytes_written += count * PAGE_BYTES;
                let offset = RAM_OFFSET + (first + page + at) * PAGE_BYTES;
                writes.submit(IoOp::Write { offset, buf, fua: false })?;
            }
        }
        writes.finish()
    }

    /// Writes all pages that were ever touched.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write_touched(&mut self, file: &dyn ImageFile) -> Result<(), SnapshotError> {
        self.write(file, 0, &touched_pages(&self.ram)?)
    }

    /// Ends: nothing more is written.
    #[must_use]
    pub fn finish(self) -> SavedRam {
        SavedRam { pages: self.pages, bytes_written: self.bytes_written }
    }

    /// Bytes written so far.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }
}

/// The pages that were ever touched, a bit each: all others are zeros.
///
/// # Errors
/// When the system does not tell.
pub fn touched_pages(ram: &GuestRam) -> Result<Vec<u64>, SnapshotError> {
    let mut bits = vec![0; words(ram.bytes() / PAGE_BYTES)];
    for (start, end) in ram.touched_ranges()? {
        (start / PAGE_BYTES..end.div_ceil(PAGE_BYTES)).for_each(|page| set(&mut bits, page));
    }
    Ok(bits)
}

/// Writes RAM; the VM must be paused and drained. What the file held before is gone.
///
/// # Errors
/// When writing fails; the file then is no saved VM.
pub fn write_ram(file: &dyn ImageFile, ram: &GuestRam) -> Result<SavedRam, SnapshotError> {
    let mut writer = RamWriter::begin(file, ram.clone())?;
    writer.write_touched(file)?;
    Ok(writer.finish())
}

/// Writes the state behind the RAM, makes all of it stable, and only then the header.
///
/// # Errors
/// When writing fails; the file then is no saved VM.
pub fn write_state(
    file: &dyn ImageFile,
    ram: SavedRam,
    machine: SavedMachine,
    by: &SavedBy,
) -> Result<SaveStats, SnapshotError> {
    let memory_bytes = machine.memory_bytes;
    let (present, sums) = ram.pages.tables();
    let image = SavedImage { machine: Some(machine), vm: by.vm.clone(), vm_epoch: by.epoch, present, sums };
    let contents = image.encode_to_vec();
    let offset = RAM_OFFSET + memory_bytes;
    let padded = contents.len().next_multiple_of(HEADER_BYTES);
    let mut block = vec![0; padded];
    block[..contents.len()].copy_from_slice(&contents);
    file.set_len(offset + padded as u64).doing("sizing the file")?;
    file.write_at(offset, &block).doing("writing the state")?;
    file.flush().doing("flushing the state")?;
    file.write_at(0, &header(memory_bytes, &contents)).doing("writing the header")?;
    file.flush().doing("flushing the header")?;
    Ok(SaveStats {
        memory_bytes_total: memory_bytes,
        memory_bytes_written: ram.bytes_written,
        contents_bytes: contents.len() as u64,
    })
}

/// Reads and checks everything but RAM.
///
/// # Errors
/// When it is not a whole saved VM.
pub fn read_contents(file: &dyn BlockDevice) -> Result<SavedImage, SnapshotError> {
    let size = file.geometry().size_bytes;
    if size < RAM_OFFSET {
        return Err(SnapshotError::NotSaved("it is too short"));
    }
    let mut header = [0; HEADER_BYTES];
    file.read_at(0, &mut header).doing("reading the header")?;
    let header = Header::parse(&header)?;
    let offset =
        RAM_OFFSET.checked_add(header.memory_bytes).ok_or(SnapshotError::Damaged("its size of RAM"))?;
    // A sum of four bytes and a bit for each page.
    let most = STATE_BYTES_MAX + header.memory_bytes / PAGE_BYTES * 5;
    if header.memory_bytes > MEMORY_BYTES_MAX
        || header.contents_bytes > most
        || offset.checked_add(header.contents_bytes).is_none_or(|end| end > size)
    {
        return Err(SnapshotError::Damaged("its end is missing"));
    }
    let len = usize::try_from(header.contents_bytes).expect("not more than the file has");
    let mut contents = vec![0; len.next_multiple_of(HEADER_BYTES)];
    file.read_at(offset, &mut contents).doing("reading the state")?;
    contents.truncate(len);
    if crc32c::crc32c(&contents) != header.contents_crc {
        return Err(SnapshotError::Damaged("the checksum of its state"));
    }
    let image = SavedImage::decode(&*contents).map_err(|_| SnapshotError::Damaged("its state"))?;
    check_contents(&image, header.memory_bytes)?;
    Ok(image)
}

/// Checks that the tables fit RAM, and that the state is one this build reads.
///
/// # Errors
/// What is wrong with it.
pub fn check_contents(image: &SavedImage, memory_bytes: u64) -> Result<(), SnapshotError> {
    let machine = image.machine.as_ref().ok_or(StateError::Missing("machine"))?;
    machine.check_version()?;
    if machine.memory_bytes != memory_bytes {
        return Err(SnapshotError::Damaged("its sizes of RAM differ"));
    }
    PageSums::of_image(image, memory_bytes).map(drop)
}

/// Reads RAM into a VM that has not run, and checks what was read.
///
/// # Errors
/// When it cannot be read, or differs from what was saved.
pub fn read_ram(file: &dyn BlockDevice, image: &SavedImage, ram: &GuestRam) -> Result<(), SnapshotError> {
    let pages = PageSums::of_image(image, ram.bytes())?;
    let mut reads = Pipeline::new(file, "reading RAM");
    for (page, count) in runs_of_bits(&pages.present, RUN_PAGES_MAX) {
        let buf = ram.linear_buf(page * PAGE_BYTES, count * PAGE_BYTES)?;
        reads.submit(IoOp::Read { offset: RAM_OFFSET + page * PAGE_BYTES, buf })?;
    }
    reads.finish()?;
    let mut whole = vec![0; run_bytes(RUN_PAGES_MAX)];
    for (page, count) in runs_of_bits(&pages.present, RUN_PAGES_MAX) {
        let bytes = &mut whole[..run_bytes(count)];
        ram.read_linear(page * PAGE_BYTES, bytes)?;
        pages.check(page, bytes)?;
    }
    Ok(())
}

/// Which pages are in a file, and their sums.
#[derive(Clone, Debug)]
pub(crate) struct PageSums {
    present: Vec<u64>,
    /// One for each page of RAM; of pages that are not present it says nothing.
    sums: Vec<u32>,
}

impl PageSums {
    fn none(memory_bytes: u64) -> Self {
        let pages = memory_bytes / PAGE_BYTES;
        Self { present: vec![0; words(pages)], sums: vec![0; run_len(pages)] }
    }

    /// Takes note of pages from `first` on; gives those that are not zero, a bit each.
    fn note(&mut self, first: u64, bytes: &[u8]) -> Vec<u64> {
        let mut present = vec![0; words((bytes.len() / PAGE_LEN) as u64)];
        for (at, page) in (0..).zip(bytes.chunks_exact(PAGE_LEN)) {
            if is_zero(page) {
                clear(&mut self.present, first + at);
                continue;
            }
            set(&mut self.present, first + at);
            set(&mut present, at);
            self.sums[run_len(first + at)] = crc32c::crc32c(page);
        }
        present
    }

    fn tables(&self) -> (Vec<u8>, Vec<u8>) {
        let present = self.present.iter().flat_map(|word| word.to_le_bytes()).collect();
        let listed = (0..).zip(&self.sums).filter(|(page, _)| self.has(*page));
        (present, listed.flat_map(|(_, sum)| sum.to_le_bytes()).collect())
    }

    /// From a saved image, whose tables must be exactly as long as they have to be.
    pub(crate) fn of_image(image: &SavedImage, memory_bytes: u64) -> Result<Self, SnapshotError> {
        let damaged = SnapshotError::Damaged("the tables of its RAM");
        let pages = memory_bytes / PAGE_BYTES;
        if image.present.len() != words(pages) * 8 {
            return Err(damaged);
        }
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let mut found = Self::none(memory_bytes);
        found.present = image.present.chunks_exact(8).map(word).collect();
        let count: u64 = found.present.iter().map(|word| u64::from(word.count_ones())).sum();
        let beyond = (pages..words(pages) as u64 * WORD_BITS).any(|page| found.has(page));
        if beyond || image.sums.len() as u64 != count * SUM_BYTES as u64 {
            return Err(damaged);
        }
        let mut sums = image.sums.chunks_exact(SUM_BYTES);
        for page in 0..pages {
            if found.has(page)
                && let Some(sum) = sums.next()
            {
                found.sums[run_len(page)] = u32::from_le_bytes(sum.try_into().expect("four bytes"));
            }
        }
        Ok(found)
    }

    pub(crate) fn has(&self, page: u64) -> bool {
        let word = self.present.get(run_len(page / WORD_BITS)).copied().unwrap_or(0);
        word >> (page % WORD_BITS) & 1 == 1
    }

    /// Whether pages from `first` on are what was saved.
    pub(crate) fn check(&self, first: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut each = (first..).zip(bytes.chunks_exact(PAGE_LEN));
        let sound = each.all(|(page, bytes)| self.sums.get(run_len(page)) == Some(&crc32c::crc32c(bytes)));
        if sound { Ok(()) } else { Err(SnapshotError::Damaged("the checksum of a page of RAM")) }
    }
}

/// Where a page lies in a file.
pub(crate) fn offset_of(page: u64) -> u64 {
    RAM_OFFSET + page * PAGE_BYTES
}

fn words(pages: u64) -> usize {
    run_len(pages.div_ceil(WORD_BITS))
}

fn run_len(count: u64) -> usize {
    usize::try_from(count).expect("fewer pages than bytes of RAM")
}

fn run_bytes(pages: u64) -> usize {
    run_len(pages) * PAGE_LEN
}

fn set(bits: &mut [u64], page: u64) {
    bits[run_len(page / WORD_BITS)] |= 1 << (page % WORD_BITS);
}

fn clear(bits: &mut [u64], page: u64) {
    bits[run_len(page / WORD_BITS)] &= !(1 << (page % WORD_BITS));
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks(128).all(|part| part.iter().fold(0, |any, byte| any | byte) == 0)
}

/// Runs of set bits as (first, count), none longer than `longest`.
fn runs_of_bits(bits: &[u64], longest: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let bit = |at: u64| bits[run_len(at / WORD_BITS)] >> (at % WORD_BITS) & 1 == 1;
    let end = bits.len() as u64 * WORD_BITS;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < end && !bit(at) {
            // Whole words without a bit are the usual case.
            let empty = at.is_multiple_of(WORD_BITS) && bits[run_len(at / WORD_BITS)] == 0;
            at += if empty { WORD_BITS } else { 1 };
        }
        let first = at;
        while at < end && at - first < longest && bit(at) {
            at += 1;
        }
        (at > first).then_some((first, at - first))
    })
}

/// A bounded number of transfers under way.
struct Pipeline<'a> {
    file: &'a dyn BlockDevice,
    what: &'static str,
    tell: mpsc::Sender<Result<(), IoError>>,
    told: mpsc::Receiver<Result<(), IoError>>,
    in_flight: usize,
}

impl<'a> Pipeline<'a> {
    fn new(file: &'a dyn BlockDevice, what: &'static str) -> Self {
        let (tell, told) = mpsc::channel();
        Self { file, what, tell, told, in_flight: 0 }
    }

    fn submit(&mut self, op: IoOp) -> Result<(), SnapshotError> {
        if self.in_flight == DEPTH {
            self.wait_one()?;
        }
        let tell = self.tell.clone();
        self.in_flight += 1;
        self.file.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send(outcome))) });
        Ok(())
    }

    fn finish(mut self) -> Result<(), SnapshotError> {
        while self.in_flight > 0 {
            self.wait_one()?;
        }
        Ok(())
    }

    fn wait_one(&mut self) -> Result<(), SnapshotError> {
        self.in_flight -= 1;
        self.told.recv().expect("this end keeps a sender").doing(self.what)
    }
}

struct Header {
    memory_bytes: u64,
    contents_bytes: u64,
    contents_crc: u32,
}

/// magic 0, version 8, checksum of the rest 12, memory 16, contents 24, checksum of the contents 32; zeros.
fn header(memory_bytes: u64, contents: &[u8]) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[0..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&memory_bytes.to_le_bytes());
    bytes[24..32].copy_from_slice(&(contents.len() as u64).to_le_bytes());
    bytes[32..36].copy_from_slice(&crc32c::crc32c(contents).to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, SnapshotError> {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        if &bytes[0..8] != MAGIC {
            return Err(SnapshotError::NotSaved("it has no header"));
        }
        if u32_at(12) != crc32c::crc32c(&bytes[16..]) {
            return Err(SnapshotError::Damaged("the checksum of its header"));
        }
        if u32_at(8) != VERSION {
            return Err(SnapshotError::Version { found: u32_at(8) });
        }
        Ok(Self { memory_bytes: u64_at(16), contents_bytes: u64_at(24), contents_crc: u32_at(32) })
    }
}

#[cfg(test)]
mod tests {
    use blockio::MemoryDevice;
    use proptest::prelude::*;

    use super::*;

    const BYTES: u64 = 4 << 20;

    /// A saved VM with pages here and there.
    fn saved() -> Vec<u8> {
        let (file, ram) = (MemoryDevice::new(0), GuestRam::new(BYTES).expect("a little memory"));
        for page in [0, 1, 7, 200, 255] {
            ram.write_linear(page * PAGE_BYTES, &[9; PAGE_LEN]).expect("in RAM");
        }
        let machine = SavedMachine {
            version: crate::state::STATE_VERSION,
            memory_bytes: BYTES,
            ..SavedMachine::default()
        };
        let written = write_ram(&file, &ram).expect("memory");
        write_state(&file, written, machine, &SavedBy { vm: vec![1; 16], epoch: 3 }).expect("memory");
        let mut bytes = vec![0; usize::try_from(file.geometry().size_bytes).expect("small")];
        file.read_at(0, &mut bytes).expect("memory");
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

        // Invariant H7
        #[test]
        fn a_damaged_file_with_right_checksums_is_refused_or_holds_together(
            damages in proptest::collection::vec((any::<bool>(), 0_usize..512, any::<u64>(), 1_usize..=8), 1..5),
            cut in proptest::option::of(0_u64..(6 << 20)),
        ) {
            let mut bytes = saved();
            let contents = usize::try_from(RAM_OFFSET + BYTES).expect("small");
            for (in_header, at, value, len) in damages {
                let at = if in_header { 8 + at % 32 } else { contents + at };
                bytes[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
            }
            // Whoever makes such a file makes its checksums too.
            let said = u64::from_le_bytes(bytes[24..32].try_into().expect("eight bytes"));
            let said = usize::try_from(said).unwrap_or(usize::MAX).min(bytes.len() - contents);
            let sum = crc32c::crc32c(&bytes[contents..contents + said]);
            bytes[32..36].copy_from_slice(&sum.to_le_bytes());
            let sum = crc32c::crc32c(&bytes[16..HEADER_BYTES]);
            bytes[12..16].copy_from_slice(&sum.to_le_bytes());
            let file = MemoryDevice::new(0);
            file.set_len(bytes.len() as u64).expect("memory");
            file.write_at(0, &bytes).expect("memory");
            if let Some(cut) = cut {
                file.set_len(cut / 512 * 512).expect("memory");
            }
            let ram = GuestRam::new(BYTES).expect("a little memory");
            if let Ok(image) = read_contents(&file)
                && read_ram(&file, &image, &ram).is_ok()
            {
                // What is not listed is zero; what is, has its sum.
                let pages = PageSums::of_image(&image, BYTES).expect("it was read");
                let mut page = [0; PAGE_LEN];
                for number in 0..BYTES / PAGE_BYTES {
                    ram.read_linear(number * PAGE_BYTES, &mut page).expect("in RAM");
                    let sound =
                        if pages.has(number) { pages.check(number, &page).is_ok() } else { is_zero(&page) };
                    prop_assert!(sound, "page {}", number);
                }
            }
        }
    }

    #[test]
    fn runs_end_at_gaps_and_at_the_longest_transfer() {
        assert_eq!(runs_of_bits(&[0b0111_0000, 0, 1 << 63, 1], 256).collect::<Vec<_>>(), [(4, 3), (191, 2)]);
        assert_eq!(runs_of_bits(&[u64::MAX], 40).collect::<Vec<_>>(), [(0, 40), (40, 24)]);
    }

    #[test]
    fn a_page_that_has_become_zero_is_not_listed_any_more() {
        let mut pages = PageSums::none(3 * PAGE_BYTES);
        let mut bytes = vec![1; 3 * PAGE_LEN];
        assert_eq!(pages.note(0, &bytes), [0b111]);
        bytes[PAGE_LEN..2 * PAGE_LEN].fill(0);
        assert_eq!(pages.note(1, &bytes[PAGE_LEN..2 * PAGE_LEN]), [0]);
        let (present, sums) = pages.tables();
        assert_eq!((present[0], sums.len()), (0b101, 8));
        let image = SavedImage { present, sums, ..SavedImage::default() };
        let read = PageSums::of_image(&image, 3 * PAGE_BYTES).expect("as it was written");
        read.check(2, &bytes[2 * PAGE_LEN..]).expect("what was saved");
        assert!(read.check(0, &bytes[PAGE_LEN..2 * PAGE_LEN]).is_err());
    }
}
