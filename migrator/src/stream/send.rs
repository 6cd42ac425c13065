//! The source's end of one memory stream.

use std::fmt;
use std::io::{Read, Write};
use std::iter::Sum;
use std::time::Instant;

use hv::GuestRam;
use zstd::bulk::Compressor;

use super::choice::{Choice, Cost};
use super::differences::{Differences, Way};
use super::record::{
    self, Kind, PACKED_HEADER_BYTES, PAGE, RUN_BYTES_MAX, Record, STATE_BYTES_MAX, StreamError,
};

const WORD_BITS: u64 = 64;

/// Pages to send: a bit each, from the first page on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    /// The page of the first bit, counting RAM only.
    pub first: u64,
    /// The bits, 64 a word.
    pub bits: Vec<u64>,
    /// The target has nothing there yet: zeros need not be sent.
    pub fresh: bool,
}

/// What a stream has carried so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Bytes, before encryption.
    pub bytes: u64,
    /// Bytes of the pages whose content went, whole or as a difference.
    pub page_bytes: u64,
    /// Pages of which only the difference to what was sent before went; nothing where there was none.
    pub delta_pages: u64,
    /// Bytes that these pages would have taken more if they had gone whole and plain.
    pub delta_bytes_saved: u64,
}

impl Sum for Sent {
    /// Of several streams.
    fn sum<I: Iterator<Item = Self>>(streams: I) -> Self {
        streams.fold(Self::default(), |all, one| Self {
            bytes: all.bytes + one.bytes,
            page_bytes: all.page_bytes + one.page_bytes,
            delta_pages: all.delta_pages + one.delta_pages,
            delta_bytes_saved: all.delta_bytes_saved + one.delta_bytes_saved,
        })
    }
}

/// The fastest level that finds anything.
const LEVEL: i32 = 1;

/// Sends RAM over one connection.
pub struct Sender<S> {
    stream: S,
    ram: GuestRam,
    buffer: Vec<u8>,
    pages: u64,
    bytes: u64,
    page_bytes: u64,
    choice: Choice,
    always_packs: bool,
    packer: Option<Compressor<'static>>,
    packed: Vec<u8>,
    differences: Option<Differences>,
}

impl<S> fmt::Debug for Sender<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("pages", &self.pages)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl<S: Write> Sender<S> {
    /// For a stream whose opening was sent.
    pub fn new(stream: S, ram: GuestRam) -> Self {
        Self {
            stream,
            ram,
            buffer: vec![0; RUN_BYTES_MAX],
            pages: 0,
            bytes: 0,
            page_bytes: 0,
            choice: Choice::default(),
            always_packs: false,
            packer: None,
            packed: Vec::new(),
            differences: None,
        }
    }

    /// Remembers up to so many bytes of what it sends, at most [`super::REMEMBERED_BYTES_MAX`], so that pages can go as
    /// differences. For a target that knows them, and before anything is sent.
    #[must_use]
    pub fn remembering(mut self, bytes: u64) -> Self {
        let bytes = usize::try_from(bytes.min(super::REMEMBERED_BYTES_MAX)).expect("bounded by a constant");
        self.differences = (bytes >= PAGE).then(|| Differences::new(bytes));
        self
    }

    /// What it has sent so far.
    #[must_use]
    pub fn sent(&self) -> Sent {
        let saved = self.differences.as_ref().map(|differences| differences.saved).unwrap_or_default();
        Sent {
            bytes: self.bytes,
            page_bytes: self.page_bytes,
            delta_pages: saved.pages,
            delta_bytes_saved: saved.bytes,
        }
    }

    /// Sends what the pages hold now. A guest that writes meanwhile marks them dirty again.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn send(&mut self, pages: &Pages) -> Result<(), StreamError> {
        for (first, count) in runs(pages) {
            let mut page = first;
            while page < first + count {
                let some = (first + count - page).min((RUN_BYTES_MAX / PAGE) as u64);
                self.send_run(page, some, pages.fresh)?;
                page += some;
            }
        }
        // None of these pages has come twice until here, so it does not matter that other records were faster.
        self.put_entries()
    }

    /// Pages in a row, from one copy of them: the guest may write on.
    fn send_run(&mut self, first: u64, count: u64, fresh: bool) -> Result<(), StreamError> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let whole = &mut buffer[..usize::try_from(count).expect("at most a buffer") * PAGE];
        self.ram.read_linear(first * hv::PAGE_BYTES, whole)?;
        let sent = self.put_run(first, whole, fresh);
        self.buffer = buffer;
        sent
    }

    fn put_run(&mut self, first: u64, content: &[u8], fresh: bool) -> Result<(), StreamError> {
        let mut at = 0;
        for alike in self.ways(first, content, fresh)?.chunk_by(|a, b| a == b) {
            let end = at + alike.len() * PAGE;
            let offset = first * hv::PAGE_BYTES + at as u64;
            match alike[0] {
                Way::Whole => self.put_pages(offset, &content[at..end])?,
                Way::Zero if !fresh => self.put_zeros(offset, alike.len())?,
                Way::Zero | Way::Entry | Way::Unchanged => {}
            }
            if alike[0] != Way::Zero {
                self.page_bytes += (end - at) as u64;
            }
            at = end;
        }
        Ok(())
    }

    /// How each of the pages goes. Those that go as differences are noted for the next record.
    fn ways(&mut self, first: u64, content: &[u8], fresh: bool) -> Result<Vec<Way>, StreamError> {
        let full = |differences: &Differences| !differences.entries.have_room(first, content.len() / PAGE);
        if self.differences.as_ref().is_some_and(full) {
            self.put_entries()?;
        }
        let way = |page: &[u8]| if is_zero(page) { Way::Zero } else { Way::Whole };
        let mut ways: Vec<Way> = content.chunks_exact(PAGE).map(way).collect();
        if let Some(differences) = &mut self.differences {
            differences.forget_others(first, &ways);
            let begun = now();
            differences.look(first, content, fresh, &mut ways);
            differences.looked(since(begun), self.choice.whole_ns());
        }
        Ok(ways)
    }

    /// The entries that wait, as one record.
    fn put_entries(&mut self) -> Result<(), StreamError> {
        let Some(differences) = &mut self.differences else { return Ok(()) };
        let mut entries = std::mem::take(&mut differences.entries);
        if let Some((first, pages, payload)) = entries.record() {
            differences.saved.bytes = differences.saved.bytes.saturating_sub(record::HEADER_BYTES as u64);
            self.put(Kind::Deltas, first * hv::PAGE_BYTES, payload)?;
            self.pages += pages;
        }
        entries.clear();
        if let Some(differences) = &mut self.differences {
            differences.entries = entries;
        }
        Ok(())
    }

    /// Packs, whatever it costs.
    #[cfg(test)]
    pub(super) fn always_pack(&mut self) {
        self.always_packs = true;
    }

    /// Remembers and compares all pages, whatever it costs.
    #[cfg(test)]
    pub(super) fn always_compare(&mut self) {
        self.differences.as_mut().expect("it remembers").always = true;
    }

    /// Plain or packed, whichever is known to be faster now.
    fn put_pages(&mut self, place: u64, pages: &[u8]) -> Result<(), StreamError> {
        let (begun, sent_before) = (now(), self.bytes);
        let wanted = self.choice.pack_next() || self.always_packs;
        let packed = if wanted { self.pack(pages)? } else { None };
        let packing_ns = since(begun);
        let begun = now();
        match packed {
            Some(length) if length < pages.len() => self.put_packed(place, pages.len(), length)?,
            _ => self.put(Kind::Pages, place, pages)?,
        }
        self.choice.after(Cost {
            plain_bytes: pages.len() as u64,
            packed_bytes: packed.map(|length| length as u64),
            packing_ns,
            sent_bytes: self.bytes - sent_before,
            sending_ns: since(begun),
        });
        Ok(())
    }

    /// Into `packed`; gives its length. What does not get smaller gives none.
    fn pack(&mut self, pages: &[u8]) -> Result<Option<usize>, StreamError> {
        if self.packer.is_none() {
            self.packer = Some(Compressor::new(LEVEL)?);
            self.packed = vec![0; RUN_BYTES_MAX];
        }
        let packer = self.packer.as_mut().expect("made above");
        let room = pages.len().min(RUN_BYTES_MAX - PACKED_HEADER_BYTES as usize);
        Ok(packer.compress_to_buffer(pages, &mut self.packed[..room]).ok().or(Some(pages.len())))
    }

    fn put_packed(&mut self, place: u64, plain_bytes: usize, length: usize) -> Result<(), StreamError> {
        let whole = u32::try_from(length).expect("at most a run") + PACKED_HEADER_BYTES;
        self.put_header(Record { kind: Kind::Packed, length: whole, place })?;
        self.stream.write_all(&u32::try_from(plain_bytes).expect("at most a run").to_le_bytes())?;
        self.stream.write_all(&self.packed[..length])?;
        self.bytes += u64::from(whole);
        self.pages += (plain_bytes / PAGE) as u64;
        Ok(())
    }

    fn put(&mut self, kind: Kind, place: u64, payload: &[u8]) -> Result<(), StreamError> {
        let length = u32::try_from(payload.len()).expect("bounded by the caller");
        self.put_header(Record { kind, length, place })?;
        self.stream.write_all(payload)?;
        self.bytes += payload.len() as u64;
        if kind == Kind::Pages {
            self.pages += (payload.len() / PAGE) as u64;
        }
        Ok(())
    }

    fn put_zeros(&mut self, place: u64, pages: usize) -> Result<(), StreamError> {
        let length = u32::try_from(pages).expect("at most a buffer");
        self.pages += u64::from(length);
        self.put_header(Record { kind: Kind::Zeros, length, place })
    }

    fn put_header(&mut self, record: Record) -> Result<(), StreamError> {
        self.bytes += record::HEADER_BYTES as u64;
        Ok(self.stream.write_all(&record.to_bytes())?)
    }

    /// Returns when everything so far has arrived.
    ///
    /// # Errors
    /// When the connection breaks, or the target refuses what it got.
    pub fn settle(&mut self) -> Result<(), StreamError>
    where
        S: Read,
    {
        self.put_header(Record { kind: Kind::Mark, length: 0, place: self.pages })?;
        self.stream.flush()?;
        record::read_answer(&mut self.stream)
    }

    /// The last words, with the state on one of the streams. The stream is then only read from. What is remembered stays until the
    /// sender is dropped: giving it back takes a while, for which the guest would stand still.
    ///
    /// # Errors
    /// When the connection breaks, or the state is larger than any should be.
    pub fn finish(&mut self, state: Option<&[u8]>) -> Result<(), StreamError> {
        if let Some(state) = state {
            if state.len() > STATE_BYTES_MAX as usize {
                return Err(StreamError::Invalid("the state is too large"));
            }
            self.put(Kind::State, 0, state)?;
        }
        self.put_header(Record { kind: Kind::End, length: 0, place: self.pages })?;
        Ok(self.stream.flush()?)
    }

    /// Waits for the target's answer to a finished stream.
    ///
    /// # Errors
    /// [`StreamError::Refused`], or when the connection breaks.
    pub fn await_answer(&mut self) -> Result<(), StreamError>
    where
        S: Read,
    {
        record::read_answer(&mut self.stream)
    }

    /// The stream, for tests that look at it.
    #[cfg(test)]
    pub(super) fn into_stream(self) -> S {
        self.stream
    }
}

#[expect(clippy::disallowed_methods, reason = "measures what the next decision rests on")]
fn now() -> Instant {
    Instant::now()
}

fn since(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Runs of set bits as (page, count).
fn runs(pages: &Pages) -> impl Iterator<Item = (u64, u64)> + '_ {
    let bit = |at: u64| {
        let word = usize::try_from(at / WORD_BITS).ok().and_then(|word| pages.bits.get(word));
        word.is_some_and(|word| word >> (at % WORD_BITS) & 1 == 1)
    };
    let end = pages.bits.len() as u64 * WORD_BITS;
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < end && !bit(at) {
            // Whole words without a bit are the usual case.
            let empty = at.is_multiple_of(WORD_BITS)
                && usize::try_from(at / WORD_BITS).is_ok_and(|word| pages.bits[word] == 0);
            at += if empty { WORD_BITS } else { 1 };
        }
        let first = at;
        while at < end && bit(at) {
            at += 1;
        }
        (at > first).then_some((pages.first + first, at - first))
    })
}

/// In steps that the compiler turns into wide comparisons; most pages with content differ in the first.
fn is_zero(page: &[u8]) -> bool {
    page.chunks(128).all(|part| part.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_bits_become_runs_of_pages() {
        let pages = Pages { first: 1000, bits: vec![0b0111_0000, 0, 1 << 63, 1], fresh: false };
        assert_eq!(runs(&pages).collect::<Vec<_>>(), [(1004, 3), (1191, 2)]);
        let none = Pages { first: 0, bits: vec![], fresh: false };
        assert_eq!(runs(&none).count(), 0);
    }
}
