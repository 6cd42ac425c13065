//! The bytes of the handshake: greeting, options, option replies.
//!
//! ```text
//!   server   NBDMAGIC | IHAVEOPT | flags 2          client   flags 4
//!   client   IHAVEOPT | option 4 | length 4 | data
//!   server   reply magic 8 | option 4 | kind 4 | length 4 | data
//! ```
//! **Invariant:** lengths are checked against [`OPTION_BYTES_MAX`] before anything is read, and against the data after.

use super::format::{be16, be32, be64};

pub(crate) const GREETING: u64 = 0x4e42_444d_4147_4943;
pub(crate) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, the same bits in both directions.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

/// Longest data of an option or of its reply that is read: a name of the protocol's greatest length, and some room.
pub(crate) const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Longest export name.
pub(crate) const NAME_BYTES_MAX: usize = 4096;
/// Bytes before the data of an option.
pub(crate) const OPTION_HEAD_BYTES: usize = 16;
/// Bytes before the data of an option's reply.
pub(crate) const OPTION_REPLY_HEAD_BYTES: usize = 20;
/// Options of one handshake; more come only from somebody who means harm.
pub(crate) const OPTIONS_MAX: usize = 64;

/// The context that says which parts of an export are allocated.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";

/// Numbers of options.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of option replies.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub(crate) const ERR_POLICY: u32 = 1 << 31 | 2;
    pub(crate) const ERR_INVALID: u32 = 1 << 31 | 3;
    pub(crate) const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    pub(crate) const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub(crate) const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    pub(crate) const ERR_TOO_BIG: u32 = 1 << 31 | 9;

    /// Whether the kind means that the option was refused.
    pub(crate) fn is_error(kind: u32) -> bool {
        kind & 1 << 31 != 0
    }
}

/// Kinds of information about an export.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// An option without its data.
pub(crate) fn option_head(option: u32, length: u32) -> [u8; OPTION_HEAD_BYTES] {
    let mut bytes = [0; OPTION_HEAD_BYTES];
    bytes[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[8..12].copy_from_slice(&option.to_be_bytes());
    bytes[12..].copy_from_slice(&length.to_be_bytes());
    bytes
}

/// Option and length of its data.
pub(crate) fn decode_option_head(bytes: &[u8; OPTION_HEAD_BYTES]) -> Option<(u32, u32)> {
    (be64(bytes, 0) == OPTION_MAGIC).then(|| (be32(bytes, 8), be32(bytes, 12)))
}

/// A whole option reply.
pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(OPTION_REPLY_HEAD_BYTES + data.len());
    bytes.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Option, kind and length of the data of an option reply.
pub(crate) fn decode_option_reply_head(bytes: &[u8; OPTION_REPLY_HEAD_BYTES]) -> Option<(u32, u32, u32)> {
    (be64(bytes, 0) == OPTION_REPLY_MAGIC).then(|| (be32(bytes, 8), be32(bytes, 12), be32(bytes, 16)))
}

/// Reads numbers and texts off the front of an option's data.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.bytes(2).map(|bytes| be16(bytes, 0))
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.bytes(4).map(|bytes| be32(bytes, 0))
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.bytes(8).map(|bytes| be64(bytes, 0))
    }

    /// A text with its length before it, of at most [`NAME_BYTES_MAX`] bytes.
    pub(crate) fn text(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok().filter(|length| *length <= NAME_BYTES_MAX)?;
        std::str::from_utf8(self.bytes(length)?).ok()
    }

    pub(crate) fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

/// Data of `INFO` and `GO`: an export's name and what the client wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) name: String,
    pub(crate) wanted: Vec<u16>,
}

impl InfoRequest {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = text(&self.name);
        bytes.extend_from_slice(&u16::try_from(self.wanted.len()).unwrap_or(u16::MAX).to_be_bytes());
        for wanted in &self.wanted {
            bytes.extend_from_slice(&wanted.to_be_bytes());
        }
        bytes
    }

    pub(crate) fn decode(data: &[u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.text()?.to_owned();
        let count = fields.u16()?;
        let wanted = (0..count).map(|_| fields.u16()).collect::<Option<_>>()?;
        fields.end()?;
        Some(Self { name, wanted })
    }
}

/// Data of `SET_META_CONTEXT` and `LIST_META_CONTEXT`: an export's name and queries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContextRequest {
    pub(crate) name: String,
    pub(crate) queries: Vec<String>,
}

impl ContextRequest {
    pub(crate) fn decode(data: &[u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.text()?.to_owned();
        let count = fields.u32()?;
        // Each query takes 4 bytes at least: a count that the data cannot hold ends at its first missing byte.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(fields.text()?.to_owned());
        }
        fields.end()?;
        Some(Self { name, queries })
    }
}

/// What `INFO` and `GO` tell about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Info {
    Export { size_bytes: u64, flags: u16 },
    BlockSize { least: u32, preferred: u32, most: u32 },
    Other,
}

impl Info {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Export { size_bytes, flags } => {
                bytes.extend_from_slice(&info::EXPORT.to_be_bytes());
                bytes.extend_from_slice(&size_bytes.to_be_bytes());
                bytes.extend_from_slice(&flags.to_be_bytes());
            }
            Self::BlockSize { least, preferred, most } => {
                bytes.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
                for size in [least, preferred, most] {
                    bytes.extend_from_slice(&size.to_be_bytes());
                }
            }
            Self::Other => {}
        }
        bytes
    }

    /// Nothing when a known kind has the wrong length.
    pub(crate) fn decode(data: &[u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let found = match fields.u16()? {
            info::EXPORT => Self::Export { size_bytes: fields.u64()?, flags: fields.u16()? },
            info::BLOCK_SIZE => {
                Self::BlockSize { least: fields.u32()?, preferred: fields.u32()?, most: fields.u32()? }
            }
            _ => return Some(Self::Other),
        };
        fields.end()?;
        Some(found)
    }
}

/// A text with its length before it.
pub(crate) fn text(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_asked_of_an_export_is_read_back(name in ".{0,40}", wanted in proptest::collection::vec(any::<u16>(), 0..8)) {
            let request = InfoRequest { name, wanted };
            prop_assert_eq!(InfoRequest::decode(&request.encode()), Some(request));
        }

        #[test]
        fn what_is_told_of_an_export_is_read_back(size_bytes: u64, flags: u16, least: u32, preferred: u32, most: u32) {
            for info in [Info::Export { size_bytes, flags }, Info::BlockSize { least, preferred, most }] {
                prop_assert_eq!(Info::decode(&info.encode()), Some(info));
            }
        }

        #[test]
        fn any_data_of_an_option_is_read_or_refused(data in proptest::collection::vec(any::<u8>(), 0..64), low in 0_u8..8) {
            let mut data = data;
            // Small lengths, so that what lies behind them is reached.
            for byte in data.iter_mut().step_by(2) {
                *byte = byte.checked_sub(255 - low).unwrap_or(0);
            }
            let _ = (InfoRequest::decode(&data), ContextRequest::decode(&data), Info::decode(&data));
        }
    }

    #[test]
    fn a_count_that_the_data_cannot_hold_allocates_nothing() {
        let mut data = text("disk");
        data.extend_from_slice(&u32::MAX.to_be_bytes());
        assert_eq!(ContextRequest::decode(&data), None);
    }

    #[test]
    fn heads_are_read_back_as_they_were_written() {
        assert_eq!(decode_option_head(&option_head(7, 12)), Some((7, 12)));
        let reply = option_reply(7, reply::ACK, b"abc");
        let head = reply.first_chunk().expect("a head");
        assert_eq!(decode_option_reply_head(head), Some((7, reply::ACK, 3)));
        assert_eq!(decode_option_reply_head(&[0; OPTION_REPLY_HEAD_BYTES]), None);
    }
}
