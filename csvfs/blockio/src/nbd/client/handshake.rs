//! The client's side of the handshake: fixed newstyle, chunks if the server has them, then `GO`.

use std::io;

use crate::nbd::format::{TRANSFER_BYTES_MAX, export_flag};
use crate::nbd::inbox::{Filled, Inbox};
use crate::nbd::options::{
    FIXED_NEWSTYLE, GREETING, Info, InfoRequest, NO_ZEROES, OPTION_BYTES_MAX, OPTION_MAGIC,
    OPTION_REPLY_HEAD_BYTES, OPTIONS_MAX, decode_option_reply_head, info, option, option_head, reply,
};
use crate::nbd::socket::Socket;

/// Smallest and greatest granularity that a server may ask for.
const BLOCK_BYTES_MAX: u32 = 64 << 10;

/// What the server has told about its export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Export {
    pub(super) size_bytes: u64,
    flags: u16,
    /// Granularity of requests.
    pub(super) block_bytes: u32,
    /// Longest read or write.
    pub(super) transfer_bytes_max: u32,
    /// Reads are answered in chunks.
    pub(super) structured: bool,
}

impl Export {
    pub(super) fn is_read_only(&self) -> bool {
        self.flags & export_flag::READ_ONLY != 0
    }
    pub(super) fn can_flush(&self) -> bool {
        self.flags & export_flag::SEND_FLUSH != 0
    }
    pub(super) fn can_fua(&self) -> bool {
        self.flags & export_flag::SEND_FUA != 0
    }
    pub(super) fn can_trim(&self) -> bool {
        self.flags & export_flag::SEND_TRIM != 0
    }
    pub(super) fn can_zero(&self) -> bool {
        self.flags & export_flag::SEND_WRITE_ZEROES != 0
    }
    pub(super) fn can_multi_conn(&self) -> bool {
        self.flags & export_flag::CAN_MULTI_CONN != 0
    }
}

/// Agrees with the server on an export. The error is a sentence with the reason.
pub(super) fn negotiate(socket: &Socket, inbox: &mut Inbox, export: &str) -> Result<Export, String> {
    let mut talk = Talk { socket, inbox };
    socket.begin_handshake().map_err(|error| error.to_string())?;
    talk.greet()?;
    let structured = talk.agree_on_chunks()?;
    let found = talk.go(export, structured)?;
    socket.end_handshake().map_err(|error| error.to_string())?;
    Ok(found)
}

struct Talk<'a> {
    socket: &'a Socket,
    inbox: &'a mut Inbox,
}

struct OptionReply {
    kind: u32,
    data: Vec<u8>,
}

impl Talk<'_> {
    fn greet(&mut self) -> Result<(), String> {
        self.need(18)?;
        let greeting = self.inbox.peek::<18>().expect("they are there");
        let number = |at: usize| crate::nbd::format::be64(greeting, at);
        if number(0) != GREETING || number(8) != OPTION_MAGIC {
            return Err("what answers is no NBD server of the present style".to_owned());
        }
        let flags = crate::nbd::format::be16(greeting, 16);
        self.inbox.consume(18);
        if flags & FIXED_NEWSTYLE == 0 {
            return Err("the server is too old: it does not speak fixed newstyle".to_owned());
        }
        let ours = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.send(&ours.to_be_bytes())
    }

    fn agree_on_chunks(&mut self) -> Result<bool, String> {
        self.ask(option::STRUCTURED_REPLY, &[])?;
        Ok(self.answer(option::STRUCTURED_REPLY)?.kind == reply::ACK)
    }

    fn go(&mut self, export: &str, structured: bool) -> Result<Export, String> {
        let request = InfoRequest { name: export.to_owned(), wanted: vec![info::BLOCK_SIZE] };
        self.ask(option::GO, &request.encode())?;
        let mut found = None;
        let mut blocks = (1, TRANSFER_BYTES_MAX);
        for _ in 0..OPTIONS_MAX {
            let answer = self.answer(option::GO)?;
            match answer.kind {
                reply::ACK => {
                    let (size_bytes, flags) = found.ok_or("the server does not tell the export's size")?;
                    return check(Export {
                        size_bytes,
                        flags,
                        block_bytes: blocks.0,
                        transfer_bytes_max: blocks.1,
                        structured,
                    });
                }
                reply::INFO => match Info::decode(&answer.data) {
                    Some(Info::Export { size_bytes, flags }) => found = Some((size_bytes, flags)),
                    Some(Info::BlockSize { least, most, .. }) => blocks = (least, most),
                    Some(Info::Other) => {}
                    None => {
                        return Err("the server describes its export in bytes that cannot be read".to_owned());
                    }
                },
                kind => return Err(refusal(kind, export, &answer.data)),
            }
        }
        Err("the server does not come to an end with describing its export".to_owned())
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> Result<(), String> {
        let length = u32::try_from(data.len()).map_err(|_| "the export's name is too long".to_owned())?;
        let mut bytes = option_head(option, length).to_vec();
        bytes.extend_from_slice(data);
        self.send(&bytes)
    }

    fn answer(&mut self, asked: u32) -> Result<OptionReply, String> {
        self.need(OPTION_REPLY_HEAD_BYTES)?;
        let head = self.inbox.peek().expect("it is there");
        let (option, kind, length) =
            decode_option_reply_head(head).ok_or("the server answers in bytes that cannot be read")?;
        if option != asked || length > OPTION_BYTES_MAX {
            return Err(format!(
                "the server answers option {option} with {length} bytes; {asked} was asked for"
            ));
        }
        self.inbox.consume(OPTION_REPLY_HEAD_BYTES);
        self.need(length as usize)?;
        let data = self.inbox.bytes()[..length as usize].to_vec();
        self.inbox.consume(data.len());
        Ok(OptionReply { kind, data })
    }

    fn send(&self, bytes: &[u8]) -> Result<(), String> {
        self.socket.send_all(bytes).map_err(|error| format!("the connection broke in the handshake: {error}"))
    }

    /// Waits until `count` bytes are there; they fit the inbox.
    fn need(&mut self, count: usize) -> Result<(), String> {
        while self.inbox.bytes().len() < count {
            match self.inbox.fill(self.socket, None, true) {
                Ok(Filled::Bytes { .. }) => {}
                Ok(Filled::Nothing) => return Err("the server does not answer".to_owned()),
                Ok(Filled::Ended) => return Err("the server has closed the connection".to_owned()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err("the server does not answer".to_owned());
                }
                Err(error) => return Err(format!("the connection broke in the handshake: {error}")),
            }
        }
        Ok(())
    }
}

fn check(export: Export) -> Result<Export, String> {
    let Export { size_bytes, block_bytes, transfer_bytes_max, .. } = export;
    if !block_bytes.is_power_of_two() || block_bytes > BLOCK_BYTES_MAX || transfer_bytes_max < block_bytes {
        return Err(format!("the server wants blocks of {block_bytes} to {transfer_bytes_max} bytes"));
    }
    if i64::try_from(size_bytes).is_err() {
        return Err(format!("the server says that its export has {size_bytes} bytes"));
    }
    let whole = |bytes: u32| bytes / block_bytes * block_bytes;
    Ok(Export { transfer_bytes_max: whole(transfer_bytes_max.min(TRANSFER_BYTES_MAX)), ..export })
}

fn refusal(kind: u32, export: &str, text: &[u8]) -> String {
    let why = match kind {
        reply::ERR_UNKNOWN => format!("it has no export named `{export}`"),
        reply::ERR_TLS_REQD => "it wants TLS, which nbd:// does not do".to_owned(),
        reply::ERR_POLICY => "it does not permit it".to_owned(),
        reply::ERR_UNSUP => "it is too old: it does not know NBD_OPT_GO".to_owned(),
        reply::ERR_SHUTDOWN => "it is ending".to_owned(),
        kind if reply::is_error(kind) => format!("error {:#x}", kind & 0xffff),
        kind => format!("an answer of kind {kind}, which makes no sense here"),
    };
    let text = String::from_utf8_lossy(&text[..text.len().min(256)]);
    if text.is_empty() {
        format!("the server refuses: {why}")
    } else {
        format!("the server refuses: {why} ({})", text.escape_debug())
    }
}
