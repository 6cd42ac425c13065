//! One connection to a server: requests of many threads go out, one thread takes the replies in.
//!
//! ```text
//!   any thread -- submit --> [outgoing] -- whoever finds nobody sending, sends --> socket
//!   own thread <-- replies -- socket;  completes, and sends at once what its completions have submitted
//! ```
//! A lone request leaves on its submitter's thread, without a wake-up. Under load the completions of one batch of replies
//! submit the next requests, and these leave with one system call.
//!
//! **Invariants:** one thread sends at a time, in the order of submission; each request is completed once, at the latest
//! when the connection ends.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::handshake::Export;
use super::pending::{Flight, Pending};
use super::reader::{Reader, Step, Violation};
use crate::nbd::format::{Command, Request};
use crate::nbd::inbox::{Filled, Inbox};
use crate::nbd::outbox::{Message, Outbox};
use crate::nbd::socket::Socket;
use crate::{IoBuf, IoError};

/// Requests in flight before a submitter waits.
const IN_FLIGHT_MAX: usize = 1024;

thread_local! {
    /// Address of the connection whose replies this thread takes in; 0 for all others.
    static SERVES: Cell<usize> = const { Cell::new(0) };
}

/// See the module.
pub(super) struct Connection {
    socket: Socket,
    pub(super) export: Export,
    /// Lock rank: a leaf. Held for a few instructions only; nothing is sent or completed under it.
    state: Mutex<State>,
    room: Condvar,
}

#[derive(Default)]
struct State {
    pending: Pending,
    outgoing: VecDeque<Message>,
    /// Somebody sends, and will take what is in `outgoing`.
    sending: bool,
    /// No further requests: the device is being dropped.
    closing: bool,
    /// Why the connection is over.
    ended: Option<IoError>,
}

/// A request for the server.
pub(super) struct Order {
    pub(super) command: Command,
    pub(super) flags: u16,
    pub(super) offset: u64,
    pub(super) length: u32,
    /// What a write sends.
    pub(super) body: Option<IoBuf>,
}

impl Connection {
    pub(super) fn new(socket: Socket, export: Export) -> Self {
        Self { socket, export, state: Mutex::default(), room: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the calling thread takes this connection's replies in.
    pub(super) fn is_served_here(&self) -> bool {
        SERVES.get() == std::ptr::from_ref(self).addr()
    }

    /// Starts a request; gives it back, with the reason, when the connection is over. Waits while too many are in flight.
    pub(super) fn submit(&self, order: Order, flight: Flight) -> Result<(), Box<(Flight, IoError)>> {
        let mut state = self.lock();
        if !self.is_served_here() {
            let full = |state: &mut State| state.pending.len() >= IN_FLIGHT_MAX && state.ended.is_none();
            state = self.room.wait_while(state, full).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(why) = &state.ended {
            let why = why.clone();
            return Err(Box::new((flight, why)));
        }
        let Order { command, flags, offset, length, body } = order;
        let cookie = state.pending.insert(flight);
        let request = Request { flags, command, cookie, offset, length };
        state.outgoing.push_back(Message::new(&request.encode(), &[], body));
        if !std::mem::replace(&mut state.sending, true) {
            drop(state);
            self.send_waiting();
        }
        Ok(())
    }

    /// Sends until nothing is left; the caller has set `sending`. Waits for room in the socket: the replies are taken in
    /// by another thread meanwhile.
    fn send_waiting(&self) {
        let mut outbox = Outbox::default();
        while self.take_outgoing(&mut outbox) {
            let sent = outbox.send(&self.socket, drop);
            let waited = match sent {
                Ok(true) => continue,
                Ok(false) => self.socket.wait(false, true, None).map(drop),
                Err(error) => Err(error),
            };
            if waited.is_err() {
                // The thread that takes in the replies notices it too, and tells everybody.
                self.socket.shut_down();
                return;
            }
        }
    }

    /// Moves what waits to the sender's own outbox. `false`, and nobody sends any more, when there is nothing.
    fn take_outgoing(&self, outbox: &mut Outbox) -> bool {
        let mut state = self.lock();
        outbox.append(&mut state.outgoing);
        state.sending = !outbox.is_empty() && state.ended.is_none();
        state.sending
    }

    /// Takes replies in until the connection ends, then fails what is left with the reason. Body of the own thread.
    pub(super) fn run(&self, inbox: Inbox, what: &str) {
        SERVES.set(std::ptr::from_ref(self).addr());
        let why = Taking {
            connection: self,
            reader: Reader::new(self.export.structured),
            inbox,
            outbox: Outbox::default(),
            mine: false,
        }
        .run();
        let lost = IoError::Lost { what: what.to_owned(), why };
        self.socket.shut_down();
        let (flights, unsent) = {
            let mut state = self.lock();
            state.ended = Some(lost.clone());
            (state.pending.take_all(), std::mem::take(&mut state.outgoing))
        };
        drop(unsent);
        self.room.notify_all();
        for flight in flights {
            flight.finish(Err(lost.clone()));
        }
        SERVES.set(0);
    }

    /// Ends the connection at once; what is in flight fails.
    pub(super) fn abort(&self) {
        self.socket.shut_down();
    }

    /// Ends the connection when all that is in flight is done.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        if state.pending.len() == 0 {
            drop(state);
            self.say_goodbye();
        }
    }

    /// Tells the server that this is an orderly end.
    fn say_goodbye(&self) {
        let request = Request { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, length: 0 };
        // Nothing is owed to a server that does not read: it notices the end in any case.
        let bytes = request.encode();
        drop(self.socket.send(std::iter::once(crate::nbd::socket::Part::Bytes(&bytes))));
        self.socket.shut_down();
    }
}

/// The thread that takes replies in.
struct Taking<'a> {
    connection: &'a Connection,
    reader: Reader,
    inbox: Inbox,
    outbox: Outbox,
    /// This thread is the one that sends.
    mine: bool,
}

impl Taking<'_> {
    /// Gives the reason of the end.
    fn run(mut self) -> String {
        loop {
            self.begin_sending();
            if let Err(Violation(what)) = self.complete_all() {
                tracing::error!(what, "the NBD server breaks the protocol: the connection is closed");
                return format!("the server breaks the protocol: {what}");
            }
            let received = self.send().and_then(|()| self.receive());
            match received {
                Ok(true) => {}
                Ok(false) => return "the server has closed the connection".to_owned(),
                Err(error) => return error.to_string(),
            }
        }
    }

    /// From here on what is submitted waits until [`Self::send`], so that it leaves together.
    fn begin_sending(&mut self) {
        if !self.mine {
            self.mine = !std::mem::replace(&mut self.connection.lock().sending, true);
        }
    }

    fn complete_all(&mut self) -> Result<(), Violation> {
        loop {
            self.reader.take_data(&mut self.inbox);
            let (step, full, last) = {
                let mut state = self.connection.lock();
                let before = state.pending.len();
                let step = self.reader.step(&mut self.inbox, &mut state.pending)?;
                (step, before >= IN_FLIGHT_MAX, state.closing && state.pending.len() == 0)
            };
            let Step::Finished(flight, outcome) = step else { return Ok(()) };
            if full {
                self.connection.room.notify_all();
            }
            flight.finish(outcome);
            if last {
                self.connection.say_goodbye();
            }
        }
    }

    /// Sends what the socket takes; stays the sender while something is left.
    fn send(&mut self) -> std::io::Result<()> {
        while self.mine {
            self.mine = self.connection.take_outgoing(&mut self.outbox);
            if self.mine && !self.outbox.send(&self.connection.socket, drop)? {
                break;
            }
        }
        Ok(())
    }

    /// Receives something; `false` at the end of the stream. With something left to send it also waits for room.
    fn receive(&mut self) -> std::io::Result<bool> {
        let blocked = self.mine;
        if blocked && !self.connection.socket.wait(true, true, None)?.receive {
            return Ok(true);
        }
        match self.inbox.fill(&self.connection.socket, self.reader.target(), !blocked)? {
            Filled::Nothing => Ok(true),
            Filled::Ended => Ok(false),
            Filled::Bytes { into_first } => {
                self.reader.received(into_first);
                Ok(true)
            }
        }
    }
}
