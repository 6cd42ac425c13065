//! One client after the handshake: its requests go to the device, the outcomes back.
//!
//! ```text
//!   session thread:  replies that are finished -> socket     socket -> requests -> device.submit
//!         ^ bell, only when it sleeps                                                 |
//!         +------------------------- finished replies <---- completions <------------+
//! ```
//! Replies that finish together leave together.
//!
//! **Invariants:** what a client keeps busy is limited: requests and bytes that are neither answered nor taken off by the
//! client. A client that does not read its replies is not read from. [`run`] returns when nothing of the client can reach
//! the device any more.

use std::io;
use std::sync::Arc;

use super::buffers::Buffers;
use super::export::NbdExport;
use super::handshake::{CONTEXT, Chosen};
use super::reply::{Shared, Transfer};
use super::request::{Plan, Rules, plan};
use crate::nbd::format::{ChunkKind, Command, REQUEST_BYTES, Request, TRANSFER_BYTES_MAX, chunk};
use crate::nbd::inbox::{Filled, Inbox};
use crate::nbd::outbox::{Message, Outbox};
use crate::nbd::socket::{Ready, Socket};
use crate::{AlignedBuf, Completion, IoBuf, IoError, IoOp, IoRequest};

/// Requests of a client that are not answered yet, at most.
const REQUESTS_MAX: usize = 256;
/// Bytes of their data, at most; a single request may always have as much as it is allowed to ask for.
const BYTES_MAX: usize = TRANSFER_BYTES_MAX as usize;
/// Extents that one answer about allocation has at most.
const EXTENTS_MAX: usize = 1024;
/// Flags of an extent: it is a hole, and reads zeros.
const HOLE_AND_ZERO: u32 = 3;

/// Serves a client until it leaves, and all that it has begun is done.
pub(super) fn run(socket: Socket, inbox: Inbox, chosen: Chosen) -> Result<(), String> {
    let shared = Shared::new(chosen.structured).map_err(|error| error.to_string())?;
    let mut session = Session {
        socket,
        inbox,
        outbox: Outbox::default(),
        buffers: Buffers::default(),
        rules: Rules {
            geometry: chosen.export.device.geometry(),
            read_only: chosen.export.read_only,
            allocation: chosen.allocation,
        },
        export: chosen.export,
        receiving: Receiving::Head,
        shared: Arc::clone(&shared),
        busy: Busy::default(),
    };
    let ended = session.serve();
    // Whoever hears that the session is over may rely on it: nothing of it is on its way to the device.
    shared.wait_quiet();
    ended
}

/// What the client keeps busy.
#[derive(Debug, Default)]
struct Busy {
    requests: usize,
    bytes: usize,
}

impl Busy {
    /// Whether a request with `bytes` of data may begin.
    fn has_room(&self, bytes: usize) -> bool {
        self.requests == 0 || (self.requests < REQUESTS_MAX && self.bytes + bytes <= BYTES_MAX)
    }
}

/// What the next bytes are.
enum Receiving {
    Head,
    /// Data of a write.
    Data {
        request: Request,
        fua: bool,
        buf: IoBuf,
        left: IoBuf,
    },
    /// Data of a write that is not done.
    Refused {
        cookie: u64,
        errno: i32,
        left: usize,
    },
}

/// What came of looking at the inbox.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Took {
    /// A request was begun.
    Something,
    /// More bytes must come first.
    NeedsBytes,
    /// Room must come first.
    NeedsRoom,
    /// The client leaves.
    Left,
}

struct Session {
    socket: Socket,
    inbox: Inbox,
    outbox: Outbox,
    buffers: Buffers,
    rules: Rules,
    export: NbdExport,
    receiving: Receiving,
    shared: Arc<Shared>,
    busy: Busy,
}

impl Session {
    fn serve(&mut self) -> Result<(), String> {
        let lost = |error: io::Error| format!("the connection broke: {error}");
        loop {
            let took = self.take_requests()?;
            if took == Took::Left {
                return self.say_goodbye().map_err(lost);
            }
            let before = self.busy.requests;
            let blocked = !self.send().map_err(lost)?;
            if took == Took::NeedsRoom && self.busy.requests < before {
                continue;
            }
            let wants_bytes = took == Took::NeedsBytes;
            let ready = self.sleep(wants_bytes, blocked).map_err(lost)?;
            if wants_bytes && ready.receive {
                if !self.receive().map_err(lost)? {
                    return Ok(());
                }
            } else if ready.broken {
                return Err("the client is gone".to_owned());
            }
        }
    }

    /// Sends what is finished; `false` when the socket takes no more.
    fn send(&mut self) -> io::Result<bool> {
        self.shared.take_finished(&mut self.outbox);
        let (buffers, busy) = (&mut self.buffers, &mut self.busy);
        self.outbox.send(&self.socket, |sent| {
            busy.requests -= 1;
            busy.bytes -= sent.charge();
            if let Some(memory) = sent.into_memory() {
                buffers.give_back(memory);
            }
        })
    }

    /// After the client has said that it leaves: what it has begun is still answered, as far as it listens.
    fn say_goodbye(&mut self) -> io::Result<()> {
        self.shared.wait_quiet();
        while !self.send()? {
            if self.socket.wait(false, true, None)?.broken {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Begins what has come in, as far as there is room.
    fn take_requests(&mut self) -> Result<Took, String> {
        loop {
            match self.take_one()? {
                Took::Something => {}
                took => return Ok(took),
            }
        }
    }

    fn take_one(&mut self) -> Result<Took, String> {
        match &mut self.receiving {
            Receiving::Head => self.take_head(),
            Receiving::Data { left, .. } => {
                let moved = self.inbox.move_into(left);
                *left = left.slice(moved..left.len());
                Ok(if left.is_empty() { self.write() } else { Took::NeedsBytes })
            }
            Receiving::Refused { cookie, errno, left } => {
                *left -= self.inbox.skip(*left);
                if *left > 0 {
                    return Ok(Took::NeedsBytes);
                }
                let (cookie, errno) = (*cookie, *errno);
                self.receiving = Receiving::Head;
                self.refuse(cookie, errno, false);
                Ok(Took::Something)
            }
        }
    }

    fn take_head(&mut self) -> Result<Took, String> {
        let Some(head) = self.inbox.peek::<REQUEST_BYTES>() else { return Ok(Took::NeedsBytes) };
        let Some(request) = Request::decode(head) else {
            return Err("the client breaks the protocol: what it sends is no request".to_owned());
        };
        let plan = plan(&request, &self.rules);
        let bytes = match &plan {
            Plan::Read | Plan::Write { .. } => request.length as usize,
            _ => 0,
        };
        if !self.busy.has_room(bytes) {
            return Ok(Took::NeedsRoom);
        }
        self.inbox.consume(REQUEST_BYTES);
        self.busy.requests += 1;
        self.begin(request, plan, bytes)
    }

    fn begin(&mut self, request: Request, plan: Plan, bytes: usize) -> Result<Took, String> {
        let Request { cookie, offset, .. } = request;
        match plan {
            Plan::Read => {
                self.busy.bytes += bytes;
                let buf = self.buffers.take(bytes);
                self.submit(
                    IoOp::Read { offset, buf: buf.clone() },
                    cookie,
                    Some(Transfer { reads: true, offset, buf }),
                );
            }
            Plan::Write { fua } => {
                self.busy.bytes += bytes;
                let buf = self.buffers.take(bytes);
                self.receiving = Receiving::Data { request, fua, left: buf.clone(), buf };
            }
            Plan::Do { op, fua } => self.submit_durable(op, cookie, fua),
            Plan::Status { one } => self.tell_allocation(&request, one),
            Plan::Refuse { errno, data: 0 } => self.refuse(cookie, errno, request.command == Command::Read),
            Plan::Refuse { errno, data } => self.receiving = Receiving::Refused { cookie, errno, left: data },
            Plan::Leave => return Ok(Took::Left),
            Plan::Hostile(what) => return Err(format!("the client breaks the protocol: {what}")),
        }
        Ok(Took::Something)
    }

    /// All data of a write has come.
    fn write(&mut self) -> Took {
        if let Receiving::Data { request, fua, buf, .. } =
            std::mem::replace(&mut self.receiving, Receiving::Head)
        {
            let offset = request.offset;
            let memory = Transfer { reads: false, offset, buf: buf.clone() };
            self.submit(IoOp::Write { offset, buf, fua }, request.cookie, Some(memory));
        }
        Took::Something
    }

    fn submit(&self, op: IoOp, cookie: u64, memory: Option<Transfer>) {
        self.shared.begin();
        let shared = Arc::clone(&self.shared);
        let done: Completion = Box::new(move |outcome| {
            let reply = shared.reply(cookie, outcome, memory);
            shared.finish(reply);
        });
        self.export.device.submit(IoRequest { op, done });
    }

    /// An operation without data; with `fua` a flush follows it before it is answered.
    fn submit_durable(&self, op: IoOp, cookie: u64, fua: bool) {
        if !fua {
            return self.submit(op, cookie, None);
        }
        self.shared.begin();
        let (shared, device) = (Arc::clone(&self.shared), Arc::clone(&self.export.device));
        let answer = move |shared: &Shared, outcome| shared.finish(shared.reply(cookie, outcome, None));
        let done: Completion = Box::new(move |outcome| match outcome {
            Ok(()) => {
                let done: Completion = Box::new(move |outcome| answer(&shared, outcome));
                device.submit(IoRequest { op: IoOp::Flush, done });
            }
            failed => answer(&shared, failed),
        });
        self.export.device.submit(IoRequest { op, done });
    }

    fn refuse(&mut self, cookie: u64, errno: i32, of_read: bool) {
        let error = IoError::Os { op: "request", offset: 0, errno };
        self.outbox.push(self.shared.refusal(cookie, &error, of_read));
    }

    fn tell_allocation(&mut self, request: &Request, one: bool) {
        let most = if one { 1 } else { EXTENTS_MAX };
        let mut content = CONTEXT.to_be_bytes().to_vec();
        let (mut at, mut left) = (request.offset, u64::from(request.length));
        for _ in 0..most {
            let (len, hole) = match &self.export.allocation {
                Some(allocation) if left > 0 => allocation.run_at(at, left),
                _ => break,
            };
            let len = len.clamp(1, left);
            content
                .extend_from_slice(&u32::try_from(len).expect("not longer than was asked for").to_be_bytes());
            content.extend_from_slice(&(if hole { HOLE_AND_ZERO } else { 0 }).to_be_bytes());
            (at, left) = (at + len, left - len);
        }
        let length = u32::try_from(content.len()).expect("a limited number of extents");
        let head = chunk(ChunkKind::BlockStatus, true, request.cookie, length);
        self.outbox.push(Message::new(&head, &[], Some(AlignedBuf::copy_of(&content).into())));
    }

    /// Receives what is there; `false` at the end of the stream.
    fn receive(&mut self) -> io::Result<bool> {
        let target = match &self.receiving {
            Receiving::Data { left, .. } => Some(left),
            _ => None,
        };
        let filled = self.inbox.fill(&self.socket, target, false)?;
        if let (Receiving::Data { left, .. }, Filled::Bytes { into_first }) = (&mut self.receiving, filled) {
            *left = left.slice(into_first..left.len());
        }
        Ok(filled != Filled::Ended)
    }

    /// Waits until there is something to do.
    fn sleep(&self, receiving: bool, blocked: bool) -> io::Result<Ready> {
        if !self.shared.fall_asleep(blocked) {
            return Ok(Ready { receive: false, broken: false, rung: false });
        }
        let ready = self.socket.wait(receiving, blocked, Some(&self.shared.bell));
        self.shared.wake_up(ready.as_ref().is_ok_and(|ready| ready.rung));
        ready
    }
}
