//! What the daemon asks of an `hv` process, over its control socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use api::Error;
use hv::control as pb;
use pb::control::Op;
use pb::control_reply::Result as Answer;
use prost::Message;
use wire::{Connection, Local, RefuseAll, connect_unix, service};

/// Longest time for requests that only look at or flip a state.
const QUICK: Duration = Duration::from_secs(10);
/// Longest time for requests that write the VM's memory or flush its disks.
const LONG: Duration = Duration::from_secs(120);
/// Longest time for a pass over a VM's memory between process and volume; the guest runs meanwhile.
const COPY: Duration = Duration::from_secs(3600);

/// The control socket of one process. Each caller has a connection of its own, so that a call that waits for console
/// output holds nobody up.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    socket: PathBuf,
    local: Local,
}

impl Control {
    pub(super) fn new(socket: &Path, local: Local) -> Self {
        Self { socket: socket.to_path_buf(), local }
    }

    async fn connect(&self) -> Result<Connection, Error> {
        connect_unix(&self.socket, &self.local, Arc::new(RefuseAll))
            .await
            .map_err(|error| Error::failed(error.explain()).during("connecting to the VM's process"))
    }

    /// A connection of its own for many requests, one after the other.
    pub(super) async fn session(&self) -> Result<Session, Error> {
        Ok(Session(self.connect().await?))
    }

    async fn ask(&self, op: Op, limit: Duration) -> Result<Answer, Error> {
        let connection = tokio::time::timeout(limit, self.connect()).await;
        call(&connection.map_err(|_| late(limit))??, op, limit).await
    }

    /// Ends the noting of written pages, and lets the guest run as fast as it can.
    pub(super) async fn untrack(&self) -> Result<(), Error> {
        self.ask(Op::Track(pb::Track { on: false }), LONG).await.map(drop)
    }

    pub(super) async fn status(&self) -> Result<pb::StatusReply, Error> {
        self.status_within(Duration::ZERO).await
    }

    /// As soon as the guest has ended, or after `limit`, which is far below [`QUICK`]. A process of an older release answers at
    /// once, and does not say that it has waited.
    pub(super) async fn status_within(&self, limit: Duration) -> Result<pb::StatusReply, Error> {
        let wait_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        match self.ask(Op::Status(pb::Status { wait_ms }), QUICK).await? {
            Answer::Status(status) => Ok(status),
            _ => Err(unexpected()),
        }
    }

    pub(super) async fn pause(&self) -> Result<(), Error> {
        self.ask(Op::Pause(pb::Pause {}), QUICK).await.map(drop)
    }

    pub(super) async fn resume(&self) -> Result<(), Error> {
        self.ask(Op::Resume(pb::Resume {}), QUICK).await.map(drop)
    }

    /// Pauses, drains, and writes memory and state to a file on the volume.
    pub(super) async fn save(&self, volume: &str, path: &str) -> Result<pb::SaveReply, Error> {
        let op = Op::Save(pb::Save { volume: volume.to_owned(), path: path.to_owned() });
        match self.ask(op, LONG).await? {
            Answer::Save(saved) => Ok(saved),
            _ => Err(unexpected()),
        }
    }

    /// Writes memory to a file on the volume while the guest runs; a save to the same file writes the rest.
    pub(super) async fn copy_memory(&self, volume: &str, path: &str) -> Result<(), Error> {
        let op = Op::CopyMemory(pb::CopyMemory { volume: volume.to_owned(), path: path.to_owned() });
        self.ask(op, COPY).await.map(drop)
    }

    /// Returns when the memory of a guest that goes on from a saved state is all there.
    pub(super) async fn await_memory(&self) -> Result<(), Error> {
        self.ask(Op::AwaitMemory(pb::AwaitMemory {}), COPY).await.map(drop)
    }

    /// Undoes a save: the guest runs on, its disks in the images that are named.
    pub(super) async fn abandon(&self, disks: Vec<pb::DiskPlace>) -> Result<(), Error> {
        self.ask(Op::Abandon(pb::Abandon { disks }), LONG).await.map(drop)
    }

    /// The process owns the VM from here on: disks are opened for writing, the guest runs.
    pub(super) async fn activate(&self) -> Result<(), Error> {
        self.ask(Op::Activate(pb::Activate {}), LONG).await.map(drop)
    }

    pub(super) async fn stop(&self, force: bool) -> Result<(), Error> {
        self.ask(Op::Stop(pb::Stop { force }), LONG).await.map(drop)
    }

    /// Requests that wait for space are done once more.
    pub(super) async fn retry(&self) -> Result<(), Error> {
        self.ask(Op::Retry(pb::Retry {}), QUICK).await.map(drop)
    }

    /// Types at the serial console; gives how many bytes were taken.
    pub(super) async fn type_in(&self, data: Vec<u8>) -> Result<u64, Error> {
        match self.ask(Op::Type(pb::Type { data }), QUICK).await? {
            Answer::Type(reply) => Ok(reply.taken),
            _ => Err(unexpected()),
        }
    }

    /// Adds, removes, resizes or limits a disk, or changes the balloon.
    pub(super) async fn disk(&self, op: Op) -> Result<(), Error> {
        self.ask(op, LONG).await.map(drop)
    }

    /// Begins work on the image of a disk.
    pub(super) async fn begin_image(&self, work: pb::ImageWork) -> Result<(), Error> {
        self.ask(Op::ImageWork(work), LONG).await.map(drop)
    }

    /// How far it is, as soon as that is something else than version `seen`.
    pub(super) async fn watch_image(&self, seen: u64) -> Result<pb::ImageProgress, Error> {
        match self.ask(Op::ImageWatch(pb::ImageWatch { seen }), QUICK).await? {
            Answer::Image(progress) => Ok(progress),
            _ => Err(unexpected()),
        }
    }

    /// Answers a snapshot that asks whether its new image is the disk.
    pub(super) async fn decide_image(&self, go: bool) -> Result<(), Error> {
        self.ask(Op::ImageDecide(pb::ImageDecide { go }), QUICK).await.map(drop)
    }

    /// A part of the console, from byte `from` of boot `boot` on.
    pub(super) async fn console(
        &self,
        boot: u64,
        from: u64,
        follow: bool,
    ) -> Result<pb::ConsoleReply, Error> {
        match self.ask(Op::Console(pb::Console { from, follow, boot }), LONG).await? {
            Answer::Console(chunk) => Ok(chunk),
            _ => Err(unexpected()),
        }
    }
}

/// A connection to a process for the many requests of a live move.
#[derive(Debug)]
pub(crate) struct Session(Connection);

impl Session {
    /// Which memfd holds the RAM.
    pub(super) async fn ram(&self) -> Result<pb::RamReply, Error> {
        match call(&self.0, Op::Ram(pb::Ram {}), QUICK).await? {
            Answer::Ram(ram) => Ok(ram),
            _ => Err(unexpected()),
        }
    }

    /// Begins to note which pages are written.
    pub(super) async fn track(&self, on: bool) -> Result<(), Error> {
        call(&self.0, Op::Track(pb::Track { on }), LONG).await.map(drop)
    }

    /// Begins a pass; gives the number of written pages.
    pub(super) async fn fetch(&self) -> Result<u64, Error> {
        match call(&self.0, Op::Fetch(pb::Fetch {}), LONG).await? {
            Answer::Fetch(fetched) => Ok(fetched.pages),
            _ => Err(unexpected()),
        }
    }

    /// The written pages of a part of RAM, a bit each: exactly as many words as the pages need.
    pub(super) async fn take(&self, first_page: u64, pages: u64) -> Result<Vec<u64>, Error> {
        match call(&self.0, Op::Take(pb::Take { first_page, pages }), LONG).await? {
            Answer::Take(taken) if taken.bits.len() as u64 == pages.div_ceil(64) => Ok(taken.bits),
            _ => Err(unexpected()),
        }
    }

    /// A VM that came over the network: RAM is there, this is the rest.
    pub(super) async fn load(&self, state: Vec<u8>) -> Result<(), Error> {
        call(&self.0, Op::Load(pb::Load { state }), LONG).await.map(drop)
    }

    /// The process owns the VM from here on: disks are opened for writing, the guest runs.
    pub(super) async fn activate(&self) -> Result<(), Error> {
        call(&self.0, Op::Activate(pb::Activate {}), LONG).await.map(drop)
    }

    /// Holds the guest back for this share of its time.
    pub(super) async fn hold_back(&self, percent: u8) -> Result<(), Error> {
        call(&self.0, Op::Throttle(pb::Throttle { percent: percent.into() }), QUICK).await.map(drop)
    }

    /// Pauses the guest, flushes and closes the disks, gives the state and which of its `pages` are left to send.
    pub(super) async fn halt(&self, pages: u64) -> Result<pb::HaltReply, Error> {
        match call(&self.0, Op::Halt(pb::Halt {}), LONG).await? {
            Answer::Halt(halted)
                if halted.rest.is_empty() || halted.rest.len() as u64 == pages.div_ceil(64) =>
            {
                Ok(halted)
            }
            _ => Err(unexpected()),
        }
    }
}

async fn call(connection: &Connection, op: Op, limit: Duration) -> Result<Answer, Error> {
    let body = pb::Control { op: Some(op) }.encode_to_vec();
    let called = tokio::time::timeout(limit, connection.call(service::HV, body.into())).await;
    let reply = called.map_err(|_| late(limit))?.map_err(|error| Error::failed(error.explain()))?;
    match pb::ControlReply::decode(reply).map_err(Error::failed)?.result {
        Some(Answer::Refused(refused)) => Err(Error::conflict(refused.message).hint(refused.hint)),
        Some(answer) => Ok(answer),
        None => Err(Error::failed("the VM's process gave an empty answer")),
    }
}

fn late(limit: Duration) -> Error {
    Error::failed(format!("the VM's process did not answer within {} s", limit.as_secs()))
}

fn unexpected() -> Error {
    Error::failed("the VM's process answered something else").hint("is hv of the same version as csvd?")
}
