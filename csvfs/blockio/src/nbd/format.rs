//! The bytes of the transmission phase: requests, replies, chunks.
//!
//! ```text
//!   request       magic 4 | flags 2 | command 2 | cookie 8 | offset 8 | length 4          = 28, then a write's data
//!   simple reply  magic 4 | error 4 | cookie 8                                            = 16, then a read's data
//!   chunk         magic 4 | flags 2 | kind 2 | cookie 8 | length 4                        = 20, then `length` bytes
//! ```
//! All numbers are big-endian. Names and values are those of the NBD protocol's `doc/proto.md`.
//!
//! **Invariant:** decoding looks at nothing but the bytes it is given, and neither panics nor allocates.

/// Bytes of a request before its data.
pub(crate) const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply before its data.
pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;
/// Bytes of a chunk before its content.
pub(crate) const CHUNK_BYTES: usize = 20;
/// Longest read or write: what clients and servers take that were told nothing else.
pub(crate) const TRANSFER_BYTES_MAX: u32 = 32 << 20;
/// Longest text in an error chunk; the protocol's limit for strings.
pub(crate) const TEXT_BYTES_MAX: usize = 4096;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// The chunk is the last of its reply.
const CHUNK_DONE: u16 = 1;

/// Flags of a request.
pub(crate) mod command_flag {
    /// Complete only when the data is stable.
    pub(crate) const FUA: u16 = 1 << 0;
    /// Zero without giving space back.
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    /// Answer a read in one chunk.
    pub(crate) const DF: u16 = 1 << 2;
    /// Answer a block status with one extent.
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    /// All that this implementation understands.
    pub(crate) const ALL: u16 = FUA | NO_HOLE | DF | REQ_ONE;
}

/// Flags of an export.
pub(crate) mod export_flag {
    pub(crate) const HAS_FLAGS: u16 = 1 << 0;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// One that this implementation does not know; it has no data behind it.
    Other(u16),
}

impl Command {
    fn from_number(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Other(other),
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Other(other) => other,
        }
    }
}

/// A request without its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) command: Command,
    /// Names the request in its reply.
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

impl Request {
    pub(crate) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut bytes = [0; REQUEST_BYTES];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.number().to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.length.to_be_bytes());
        bytes
    }

    /// The request, or nothing when the bytes begin with another magic.
    pub(crate) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        (be32(bytes, 0) == REQUEST_MAGIC).then(|| Self {
            flags: be16(bytes, 4),
            command: Command::from_number(be16(bytes, 6)),
            cookie: be64(bytes, 8),
            offset: be64(bytes, 16),
            length: be32(bytes, 24),
        })
    }
}

/// How a reply begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// The whole outcome; data follows a read that succeeded.
    Simple { error: u32, cookie: u64 },
    /// A part of the outcome.
    Chunk { kind: ChunkKind, done: bool, cookie: u64, length: u32 },
}

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChunkKind {
    /// Nothing: it only ends the reply.
    None,
    /// Offset 8, then data.
    OffsetData,
    /// Offset 8, size 4: zeros.
    OffsetHole,
    /// Context 4, then pairs of length 4 and flags 4.
    BlockStatus,
    /// Error 4, text length 2, text.
    Error,
    /// As `Error`, then offset 8.
    ErrorOffset,
    /// One that this implementation does not know. By its number it may mean an error.
    Other { is_error: bool },
}

const KIND_ERROR: u16 = 1 << 15;

impl ChunkKind {
    fn from_number(number: u16) -> Self {
        match number {
            0 => Self::None,
            1 => Self::OffsetData,
            2 => Self::OffsetHole,
            5 => Self::BlockStatus,
            0x8001 => Self::Error,
            0x8002 => Self::ErrorOffset,
            other => Self::Other { is_error: other & KIND_ERROR != 0 },
        }
    }

    fn number(self) -> u16 {
        match self {
            Self::None => 0,
            Self::OffsetData => 1,
            Self::OffsetHole => 2,
            Self::BlockStatus => 5,
            Self::Error | Self::Other { is_error: true } => 0x8001,
            Self::ErrorOffset => 0x8002,
            Self::Other { is_error: false } => 0x7fff,
        }
    }
}

impl Reply {
    /// Number of bytes that the beginning of a reply takes, by its magic.
    pub(crate) fn length_by_magic(magic: [u8; 4]) -> Option<usize> {
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => Some(SIMPLE_REPLY_BYTES),
            CHUNK_MAGIC => Some(CHUNK_BYTES),
            _ => None,
        }
    }

    /// Decodes as many bytes as [`Self::length_by_magic`] said; nothing for any other bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let magic = *bytes.first_chunk()?;
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC if bytes.len() == SIMPLE_REPLY_BYTES => {
                Some(Self::Simple { error: be32(bytes, 4), cookie: be64(bytes, 8) })
            }
            CHUNK_MAGIC if bytes.len() == CHUNK_BYTES => Some(Self::Chunk {
                done: be16(bytes, 4) & CHUNK_DONE != 0,
                kind: ChunkKind::from_number(be16(bytes, 6)),
                cookie: be64(bytes, 8),
                length: be32(bytes, 16),
            }),
            _ => None,
        }
    }
}

/// A simple reply without data.
pub(crate) fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut bytes = [0; SIMPLE_REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

/// The beginning of a chunk with `length` bytes of content.
pub(crate) fn chunk(kind: ChunkKind, done: bool, cookie: u64, length: u32) -> [u8; CHUNK_BYTES] {
    let mut bytes = [0; CHUNK_BYTES];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&(if done { CHUNK_DONE } else { 0 }).to_be_bytes());
    bytes[6..8].copy_from_slice(&kind.number().to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Error numbers of the protocol for those of this system, and back: they have the values of Linux. A server whose own
/// way to its device is lost says so, as far as the protocol has words for it: an I/O error would be taken for the device's.
pub(crate) fn error_to_wire(errno: i32) -> u32 {
    let known = [
        libc::EPERM,
        libc::EIO,
        libc::ENOMEM,
        libc::EINVAL,
        libc::ENOSPC,
        libc::EOVERFLOW,
        libc::ENOTSUP,
        libc::ESHUTDOWN,
    ];
    let told = match errno {
        libc::EROFS | libc::EACCES => libc::EPERM,
        libc::EDQUOT | libc::EFBIG => libc::ENOSPC,
        libc::ENODEV
        | libc::ENXIO
        | libc::ENOLINK
        | libc::ENOTCONN
        | libc::ETIMEDOUT
        | libc::EHOSTDOWN
        | libc::EHOSTUNREACH => libc::ESHUTDOWN,
        errno if known.contains(&errno) => errno,
        _ => libc::EIO,
    };
    told.cast_unsigned()
}

/// See [`error_to_wire`]; any unknown number, and 0 where an error is due, is an I/O error.
pub(crate) fn error_from_wire(error: u32) -> i32 {
    match i32::try_from(error) {
        Ok(errno @ 1..=4095) if error_to_wire(errno) == error => errno,
        _ => libc::EIO,
    }
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_request_is_read_back_as_it_was_written(
            flags: u16, number: u16, cookie: u64, offset: u64, length: u32,
        ) {
            let request = Request { flags, command: Command::from_number(number), cookie, offset, length };
            prop_assert_eq!(Request::decode(&request.encode()), Some(request));
        }

        #[test]
        fn any_bytes_are_a_request_or_nothing(bytes: [u8; REQUEST_BYTES]) {
            let request = Request::decode(&bytes);
            prop_assert_eq!(request.is_some(), bytes[..4] == REQUEST_MAGIC.to_be_bytes());
        }

        #[test]
        fn any_bytes_are_a_reply_or_nothing(bytes in proptest::collection::vec(any::<u8>(), 0..40), magic in 0_usize..3) {
            let mut bytes = bytes;
            let start = [SIMPLE_REPLY_MAGIC, CHUNK_MAGIC];
            if let (Some(magic), Some(first)) = (start.get(magic), bytes.first_chunk_mut::<4>()) {
                *first = magic.to_be_bytes();
            }
            let right = bytes.first_chunk().and_then(|magic| Reply::length_by_magic(*magic));
            prop_assert_eq!(Reply::decode(&bytes).is_some(), right == Some(bytes.len()));
        }

        #[test]
        fn any_error_number_becomes_one_that_both_sides_know(error: u32) {
            let errno = error_from_wire(error);
            prop_assert!(errno > 0);
            prop_assert_eq!(error_from_wire(error_to_wire(errno)), errno);
        }
    }

    #[test]
    fn replies_are_read_back_as_they_were_written() {
        let simple = simple_reply(5, 77);
        assert_eq!(Reply::decode(&simple), Some(Reply::Simple { error: 5, cookie: 77 }));
        for kind in [
            ChunkKind::None,
            ChunkKind::OffsetData,
            ChunkKind::OffsetHole,
            ChunkKind::BlockStatus,
            ChunkKind::Error,
            ChunkKind::ErrorOffset,
        ] {
            let bytes = chunk(kind, true, 9, 1234);
            assert_eq!(
                Reply::decode(&bytes),
                Some(Reply::Chunk { kind, done: true, cookie: 9, length: 1234 })
            );
        }
    }
}
