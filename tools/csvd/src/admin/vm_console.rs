//! `vm console`: pieces of what a VM says, from wherever it runs.
//!
//! ```text
//!   what do the records say? --> ask the owner --something--> the user
//!        ^  runs, moves, boots again    | nothing, or it cannot tell
//!        '------------------------------+-- stopped, failed, saved --> the last piece says what has become of it
//! ```
//! The records are read before the owner is asked: when they say that a VM has ended, its owner has all that it has said.

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use futures::stream;
use lockmgr::cluster::{VmRecord, VmState};

use super::Streamed;
use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::{forward, view, vms};

/// Between two questions to an owner that cannot answer, unless its record changes.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// So often in a row it may not answer, while the record says that the VM is there.
const FAILURES_MAX: u32 = 30;

/// Pieces of the console, until there are no more.
pub(super) fn pieces(
    core: &Arc<Core>,
    request: pb::VmConsoleRequest,
) -> Result<Streamed<pb::ConsoleChunk>, Error> {
    view::vm(&core.state(), &request.name)?;
    let reading = Reading { core: Arc::clone(core), request, begun: false, over: false };
    Ok(Box::pin(stream::unfold(Some(reading), |reading| async move {
        let mut reading = reading?;
        match reading.next().await {
            Ok(None) => None,
            Ok(Some(chunk)) => {
                let more = !reading.over;
                Some((Ok(chunk), more.then_some(reading)))
            }
            Err(error) => Some((Err(error.into()), None)),
        }
    })))
}

/// A console that somebody reads.
struct Reading {
    core: Arc<Core>,
    /// What to ask for next.
    request: pb::VmConsoleRequest,
    /// An owner has answered.
    begun: bool,
    /// There is no next piece.
    over: bool,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<pb::ConsoleChunk>, Error> {
        let endless = self.request.follow && self.request.limit_ms == 0;
        let mut failures = 0;
        loop {
            let record = view::vm(&self.core.state(), &self.request.name)?.clone();
            match (self.ask(&record).await, ending(&record)) {
                (Ok(chunk), _) if !chunk.data.is_empty() => {
                    (self.request.from, self.request.boot) = (chunk.next, chunk.boot);
                    // With a limit, the first piece that was waited for is the last.
                    self.over = self.request.follow && !endless;
                    return Ok(Some(chunk));
                }
                (Ok(_), _) if !endless => return Ok(None),
                (Ok(_), Some(ended)) => return Ok(Some(self.end(ended))),
                // One that has never been heard of is not worth following.
                (Err(_), Some(ended)) if endless && self.begun => return Ok(Some(self.end(ended))),
                (Ok(chunk), None) => {
                    failures = 0;
                    if chunk.last {
                        self.await_change(&record).await;
                    }
                }
                // Where it is now is known already.
                (Err(_), None) if self.owner_differs(&record) => {}
                (Err(error), ended) => {
                    failures += 1;
                    if !endless || ended.is_some() || failures > FAILURES_MAX {
                        return Err(error);
                    }
                    self.await_change(&record).await;
                }
            }
        }
    }

    async fn ask(&mut self, record: &VmRecord) -> Result<pb::ConsoleChunk, Error> {
        let op = NodeOp::VmConsole(self.request.clone());
        match forward::ask(&self.core, record.owner, op).await? {
            NodeAnswer::Console(chunk) => {
                self.begun = true;
                Ok(chunk)
            }
            _ => Err(Error::failed("the owner's answer cannot be read")),
        }
    }

    /// The last piece, without output.
    fn end(&mut self, ended: String) -> pb::ConsoleChunk {
        self.over = true;
        let (from, boot) = (self.request.from, self.request.boot);
        pb::ConsoleChunk { from, next: from, boot, last: true, ended, ..pb::ConsoleChunk::default() }
    }

    fn owner_differs(&self, record: &VmRecord) -> bool {
        let state = self.core.state();
        state.vms.get(&record.name).is_some_and(|now| now.owner != record.owner)
    }

    /// Returns when the record is another one, or after a while.
    async fn await_change(&self, record: &VmRecord) {
        let mut records = self.core.cluster.watch();
        let changed = records.wait_for(|state| state.vms.get(&record.name) != Some(record));
        drop(tokio::time::timeout(ASK_AGAIN_AFTER, changed).await);
    }
}

/// What has become of a VM that does not go on by itself.
fn ending(record: &VmRecord) -> Option<String> {
    match record.state {
        VmState::Stopped => Some("it has stopped".to_owned()),
        VmState::Failed if record.restarts_left == 0 => Some(format!("it has failed: {}", record.reason)),
        VmState::Saved if vms::is_put_by(record) => Some("it is saved".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockmgr::NodeId;

    #[test]
    fn only_a_vm_that_nobody_starts_again_has_ended() {
        let vm = |state, restarts_left, peer| VmRecord {
            name: "web".into(),
            id: uuid::Uuid::nil(),
            owner: NodeId(1),
            epoch: 3,
            state,
            peer,
            spec: Vec::new().into(),
            saved: None,
            reason: "why".into(),
            restarts_left,
        };
        let ended = |state, restarts_left, peer| ending(&vm(state, restarts_left, peer));
        assert_eq!(ended(VmState::Stopped, 0, None).as_deref(), Some("it has stopped"));
        assert_eq!(ended(VmState::Failed, 0, None).as_deref(), Some("it has failed: why"));
        assert_eq!(ended(VmState::Saved, 0, Some(NodeId(1))).as_deref(), Some("it is saved"));
        assert_eq!(ended(VmState::Failed, 2, None), None, "it boots again");
        assert_eq!(ended(VmState::Saved, 0, Some(NodeId(2))), None, "it moves");
        for state in [VmState::Starting, VmState::Running, VmState::Paused, VmState::Migrating] {
            assert_eq!(ended(state, 0, None), None);
        }
    }
}
