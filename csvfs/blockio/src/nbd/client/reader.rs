//! What a server's bytes mean for the requests that wait.
//!
//! ```text
//!   Head --simple reply--------------------------> finished
//!        --data follows--> Data --all has come---> finished, or Head for the next chunk
//!        --chunk of other kind--------------------> the same
//! ```
//! No socket is read here: bytes come from the inbox, so that any bytes can be tried.
//!
//! **Invariant:** data goes only where the request asked for it, each byte once; anything else is a [`Violation`], which
//! ends the connection.

use super::pending::{Flight, Pending};
use crate::nbd::format::{CHUNK_BYTES, ChunkKind, Reply, TEXT_BYTES_MAX, be32, be64, error_from_wire};
use crate::nbd::inbox::Inbox;
use crate::{IoBuf, IoError};

/// Longest content of an error chunk: number, length, text, offset.
const ERROR_BYTES_MAX: usize = 6 + TEXT_BYTES_MAX + 8;

/// The server does not speak the protocol.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation(pub(super) String);

fn violation<T>(what: impl Into<String>) -> Result<T, Violation> {
    Err(Violation(what.into()))
}

/// What a look at the inbox has led to.
pub(super) enum Step {
    /// A request is done.
    Finished(Flight, Result<(), IoError>),
    /// More bytes must come.
    NeedsMore,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Reader {
    structured: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Head,
    /// Data for the memory that is left.
    Data {
        cookie: u64,
        left: IoBuf,
        done: bool,
    },
    /// Content that means nothing to us.
    Skip {
        cookie: u64,
        left: usize,
        done: bool,
    },
}

impl Reader {
    pub(super) fn new(structured: bool) -> Self {
        Self { structured, state: State::Head }
    }

    /// Where the next bytes belong, when they are data.
    pub(super) fn target(&self) -> Option<&IoBuf> {
        match &self.state {
            State::Data { left, .. } => Some(left),
            _ => None,
        }
    }

    /// So many bytes have come into the target.
    pub(super) fn received(&mut self, count: usize) {
        if let State::Data { left, .. } = &mut self.state {
            *left = left.slice(count..left.len());
        }
    }

    /// Moves data from the inbox to its target. No request is touched.
    pub(super) fn take_data(&mut self, inbox: &mut Inbox) {
        match &mut self.state {
            State::Data { left, .. } => {
                let moved = inbox.move_into(left);
                *left = left.slice(moved..left.len());
            }
            State::Skip { left, .. } => *left -= inbox.skip(*left),
            State::Head => {}
        }
    }

    /// Goes on until a request is finished or bytes are missing.
    pub(super) fn step(&mut self, inbox: &mut Inbox, pending: &mut Pending) -> Result<Step, Violation> {
        loop {
            self.take_data(inbox);
            let ended = match &self.state {
                State::Data { cookie, left, done } if left.is_empty() => Some((*cookie, *done)),
                State::Skip { cookie, left: 0, done } => Some((*cookie, *done)),
                State::Data { .. } | State::Skip { .. } => return Ok(Step::NeedsMore),
                State::Head => None,
            };
            let ended = match ended {
                Some(ended) => {
                    self.state = State::Head;
                    Some(ended)
                }
                None => match self.head(inbox, pending)? {
                    Some(begun) => begun,
                    None => return Ok(Step::NeedsMore),
                },
            };
            if let Some((cookie, true)) = ended {
                return finish(pending, cookie);
            }
        }
    }

    /// Takes the beginning of a reply. Nothing: bytes are missing. Otherwise the request whose part has ended with it, and
    /// whether it was the last part, when no content follows.
    fn head(
        &mut self,
        inbox: &mut Inbox,
        pending: &mut Pending,
    ) -> Result<Option<Option<(u64, bool)>>, Violation> {
        let Some(magic) = inbox.peek::<4>() else { return Ok(None) };
        let Some(length) = Reply::length_by_magic(*magic) else {
            return violation(format!("a reply begins with {magic:02x?}"));
        };
        let Some(head) = inbox.bytes().get(..length) else { return Ok(None) };
        match Reply::decode(head) {
            Some(Reply::Simple { error, cookie }) => {
                inbox.consume(length);
                self.simple(error, cookie, pending).map(Some)
            }
            Some(Reply::Chunk { kind, done, cookie, length }) => {
                self.chunk(inbox, pending, Chunk { kind, done, cookie, length: length as usize })
            }
            None => violation("a reply that cannot be read"),
        }
    }

    fn simple(
        &mut self,
        error: u32,
        cookie: u64,
        pending: &mut Pending,
    ) -> Result<Option<(u64, bool)>, Violation> {
        let flight = known(pending, cookie)?;
        if error != 0 {
            flight.errno = Some(error_from_wire(error));
            return Ok(Some((cookie, true)));
        }
        let Some(memory) = flight.memory.clone() else { return Ok(Some((cookie, true))) };
        if self.structured {
            return violation("a read is answered by a simple reply, although chunks were agreed on");
        }
        let whole = flight.covered.add(0, memory.len());
        debug_assert!(whole || memory.is_empty(), "a simple reply is the only one to its read");
        self.state = State::Data { cookie, left: memory, done: true };
        Ok(None)
    }

    fn chunk(
        &mut self,
        inbox: &mut Inbox,
        pending: &mut Pending,
        chunk: Chunk,
    ) -> Result<Option<Option<(u64, bool)>>, Violation> {
        if !self.structured {
            return violation("a chunk, although none were agreed on");
        }
        let flight = known(pending, chunk.cookie)?;
        let ended = Ok(Some(Some((chunk.cookie, chunk.done))));
        // What is looked at of the content must be there as a whole.
        let Some(content) = inbox.bytes().get(CHUNK_BYTES..CHUNK_BYTES + chunk.looked_at()?) else {
            return Ok(None);
        };
        match chunk.kind {
            ChunkKind::None => {
                inbox.consume(CHUNK_BYTES);
                ended
            }
            ChunkKind::OffsetData => {
                let target = flight.part(be64(content, 0), chunk.length - 8)?;
                inbox.consume(CHUNK_BYTES + 8);
                self.state = State::Data { cookie: chunk.cookie, left: target, done: chunk.done };
                Ok(Some(None))
            }
            ChunkKind::OffsetHole => {
                flight.part(be64(content, 0), be32(content, 8) as usize)?.fill_zero();
                inbox.consume(CHUNK_BYTES + 12);
                ended
            }
            ChunkKind::Error | ChunkKind::ErrorOffset => {
                let error = be32(content, 0);
                let text = String::from_utf8_lossy(&content[6..]);
                tracing::debug!(error, text = %text.escape_debug(), "the NBD server reports an error");
                flight.errno.get_or_insert(error_from_wire(error));
                inbox.consume(CHUNK_BYTES + chunk.length);
                ended
            }
            ChunkKind::Other { is_error: true } => {
                flight.errno.get_or_insert(libc::EIO);
                inbox.consume(CHUNK_BYTES);
                self.state = State::Skip { cookie: chunk.cookie, left: chunk.length, done: chunk.done };
                Ok(Some(None))
            }
            ChunkKind::BlockStatus | ChunkKind::Other { is_error: false } => {
                violation("a chunk of a kind that was not asked for")
            }
        }
    }
}

/// The beginning of a chunk.
struct Chunk {
    kind: ChunkKind,
    done: bool,
    cookie: u64,
    length: usize,
}

impl Chunk {
    /// How many bytes of the content are looked at before anything is decided.
    fn looked_at(&self) -> Result<usize, Violation> {
        let (fits, looked_at) = match self.kind {
            ChunkKind::None => (self.length == 0 && self.done, 0),
            ChunkKind::OffsetData => (self.length > 8, 8),
            ChunkKind::OffsetHole => (self.length == 12, 12),
            ChunkKind::Error => ((6..=ERROR_BYTES_MAX).contains(&self.length), self.length),
            ChunkKind::ErrorOffset => ((14..=ERROR_BYTES_MAX).contains(&self.length), self.length),
            ChunkKind::Other { .. } => (self.length <= ERROR_BYTES_MAX, 0),
            ChunkKind::BlockStatus => (true, 0),
        };
        if fits { Ok(looked_at) } else { violation(format!("a chunk of {} bytes", self.length)) }
    }
}

impl Flight {
    /// The part of a read's memory for `length` bytes of the export at `offset`.
    fn part(&mut self, offset: u64, length: usize) -> Result<IoBuf, Violation> {
        let Some(memory) = &self.memory else {
            return violation(format!("data in the reply to a {}", self.op));
        };
        let start = offset.checked_sub(self.offset).and_then(|start| usize::try_from(start).ok());
        let inside = start
            .and_then(|start| start.checked_add(length).map(|end| start..end))
            .filter(|range| range.end <= memory.len() && self.covered.add(range.start, range.end));
        match inside {
            Some(range) => Ok(memory.slice(range)),
            None => violation("data that was not asked for, or comes twice"),
        }
    }
}

fn known(pending: &mut Pending, cookie: u64) -> Result<&mut Flight, Violation> {
    pending.get(cookie).ok_or_else(|| Violation("a reply to a request that nobody has made".to_owned()))
}

fn finish(pending: &mut Pending, cookie: u64) -> Result<Step, Violation> {
    let Some(flight) = pending.remove(cookie) else { return violation("a second reply") };
    let outcome = match (flight.errno, &flight.memory) {
        (Some(errno), _) => Err(flight.error(errno)),
        (None, Some(memory)) if !flight.covered.is_whole(memory.len()) => Err(IoError::Corrupt(format!(
            "the NBD server has left out a part of {} at {}",
            flight.op, flight.offset
        ))),
        (None, _) => Ok(()),
    };
    Ok(Step::Finished(flight, outcome))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::nbd::format::{chunk, simple_reply};

    /// Feeds bytes in parts; gives the outcomes, or the violation.
    fn read(
        reader: &mut Reader,
        pending: &mut Pending,
        bytes: &[u8],
        part: usize,
    ) -> Result<Vec<Result<(), IoError>>, Violation> {
        let mut inbox = Inbox::new();
        let mut outcomes = Vec::new();
        for part in bytes.chunks(part.max(1)) {
            let mut rest = part;
            while !rest.is_empty() {
                rest = &rest[inbox.feed(rest)..];
                while let Step::Finished(_, outcome) = reader.step(&mut inbox, pending)? {
                    outcomes.push(outcome);
                }
            }
        }
        Ok(outcomes)
    }

    fn a_read(pending: &mut Pending, offset: u64, len: usize) -> (u64, IoBuf) {
        let memory = IoBuf::zeroed(len);
        memory.copy_from(&vec![0xee; len]);
        let flight = Flight::new("read", offset, Some(memory.clone()), Box::new(|_| ()));
        (pending.insert(flight), memory)
    }

    fn data(cookie: u64, done: bool, offset: u64, bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len() + 8).expect("short");
        let mut whole = chunk(ChunkKind::OffsetData, done, cookie, length).to_vec();
        whole.extend_from_slice(&offset.to_be_bytes());
        whole.extend_from_slice(bytes);
        whole
    }

    fn hole(cookie: u64, done: bool, offset: u64, size: u32) -> Vec<u8> {
        let mut whole = chunk(ChunkKind::OffsetHole, done, cookie, 12).to_vec();
        whole.extend_from_slice(&offset.to_be_bytes());
        whole.extend_from_slice(&size.to_be_bytes());
        whole
    }

    fn error(cookie: u64, done: bool, error: u32, text: &[u8]) -> Vec<u8> {
        let length = u32::try_from(text.len() + 6).expect("short");
        let mut whole = chunk(ChunkKind::Error, done, cookie, length).to_vec();
        whole.extend_from_slice(&error.to_be_bytes());
        whole.extend_from_slice(&u16::try_from(text.len()).expect("short").to_be_bytes());
        whole.extend_from_slice(text);
        whole
    }

    #[test]
    fn a_read_in_chunks_that_come_in_any_order_is_put_together() {
        for part in [1, 7, 1000] {
            let mut pending = Pending::default();
            let (cookie, memory) = a_read(&mut pending, 1000, 10);
            let bytes = [
                data(cookie, false, 1006, b"gh"),
                hole(cookie, false, 1008, 2),
                data(cookie, false, 1000, b"abc"),
                data(cookie, false, 1003, b"def"),
                chunk(ChunkKind::None, true, cookie, 0).to_vec(),
            ];
            let outcomes = read(&mut Reader::new(true), &mut pending, &bytes.concat(), part);
            assert!(matches!(outcomes.as_deref(), Ok([Ok(())])), "{outcomes:?}");
            assert_eq!(memory.to_vec(), b"abcdefgh\0\0");
        }
    }

    #[test]
    fn an_error_chunk_fails_the_read_whatever_else_comes() {
        let mut pending = Pending::default();
        let (cookie, _memory) = a_read(&mut pending, 0, 4);
        let bytes = [error(cookie, false, 28, b"disk full"), data(cookie, true, 0, b"abcd")];
        let outcomes =
            read(&mut Reader::new(true), &mut pending, &bytes.concat(), 3).expect("it speaks the protocol");
        assert!(matches!(outcomes[..], [Err(IoError::NoSpace { .. })]), "{outcomes:?}");
    }

    #[test]
    fn a_read_of_which_a_part_is_missing_fails() {
        let mut pending = Pending::default();
        let (cookie, _memory) = a_read(&mut pending, 0, 4);
        let outcomes = read(&mut Reader::new(true), &mut pending, &data(cookie, true, 0, b"abc"), 50)
            .expect("well formed");
        assert!(matches!(outcomes[..], [Err(IoError::Corrupt(_))]), "{outcomes:?}");
    }

    #[test]
    fn a_server_that_breaks_the_protocol_is_noticed_and_writes_nowhere_else() {
        type Bytes = fn(u64) -> Vec<u8>;
        let cases: [(&str, Bytes); 9] = [
            ("before the range", |cookie| data(cookie, true, 99, b"abcd")),
            ("after the range", |cookie| data(cookie, true, 102, b"abcd")),
            ("at the end of all numbers", |cookie| data(cookie, true, u64::MAX, b"abcd")),
            ("twice", |cookie| [data(cookie, false, 100, b"ab"), data(cookie, true, 101, b"c")].concat()),
            ("a hole beyond", |cookie| hole(cookie, true, 100, u32::MAX)),
            ("an unknown cookie", |cookie| simple_reply(0, cookie + 1).to_vec()),
            ("a simple reply to a read", |cookie| simple_reply(0, cookie).to_vec()),
            ("an endless text", |cookie| chunk(ChunkKind::Error, true, cookie, 1 << 30).to_vec()),
            ("no magic", |_| vec![0; 20]),
        ];
        for (what, bytes) in cases {
            let mut pending = Pending::default();
            let (cookie, memory) = a_read(&mut pending, 100, 4);
            let outcome = read(&mut Reader::new(true), &mut pending, &bytes(cookie), 1000);
            assert!(outcome.is_err(), "{what}: {outcome:?}");
            assert_eq!(memory.len(), 4);
            assert_eq!(pending.len(), 1, "{what}: whoever waits is told when the connection ends");
        }
    }

    #[test]
    fn simple_replies_answer_what_was_not_agreed_to_come_in_chunks() {
        let mut pending = Pending::default();
        let (cookie, memory) = a_read(&mut pending, 0, 4);
        let write = pending.insert(Flight::new("write", 0, None, Box::new(|_| ())));
        let bytes = [simple_reply(0, cookie).to_vec(), b"abcd".to_vec(), simple_reply(5, write).to_vec()];
        let outcomes = read(&mut Reader::new(false), &mut pending, &bytes.concat(), 5).expect("well formed");
        assert!(matches!(outcomes[..], [Ok(()), Err(IoError::Os { op: "write", errno: libc::EIO, .. })]));
        assert_eq!(memory.to_vec(), b"abcd");
    }

    proptest! {
        #[test]
        fn any_bytes_finish_requests_or_end_the_connection(
            structured: bool,
            pieces in proptest::collection::vec((0_u8..7, any::<bool>(), 0_u64..40, 0_usize..20), 0..12),
            noise in proptest::collection::vec(any::<u8>(), 0..30),
            part in 1_usize..40,
        ) {
            let mut pending = Pending::default();
            let (cookie, memory) = a_read(&mut pending, 8, 16);
            let write = pending.insert(Flight::new("write", 0, None, Box::new(|_| ())));
            let mut bytes = Vec::new();
            for (what, done, offset, len) in pieces {
                bytes.extend(match what {
                    0 => data(cookie, done, offset, &vec![1; len]),
                    1 => hole(cookie, done, offset, u32::try_from(len).expect("short")),
                    2 => error(cookie, done, 5, &vec![b'x'; len]),
                    3 => simple_reply(u32::from(done), write).to_vec(),
                    4 => chunk(ChunkKind::None, done, cookie, 0).to_vec(),
                    5 => chunk(ChunkKind::Other { is_error: true }, done, cookie, 3).to_vec(),
                    _ => simple_reply(0, offset).to_vec(),
                });
            }
            bytes.extend(noise);
            let _ = read(&mut Reader::new(structured), &mut pending, &bytes, part);
            prop_assert_eq!(memory.len(), 16);
        }
    }
}
