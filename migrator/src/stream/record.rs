//! The bytes of a memory stream: opening, records, answer.
//!
//! ```text
//!   opening:  length u32 | StreamOpening of migrator.proto
//!   record:   kind u8 | 0 0 0 | length u32 | place u64 | payload
//!             1 pages   length: bytes of payload, whole pages    place: offset in RAM, counting RAM only
//!             2 zeros   length: pages; no payload                place: the same
//!             5 packed  length: bytes of payload, u32 bytes of pages | a zstd frame   place: as for pages
//!             7 deltas  length: bytes of payload, see delta.rs   place: as for pages; only to a target that knows it
//!             3 state   length: bytes of payload                 place: 0
//!             4 end     length: 0                                place: pages sent on this stream, with zeros and deltas
//!             6 mark    length: 0                                place: as for the end; an answer is due, and more records follow
//!   answer:   code u8 (1 ready, 2 refused) | length u32 | reason in UTF-8
//! ```
//! All numbers are little-endian.

use std::io::{self, Read, Write};

use prost::Message;

use crate::protocol::{Move, ProtocolError, move_of, pb};

pub(super) const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == hv::PAGE_BYTES);
/// Payload of one record.
pub(super) const RUN_BYTES_MAX: usize = 256 << 10;
/// The state of processors and devices; most of it is the guest's console.
pub(super) const STATE_BYTES_MAX: u32 = 16 << 20;
pub(super) const HEADER_BYTES: usize = 16;
/// In front of a frame: bytes of the pages in it.
pub(super) const PACKED_HEADER_BYTES: u32 = 4;
const OPENING_BYTES_MAX: u32 = 4096;
const REASON_BYTES_MAX: u32 = 4096;

/// Why a stream came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The connection.
    #[error("the memory stream broke: {0}")]
    Io(#[from] io::Error),
    /// The other side does not keep the rules.
    #[error("the memory stream is not valid: {0}")]
    Invalid(&'static str),
    /// A message of it.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// RAM.
    #[error(transparent)]
    Memory(#[from] hv::MemoryError),
    /// The target says no.
    #[error("the target refused it: {0}")]
    Refused(String),
}

/// What a stream is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// The move.
    pub of: Move,
    /// Number of this stream, from 0.
    pub stream: u32,
    /// How many there are.
    pub streams: u32,
}

impl Opening {
    /// Sends it.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let message =
            pb::StreamOpening { r#move: Some((&self.of).into()), stream: self.stream, streams: self.streams };
        let body = message.encode_to_vec();
        let length = u32::try_from(body.len()).expect("an opening is short");
        to.write_all(&length.to_le_bytes())?;
        to.write_all(&body)?;
        to.flush()
    }

    /// Reads it.
    ///
    /// # Errors
    /// When the connection breaks, or it makes no sense.
    pub fn read(from: &mut impl Read) -> Result<Self, StreamError> {
        let body = read_bounded(from, OPENING_BYTES_MAX, "its opening is too long")?;
        let opening = pb::StreamOpening::decode(&*body).map_err(ProtocolError::from)?;
        let in_range = opening.streams <= super::STREAMS_MAX && opening.stream < opening.streams;
        if !in_range {
            return Err(StreamError::Invalid("the number of streams"));
        }
        Ok(Self { of: move_of(opening.r#move)?, stream: opening.stream, streams: opening.streams })
    }
}

/// Header of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) kind: Kind,
    pub(super) length: u32,
    pub(super) place: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Pages = 1,
    Zeros = 2,
    State = 3,
    End = 4,
    Packed = 5,
    Mark = 6,
    Deltas = 7,
}

impl Record {
    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.length.to_le_bytes());
        bytes[8..].copy_from_slice(&self.place.to_le_bytes());
        bytes
    }

    pub(super) fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, StreamError> {
        let kind = match bytes[0] {
            1 => Kind::Pages,
            2 => Kind::Zeros,
            3 => Kind::State,
            4 => Kind::End,
            5 => Kind::Packed,
            6 => Kind::Mark,
            7 => Kind::Deltas,
            _ => return Err(StreamError::Invalid("a record of an unknown kind")),
        };
        if bytes[1..4] != [0; 3] {
            return Err(StreamError::Invalid("a reserved byte is set"));
        }
        let length = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
        let place = u64::from_le_bytes(bytes[8..].try_into().expect("eight bytes"));
        Ok(Self { kind, length, place })
    }
}

/// The target's answer.
pub(super) fn write_answer(to: &mut impl Write, answer: Result<(), &str>) -> io::Result<()> {
    let (code, reason) = match answer {
        Ok(()) => (1, ""),
        Err(reason) => (2, reason),
    };
    let end = reason.floor_char_boundary(reason.len().min(REASON_BYTES_MAX as usize));
    let reason = &reason.as_bytes()[..end];
    to.write_all(&[code])?;
    to.write_all(&u32::try_from(reason.len()).expect("cut to a page").to_le_bytes())?;
    to.write_all(reason)?;
    to.flush()
}

pub(super) fn read_answer(from: &mut impl Read) -> Result<(), StreamError> {
    let mut code = [0];
    from.read_exact(&mut code)?;
    let reason = read_bounded(from, REASON_BYTES_MAX, "its answer is too long")?;
    match code[0] {
        1 => Ok(()),
        2 => Err(StreamError::Refused(String::from_utf8_lossy(&reason).into_owned())),
        _ => Err(StreamError::Invalid("an answer of an unknown kind")),
    }
}

/// A length and so many bytes; memory grows only with bytes that have arrived.
fn read_bounded(from: &mut impl Read, max: u32, too_long: &'static str) -> Result<Vec<u8>, StreamError> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > max {
        return Err(StreamError::Invalid(too_long));
    }
    read_whole(from, length)
}

pub(super) fn read_whole(from: &mut impl Read, length: u32) -> Result<Vec<u8>, StreamError> {
    let mut body = Vec::new();
    if from.take(u64::from(length)).read_to_end(&mut body)? < length as usize {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(body)
}
