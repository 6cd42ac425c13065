//! The store against openraft's own suite, and what must survive a restart.

use std::sync::Arc;

use bytes::Bytes;
use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, EntryPayload, RaftLogReader, RaftSnapshotBuilder};
use tempfile::TempDir;
use uuid::Uuid;

use super::{Closer, LogStore, StateMachine, Store, StoreError};
use crate::cluster::codec::Proposal;
use crate::cluster::raft_types::{Entry, LogId, StorageError, Types, Vote};
use crate::cluster::{Command, Given};
use crate::{ClusterId, NodeId};

const CLUSTER: ClusterId = ClusterId(Uuid::from_u128(7));

struct Builder;

impl StoreBuilder<Types, LogStore, StateMachine, (TempDir, Closer)> for Builder {
    async fn build(&self) -> Result<((TempDir, Closer), LogStore, StateMachine), StorageError> {
        let folder = tempfile::tempdir().expect("folder");
        let (log, machine, closer) = open(&folder);
        Ok(((folder, closer), log, machine))
    }
}

fn open(folder: &TempDir) -> (LogStore, StateMachine, Closer) {
    Store::open(folder.path(), CLUSTER, NodeId(1)).expect("opens").into_parts()
}

#[test]
fn the_store_does_what_openraft_asks_of_it() {
    Suite::test_all(Builder).expect("suite");
}

fn log_id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, 1), index)
}

fn event(index: u64) -> Entry {
    let command = Command::Event { kind: "test".into(), subject: "s".into(), text: format!("line {index}") };
    let proposal = Proposal {
        id: Uuid::new_v4(),
        node: NodeId(1),
        epoch: crate::Epoch(0),
        at_ms: index,
        basis: 0,
        command,
    };
    Entry { log_id: log_id(1, index), payload: EntryPayload::Normal(Arc::new(proposal)) }
}

#[tokio::test]
async fn vote_log_and_snapshot_survive_a_restart() {
    let folder = tempfile::tempdir().expect("folder");
    {
        let (mut log, mut machine, closer) = open(&folder);
        log.save_vote(&Vote::new_committed(3, 2)).await.expect("vote");
        log.blocking_append((1..=10).map(event)).await.expect("append");
        machine.apply((1..=6).map(event)).await.expect("apply");
        machine.get_snapshot_builder().await.build_snapshot().await.expect("snapshot");
        log.purge(log_id(1, 4)).await.expect("purge");
        log.truncate(log_id(1, 9)).await.expect("truncate");
        log.save_committed(Some(log_id(1, 7))).await.expect("committed");
        closer.close();
        assert!(log.save_vote(&Vote::new(9, 9)).await.is_err(), "a closed store acknowledges nothing");
    }
    let (mut log, mut machine, _closer) = open(&folder);
    assert_eq!(log.read_vote().await.expect("vote"), Some(Vote::new_committed(3, 2)));
    let state = log.get_log_state().await.expect("state");
    assert_eq!(state.last_purged_log_id, Some(log_id(1, 4)));
    assert_eq!(state.last_log_id, Some(log_id(1, 8)));
    let entries = log.try_get_log_entries(..).await.expect("entries");
    assert_eq!(entries.len(), 4);
    assert_eq!(machine.applied_state().await.expect("applied").0, Some(log_id(1, 6)));
    assert_eq!(machine.watch().borrow().events.len(), 6);
}

// Invariant D1
#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_crash() {
    let (before, after) = (tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder"));
    let (mut log, _machine, _closer) = open(&before);
    log.save_vote(&Vote::new_committed(3, 2)).await.expect("vote");
    for index in 1..=300 {
        log.blocking_append([event(index)]).await.expect("append");
        if index % 100 == 50 {
            // Lazy, so the last that was made durable is older than the last that was written.
            log.save_committed(Some(log_id(1, index))).await.expect("committed");
        }
    }
    // The file as it is in this moment, neither closed nor tidied up.
    let crashed = after.path().join("cluster.redb");
    std::fs::copy(before.path().join("cluster.redb"), crashed).expect("copy");
    let (mut log, _machine, _closer) = open(&after);
    assert_eq!(log.read_vote().await.expect("vote"), Some(Vote::new_committed(3, 2)));
    assert_eq!(log.get_log_state().await.expect("state").last_log_id, Some(log_id(1, 300)));
    assert_eq!(log.try_get_log_entries(..).await.expect("entries").len(), 300);
}

#[tokio::test]
async fn an_older_snapshot_never_replaces_a_newer_one_on_disk() {
    let folder = tempfile::tempdir().expect("folder");
    let newer = {
        let other = tempfile::tempdir().expect("folder");
        let (_log, mut machine, _closer) = open(&other);
        machine.apply((1..=9).map(event)).await.expect("apply");
        machine.get_snapshot_builder().await.build_snapshot().await.expect("snapshot")
    };
    {
        let (_log, mut machine, closer) = open(&folder);
        machine.apply((1..=3).map(event)).await.expect("apply");
        let mut builder = machine.get_snapshot_builder().await;
        machine.install_snapshot(&newer.meta, newer.snapshot.clone()).await.expect("install");
        builder.build_snapshot().await.expect("late snapshot");
        closer.close();
    }
    let (_log, mut machine, _closer) = open(&folder);
    assert_eq!(machine.applied_state().await.expect("applied").0, Some(log_id(1, 9)));
    let current = machine.get_current_snapshot().await.expect("snapshot").expect("some");
    assert_eq!(current.meta, newer.meta);
}

#[tokio::test]
async fn messages_to_followers_stay_below_the_longest_frame() {
    let folder = tempfile::tempdir().expect("folder");
    let (mut log, _machine, _closer) = open(&folder);
    let big = |index| {
        let command = Command::CreateVm {
            name: format!("vm{index}"),
            id: Uuid::new_v4(),
            owner: NodeId(1),
            spec: Bytes::from(vec![0; crate::cluster::SPEC_BYTES_MAX]),
        };
        let proposal = Proposal {
            id: Uuid::new_v4(),
            node: NodeId(1),
            epoch: crate::Epoch(0),
            at_ms: 0,
            basis: 0,
            command,
        };
        Entry { log_id: log_id(1, index), payload: EntryPayload::Normal(Arc::new(proposal)) }
    };
    log.blocking_append((1..=100).map(big)).await.expect("append");
    let mut next = 1;
    while next <= 100 {
        let some = log.limited_get_log_entries(next, 101).await.expect("entries");
        assert!(!some.is_empty() && some.len() < 20, "{} entries at once", some.len());
        assert_eq!(some[0].log_id.index, next);
        next += some.len() as u64;
    }
}

#[tokio::test]
async fn a_proposal_that_stands_twice_in_the_log_is_applied_once() {
    let folder = tempfile::tempdir().expect("folder");
    let (_log, mut machine, _closer) = open(&folder);
    let first = event(1);
    let again = Entry { log_id: log_id(1, 2), payload: first.payload.clone() };
    let ends = machine.apply([first, again]).await.expect("apply");
    assert_eq!((ends[0].index, &ends[0].result), (1, &Ok(Given::Nothing)));
    assert_eq!(ends[0], ends[1]);
    assert_eq!(machine.watch().borrow().events.len(), 1);
}

#[test]
fn a_store_of_another_node_or_cluster_or_in_use_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let first = Store::open(folder.path(), CLUSTER, NodeId(1)).expect("opens");
    assert!(matches!(Store::open(folder.path(), CLUSTER, NodeId(1)), Err(StoreError::InUse { .. })));
    drop(first);
    let other_node = Store::open(folder.path(), CLUSTER, NodeId(2));
    assert!(matches!(other_node, Err(StoreError::WrongOwner { .. })));
    let other_cluster = Store::open(folder.path(), ClusterId(Uuid::from_u128(8)), NodeId(1));
    assert!(matches!(other_cluster, Err(StoreError::WrongOwner { .. })));
}
