//! Everything that turns bytes into records and Raft messages, fed with bytes that may be anything: by tests that damage what
//! is valid (`apply_tests.rs`), and by a fuzzer (`lockmgr/fuzz`).
//!
//! **Invariant:** bytes are a message or an error, never a panic; what was accepted is written and read again as the same.

use bytes::Bytes;
use prost::Message;

use super::codec::{End, Proposal};
use super::command::Command;
use super::machine::Machine;
use super::{pb, raft_codec};

/// Feeds every decoder.
///
/// # Panics
/// When a decoder breaks its promise.
pub fn feed(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    snapshot(bytes.clone());
    proposal(bytes.clone());
    end(bytes.clone());
    entry(bytes.clone());
    requests(bytes.clone());
    replies(bytes);
}

fn snapshot(bytes: Bytes) {
    let Ok(mut machine) = Machine::decode(bytes) else { return };
    let again = Machine::decode(machine.encode().into()).expect("what was written is read");
    assert_eq!(machine.state, again.state, "a snapshot is the same after it was written again");
    // Whatever the records are, commands about each of them are applied or refused.
    let members: Vec<_> = machine.state.members.values().cloned().collect();
    let mut commands: Vec<Command> =
        members.iter().map(|it| Command::BeginEpoch { node: it.id, expect: it.epoch }).collect();
    commands.extend(members.iter().map(|it| Command::RemoveMember { node: it.id, expect: it.epoch }));
    commands
        .extend(machine.state.vms.values().map(|vm| vm.update(|vm| vm.epoch = vm.epoch.saturating_add(1))));
    let applied = machine.state.applied;
    for (distance, command) in (1..).zip(commands) {
        let index = applied.saturating_add(distance);
        let id = uuid::Uuid::from_u128(index.into());
        let proposal = Proposal {
            id,
            node: crate::NodeId(1),
            epoch: crate::Epoch(0),
            at_ms: 0,
            basis: index.saturating_sub(1),
            command,
        };
        let _end = machine.apply(index, &proposal);
    }
}

fn proposal(bytes: Bytes) {
    let Ok(Ok(proposal)) = pb::Proposal::decode(bytes).map(Proposal::try_from) else { return };
    let again = pb::Proposal::decode(pb::Proposal::from(&proposal).encode_to_vec().as_slice());
    let again = again.map(Proposal::try_from).expect("ours").expect("ours");
    assert_eq!(proposal, again, "a proposal is the same after it was sent on");
}

fn end(bytes: Bytes) {
    let Ok(Ok(end)) = pb::End::decode(bytes).map(End::try_from) else { return };
    let again = End::try_from(pb::End::from(&end)).expect("ours");
    assert_eq!(end, again, "an end is the same after it was sent on");
}

fn entry(bytes: Bytes) {
    let Ok(Ok(entry)) = pb::Entry::decode(bytes).map(raft_codec::entry_from_pb) else { return };
    let written = raft_codec::entry_to_pb(&entry);
    let again = raft_codec::entry_from_pb(written.clone()).expect("ours");
    assert_eq!(raft_codec::entry_to_pb(&again), written, "an entry is the same after it was logged");
}

fn requests(bytes: Bytes) {
    if let Ok(Ok(append)) = pb::Append::decode(bytes.clone()).map(raft_codec::append_from_pb) {
        let _sent_on = raft_codec::append_to_pb(&append).encode_to_vec();
    }
    if let Ok(Ok(vote)) = pb::VoteRequest::decode(bytes.clone()).map(raft_codec::vote_request_from_pb) {
        let _sent_on = raft_codec::vote_request_to_pb(&vote).encode_to_vec();
    }
    if let Ok(Ok(install)) = pb::Install::decode(bytes).map(raft_codec::install_from_pb) {
        let _sent_on = raft_codec::install_to_pb(install).encode_to_vec();
    }
}

fn replies(bytes: Bytes) {
    let _append = pb::AppendReply::decode(bytes.clone()).map(raft_codec::append_reply_from_pb);
    let _vote = pb::VoteReply::decode(bytes).map(raft_codec::vote_reply_from_pb);
}
