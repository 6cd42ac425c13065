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

    async fn ask(&self, op: Op, limit: Duration) -> Result<Answer, Error> {
        let body = pb::Control { op: Some(op) }.encode_to_vec();
        let call = async {
            let connection = self.connect().await?;
            connection.call(service::HV, body.into()).await.map_err(|error| Error::failed(error.explain()))
        };
        let reply = tokio::time::timeout(limit, call).await.map_err(|_| {
            Error::failed(format!("the VM's process did not answer within {} s", limit.as_secs()))
        })??;
        let reply = pb::ControlReply::decode(reply).map_err(Error::failed)?;
        match reply.result {
            Some(Answer::Refused(refused)) => Err(Error::conflict(refused.message).hint(refused.hint)),
            Some(answer) => Ok(answer),
            None => Err(Error::failed("the VM's process gave an empty answer")),
        }
    }

    pub(super) async fn status(&self) -> Result<pb::StatusReply, Error> {
        match self.ask(Op::Status(pb::Status {}), QUICK).await? {
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

    /// Undoes a save: the guest runs on.
    pub(super) async fn abandon(&self) -> Result<(), Error> {
        self.ask(Op::Abandon(pb::Abandon {}), LONG).await.map(drop)
    }

    /// The process owns the VM from here on: disks are opened for writing, the guest runs.
    pub(super) async fn activate(&self) -> Result<(), Error> {
        self.ask(Op::Activate(pb::Activate {}), LONG).await.map(drop)
    }

    pub(super) async fn stop(&self, force: bool) -> Result<(), Error> {
        self.ask(Op::Stop(pb::Stop { force }), LONG).await.map(drop)
    }

    pub(super) async fn console(&self, from: u64, follow: bool) -> Result<pb::ConsoleReply, Error> {
        match self.ask(Op::Console(pb::Console { from, follow }), LONG).await? {
            Answer::Console(chunk) => Ok(chunk),
            _ => Err(unexpected()),
        }
    }
}

fn unexpected() -> Error {
    Error::failed("the VM's process answered something else").hint("is hv of the same version as csvd?")
}
