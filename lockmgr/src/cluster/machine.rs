//! The state machine: applies proposals to the records and remembers how the last ones ended.
//!
//! A proposer whose answer was lost proposes again with the same id. If the first try had been applied, the second gets
//! the remembered end instead of a conflict with itself. **Invariant:** a proposal is applied at most once, however
//! often it stands in the log. The memory is bounded: a proposal whose proposer had seen the log only up to a point that
//! is further back than the memory reaches is refused, because nobody can tell any more.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use prost::Message;
use uuid::Uuid;

use super::codec::{CodecError, End, Proposal, state_from_pb, state_to_pb, uuid, uuid_bytes};
use super::command::Rejection;
use super::pb;
use super::records::ClusterState;

/// Ends that are remembered. Each applied proposal adds at most one, so this is also a distance in the log.
const REMEMBERED_MAX: u64 = 4096;

/// Records and memory, as of one moment of the log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Machine {
    pub(crate) state: ClusterState,
    ends: HashMap<Uuid, End>,
    order: VecDeque<Uuid>,
}

impl Machine {
    /// Applies the proposal at `index` of the log.
    pub(crate) fn apply(&mut self, index: u64, proposal: &Proposal) -> End {
        self.state.applied = index;
        if let Some(end) = self.ends.get(&proposal.id) {
            return end.clone();
        }
        if index.saturating_sub(proposal.basis) >= REMEMBERED_MAX {
            return End { index, result: Err(Rejection::Expired) };
        }
        let result = self.state.apply(proposal.command.clone(), proposal.position(index));
        let end = End { index, result };
        self.remember(proposal.id, end.clone());
        end
    }

    /// Notes an entry of the log that is about Raft itself.
    pub(crate) fn pass(&mut self, index: u64) -> End {
        self.state.applied = index;
        End { index, result: Ok(super::Given::Nothing) }
    }

    fn remember(&mut self, id: Uuid, end: End) {
        while self.order.len() as u64 >= REMEMBERED_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.ends.remove(&oldest);
            }
        }
        self.order.push_back(id);
        self.ends.insert(id, end);
    }

    /// Everything, for a snapshot.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut snapshot = state_to_pb(&self.state);
        let remembered = |id: &Uuid| {
            self.ends.get(id).map(|end| pb::Remembered { proposal: uuid_bytes(*id), end: Some(end.into()) })
        };
        snapshot.remembered = self.order.iter().filter_map(remembered).collect();
        snapshot.encode_to_vec()
    }

    /// Reads a snapshot.
    pub(crate) fn decode(bytes: Bytes) -> Result<Self, CodecError> {
        let mut snapshot = pb::Snapshot::decode(bytes)?;
        let remembered = std::mem::take(&mut snapshot.remembered);
        let mut machine = Self { state: state_from_pb(snapshot)?, ..Self::default() };
        for one in remembered {
            let end = one.end.ok_or_else(|| super::codec::malformed("remembered end"))?;
            machine.remember(uuid(&one.proposal)?, end.try_into()?);
        }
        Ok(machine)
    }
}
