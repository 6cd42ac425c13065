//! Emptying a node, and giving it back what it had.
//!
//! ```text
//!   request.rs   a user asks: the record of the drain is written, and its progress told
//!   run()        on the node that the record is about: plan.rs says what is next, carry.rs does it, until nothing is left
//!   farewell.rs  a node that leaves for good gives its vote back, is forgotten, and keeps no secret of the cluster
//! ```
//! What is left to do follows from the records alone, so a node that was killed in the middle goes on where it was (G1); of
//! one that stays away the others take what it had, as of any node that is lost.
//!
//! **Invariant:** whatever moves is in the record of the drain before it moves.

mod carry;
mod farewell;
mod plan;
mod request;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lockmgr::cluster::{Command, Drain};

use crate::core::Core;
use plan::Step;

pub(crate) use farewell::{forgotten, take as take_leave};
pub(crate) use request::{Progress, begin, begin_leave, resume};

/// Shortest pause before what could not be moved is tried again: a node that is asked may not have read the records yet.
const AGAIN_AFTER_MIN: Duration = Duration::from_millis(200);
/// It doubles so often.
const DOUBLINGS_MAX: u32 = 4;

/// Carries out the drain of this node that the records ask for, until the daemon ends.
pub(crate) async fn run(core: Arc<Core>) {
    let mut records = core.cluster.watch();
    let mut round = Round::default();
    loop {
        let state = records.borrow_and_update().clone();
        let arriving = core.vms.expects_any();
        let next = plan::next(&state, core.me, &round.tried, round.number, arriving);
        if let Some(step) = next {
            follow(&core, step, &mut round).await;
            continue;
        }
        tokio::select! {
            () = core.stop.cancelled() => return,
            changed = records.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(round.pause()), if state.drains.contains_key(&core.me) => round.begin_another(),
        }
    }
}

/// One attempt at everything that is left.
#[derive(Debug, Default)]
struct Round {
    number: u32,
    /// What could not be moved in this round, and why.
    tried: BTreeMap<String, String>,
}

impl Round {
    fn pause(&self) -> Duration {
        AGAIN_AFTER_MIN * 2_u32.pow(self.number.min(DOUBLINGS_MAX))
    }

    fn begin_another(&mut self) {
        self.number = self.number.saturating_add(1);
        self.tried.clear();
    }
}

async fn follow(core: &Arc<Core>, step: Step, round: &mut Round) {
    let moved = match step {
        Step::Write { step, to } => {
            let ends = to.is_none();
            if write(core, step, to).await && ends {
                *round = Round::default();
            }
            return;
        }
        Step::Leave => {
            tracing::info!("this node leaves the cluster: nothing is left on it");
            core.stop.cancel();
            return core.stop.cancelled().await;
        }
        Step::VolumeAway(name) => (format!("volume {name}"), carry::volume_away(core, &name).await),
        Step::VmAway(name) => (format!("vm {name}"), carry::vm_away(core, &name).await),
        Step::VolumeBack(name) => (format!("volume {name}"), carry::volume_back(core, &name).await),
        Step::VmBack(name) => (format!("vm {name}"), carry::vm_back(core, &name).await),
    };
    if let (what, Err(error)) = moved {
        tracing::warn!(what, %error, "not moved now");
        round.tried.insert(what, error.message);
    }
}

/// Changes the record, from the step that was read. `true` when it is so now.
async fn write(core: &Arc<Core>, expect_step: u64, to: Option<Drain>) -> bool {
    let mut records = core.cluster.watch();
    match core.propose(Command::SetDrain { node: core.me, expect_step, to }).await {
        Ok(_) => true,
        Err(error) => {
            tracing::info!(%error, "the drain of this node was not recorded; its record is read again");
            drop(tokio::time::timeout(Duration::from_millis(core.timing.beat_ms), records.changed()).await);
            false
        }
    }
}
