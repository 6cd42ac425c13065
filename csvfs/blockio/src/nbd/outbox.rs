//! Messages on their way out: a head of a few bytes, and perhaps memory after it.
//!
//! All that waits goes with one system call, as far as the socket takes it.
//!
//! **Invariant:** messages leave whole and in their order.

use std::collections::VecDeque;
use std::io;

use super::socket::{Part, Socket};
use crate::IoBuf;

/// Longest head: a request, or a chunk with an offset and a size.
const HEAD_BYTES_MAX: usize = 36;
/// Bytes for which one call is made at most; the kernel takes far less at once.
const BATCH_MESSAGES_MAX: usize = 64;

/// A message.
#[derive(Debug)]
pub(crate) struct Message {
    head: [u8; HEAD_BYTES_MAX],
    head_len: usize,
    body: Option<IoBuf>,
    /// Memory that does not leave, but is free when the message has.
    kept: Option<IoBuf>,
    charge: usize,
}

impl Message {
    /// A message of `head` and `more`, which are at most [`HEAD_BYTES_MAX`] together, and `body`.
    pub(crate) fn new(head: &[u8], more: &[u8], body: Option<IoBuf>) -> Self {
        let head_len = head.len() + more.len();
        let mut message = Self { head: [0; HEAD_BYTES_MAX], head_len, body, kept: None, charge: 0 };
        message.head[..head.len()].copy_from_slice(head);
        message.head[head.len()..head_len].copy_from_slice(more);
        message
    }

    fn len(&self) -> usize {
        self.head_len + self.body.as_ref().map_or(0, IoBuf::len)
    }

    /// With memory that is free when the message has left, and is charged for until then.
    pub(crate) fn keeping(self, memory: IoBuf) -> Self {
        Self { charge: memory.len(), kept: Some(memory), ..self }
    }

    /// Notes for how many bytes the sender answers until the message has left.
    pub(crate) fn charging(self, charge: usize) -> Self {
        Self { charge, ..self }
    }

    pub(crate) fn charge(&self) -> usize {
        self.charge
    }

    /// The memory that is free when the message has left.
    pub(crate) fn into_memory(self) -> Option<IoBuf> {
        self.kept.or(self.body)
    }
}

/// Messages that wait for room in the socket.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: VecDeque<Message>,
    /// Bytes of the first message that have left.
    left: usize,
}

impl Outbox {
    pub(crate) fn push(&mut self, message: Message) {
        self.waiting.push_back(message);
    }

    pub(crate) fn append(&mut self, messages: &mut VecDeque<Message>) {
        self.waiting.append(messages);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Sends until nothing waits (`true`) or the socket takes no more (`false`). Messages that have left are given to `gone`.
    pub(crate) fn send(&mut self, socket: &Socket, mut gone: impl FnMut(Message)) -> io::Result<bool> {
        while !self.waiting.is_empty() {
            let Some(sent) = self.send_once(socket)? else { return Ok(false) };
            self.left += sent;
            while let Some(first) = self.waiting.front()
                && self.left >= first.len()
            {
                self.left -= first.len();
                gone(self.waiting.pop_front().expect("it was there just now"));
            }
        }
        Ok(true)
    }

    fn send_once(&self, socket: &Socket) -> io::Result<Option<usize>> {
        let first = self.waiting.front().expect("the caller has looked");
        let head_left = self.left.min(first.head_len);
        // The rest of a body that has left in part.
        let body = first.body.as_ref().map(|body| body.slice(self.left - head_left..body.len()));
        let begun = [
            (head_left < first.head_len).then(|| Part::Bytes(&first.head[head_left..first.head_len])),
            body.as_ref().map(Part::Memory),
        ];
        let others = self.waiting.iter().skip(1).take(BATCH_MESSAGES_MAX).flat_map(|message| {
            [Some(Part::Bytes(&message.head[..message.head_len])), message.body.as_ref().map(Part::Memory)]
        });
        socket.send(begun.into_iter().chain(others).flatten())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn messages_that_do_not_fit_the_socket_arrive_whole_and_in_order() {
        let (near, far) = UnixStream::pair().expect("a pair of sockets");
        let (near, far) = (Socket::new(near), Socket::new(far));
        let mut outbox = Outbox::default();
        let mut wanted = Vec::new();
        for number in 0..200_u8 {
            let body = (number % 3 > 0).then(|| IoBuf::zeroed(usize::from(number) * 301));
            if let Some(body) = &body {
                body.copy_from(&vec![number; body.len()]);
            }
            wanted.extend_from_slice(&[number, 1, 2]);
            wanted.extend_from_slice(&body.as_ref().map(IoBuf::to_vec).unwrap_or_default());
            outbox.push(Message::new(&[number], &[1, 2], body));
        }
        let (mut found, mut gone) = (Vec::new(), 0);
        let mut part = vec![0; 70_001];
        while found.len() < wanted.len() {
            outbox.send(&near, |_| gone += 1).expect("the socket is whole");
            let received =
                far.receive(None, &mut part, true).expect("the socket is whole").expect("it waits");
            found.extend_from_slice(&part[..received]);
        }
        assert!(outbox.is_empty() && gone == 200);
        assert!(found == wanted);
    }
}
