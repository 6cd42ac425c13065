//! What is typed at a VM's console: the keys of a terminal, or standard input to its end.
//!
//! ```text
//!   stdin --thread--> a few pieces --task--> csvd, as much as the guest has room for, the rest again
//! ```
//! **Invariant:** a terminal is as it was before when this is dropped.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

use api::pb::VmTypeRequest;
use api::{Client, Error, Kind};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Ctrl-], as a terminal sends it.
const LEAVE: u8 = 0x1d;
/// What one request may carry.
const PIECE_BYTES: usize = 4096;
/// Pieces that wait while a guest reads nothing. Keys beyond are not taken.
const PIECES_MAX: usize = 256;
/// A VM that moves or boots takes nothing for a moment.
const AGAIN_AFTER: Duration = Duration::from_millis(200);
const FAILURES_MAX: u32 = 150;
/// Longest time between the key that leaves and the end.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// Somebody who types.
#[derive(Debug)]
pub(super) struct Typing {
    typed: JoinHandle<Result<u64, Error>>,
    left: Arc<Notify>,
    /// Until when what was typed before the key that leaves still goes to the guest.
    goes_until: Option<Instant>,
    _raw: Option<RawTerminal>,
}

impl Typing {
    /// The keys of this terminal, each as it is pressed, until Ctrl-].
    pub(super) fn keys(client: Client, vm: &str) -> Result<Self, Error> {
        let raw = RawTerminal::enter()?;
        Self::start(client, vm, Some(raw), keys)
    }

    /// Standard input, to its end.
    pub(super) fn input(client: Client, vm: &str) -> Result<Self, Error> {
        Self::start(client, vm, None, |pieces, _| input(pieces))
    }

    fn start(
        client: Client,
        vm: &str,
        raw: Option<RawTerminal>,
        read: fn(&Sender<Vec<u8>>, &Notify),
    ) -> Result<Self, Error> {
        let (pieces, coming) = channel(PIECES_MAX);
        let left = Arc::new(Notify::new());
        let leaves = Arc::clone(&left);
        // A thread of its own, which nobody waits for at the end: it may be waiting for a key.
        Builder::new()
            .name("typing".to_owned())
            .spawn(move || read(&pieces, &leaves))
            .map_err(|error| Error::failed(format!("start of a thread: {error}")))?;
        let typed = tokio::spawn(type_all(client, vm.to_owned(), coming));
        Ok(Self { typed, left, goes_until: None, _raw: raw })
    }

    /// Returns when there is nothing more to type, with the number of bytes that the guest took. May be dropped and called again.
    pub(super) async fn end(&mut self) -> Result<u64, Error> {
        let goes_until = match self.goes_until {
            Some(moment) => moment,
            None => tokio::select! {
                typed = &mut self.typed => return typed.map_err(Error::failed)?,
                () = self.left.notified() => *self.goes_until.insert(Instant::now() + LEAVE_WITHIN),
            },
        };
        match tokio::time::timeout_at(goes_until, &mut self.typed).await {
            Ok(typed) => typed.map_err(Error::failed)?,
            // A guest that reads nothing keeps nobody here.
            Err(_) => Ok(0),
        }
    }
}

/// Body of the thread that reads keys.
fn keys(pieces: &Sender<Vec<u8>>, left: &Notify) {
    let mut bytes = [0; 256];
    loop {
        let Ok(count @ 1..) = io::stdin().lock().read(&mut bytes) else { break };
        let (typed, leaves) = before_leaving(&bytes[..count]);
        if !typed.is_empty() && pieces.try_send(typed.to_vec()).is_err() {
            // As terminals say that they take no more.
            drop(io::stderr().write_all(b"\x07"));
        }
        if leaves {
            break;
        }
    }
    left.notify_one();
}

/// Body of the thread that reads standard input. It waits for the guest.
fn input(pieces: &Sender<Vec<u8>>) {
    let mut bytes = [0; PIECE_BYTES];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut bytes) {
        if pieces.blocking_send(bytes[..count].to_vec()).is_err() {
            return;
        }
    }
}

fn before_leaving(bytes: &[u8]) -> (&[u8], bool) {
    match bytes.iter().position(|byte| *byte == LEAVE) {
        Some(at) => (&bytes[..at], true),
        None => (bytes, false),
    }
}

async fn type_all(mut client: Client, vm: String, mut pieces: Receiver<Vec<u8>>) -> Result<u64, Error> {
    let (mut typed, mut failures) = (0, 0);
    while let Some(piece) = pieces.recv().await {
        let mut rest = &piece[..];
        while !rest.is_empty() {
            let request = VmTypeRequest { name: vm.clone(), data: rest.to_vec() };
            match client.vm_type(request).await.map_err(Error::from) {
                Ok(reply) => {
                    let taken = reply.into_inner().taken;
                    let count = usize::try_from(taken).unwrap_or(rest.len()).min(rest.len());
                    rest = &rest[count..];
                    typed += count as u64;
                    failures = 0;
                }
                // It has taken something before: it is on its way to somewhere else, or boots.
                Err(error) if typed > 0 && failures < FAILURES_MAX && may_pass(&error) => {
                    failures += 1;
                    tokio::time::sleep(AGAIN_AFTER).await;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(typed)
}

fn may_pass(error: &Error) -> bool {
    matches!(error.kind, Kind::Conflict | Kind::Unreachable | Kind::Failed)
}

/// The terminal on standard input, which hands over each key as it is pressed, until this is dropped.
#[derive(Debug)]
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> Result<Self, Error> {
        let failed = |error: rustix::io::Errno| Error::failed(format!("switch of the terminal: {error}"));
        let before = tcgetattr(io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        // What is printed still begins at the left, whatever the guest ends its lines with.
        raw.output_modes = before.output_modes;
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_before_the_one_that_leaves_are_still_typed() {
        assert_eq!(before_leaving(b"abc\x03"), (&b"abc\x03"[..], false));
        assert_eq!(before_leaving(b"ab\x1dcd"), (&b"ab"[..], true));
        assert_eq!(before_leaving(b"\x1d"), (&b""[..], true));
    }
}
