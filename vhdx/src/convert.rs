//! Converting to and from raw bytes.
//!
//! ```text
//!   source --1 MiB reads--> [ zero? skip ] --runs of data--> target          several chunks in flight, no copy between
//! ```
//! A new image is written as a draft: payload first, structures last, so the log is not needed and a crash leaves no half
//! image.
//!
//! **Invariant:** what is skipped reads as zeros in the target, because the target was emptied first.

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};

use blockio::{BlockDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest};

use crate::create::{Draft, Spec};
use crate::error::{VhdxError, doing};
use crate::format::{MIB, bytes, index};
use crate::image::Image;
use crate::resolve::Said;

/// Bytes per read. No larger than the smallest block, so that a chunk lies in one block.
const CHUNK: u64 = MIB;
/// Chunks in flight.
const IN_FLIGHT_MAX: usize = 8;
/// Zeros are looked for in pieces of this size.
const PIECE: usize = 64 * 1024;

/// How far a conversion has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the disk that are done.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
    /// Bytes that were written; the others are zeros.
    pub data_bytes: u64,
}

/// The next range at or after an offset that may hold other bytes than zeros; none if only zeros follow.
pub type DataMap<'a> = &'a dyn Fn(u64) -> Option<Range<u64>>;

/// Makes an image in `target` with the bytes of `source`, zeros left out. `spec.size_bytes` is the size of the disk; what
/// the source lacks to it is zero. `data` tells where the source has holes, if that is known.
///
/// # Errors
/// [`crate::ErrorKind::InvalidInput`] before anything changes, [`crate::ErrorKind::Io`] later.
pub fn from_raw(
    source: &dyn BlockDevice,
    data: Option<DataMap<'_>>,
    target: &dyn ImageFile,
    spec: &Spec,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, VhdxError> {
    let source_bytes = source.geometry().size_bytes;
    if source_bytes > spec.size_bytes {
        return Err(VhdxError::InvalidInput(format!(
            "the source has {source_bytes} bytes, more than the disk of {} bytes",
            spec.size_bytes
        )));
    }
    let mut draft = Draft::begin(target, spec)?;
    let place = |offset: u64| {
        let block_bytes = draft.shape.block_bytes;
        let start = draft.place(offset / block_bytes);
        draft.grow_ahead()?;
        Ok(start + offset % block_bytes)
    };
    let copied = copy(source, source_bytes, data, target, place, progress)?;
    draft.finish()?;
    Ok(copied)
}

/// Writes the disk as raw bytes into `target`, which becomes as long as the disk. Zeros become holes.
///
/// # Errors
/// [`crate::ErrorKind::Io`] when one of the files fails.
pub fn to_raw(
    image: &Image,
    target: &dyn ImageFile,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, VhdxError> {
    let disk_bytes = image.geometry().size_bytes;
    target.set_len(0).map_err(doing("emptying the target"))?;
    target.set_len(disk_bytes).map_err(doing(format!("growing the target to {disk_bytes} bytes")))?;
    let data = |offset| image.data_from(offset);
    let copied = copy(image, disk_bytes, Some(&data), target, Ok, progress)?;
    target.flush().map_err(doing("flushing the target"))?;
    Ok(copied)
}

impl Image {
    /// The next range at or after `offset` that has its place in a file of the chain; none if only zeros follow.
    #[must_use]
    pub fn data_from(&self, offset: u64) -> Option<Range<u64>> {
        let disk_bytes = self.geometry().size_bytes;
        let block_bytes = self.loaded().params.block_bytes;
        let mut at = offset;
        while at < disk_bytes {
            let end = (at / block_bytes + 1).saturating_mul(block_bytes).min(disk_bytes);
            let mut data = false;
            let start = at / 4096 * 4096;
            self.say(start, end - start, &mut |_, said, _| data |= matches!(said, Said::Data(_)));
            if data {
                return Some(at..end);
            }
            at = end;
        }
        None
    }
}

enum Event {
    Read { slot: usize, outcome: Result<(), IoError> },
    Written { slot: usize, outcome: Result<(), IoError> },
}

/// A buffer and what is being done with it. Buffers are used again: fresh memory costs as much as the copy.
struct Slot {
    buf: IoBuf,
    chunk: Range<u64>,
    writes: usize,
}

struct Pipe<'a> {
    source: &'a dyn BlockDevice,
    target: &'a dyn ImageFile,
    tell: Sender<Event>,
    told: Receiver<Event>,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Requests in flight.
    busy: usize,
    progress: Progress,
}

fn copy(
    source: &dyn BlockDevice,
    total: u64,
    data: Option<DataMap<'_>>,
    target: &dyn ImageFile,
    mut place: impl FnMut(u64) -> Result<u64, VhdxError>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, VhdxError> {
    let mut pipe = Pipe::new(source, target, total);
    let mut chunks = Chunks::new(total, data);
    let outcome = pipe.run(&mut chunks, &mut place, progress);
    // Requests in flight end also after an error; the target must not change after this returns.
    pipe.drain();
    outcome?;
    pipe.progress.done_bytes = total;
    progress(pipe.progress);
    Ok(pipe.progress)
}

impl<'a> Pipe<'a> {
    fn new(source: &'a dyn BlockDevice, target: &'a dyn ImageFile, total_bytes: u64) -> Self {
        let (tell, told) = channel();
        let slot = |_| Slot { buf: IoBuf::zeroed(index(CHUNK)), chunk: 0..0, writes: 0 };
        Self {
            source,
            target,
            tell,
            told,
            slots: (0..IN_FLIGHT_MAX).map(slot).collect(),
            free: (0..IN_FLIGHT_MAX).collect(),
            busy: 0,
            progress: Progress { total_bytes, ..Progress::default() },
        }
    }

    fn run(
        &mut self,
        chunks: &mut Chunks<'_>,
        place: &mut impl FnMut(u64) -> Result<u64, VhdxError>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), VhdxError> {
        loop {
            while let Some(slot) = self.free.pop() {
                let Some(chunk) = chunks.next() else {
                    self.free.push(slot);
                    break;
                };
                self.read(slot, chunk);
            }
            if self.busy == 0 {
                return Ok(());
            }
            let event = self.told.recv().expect("this side holds a sender");
            self.busy -= 1;
            match event {
                Event::Written { slot, outcome } => self.written(slot, outcome)?,
                Event::Read { slot, outcome } => {
                    let offset = self.slots[slot].chunk.start;
                    outcome.map_err(doing(format!("reading the source at {offset:#x}")))?;
                    self.progress.done_bytes = offset;
                    self.write(slot, place)?;
                    progress(self.progress);
                }
            }
        }
    }

    fn read(&mut self, slot: usize, chunk: Range<u64>) {
        let (offset, tell) = (chunk.start, self.tell.clone());
        let buf = self.slots[slot].buf.slice(0..index(chunk.end - chunk.start));
        self.slots[slot].chunk = chunk;
        self.busy += 1;
        let done = Box::new(move |outcome| drop(tell.send(Event::Read { slot, outcome })));
        self.source.submit(IoRequest { op: IoOp::Read { offset, buf }, done });
    }

    fn write(
        &mut self,
        number: usize,
        place: &mut impl FnMut(u64) -> Result<u64, VhdxError>,
    ) -> Result<(), VhdxError> {
        let slot = &mut self.slots[number];
        let len = index(slot.chunk.end - slot.chunk.start);
        let runs = data_runs(&mut slot.buf, len);
        slot.writes = runs.len();
        if runs.is_empty() {
            self.free.push(number);
            return Ok(());
        }
        let target = place(slot.chunk.start)?;
        for run in runs {
            let (offset, tell) = (target + bytes(run.start), self.tell.clone());
            self.progress.data_bytes += bytes(run.len());
            self.busy += 1;
            let op = IoOp::Write { offset, buf: slot.buf.slice(run), fua: false };
            let done = Box::new(move |outcome| drop(tell.send(Event::Written { slot: number, outcome })));
            self.target.submit(IoRequest { op, done });
        }
        Ok(())
    }

    fn written(&mut self, number: usize, outcome: Result<(), IoError>) -> Result<(), VhdxError> {
        let slot = &mut self.slots[number];
        outcome.map_err(doing(format!("writing the bytes of the disk at {:#x}", slot.chunk.start)))?;
        slot.writes -= 1;
        if slot.writes == 0 {
            self.free.push(number);
        }
        Ok(())
    }

    fn drain(&mut self) {
        while self.busy > 0 {
            drop(self.told.recv());
            self.busy -= 1;
        }
    }
}

/// The chunks of the source that may hold data, ascending, aligned to [`CHUNK`].
struct Chunks<'a> {
    at: u64,
    total: u64,
    map: Option<DataMap<'a>>,
    /// The last answer of the map: asking may cost as much as reading, so it is asked once per range.
    data: Range<u64>,
}

impl<'a> Chunks<'a> {
    fn new(total: u64, map: Option<DataMap<'a>>) -> Self {
        let data = if map.is_some() { 0..0 } else { 0..total };
        Self { at: 0, total, map, data }
    }
}

impl Iterator for Chunks<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        if self.at >= self.data.end {
            self.data = self.map.and_then(|map| map(self.at))?;
        }
        let start = (self.data.start / CHUNK * CHUNK).max(self.at);
        if start >= self.total {
            return None;
        }
        let end = (start / CHUNK + 1).saturating_mul(CHUNK).min(self.total);
        self.at = end;
        Some(start..end)
    }
}

/// The parts of the first `len` bytes that are not zero, in pieces of [`PIECE`]. Copies only if a device still holds the
/// buffer.
fn data_runs(buf: &mut IoBuf, len: usize) -> Vec<Range<usize>> {
    let taken = std::mem::replace(buf, IoBuf::zeroed(0));
    match taken.try_into_aligned() {
        Ok(owned) => {
            let runs = runs_of(&owned[..len]);
            *buf = owned.into();
            runs
        }
        Err(shared) => {
            let runs = runs_of(&shared.slice(0..len).to_vec());
            *buf = shared;
            runs
        }
    }
}

fn runs_of(content: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (number, piece) in content.chunks(PIECE).enumerate() {
        if is_zero(piece) {
            continue;
        }
        let (start, end) = (number * PIECE, number * PIECE + piece.len());
        match runs.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => runs.push(start..end),
        }
    }
    runs
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(piece: &[u8]) -> bool {
    let (words, rest) = piece.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_is_not_zero() {
        let mut content = vec![0; 5 * PIECE + 10];
        content[PIECE] = 1;
        content[3 * PIECE - 1] = 1;
        content[5 * PIECE + 9] = 1;
        assert_eq!(runs_of(&content), vec![PIECE..3 * PIECE, 5 * PIECE..5 * PIECE + 10]);
        assert_eq!(runs_of(&vec![0; 3 * PIECE]), vec![]);
    }

    #[test]
    fn chunks_follow_the_map_and_never_repeat() {
        let map = |offset: u64| {
            [MIB + 5..2 * MIB + 1, 9 * MIB..10 * MIB]
                .into_iter()
                .find(|data| data.end > offset)
                .map(|data| data.start.max(offset)..data.end)
        };
        let chunks: Vec<_> = Chunks::new(9 * MIB + 7, Some(&map)).collect();
        assert_eq!(chunks, vec![MIB..2 * MIB, 2 * MIB..3 * MIB, 9 * MIB..9 * MIB + 7]);
    }
}
