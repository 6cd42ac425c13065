//! `events`: the cluster's one timeline, from the records.

use std::sync::Arc;

use api::pb;
use futures::{StreamExt, stream};
use lockmgr::cluster::{ClusterState, EventRecord};
use tokio::sync::watch;

use super::Streamed;
use crate::core::Core;
use crate::view;

/// What has happened, and with `follow` what happens.
pub(super) fn stream(core: &Arc<Core>, request: pb::EventsRequest) -> Streamed<pb::Event> {
    let reader = Reader {
        state: core.cluster.watch(),
        seen: 0,
        since_ms: request.since_ms,
        follow: request.follow,
        first: true,
    };
    let batches = stream::unfold(reader, |mut reader| async move {
        let batch = reader.next().await?;
        Some((stream::iter(batch.into_iter().map(Ok)), reader))
    });
    Box::pin(batches.flatten())
}

struct Reader {
    state: watch::Receiver<Arc<ClusterState>>,
    /// Position of the last event that was given out.
    seen: u64,
    since_ms: u64,
    follow: bool,
    first: bool,
}

impl Reader {
    /// The next events; `None` at the end.
    async fn next(&mut self) -> Option<Vec<pb::Event>> {
        if !std::mem::take(&mut self.first) {
            if !self.follow {
                return None;
            }
            self.state.changed().await.ok()?;
        }
        let state = self.state.borrow_and_update().clone();
        let (seen, since_ms) = (self.seen, self.since_ms);
        let fresh = state.events.iter().filter(|event| event.index > seen && event.at_ms >= since_ms);
        let batch: Vec<_> = fresh.map(|event| shown(&state, event)).collect();
        self.seen = state.events.back().map_or(seen, |event| event.index);
        Some(batch)
    }
}

fn shown(state: &ClusterState, event: &EventRecord) -> pb::Event {
    pb::Event {
        seq: event.index,
        time_ms: event.at_ms,
        node: view::node_name(state, event.node),
        kind: event.kind.clone(),
        subject: event.subject.clone(),
        text: event.text.clone(),
    }
}
