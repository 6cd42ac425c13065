//! A saved VM in one file: RAM at fixed offsets, then the state.
//!
//! ```text
//!   0        header (4 KiB): magic, version, where the rest is; written last
//!   1 MiB    RAM, byte for byte; zero pages are holes
//!   ...      contents: SavedImage (state, and the runs of RAM that are not zero, each with a CRC-32C)
//! ```
//! **Invariant:** a header that reads well promises that everything it points to is on stable media. Nothing in the file is
//! trusted: sizes are bounded before memory is taken, each run is checked against the size of RAM (H7).

use std::sync::mpsc;

use blockio::{BlockDevice, ImageFile, IoError, IoOp, IoRequest};
use prost::Message;

use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::state::{Run, SavedImage, SavedMachine, StateError};

/// A page as the length of a buffer.
const PAGE_LEN: usize = 4096;
const _: () = assert!(PAGE_LEN as u64 == PAGE_BYTES);

const MAGIC: &[u8; 8] = b"CSVHVSAV";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 4096;
/// RAM starts here; a round number, so that large pages of a file fit pages of RAM.
const RAM_OFFSET: u64 = 1 << 20;
/// Longest run, and so the longest single transfer.
const RUN_BYTES_MAX: u64 = 1 << 20;
/// Zero pages between two runs that are not worth a run of their own.
const GAP_BYTES_MAX: u64 = 64 << 10;
/// A state of a few hundred KiB, and a run of 12 bytes for each MiB of RAM.
const CONTENTS_BYTES_MAX: u64 = 64 << 20;
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
    /// The state and the table of runs.
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

/// RAM that is already in a file, for the state that follows.
#[derive(Debug)]
pub struct SavedRam {
    runs: Vec<Run>,
    bytes_written: u64,
}

/// Writes RAM; the VM must be paused and drained. What the file held before is gone.
///
/// # Errors
/// When writing fails; the file then is no saved VM.
pub fn write_ram(file: &dyn ImageFile, ram: &GuestRam) -> Result<SavedRam, SnapshotError> {
    // Empty first: no old header, and everything that is not written reads as zeros.
    file.set_len(0).doing("emptying the file")?;
    file.set_len(RAM_OFFSET + ram.bytes()).doing("sizing the file")?;
    let mut writes = Pipeline::new(file, "writing RAM");
    let mut saved = SavedRam { runs: Vec::new(), bytes_written: 0 };
    for (offset, bytes) in runs_of(ram)? {
        let buf = ram.linear_buf(offset, bytes)?;
        let crc32c = crc32c::crc32c(&buf.to_vec());
        writes.submit(IoOp::Write { offset: RAM_OFFSET + offset, buf, fua: false })?;
        saved.runs.push(Run { offset, bytes, crc32c });
        saved.bytes_written += bytes;
    }
    writes.finish()?;
    Ok(saved)
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
    let image = SavedImage { machine: Some(machine), runs: ram.runs, vm: by.vm.clone(), vm_epoch: by.epoch };
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
    if header.contents_bytes > CONTENTS_BYTES_MAX
        || offset.checked_add(header.contents_bytes).is_none_or(|end| end > size)
    {
        return Err(SnapshotError::Damaged("its end is missing"));
    }
    let len = usize::try_from(header.contents_bytes).expect("at most 64 MiB");
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

/// Checks that every run is inside of RAM, in order and bounded, and that the state is one this build reads.
///
/// # Errors
/// What is wrong with it.
pub fn check_contents(image: &SavedImage, memory_bytes: u64) -> Result<(), SnapshotError> {
    let machine = image.machine.as_ref().ok_or(StateError::Missing("machine"))?;
    machine.check_version()?;
    if machine.memory_bytes != memory_bytes {
        return Err(SnapshotError::Damaged("its sizes of RAM differ"));
    }
    let mut end = 0;
    for run in &image.runs {
        let whole = run.offset.is_multiple_of(PAGE_BYTES) && run.bytes.is_multiple_of(PAGE_BYTES);
        let bounded = (1..=RUN_BYTES_MAX).contains(&run.bytes) && run.offset >= end;
        end = run.offset.checked_add(run.bytes).ok_or(SnapshotError::Damaged("a run of RAM"))?;
        if !whole || !bounded || end > memory_bytes {
            return Err(SnapshotError::Damaged("a run of RAM"));
        }
    }
    Ok(())
}

/// Reads RAM into a VM that has not run, and checks what was read.
///
/// # Errors
/// When it cannot be read, or differs from what was saved.
pub fn read_ram(file: &dyn BlockDevice, image: &SavedImage, ram: &GuestRam) -> Result<(), SnapshotError> {
    let mut reads = Pipeline::new(file, "reading RAM");
    for run in &image.runs {
        let buf = ram.linear_buf(run.offset, run.bytes)?;
        reads.submit(IoOp::Read { offset: RAM_OFFSET + run.offset, buf })?;
    }
    reads.finish()?;
    for run in &image.runs {
        let found = crc32c::crc32c(&ram.linear_buf(run.offset, run.bytes)?.to_vec());
        if found != run.crc32c {
            return Err(SnapshotError::Damaged("the checksum of a run of RAM"));
        }
    }
    Ok(())
}

/// Offset and length of the runs of RAM that are not zero.
fn runs_of(ram: &GuestRam) -> Result<Vec<(u64, u64)>, SnapshotError> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut page = [0; PAGE_LEN];
    for (start, end) in ram.touched_ranges()? {
        for offset in (start..end).step_by(PAGE_LEN) {
            ram.linear_buf(offset, PAGE_BYTES)?.copy_to(&mut page);
            if page.iter().all(|byte| *byte == 0) {
                continue;
            }
            match runs.last_mut() {
                Some((from, len))
                    if offset - (*from + *len) <= GAP_BYTES_MAX
                        && offset + PAGE_BYTES - *from <= RUN_BYTES_MAX =>
                {
                    *len = offset + PAGE_BYTES - *from;
                }
                _ => runs.push((offset, PAGE_BYTES)),
            }
        }
    }
    Ok(runs)
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
