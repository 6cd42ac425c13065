//! Changes of the VM's record: each is one compare-and-swap.

use lockmgr::NodeId;
use lockmgr::cluster::{Command, VmRecord, VmState, VmUpdate};

/// The part of a VM's record that a move looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordView {
    /// The node that may run it.
    pub owner: NodeId,
    /// Its epoch.
    pub epoch: u64,
    /// What it does.
    pub state: VmState,
}

impl From<&VmRecord> for RecordView {
    fn from(record: &VmRecord) -> Self {
        Self { owner: record.owner, epoch: record.epoch, state: record.state }
    }
}

/// What became of a compare-and-swap.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CasReply {
    /// It was applied.
    Won,
    /// It was not applied: the record is something else, or is gone (`None`).
    Lost(Option<RecordView>),
    /// It was not applied, for another reason that the cluster gave.
    Refused(String),
    /// Nobody knows: it may have been applied, or may still be, later.
    Unknown,
}

/// One compare-and-swap: from exactly `expect` to `to`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Change {
    /// What the record must be.
    pub expect: RecordView,
    /// What it becomes.
    pub to: RecordView,
    /// The other node of a move in progress.
    pub peer: Option<NodeId>,
    /// Where the saved state lies.
    pub saved: Option<String>,
    /// Why, for a failure.
    pub reason: String,
}

impl Change {
    /// The same VM at the same place in another state.
    pub(crate) fn state(from: RecordView, state: VmState) -> Self {
        let to = RecordView { state, ..from };
        Self { expect: from, to, peer: None, saved: None, reason: String::new() }
    }

    /// The command for the cluster. `record` gives what a move does not touch: name, id and configuration.
    #[must_use]
    pub fn command(&self, record: &VmRecord) -> Command {
        let to = VmRecord {
            owner: self.to.owner,
            epoch: self.to.epoch,
            state: self.to.state,
            peer: self.peer,
            saved: self.saved.clone(),
            reason: self.reason.clone(),
            ..record.clone()
        };
        Command::UpdateVm(VmUpdate {
            expect_epoch: self.expect.epoch,
            expect_owner: self.expect.owner,
            expect_state: self.expect.state,
            expect_spec: Some(record.spec.clone()),
            to,
        })
    }
}
