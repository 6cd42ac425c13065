//! The server's side of the handshake.
//!
//! **Invariant:** a client gets a fixed number of options, each of limited length, and limited time for each: whoever does
//! not come to the point is sent away.

use super::export::{NbdExport, NbdExports};
use crate::nbd::format::{TRANSFER_BYTES_MAX, export_flag};
use crate::nbd::inbox::{Filled, Inbox};
use crate::nbd::options::{
    BASE_ALLOCATION, ContextRequest, FIXED_NEWSTYLE, GREETING, Info, InfoRequest, NAME_BYTES_MAX, NO_ZEROES,
    OPTION_BYTES_MAX, OPTION_HEAD_BYTES, OPTION_MAGIC, OPTIONS_MAX, decode_option_head, option, option_reply,
    reply, text,
};
use crate::nbd::socket::Socket;

/// Calls in which a handshake must have come in. A client that sends byte by byte is cut off.
const RECEIVES_MAX: usize = 256;
/// What clients are told to prefer.
const PREFERRED_BYTES: u32 = 4096;
/// Number of the one context that there is.
pub(super) const CONTEXT: u32 = 1;
/// Zeros after the reply to `EXPORT_NAME`, unless the client wants none.
const PADDING_BYTES: usize = 124;

/// What the client has chosen.
pub(super) struct Chosen {
    pub(super) export: NbdExport,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
    /// The client may ask which parts are allocated.
    pub(super) allocation: bool,
}

/// Talks with a client until it has chosen. Nothing: it has left in order.
pub(super) fn negotiate(
    socket: &Socket,
    inbox: &mut Inbox,
    exports: &dyn NbdExports,
) -> Result<Option<Chosen>, String> {
    let broken = |error: std::io::Error| format!("the connection broke in the handshake: {error}");
    socket.begin_handshake().map_err(broken)?;
    let mut talk =
        Talk { socket, inbox, exports, receives: 0, structured: false, context_of: None, pads: true };
    let chosen = talk.run()?;
    socket.end_handshake().map_err(broken)?;
    Ok(chosen)
}

struct Talk<'a> {
    socket: &'a Socket,
    inbox: &'a mut Inbox,
    exports: &'a dyn NbdExports,
    receives: usize,
    structured: bool,
    /// Export for which the allocation context was agreed on.
    context_of: Option<String>,
    /// The client wants the padding of `EXPORT_NAME`.
    pads: bool,
}

/// What follows an option.
enum Next {
    Further,
    Left,
    Transmission(Chosen),
}

impl Talk<'_> {
    fn run(&mut self) -> Result<Option<Chosen>, String> {
        self.greet()?;
        for _ in 0..OPTIONS_MAX {
            let Some((option, data)) = self.option()? else { continue };
            match self.serve(option, &data)? {
                Next::Further => {}
                Next::Left => return Ok(None),
                Next::Transmission(chosen) => return Ok(Some(chosen)),
            }
        }
        Err("the client does not come to an end with its options".to_owned())
    }

    fn greet(&mut self) -> Result<(), String> {
        let mut greeting = GREETING.to_be_bytes().to_vec();
        greeting.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        greeting.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
        self.send(&greeting)?;
        self.need(4)?;
        let flags = u32::from_be_bytes(*self.inbox.peek().expect("they are there"));
        self.inbox.consume(4);
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(format!("the client wants unknown features: {flags:#x}"));
        }
        self.pads = flags & u32::from(NO_ZEROES) == 0;
        Ok(())
    }

    /// The next option; nothing when it was too long and has been refused.
    fn option(&mut self) -> Result<Option<(u32, Vec<u8>)>, String> {
        self.need(OPTION_HEAD_BYTES)?;
        let head = self.inbox.peek().expect("it is there");
        let (option, length) = decode_option_head(head).ok_or("what the client sends is no option")?;
        self.inbox.consume(OPTION_HEAD_BYTES);
        if length > OPTION_BYTES_MAX {
            self.discard(length as usize)?;
            self.refuse(option, reply::ERR_TOO_BIG, "the option is too long")?;
            return Ok(None);
        }
        self.need(length as usize)?;
        let data = self.inbox.bytes()[..length as usize].to_vec();
        self.inbox.consume(data.len());
        Ok(Some((option, data)))
    }

    fn serve(&mut self, option: u32, data: &[u8]) -> Result<Next, String> {
        match option {
            option::EXPORT_NAME => return self.export_name(data).map(Next::Transmission),
            option::GO | option::INFO => return self.info(option, data),
            option::ABORT => {
                // It leaves whatever comes of the answer.
                drop(self.answer(option, reply::ACK, &[]));
                return Ok(Next::Left);
            }
            option::LIST => self.list(data)?,
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                self.answer(option, reply::ACK, &[])?;
            }
            option::STRUCTURED_REPLY => self.refuse(option, reply::ERR_INVALID, "it takes no data")?,
            option::SET_META_CONTEXT | option::LIST_META_CONTEXT => self.context(option, data)?,
            _ => self.refuse(option, reply::ERR_UNSUP, "")?,
        }
        Ok(Next::Further)
    }

    /// The option of old clients: there is no way to refuse but closing.
    fn export_name(&mut self, data: &[u8]) -> Result<Chosen, String> {
        let name = std::str::from_utf8(data).map_err(|_| "the export's name is no text")?;
        let export = self.exports.find(name)?;
        let mut answer = export.device.geometry().size_bytes.to_be_bytes().to_vec();
        answer.extend_from_slice(&flags(&export).to_be_bytes());
        answer.resize(answer.len() + if self.pads { PADDING_BYTES } else { 0 }, 0);
        self.send(&answer)?;
        Ok(self.chosen(name, export))
    }

    fn info(&mut self, option: u32, data: &[u8]) -> Result<Next, String> {
        let Some(request) = InfoRequest::decode(data) else {
            self.refuse(option, reply::ERR_INVALID, "the request cannot be read")?;
            return Ok(Next::Further);
        };
        let export = match self.exports.find(&request.name) {
            Ok(export) => export,
            Err(why) => {
                self.refuse(option, reply::ERR_UNKNOWN, &why)?;
                return Ok(Next::Further);
            }
        };
        let geometry = export.device.geometry();
        let size = Info::Export { size_bytes: geometry.size_bytes, flags: flags(&export) };
        let least = geometry.block_bytes;
        let blocks =
            Info::BlockSize { least, preferred: PREFERRED_BYTES.max(least), most: TRANSFER_BYTES_MAX };
        for info in [size, blocks] {
            self.answer(option, reply::INFO, &info.encode())?;
        }
        self.answer(option, reply::ACK, &[])?;
        Ok(if option == option::GO {
            Next::Transmission(self.chosen(&request.name, export))
        } else {
            Next::Further
        })
    }

    fn chosen(&mut self, name: &str, export: NbdExport) -> Chosen {
        let allocation = self.context_of.take().is_some_and(|of| of == name) && export.allocation.is_some();
        Chosen { export, structured: self.structured, allocation }
    }

    fn list(&mut self, data: &[u8]) -> Result<(), String> {
        if !data.is_empty() {
            return self.refuse(option::LIST, reply::ERR_INVALID, "it takes no data");
        }
        for name in self.exports.names().iter().filter(|name| name.len() <= NAME_BYTES_MAX) {
            self.answer(option::LIST, reply::SERVER, &text(name))?;
        }
        self.answer(option::LIST, reply::ACK, &[])
    }

    fn context(&mut self, option: u32, data: &[u8]) -> Result<(), String> {
        let Some(request) = ContextRequest::decode(data).filter(|_| self.structured) else {
            return self.refuse(
                option,
                reply::ERR_INVALID,
                "it needs structured replies, a name and queries",
            );
        };
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            self.context_of = None;
        }
        let export = match self.exports.find(&request.name) {
            Ok(export) => export,
            Err(why) => return self.refuse(option, reply::ERR_UNKNOWN, &why),
        };
        let any = !setting && request.queries.is_empty();
        let asked = |query: &String| query == BASE_ALLOCATION || (!setting && query == "base:");
        if export.allocation.is_some() && (any || request.queries.iter().any(asked)) {
            let mut found = if setting { CONTEXT } else { 0 }.to_be_bytes().to_vec();
            found.extend_from_slice(BASE_ALLOCATION.as_bytes());
            self.answer(option, reply::META_CONTEXT, &found)?;
            if setting {
                self.context_of = Some(request.name);
            }
        }
        self.answer(option, reply::ACK, &[])
    }

    fn refuse(&self, option: u32, kind: u32, why: &str) -> Result<(), String> {
        self.answer(option, kind, why.as_bytes())
    }

    fn answer(&self, option: u32, kind: u32, data: &[u8]) -> Result<(), String> {
        self.send(&option_reply(option, kind, data))
    }

    fn send(&self, bytes: &[u8]) -> Result<(), String> {
        self.socket.send_all(bytes).map_err(|error| format!("the connection broke in the handshake: {error}"))
    }

    /// Waits until `count` bytes are there; they fit the inbox.
    fn need(&mut self, count: usize) -> Result<(), String> {
        while self.inbox.bytes().len() < count {
            self.receive()?;
        }
        Ok(())
    }

    fn discard(&mut self, mut count: usize) -> Result<(), String> {
        loop {
            count -= self.inbox.skip(count);
            if count == 0 {
                return Ok(());
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Result<(), String> {
        self.receives += 1;
        if self.receives > RECEIVES_MAX {
            return Err("the client takes too long over the handshake".to_owned());
        }
        match self.inbox.fill(self.socket, None, true) {
            Ok(Filled::Bytes { .. }) => Ok(()),
            Ok(Filled::Ended) => Err("the client has left in the handshake".to_owned()),
            Ok(Filled::Nothing) => Err("the client says nothing".to_owned()),
            Err(error) => Err(format!("the connection broke in the handshake: {error}")),
        }
    }
}

/// What the export can do. All connections share one device, so a flush on one covers what the others have completed.
fn flags(export: &NbdExport) -> u16 {
    let always = export_flag::HAS_FLAGS
        | export_flag::SEND_FLUSH
        | export_flag::SEND_FUA
        | export_flag::SEND_DF
        | export_flag::CAN_MULTI_CONN;
    if export.read_only {
        return always | export_flag::READ_ONLY;
    }
    let trim = if export.device.geometry().can_discard { export_flag::SEND_TRIM } else { 0 };
    always | export_flag::SEND_WRITE_ZEROES | trim
}
