//! A LUN as an open file, from the node's daemon: a process with a user and a root folder of its own finds no device.
//!
//! ```text
//!   process -- volume, client serial --> luns.sock -- csvd: may this process? opens the LUN
//!           <-- a descriptor, and whether the device takes discards; or why not
//! ```
//! One question for each connection.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use uuid::Uuid;

/// The volume's id, then the serial in little-endian order.
const QUESTION_BYTES: usize = 24;
/// A daemon or process that is silent for so long is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(10);
const WORDS_BYTES_MAX: u64 = 1024;

const REFUSED: u8 = 0;
const FILE: u8 = 1;
const FILE_WITH_DISCARDS: u8 = 2;

/// What a process asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LunQuestion {
    /// The volume on the LUN.
    pub volume: Uuid,
    /// The csvfs client that the process is.
    pub serial: u64,
}

/// An open LUN.
#[derive(Debug)]
pub struct OpenLun {
    /// For reading and writing, direct.
    pub file: File,
    /// Whether the device takes discards.
    pub can_discard: bool,
}

/// Asks the daemon at `socket`.
///
/// # Errors
/// Why there is no LUN, in the daemon's words where it has answered.
pub(crate) fn ask(socket: &Path, question: LunQuestion) -> io::Result<OpenLun> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&encode(question))?;
    let (mut kind, mut file) = ([REFUSED], None);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(&stream, &mut [IoSliceMut::new(&mut kind)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            file = files.last();
        }
    }
    match (got.bytes, kind[0], file) {
        (1, FILE | FILE_WITH_DISCARDS, Some(file)) => {
            Ok(OpenLun { file: file.into(), can_discard: kind[0] == FILE_WITH_DISCARDS })
        }
        (1, REFUSED, _) => {
            let mut why = String::new();
            stream.take(WORDS_BYTES_MAX).read_to_string(&mut why)?;
            Err(io::Error::other(why))
        }
        _ => Err(io::Error::other("the node's daemon gave no file")),
    }
}

/// Answers the one question of a connection.
///
/// # Errors
/// When the process does not ask, or does not take its answer.
pub fn answer_lun_question(
    mut stream: UnixStream,
    find: impl FnOnce(LunQuestion) -> Result<OpenLun, String>,
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut question = [0; QUESTION_BYTES];
    stream.read_exact(&mut question)?;
    match find(decode(question)) {
        Ok(lun) => {
            let kind = if lun.can_discard { FILE_WITH_DISCARDS } else { FILE };
            let files = [lun.file.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut beside = SendAncillaryBuffer::new(&mut space);
            // There is room for one, which this is.
            beside.push(SendAncillaryMessage::ScmRights(&files));
            sendmsg(&stream, &[IoSlice::new(&[kind])], &mut beside, SendFlags::NOSIGNAL)?;
        }
        Err(why) => {
            stream.write_all(&[REFUSED])?;
            stream.write_all(why.as_bytes())?;
        }
    }
    stream.shutdown(Shutdown::Both)
}

fn encode(question: LunQuestion) -> [u8; QUESTION_BYTES] {
    let mut bytes = [0; QUESTION_BYTES];
    bytes[..16].copy_from_slice(question.volume.as_bytes());
    bytes[16..].copy_from_slice(&question.serial.to_le_bytes());
    bytes
}

fn decode(bytes: [u8; QUESTION_BYTES]) -> LunQuestion {
    let (volume, serial) = bytes.split_at(16);
    LunQuestion {
        volume: Uuid::from_slice(volume).expect("16 bytes"),
        serial: u64::from_le_bytes(serial.try_into().expect("8 bytes")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    const QUESTION: LunQuestion = LunQuestion { volume: Uuid::from_u128(7), serial: 9 };

    fn asked(find: impl FnOnce(LunQuestion) -> Result<OpenLun, String> + Send) -> io::Result<OpenLun> {
        let folder = tempfile::TempDir::new().expect("a folder");
        let socket = folder.path().join("luns.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        thread::scope(|scope| {
            scope.spawn(|| answer_lun_question(listener.accept().expect("somebody").0, find));
            ask(&socket, QUESTION)
        })
    }

    #[test]
    fn the_file_that_was_asked_for_is_handed_over_open() {
        for can_discard in [false, true] {
            let mut lun = asked(|question| {
                assert_eq!(question, QUESTION);
                let mut file = tempfile::tempfile().map_err(|error| error.to_string())?;
                file.write_all(b"content").map_err(|error| error.to_string())?;
                Ok(OpenLun { file, can_discard })
            })
            .expect("a file");
            assert_eq!(lun.can_discard, can_discard);
            let mut text = String::new();
            io::Seek::rewind(&mut lun.file).expect("it is open");
            lun.file.read_to_string(&mut text).expect("it is readable");
            assert_eq!(text, "content");
        }
    }

    #[test]
    fn a_refusal_says_why() {
        let why = asked(|_| Err("there is no such volume".to_owned())).expect_err("refused");
        assert_eq!(why.to_string(), "there is no such volume");
    }

    #[test]
    fn a_daemon_that_says_nothing_gives_no_file() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let socket = folder.path().join("luns.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        thread::scope(|scope| {
            scope.spawn(|| drop(listener.accept()));
            ask(&socket, QUESTION).expect_err("there is no answer");
        });
        ask(&folder.path().join("none"), QUESTION).expect_err("there is nobody");
    }
}
