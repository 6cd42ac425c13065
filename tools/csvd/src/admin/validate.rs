//! `cluster validate`: what a cluster promises, tried out while it is in use.
//!
//! ```text
//!   here:       quorum, voters, who is heard, round trips, clocks
//!   each node:  lease; per volume: the path, reads, a write that is read back, flushes, its fence (probe.rs, trial.rs)
//! ```
//! Everything is written to a part of the LUN that holds nothing.

mod probe;
mod trial;

use std::sync::Arc;
use std::time::Duration;

use api::{Error, pb};
use lockmgr::cluster::{ClusterState, Member};

pub(crate) use probe::here;
pub(crate) use trial::cut;

use crate::core::Core;
use crate::messages::{NodeAnswer, NodeOp};
use crate::volumes::status::unix_ms;
use crate::{forward, view};

/// Longest time for one node's checks.
const NODE_WITHIN: Duration = Duration::from_secs(60);
/// Round trips that are measured to each node.
const ROUNDS: usize = 5;
/// Clocks that differ by more confuse people who read logs, and certificates.
const CLOCKS_WARN_MS: u64 = 1_000;
const CLOCKS_FAIL_MS: u64 = 60_000;

/// What came of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Ok,
    Warning,
    Failed,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// One line of the report.
fn check(what: &str, node: &str, volume: &str, (outcome, detail): (Outcome, String)) -> pb::ValidationCheck {
    pb::ValidationCheck {
        what: what.to_owned(),
        node: node.to_owned(),
        volume: volume.to_owned(),
        result: outcome.word().to_owned(),
        detail,
    }
}

/// All checks, of this node and of all others.
pub(super) async fn run(core: &Arc<Core>, request: pb::ValidateRequest) -> Result<pb::Validation, Error> {
    let state = core.state();
    let me = &core.config.name;
    let mut checks = vec![check("quorum", me, "", quorum(core)), check("voters", me, "", voters(core))];
    // One after the other: the trial of a fence sends one node's I/O through another.
    for member in state.members.values() {
        checks.extend(of_node(core, &state, member, request).await);
    }
    let worst = if checks.iter().any(|check| check.result == Outcome::Failed.word()) {
        Outcome::Failed
    } else if checks.iter().any(|check| check.result == Outcome::Warning.word()) {
        Outcome::Warning
    } else {
        Outcome::Ok
    };
    core.note(
        "cluster.validated",
        &core.config.cluster,
        format!("{} checks: {}", checks.len(), worst.word()),
    );
    Ok(pb::Validation { result: worst.word().to_owned(), checks })
}

fn quorum(core: &Core) -> (Outcome, String) {
    let raft = core.cluster.status();
    match raft.leader {
        Some(leader) if raft.quorum => (Outcome::Ok, format!("node {leader} leads, a majority is behind it")),
        _ => (Outcome::Failed, "there is no leader with a majority: nothing can be changed".to_owned()),
    }
}

fn voters(core: &Core) -> (Outcome, String) {
    let count = core.cluster.status().voters.len();
    let may_fail = count.saturating_sub(1) / 2;
    let text = format!("{count} voters: {may_fail} may fail");
    match (count, may_fail) {
        (1, _) => (Outcome::Warning, format!("{text}; let more nodes join")),
        (_, 0) => (Outcome::Warning, format!("{text}; let a witness join (node join --witness)")),
        _ => (Outcome::Ok, text),
    }
}

async fn of_node(
    core: &Arc<Core>,
    state: &ClusterState,
    member: &Member,
    request: pb::ValidateRequest,
) -> Vec<pb::ValidationCheck> {
    let name = &member.name;
    if !view::is_up(state, member.id, member.epoch) {
        return vec![check("node", name, "", (Outcome::Failed, format!("it is {}", member.state)))];
    }
    let (round_trip_us, offset_ms) = match round_trips(core, member).await {
        Ok(measured) => measured,
        Err(error) => return vec![check("network", name, "", (Outcome::Failed, error.message))],
    };
    let mut checks = vec![
        check("network", name, "", network(core, round_trip_us)),
        check("clock", name, "", clock(offset_ms)),
    ];
    let asked = forward::ask(core, member.id, NodeOp::Validate(request));
    match tokio::time::timeout(NODE_WITHIN, asked).await {
        Ok(Ok(NodeAnswer::Validated(own))) => checks.extend(own.checks),
        Ok(Ok(_)) => {
            checks.push(check("node", name, "", (Outcome::Failed, "its answer cannot be read".to_owned())));
        }
        Ok(Err(error)) => checks.push(check("node", name, "", (Outcome::Failed, error.message))),
        Err(_) => {
            let why = format!("no answer for {} s", NODE_WITHIN.as_secs());
            checks.push(check("node", name, "", (Outcome::Failed, why)));
        }
    }
    checks
}

/// The shortest round trip in microseconds, and how far the node's time of day is from this one's.
async fn round_trips(core: &Arc<Core>, member: &Member) -> Result<(u64, u64), Error> {
    let mut best: Option<(u64, u64)> = None;
    for _ in 0..ROUNDS {
        let (begun, begun_ms) = (tokio::time::Instant::now(), unix_ms());
        let asked = forward::ask(
            core,
            member.id,
            NodeOp::Validate(pb::ValidateRequest { clock_only: true, ..Default::default() }),
        );
        let answer = tokio::time::timeout(NODE_WITHIN, asked).await;
        let NodeAnswer::Validated(own) = answer.map_err(|_| Error::unreachable("no answer"))?? else {
            return Err(Error::failed("its answer cannot be read"));
        };
        let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        // Its clock was read somewhere between the question and the answer.
        let middle_ms = begun_ms.saturating_add(took / 2000);
        let measured = (took, own.clock_ms.abs_diff(middle_ms));
        best = Some(best.map_or(measured, |best| best.min(measured)));
    }
    best.ok_or_else(|| Error::failed("nothing was measured"))
}

fn network(core: &Core, round_trip_us: u64) -> (Outcome, String) {
    let text = format!("round trip {round_trip_us} us");
    let limit_us = core.timing.beat_ms * 1000;
    if round_trip_us > limit_us {
        return (Outcome::Failed, format!("{text}, longer than the interval of heartbeats, {limit_us} us"));
    }
    let outcome = if round_trip_us > limit_us / 4 { Outcome::Warning } else { Outcome::Ok };
    (outcome, text)
}

fn clock(offset_ms: u64) -> (Outcome, String) {
    let text = format!("{offset_ms} ms from this node's time of day (no lease depends on it)");
    let outcome = match offset_ms {
        0..CLOCKS_WARN_MS => Outcome::Ok,
        CLOCKS_WARN_MS..CLOCKS_FAIL_MS => Outcome::Warning,
        _ => Outcome::Failed,
    };
    (outcome, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_are_far_apart_are_named() {
        assert_eq!(clock(3).0, Outcome::Ok);
        assert_eq!(clock(5_000).0, Outcome::Warning);
        assert_eq!(clock(90_000).0, Outcome::Failed);
    }
}
