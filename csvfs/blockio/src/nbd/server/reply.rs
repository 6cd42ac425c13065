//! From the outcome of a request to its reply, and from the threads that complete to the one that sends.
//!
//! **Invariant:** a request counts as being at the device until its reply is queued; [`Shared::wait_quiet`] returns when
//! none is.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::nbd::format::{ChunkKind, chunk, error_to_wire, simple_reply};
use crate::nbd::outbox::{Message, Outbox};
use crate::{AlignedBuf, IoBuf, IoError};

/// Longest text that is sent with an error.
const TEXT_BYTES_MAX: usize = 256;

/// What completions and the session thread share.
pub(super) struct Shared {
    /// Lock rank: a leaf, held for a few instructions.
    state: Mutex<State>,
    quiet: Condvar,
    pub(super) bell: OwnedFd,
    structured: bool,
}

#[derive(Default)]
struct State {
    finished: VecDeque<Message>,
    /// The session thread sleeps, or is about to: ring.
    asleep: bool,
    /// Requests that the device has.
    at_device: usize,
}

impl Shared {
    pub(super) fn new(structured: bool) -> io::Result<Arc<Self>> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags)?;
        Ok(Arc::new(Self { state: Mutex::default(), quiet: Condvar::new(), bell, structured }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device has completed a request; `reply` goes to the client.
    pub(super) fn finish(&self, reply: Message) {
        let (ring, quiet) = {
            let mut state = self.lock();
            state.finished.push_back(reply);
            state.at_device -= 1;
            (std::mem::take(&mut state.asleep), state.at_device == 0)
        };
        if ring {
            self.ring();
        }
        if quiet {
            self.quiet.notify_all();
        }
    }

    /// The device gets a request.
    pub(super) fn begin(&self) {
        self.lock().at_device += 1;
    }

    /// Takes the replies that have been finished.
    pub(super) fn take_finished(&self, outbox: &mut Outbox) {
        outbox.append(&mut self.lock().finished);
    }

    /// Says that the session thread goes to sleep; `false` when there is a reply to send, unless it is `blocked` anyway.
    pub(super) fn fall_asleep(&self, blocked: bool) -> bool {
        let mut state = self.lock();
        state.asleep = blocked || state.finished.is_empty();
        state.asleep
    }

    /// The session thread is awake.
    pub(super) fn wake_up(&self, rung: bool) {
        self.lock().asleep = false;
        if rung {
            let mut count = [0; 8];
            // Nothing in it is fine too: it was rung and read before.
            let _ = rustix::io::read(&self.bell, &mut count);
        }
    }

    #[expect(clippy::host_endian_bytes, reason = "an eventfd takes a number in the machine's own order")]
    fn ring(&self) {
        // The counter cannot overflow before 2^64 rings, which is the only way this write can fail.
        let _ = rustix::io::write(self.bell.as_fd(), &1_u64.to_ne_bytes());
    }

    pub(super) fn wait_quiet(&self) {
        let busy = |state: &mut State| state.at_device > 0;
        drop(self.quiet.wait_while(self.lock(), busy).unwrap_or_else(PoisonError::into_inner));
    }

    /// The reply to a request. Its memory is given back when it has left.
    pub(super) fn reply(
        &self,
        cookie: u64,
        outcome: Result<(), IoError>,
        memory: Option<Transfer>,
    ) -> Message {
        match (outcome, memory) {
            (Ok(()), Some(Transfer { reads: true, offset, buf })) => self.data(cookie, offset, buf),
            (Ok(()), None) => Message::new(&simple_reply(0, cookie), &[], None),
            (Ok(()), Some(written)) => Message::new(&simple_reply(0, cookie), &[], None).keeping(written.buf),
            (Err(error), None) => self.refusal(cookie, &error, false),
            (Err(error), Some(failed)) => self.refusal(cookie, &error, failed.reads).keeping(failed.buf),
        }
    }

    fn data(&self, cookie: u64, offset: u64, buf: IoBuf) -> Message {
        let charge = buf.len();
        let message = if self.structured {
            let length = u32::try_from(buf.len() + 8).expect("a read is limited");
            let head = chunk(ChunkKind::OffsetData, true, cookie, length);
            Message::new(&head, &offset.to_be_bytes(), Some(buf))
        } else {
            Message::new(&simple_reply(0, cookie), &[], Some(buf))
        };
        message.charging(charge)
    }

    pub(super) fn refusal(&self, cookie: u64, error: &IoError, of_read: bool) -> Message {
        let number = error_to_wire(error.errno());
        if !(self.structured && of_read) {
            return Message::new(&simple_reply(number, cookie), &[], None);
        }
        let text = error.to_string();
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
        let length = u32::try_from(text.len()).expect("a short text");
        let mut more = number.to_be_bytes().to_vec();
        more.extend_from_slice(&u16::try_from(length).expect("a short text").to_be_bytes());
        let body = AlignedBuf::copy_of(text);
        Message::new(&chunk(ChunkKind::Error, true, cookie, length + 6), &more, Some(body.into()))
    }
}

/// The memory of a read or a write.
pub(super) struct Transfer {
    pub(super) reads: bool,
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
}
