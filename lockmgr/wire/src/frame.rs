//! One frame: bytes to type and back, nothing else.
//!
//! ```text
//! 0         4              12     13         14        16
//! | length  | request id   | kind | reserved | service | body ...
//! | u32 LE  | u64 LE       | u8   | 0        | u16 LE  | length - 12 bytes
//! ```
//!
//! `length` counts everything behind itself. **Invariant:** a length is checked against the limit before a byte is
//! reserved for it, and memory grows only with bytes that have arrived.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio_util::codec::{Decoder, Encoder};

use crate::WireError;

/// Longest frame: header and body, without the length field. Bulk data goes in several frames.
pub const FRAME_BYTES_MAX: usize = 4 << 20;
/// Request id, kind, reserved byte and service.
pub const HEADER_BYTES: usize = 12;
/// The length field in front of each frame.
pub(crate) const LENGTH_BYTES: usize = 4;
/// Longest frame while the peer is still unknown.
pub(crate) const HELLO_BYTES_MAX: usize = 4096;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// First frame of each side: who I am, which versions I speak.
    Hello,
    /// Wants a reply with the same id.
    Request,
    /// Answers a request.
    Reply,
    /// Answers a request (or a hello, with id 0) with a [`crate::Refusal`].
    Refusal,
    /// Wants no answer; its id is 0.
    Push,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Hello => 0,
            Self::Request => 1,
            Self::Reply => 2,
            Self::Refusal => 3,
            Self::Push => 4,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Hello,
            1 => Self::Request,
            2 => Self::Reply,
            3 => Self::Refusal,
            4 => Self::Push,
            _ => return None,
        })
    }
}

/// A decoded frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Pairs a reply with its request; chosen by the side that asks.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
    /// What it is for; see [`crate::service`].
    pub service: u16,
    /// The message.
    pub body: Bytes,
}

impl Frame {
    /// Appends length and header; the body follows, from [`Frame::body`].
    pub(crate) fn put_header(&self, out: &mut BytesMut) -> Result<(), WireError> {
        let bytes = HEADER_BYTES + self.body.len();
        let length = u32::try_from(bytes).ok().filter(|_| bytes <= FRAME_BYTES_MAX);
        let Some(length) = length else {
            return Err(WireError::TooLong { bytes: bytes as u64, max: FRAME_BYTES_MAX });
        };
        out.reserve(LENGTH_BYTES + HEADER_BYTES);
        out.put_u32_le(length);
        out.put_u64_le(self.id);
        out.put_u8(self.kind.byte());
        out.put_u8(0);
        out.put_u16_le(self.service);
        Ok(())
    }
}

/// Frames on a byte stream, for `tokio_util`'s framed readers and for the blocking client.
#[derive(Clone, Copy, Debug)]
pub struct FrameCodec {
    frame_bytes_max: usize,
}

impl FrameCodec {
    /// Accepts frames of up to `frame_bytes_max` bytes ([`FRAME_BYTES_MAX`] at most).
    #[must_use]
    pub fn new(frame_bytes_max: usize) -> Self {
        Self { frame_bytes_max: frame_bytes_max.min(FRAME_BYTES_MAX) }
    }

    /// Changes the limit for the frames to come.
    pub(crate) fn allow(&mut self, frame_bytes_max: usize) {
        self.frame_bytes_max = frame_bytes_max.min(FRAME_BYTES_MAX);
    }
}

impl Default for FrameCodec {
    fn default() -> Self {
        Self::new(FRAME_BYTES_MAX)
    }
}

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = WireError;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        let Some(length) = source.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.frame_bytes_max {
            return Err(WireError::TooLong { bytes: length as u64, max: self.frame_bytes_max });
        }
        if length < HEADER_BYTES {
            return Err(WireError::BadFrame { what: format!("length {length} is shorter than a header") });
        }
        if source.len() < LENGTH_BYTES + length {
            return Ok(None);
        }
        source.advance(LENGTH_BYTES);
        parse(source.split_to(length).freeze()).map(Some)
    }

    fn decode_eof(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        match self.decode(source)? {
            Some(frame) => Ok(Some(frame)),
            None if source.is_empty() => Ok(None),
            None => {
                Err(WireError::BadFrame { what: format!("stream ended {} bytes into a frame", source.len()) })
            }
        }
    }
}

fn parse(mut bytes: Bytes) -> Result<Frame, WireError> {
    let id = bytes.get_u64_le();
    let kind = bytes.get_u8();
    let reserved = bytes.get_u8();
    let service = bytes.get_u16_le();
    let kind =
        Kind::from_byte(kind).ok_or_else(|| WireError::BadFrame { what: format!("unknown kind {kind}") })?;
    if reserved != 0 {
        return Err(WireError::BadFrame { what: format!("reserved byte is {reserved}") });
    }
    Ok(Frame { id, kind, service, body: bytes })
}

impl Encoder<Frame> for FrameCodec {
    type Error = WireError;

    fn encode(&mut self, frame: Frame, out: &mut BytesMut) -> Result<(), WireError> {
        frame.put_header(out)?;
        out.extend_from_slice(&frame.body);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(frame: &Frame) -> BytesMut {
        let mut out = BytesMut::new();
        FrameCodec::default().encode(frame.clone(), &mut out).expect("fits");
        out
    }

    fn any_frame() -> impl Strategy<Value = Frame> {
        (any::<u64>(), 0u8..5, any::<u16>(), proptest::collection::vec(any::<u8>(), 0..300)).prop_map(
            |(id, kind, service, body)| Frame {
                id,
                kind: Kind::from_byte(kind).expect("in range"),
                service,
                body: body.into(),
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded_however_the_bytes_arrive(frame in any_frame(), cut in 0usize..400) {
            let whole = encoded(&frame);
            let cut = cut.min(whole.len() - 1);
            let mut arrived = BytesMut::from(&whole[..cut]);
            let mut codec = FrameCodec::default();
            prop_assert_eq!(codec.decode(&mut arrived).expect("a prefix is no error"), None);
            arrived.extend_from_slice(&whole[cut..]);
            prop_assert_eq!(codec.decode(&mut arrived).expect("whole"), Some(frame));
            prop_assert!(arrived.is_empty());
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error_and_cost_no_memory(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let mut source = BytesMut::from(&bytes[..]);
            let mut codec = FrameCodec::new(512);
            while let Ok(Some(frame)) = codec.decode(&mut source) {
                prop_assert!(frame.body.len() <= 512);
            }
            prop_assert!(source.capacity() <= 2 * bytes.len().max(64));
        }

        #[test]
        fn a_flipped_byte_never_panics(frame in any_frame(), at in 0usize..400, to in any::<u8>()) {
            let mut bytes = encoded(&frame);
            let at = at % bytes.len();
            bytes[at] = to;
            let _outcome = FrameCodec::default().decode_eof(&mut bytes);
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_by_its_length_alone() {
        let mut source = BytesMut::new();
        source.put_u32_le(u32::MAX);
        let error = FrameCodec::default().decode(&mut source).expect_err("too long");
        assert!(matches!(error, WireError::TooLong { bytes, .. } if bytes == u64::from(u32::MAX)), "{error}");
    }

    #[test]
    fn a_body_over_the_limit_is_not_sent() {
        let body = Bytes::from(vec![0; FRAME_BYTES_MAX]);
        let frame = Frame { id: 1, kind: Kind::Request, service: 1, body };
        let error = FrameCodec::default().encode(frame, &mut BytesMut::new()).expect_err("too long");
        assert!(matches!(error, WireError::TooLong { .. }), "{error}");
    }
}
