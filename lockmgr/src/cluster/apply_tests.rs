//! The records under arbitrary commands, and their encoding under arbitrary bytes.

use std::sync::Arc;

use bytes::Bytes;
use openraft::{CommittedLeaderId, EntryPayload};
use proptest::prelude::*;
use prost::Message;
use uuid::Uuid;

use super::apply::Position;
use super::codec::Proposal;
use super::command::{Command, Given, Rejection, VmUpdate};
use super::drain::{Drain, DrainPhase};
use super::machine::Machine;
use super::raft_types::{Entry, LogId, Membership};
use super::records::{
    ClusterState, EVENTS_MAX, FenceKind, MemberState, Renewal, VmRecord, VmState, VolumeState,
};
use super::{fuzz, pb, raft_codec};
use crate::{ClusterId, Epoch, NodeId, Term, VolumeId};

fn node() -> impl Strategy<Value = NodeId> {
    (1u16..5).prop_map(NodeId)
}

fn name(prefix: &'static str) -> impl Strategy<Value = String> {
    (0u8..3).prop_map(move |i| format!("{prefix}{i}"))
}

fn vm_state() -> impl Strategy<Value = VmState> {
    use VmState::{Failed, Migrating, Paused, Running, Saved, Saving, Starting, Stopped};
    prop::sample::select(vec![Stopped, Starting, Running, Paused, Saving, Saved, Migrating, Failed])
}

fn member_state() -> impl Strategy<Value = MemberState> {
    use MemberState::{Down, FenceFailed, Fenced, Fencing, Up};
    prop::sample::select(vec![Down, Up, Fencing, Fenced, FenceFailed])
}

fn volume_state() -> impl Strategy<Value = VolumeState> {
    use VolumeState::{Failed, Offline, Online, Opening};
    prop::sample::select(vec![Opening, Online, Offline, Failed])
}

fn vm_record() -> impl Strategy<Value = VmRecord> {
    (name("m"), 0u8..3, node(), 0u64..6, vm_state(), prop::option::of(node())).prop_map(
        |(name, id, owner, epoch, state, peer)| VmRecord {
            name,
            id: Uuid::from_u128(id.into()),
            owner,
            epoch,
            state,
            peer,
            spec: Bytes::from_static(b"spec"),
            saved: peer.map(|peer| format!("saved/{peer}")),
            reason: String::new(),
            restarts_left: id.into(),
        },
    )
}

fn drain_phase() -> impl Strategy<Value = Option<DrainPhase>> {
    use DrainPhase::{Drained, Draining, Resuming};
    prop::sample::select(vec![Some(Draining), Some(Drained), Some(Resuming), None])
}

fn drain(phase: DrainPhase) -> Drain {
    Drain {
        step: 0,
        phase,
        for_good: false,
        volumes: ["v0".to_owned()].into(),
        vms: ["m0".to_owned()].into(),
        stuck: [("vm m0".to_owned(), "it is paused".to_owned())].into(),
    }
}

/// Small numbers, so that expectations are met often.
fn command() -> impl Strategy<Value = Command> {
    let number = 0u64..6;
    prop_oneof![
        (node(), number.clone()).prop_map(|(node, e)| Command::BeginEpoch { node, expect: Epoch(e) }),
        (node(), number.clone(), member_state()).prop_map(|(node, e, state)| Command::MarkNode {
            node,
            epoch: Epoch(e),
            state
        }),
        (name("v"), 0u8..3, node(), number.clone()).prop_map(|(name, id, owner, e)| Command::CreateVolume {
            name,
            id: VolumeId(Uuid::from_u128(id.into())),
            lun_uri: format!("file:{id}"),
            owner,
            owner_epoch: Epoch(e),
            fence_kind: FenceKind::Agent,
        }),
        (name("v"), number.clone())
            .prop_map(|(name, t)| Command::RemoveVolume { name, expect_term: Term(t) }),
        (name("v"), number.clone(), node(), number.clone()).prop_map(|(name, t, to, e)| {
            Command::MoveVolume { name, expect_term: Term(t), to, to_epoch: Epoch(e) }
        }),
        (name("v"), number.clone(), volume_state()).prop_map(|(name, t, state)| Command::SetVolumeState {
            name,
            expect_term: Term(t),
            state,
            reason: String::new(),
        }),
        (name("m"), 0u8..3, node()).prop_map(|(name, id, owner)| Command::CreateVm {
            name,
            id: Uuid::from_u128(id.into()),
            owner,
            spec: Bytes::from_static(b"spec"),
        }),
        (number.clone(), node(), vm_state(), vm_record()).prop_map(
            |(expect_epoch, expect_owner, expect_state, to)| {
                Command::UpdateVm(VmUpdate {
                    expect_epoch,
                    expect_owner,
                    expect_state,
                    expect_spec: None,
                    to,
                })
            }
        ),
        (0u8..3).prop_map(|secret| Command::AddTicket { digest: [secret; 32], expires_ms: 9 }),
        (0u8..3, name("n")).prop_map(|(secret, name)| Command::AddMember {
            digest: [secret; 32],
            address: format!("{name}:1"),
            witness: secret == 2,
            name,
        }),
        (node(), number.clone()).prop_map(|(node, e)| Command::RemoveMember { node, expect: Epoch(e) }),
        (node(), number.clone()).prop_map(|(node, e)| Command::PublishProcessor {
            node,
            epoch: Epoch(e),
            record: Bytes::from_static(b"cpu"),
        }),
        (0u32..3, 0u8..3).prop_map(|(version, maker)| Command::FreezeBaseline {
            version,
            vendor: format!("v{maker}"),
            record: Bytes::from(vec![maker]),
        }),
        (name("m"), number).prop_map(|(name, expect_epoch)| Command::DeleteVm { name, expect_epoch }),
        (node(), 0u64..60, drain_phase()).prop_map(|(node, expect_step, phase)| Command::SetDrain {
            node,
            expect_step,
            to: phase.map(drain),
        }),
        (0u8..3).prop_map(|n| Command::Set { name: format!("s{n}"), value: (n > 0).then(|| "on".into()) }),
        (0u64..4, 0u64..6, 0u64..9).prop_map(|(expect_before_ms, before_ms, refused_from_ms)| {
            Command::RenewCertificates { expect_before_ms, to: Renewal { before_ms, refused_from_ms } }
        }),
        Just(Command::Event { kind: "k".into(), subject: "s".into(), text: "t".into() }),
    ]
}

fn created() -> Machine {
    let members = (1..4).map(|id| (NodeId(id), format!("n{id}"), format!("host{id}:1"))).collect();
    let cluster = ClusterId(Uuid::from_u128(1));
    let mut machine = Machine::default();
    let create = proposal(Command::CreateCluster { cluster, name: "c".into(), members }, 0);
    machine.apply(1, &create).result.expect("created");
    machine
}

fn proposal(command: Command, basis: u64) -> Proposal {
    Proposal { id: Uuid::new_v4(), node: NodeId(1), epoch: Epoch(0), at_ms: 5, basis, command }
}

/// What no command may break, whatever it was.
fn check_step(before: &ClusterState, after: &ClusterState) {
    for (id, old) in &before.members {
        let Some(new) = after.members.get(id) else {
            assert!(
                matches!(old.state, MemberState::Down | MemberState::Fenced),
                "forgotten, and may be alive"
            );
            continue;
        };
        assert!(new.epoch >= old.epoch, "epochs never go back");
        if matches!(old.state, MemberState::Fencing | MemberState::FenceFailed) {
            assert_eq!(new.epoch, old.epoch, "no successor before the end is certain");
        }
    }
    for (name, old) in &before.volumes {
        let Some(new) = after.volumes.get(name) else { continue };
        assert!(new.term >= old.term, "terms never go back");
        if (new.owner, new.owner_epoch) != (old.owner, old.owner_epoch) {
            assert!(new.term > old.term, "another coordinator has another term");
        }
    }
    for (name, old) in &before.vms {
        let Some(new) = after.vms.get(name) else { continue };
        assert!(new.epoch >= old.epoch && new.id == old.id);
        if new.owner != old.owner {
            assert_eq!(new.epoch, old.epoch + 1, "another owner has the next epoch");
            assert_eq!(after.members[&new.owner].state, MemberState::Up);
            assert!(!after.is_closed(new.owner), "nothing is placed on a drained node");
        }
    }
    for (node, drain) in after.drains.iter().filter(|(_, drain)| drain.phase == DrainPhase::Drained) {
        let is_new = before.drains.get(node) != Some(drain);
        let runs = after.vms.values().find(|vm| vm.owner == *node && ClusterState::is_active(vm));
        assert!(!is_new || runs.is_none(), "it has nothing: {runs:?}");
    }
    assert!(after.events.len() <= EVENTS_MAX);
}

proptest! {
    // Invariants H1 and E5 (one epoch per runner), A4 (quarantine), A5 (terms and epochs only grow).
    #[test]
    fn no_sequence_of_commands_breaks_the_records(commands in prop::collection::vec(command(), 1..60)) {
        let mut state = created().state;
        for (i, command) in commands.into_iter().enumerate() {
            let before = state.clone();
            let at = Position { index: i as u64 + 2, node: NodeId(1), epoch: Epoch(0), at_ms: 0 };
            match state.apply(command, at) {
                Ok(_) => check_step(&before, &state),
                Err(_) => prop_assert_eq!(&before, &state, "a refusal changes nothing"),
            }
        }
    }

    #[test]
    fn the_same_log_gives_the_same_records_also_through_a_snapshot(commands in prop::collection::vec(command(), 1..60)) {
        let log: Vec<Proposal> = commands.into_iter().map(|command| proposal(command, 1)).collect();
        let mut straight = created();
        let mut restored = straight.clone();
        for (i, proposal) in log.iter().enumerate() {
            let index = i as u64 + 2;
            let bytes = pb::Proposal::from(proposal).encode_to_vec();
            let received = Proposal::try_from(pb::Proposal::decode(bytes.as_slice()).expect("ours")).expect("ours");
            prop_assert_eq!(&received, proposal);
            restored = Machine::decode(restored.encode().into()).expect("ours");
            prop_assert_eq!(straight.apply(index, proposal), restored.apply(index, &received));
        }
        prop_assert_eq!(&straight.state, &restored.state);
        prop_assert_eq!(straight.encode(), restored.encode());
    }

    #[test]
    fn arbitrary_bytes_are_a_message_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz::feed(&bytes);
    }

    #[test]
    fn damaged_messages_are_others_or_an_error_never_a_panic(
        commands in prop::collection::vec(command(), 1..20),
        damages in prop::collection::vec(damage(), 1..6),
    ) {
        for mut bytes in messages(commands) {
            fuzz::feed(&bytes);
            for damage in &damages {
                damage.apply(&mut bytes);
            }
            fuzz::feed(&bytes);
        }
    }
}

/// What happens to a message on its way.
#[derive(Clone, Debug)]
enum Damage {
    Changed(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Removed(prop::sample::Index, u8),
    Repeated(prop::sample::Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    use Damage::{Changed, Cut, Removed, Repeated};
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, to)| Changed(at, to)),
        1 => at().prop_map(Cut),
        2 => (at(), any::<u8>()).prop_map(|(at, len)| Removed(at, len)),
        2 => (at(), any::<u8>()).prop_map(|(at, len)| Repeated(at, len)),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let range = |at: &prop::sample::Index, len: &u8| {
            let at = at.index(bytes.len());
            at..bytes.len().min(at + usize::from(*len))
        };
        match self {
            Self::Changed(at, to) => {
                let at = at.index(bytes.len());
                bytes[at] = *to;
            }
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Removed(at, len) => drop(bytes.drain(range(at, len))),
            Self::Repeated(at, len) => bytes.extend_from_within(range(at, len)),
        }
    }
}

/// One of each kind that is decoded, all about these commands.
fn messages(commands: Vec<Command>) -> Vec<Vec<u8>> {
    let mut machine = created();
    let id = |index| LogId::new(CommittedLeaderId::new(1, 1), index);
    let vote = pb::Vote { term: 3, node: 1, committed: true };
    let (mut entries, mut messages) = (Vec::new(), Vec::new());
    for (index, command) in (2..).zip(commands) {
        let proposal = proposal(command, 1);
        let end = machine.apply(index, &proposal);
        messages.push(pb::End::from(&end).encode_to_vec());
        messages.push(pb::Proposal::from(&proposal).encode_to_vec());
        let entry = Entry { log_id: id(index), payload: EntryPayload::Normal(Arc::new(proposal)) };
        entries.push(raft_codec::entry_to_pb(&entry));
    }
    let voters = Membership::new(vec![[1, 2, 3].into()], None);
    entries
        .push(raft_codec::entry_to_pb(&Entry { log_id: id(99), payload: EntryPayload::Membership(voters) }));
    messages.extend(entries.iter().map(Message::encode_to_vec));
    let last = Some(raft_codec::log_id_to_pb(&id(99)));
    let append = pb::Append { vote: Some(vote), previous: last, entries, committed: last };
    messages.push(append.encode_to_vec());
    messages.push(pb::VoteRequest { vote: Some(vote), last }.encode_to_vec());
    messages.push(pb::VoteReply { vote: Some(vote), granted: true, last }.encode_to_vec());
    let meta = pb::SnapshotMeta { last, membership: None, id: "1-1-99".into() };
    let data = machine.encode().into();
    messages.push(
        pb::Install { vote: Some(vote), meta: Some(meta), offset: 0, data, done: true }.encode_to_vec(),
    );
    messages.push(machine.encode());
    messages
}

#[test]
fn a_proposal_whose_first_try_may_be_forgotten_is_refused() {
    let mut machine = created();
    let joins = Arc::new(proposal(Command::BeginEpoch { node: NodeId(1), expect: Epoch(0) }, 1));
    assert_eq!(machine.apply(2, &joins).result, Ok(Given::Epoch(Epoch(1))));
    for index in 3..5000 {
        let line = Command::Event { kind: "k".into(), subject: "s".into(), text: "t".into() };
        machine.apply(index, &proposal(line, index - 1)).result.expect("noted");
    }
    assert_eq!(machine.apply(5000, &joins).result, Err(Rejection::Expired));
    assert_eq!(machine.state.members[&NodeId(1)].epoch, Epoch(1), "it is not applied again");
}

#[test]
fn a_conflict_names_what_was_expected_and_what_was_found() {
    let mut machine = created();
    let wrong = proposal(Command::BeginEpoch { node: NodeId(2), expect: Epoch(7) }, 1);
    let refused = machine.apply(2, &wrong).result.expect_err("wrong epoch");
    assert_eq!(refused.to_string(), "epoch of node 2: expected 7, found 0");
}

// Invariant E6: who changes a record says which one it read; a disk that was named meanwhile stays named.
#[test]
fn a_change_of_a_vm_that_knows_an_older_configuration_is_refused() {
    let mut machine = created();
    let apply = |machine: &mut Machine, index: u64, command| {
        machine.apply(index, &proposal(command, index - 1)).result
    };
    let (name, id, old) = ("m".to_owned(), Uuid::from_u128(7), Bytes::from_static(b"old top"));
    let owner = NodeId(1);
    apply(&mut machine, 2, Command::CreateVm { name, id, owner, spec: old }).expect("it is new");
    let read = machine.state.vms["m"].clone();
    let snapshot = read.update(|vm| vm.spec = Bytes::from_static(b"new top"));
    apply(&mut machine, 3, snapshot).expect("nobody was faster");
    let late = read.update(|vm| vm.reason = "its node is gone".into());
    let refused = apply(&mut machine, 4, late).expect_err("it would bring the old top back");
    assert!(refused.to_string().contains("configuration of vm m"), "{refused}");
    assert_eq!(machine.state.vms["m"].spec, Bytes::from_static(b"new top"));
}

#[test]
fn a_baseline_is_frozen_once_and_the_newest_of_its_maker_is_found() {
    let mut machine = created();
    let mut freeze = |index, version, vendor: &str, record: &'static [u8]| {
        let (vendor, record) = (vendor.to_owned(), Bytes::from_static(record));
        machine.apply(index, &proposal(Command::FreezeBaseline { version, vendor, record }, 0)).result
    };
    assert!(freeze(2, 2, "one", b"x").is_err(), "the first is number 1");
    freeze(3, 1, "one", b"a").expect("the first");
    assert!(freeze(4, 1, "one", b"b").is_err(), "never changed");
    freeze(5, 2, "two", b"c").expect("of another maker");
    freeze(6, 3, "one", b"d").expect("a newer one");
    let state = machine.state;
    assert_eq!(
        state.newest_baseline("one").map(|(version, it)| (version, &it.record[..])),
        Some((3, &b"d"[..]))
    );
    assert_eq!(state.newest_baseline("two").map(|(version, _)| version), Some(2));
    assert_eq!(state.newest_baseline("three"), None);
}

// Invariant A4
#[test]
fn nothing_that_a_former_incarnation_has_left_on_the_way_changes_the_records() {
    let mut machine = created();
    let set = |epoch| {
        let command = Command::Set { name: "balance".into(), value: Some("off".into()) };
        Proposal { epoch: Epoch(epoch), ..proposal(command, 1) }
    };
    let node = NodeId(1);
    let mut apply = |index, proposal: &Proposal| machine.apply(index, proposal).result;
    assert_eq!(
        apply(2, &proposal(Command::BeginEpoch { node, expect: Epoch(0) }, 1)),
        Ok(Given::Epoch(Epoch(1)))
    );
    assert!(apply(3, &set(1)).is_ok(), "its own incarnation");
    assert_eq!(
        apply(4, &proposal(Command::BeginEpoch { node, expect: Epoch(1) }, 1)),
        Ok(Given::Epoch(Epoch(2)))
    );
    assert!(matches!(apply(5, &set(1)), Err(Rejection::Conflict { .. })), "one that another has followed");
    assert!(apply(6, &set(2)).is_ok());
    for (index, state) in [(7, MemberState::Fencing), (8, MemberState::Fenced)] {
        let mark = proposal(Command::MarkNode { node, epoch: Epoch(2), state }, 1);
        assert!(apply(index, &mark).is_ok());
    }
    assert!(matches!(apply(9, &set(2)), Err(Rejection::Conflict { .. })), "one that was fenced");
    let told = Command::Event { kind: "k".into(), subject: "s".into(), text: "t".into() };
    assert!(apply(10, &Proposal { epoch: Epoch(2), ..proposal(told, 1) }).is_ok(), "what it saw is kept");
}
