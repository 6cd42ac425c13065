//! The target of a move: carries out what [`migrator::Incoming`] decides.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use api::Error;
use bytes::Bytes;
use hv_runner::config::VolumePath;
use lockmgr::cluster::{ProposeError, VmRecord, VmState};
use migrator::protocol::{FromTarget, Move, Saved, ToTarget};
use migrator::{CasReply, Change, Incoming, RecordView, TargetAction, TargetAnswer, TargetEvent};

use super::arrival::Arrival;
use super::{facts, propose, read_record, remove_state, remove_when_read};
use crate::core::{Core, refused};
use crate::view;
use crate::vms::runner::{Content, Runner};
use crate::vms::{spec_of, supervise};

/// How often a VM that waits for its source looks at the record by itself.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long this node's copy of the records is waited for before the quorum is asked.
const COPY_WITHIN: Duration = Duration::from_millis(30);

/// The moves to this node. A lost message is answered by the same machine when it comes again.
#[derive(Debug, Default)]
pub(crate) struct Moves {
    /// Rank: above the attempts' own locks; nothing is awaited under it.
    attempts: Mutex<HashMap<Move, SharedAttempt>>,
    /// Those whose memory is expected. Rank: a leaf.
    arrivals: Mutex<HashMap<Move, Weak<Arrival>>>,
    /// What moves from this node took besides memory, in microseconds; 0 before the first one.
    overhead_us: AtomicU64,
}

impl Moves {
    fn lock(&self) -> MutexGuard<'_, HashMap<Move, SharedAttempt>> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(&self, core: &Core, of: &Move) -> SharedAttempt {
        let mut attempts = self.lock();
        let attempt = attempts.entry(of.clone()).or_insert_with(|| {
            let machine = Incoming::new(of.from, core.me, of.epoch);
            let of = of.clone();
            Arc::new(tokio::sync::Mutex::new(Attempt {
                of,
                machine,
                saved: None,
                runner: None,
                arrival: None,
            }))
        });
        Arc::clone(attempt)
    }

    /// Whether a move of this VM to this node is not finished.
    pub(crate) fn expects(&self, vm: &str) -> bool {
        self.lock().keys().any(|of| of.vm == vm)
    }

    /// Whether any move to this node is not finished.
    pub(crate) fn expects_any(&self) -> bool {
        !self.lock().is_empty()
    }

    fn forget(&self, of: &Move) {
        self.lock().remove(of);
        self.arrivals().remove(of);
    }

    /// What the next move from this node will probably take besides memory.
    pub(super) fn overhead_us(&self) -> u64 {
        match self.overhead_us.load(Ordering::Relaxed) {
            0 => migrator::OVERHEAD_US,
            measured => measured,
        }
    }

    /// A live move took so long besides memory.
    pub(super) fn learn_overhead(&self, took_us: u64) {
        // A quarter of the newest: one that was slow by chance changes little.
        let learned = (self.overhead_us().saturating_mul(3).saturating_add(took_us)) / 4;
        self.overhead_us.store(learned, Ordering::Relaxed);
    }

    /// The move that expects a memory stream.
    pub(super) fn arrival(&self, of: &Move) -> Option<Arc<Arrival>> {
        self.arrivals().get(of)?.upgrade()
    }

    fn arrivals(&self) -> MutexGuard<'_, HashMap<Move, Weak<Arrival>>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rank: above the decision about its VM.
type SharedAttempt = Arc<tokio::sync::Mutex<Attempt>>;

/// One move to this node.
#[derive(Debug)]
struct Attempt {
    of: Move,
    machine: Incoming,
    saved: Option<Saved>,
    /// The process that has loaded the state, or waits for it.
    runner: Option<Arc<Runner>>,
    /// The memory of a live move, on its way.
    arrival: Option<Arc<Arrival>>,
}

/// A message of the source of a move to this node.
pub(crate) async fn incoming(core: &Arc<Core>, body: Bytes) -> Result<Bytes, Error> {
    let message = ToTarget::decode(&body).map_err(Error::usage)?;
    let (of, event, saved) = match message {
        ToTarget::Inquire { paths, .. } => {
            return Ok(FromTarget::Facts(facts::gather(core, paths).await).encode().into());
        }
        ToTarget::Prepare(of, saved) => (of, TargetEvent::Prepare, Some(saved)),
        ToTarget::Activate(of, saved) => (of, TargetEvent::Activate, Some(saved)),
        ToTarget::Cancel(of) => (of, TargetEvent::Cancel, None),
    };
    if of.to != core.me {
        return Err(Error::usage("the message is for another node"));
    }
    let attempt = core.vms.moves.of(core, &of);
    let (tell, told) = tokio::sync::oneshot::channel();
    // The source may stop listening; what was begun is finished all the same.
    core.runtime.spawn(follow(Arc::clone(core), attempt, of, event, saved, Some(tell)));
    let answer = told.await.unwrap_or_else(|_| TargetAnswer::Refused("the target has no answer".to_owned()));
    Ok(FromTarget::Answer(answer).encode().into())
}

type Tell = Option<tokio::sync::oneshot::Sender<TargetAnswer>>;

/// Takes one event to its end, and goes on looking while the attempt waits.
async fn follow(
    core: Arc<Core>,
    attempt: SharedAttempt,
    of: Move,
    event: TargetEvent,
    saved: Option<Saved>,
    tell: Tell,
) {
    let was_waiting = {
        let mut attempt = attempt.lock().await;
        if saved.is_some() {
            attempt.saved = saved;
        }
        attempt.machine.is_waiting()
    };
    take(&core, &attempt, event, tell).await;
    let waiting = attempt.lock().await.machine.is_waiting();
    if !waiting {
        // Nothing is here, or it is in the record what is: who asks again is answered from the record.
        core.vms.moves.forget(&of);
    }
    if waiting && !was_waiting {
        let runtime = core.runtime.clone();
        runtime.spawn(look(core, attempt, of));
    }
}

/// A message may be lost: the record tells what has become of the move. As soon as this node's copy of the records has the
/// commit, without the source's word, which comes later: the guest stands still.
async fn look(core: Arc<Core>, attempt: SharedAttempt, of: Move) {
    let mut committed = Some(Box::pin(committed(&core, &of)));
    loop {
        tokio::select! {
            () = core.done.cancelled() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = async { committed.as_mut().expect("polled while it is there").await }, if committed.is_some() => {
                committed = None;
            }
        }
        if !see_process(&core, &attempt).await {
            return;
        }
        take(&core, &attempt, TargetEvent::Look, None).await;
        if !attempt.lock().await.machine.is_waiting() {
            core.vms.moves.forget(&of);
            return;
        }
    }
}

/// Returns when this node's copy of the records says that the source owns the VM no longer in the epoch of the move.
async fn committed(core: &Core, of: &Move) {
    let mut state = core.cluster.watch();
    let epoch = of.epoch;
    let come = state.wait_for(|state| state.vms.get(&of.vm).is_some_and(|record| record.epoch > epoch));
    if come.await.is_err() {
        // Raft has ended here: nothing will come.
        std::future::pending::<()>().await;
    }
}

/// Notices the end of the process; gives whether the attempt still waits for something.
async fn see_process(core: &Arc<Core>, attempt: &SharedAttempt) -> bool {
    let ended = {
        let mut attempt = attempt.lock().await;
        if !attempt.machine.is_waiting() {
            return false;
        }
        let ended = attempt.runner.as_ref().is_some_and(|runner| runner.has_ended());
        let lost = ended && !attempt.machine.is_running();
        if lost {
            attempt.runner = None;
            attempt.arrival = None;
        }
        lost
    };
    if ended {
        let event = TargetEvent::ProcessEnded("its process ended".to_owned());
        take(core, attempt, event, None).await;
    }
    true
}

/// Carries out what follows from one event. While the outcome is proposed the attempt is not held: the source, which may ask
/// for the answer now, need not wait for it.
async fn take(core: &Arc<Core>, attempt: &SharedAttempt, event: TargetEvent, mut tell: Tell) {
    let mut now = attempt.lock().await;
    let told = event == TargetEvent::Activate;
    let mut decision = None;
    let mut todo = VecDeque::from(now.machine.step(event));
    while let Some(action) = todo.pop_front() {
        tracing::debug!(vm = now.of.vm, ?action, "move to this node");
        if let TargetAction::Answer(answer) = action {
            if let Some(tell) = tell.take() {
                let _gone = tell.send(answer);
            }
            continue;
        }
        if decision.is_none() {
            decision = Some(core.vms.decide(&now.of.vm).await);
        }
        let event = match action {
            TargetAction::Load => now.load(core).await,
            TargetAction::ReadRecord => TargetEvent::Record(now.record(core, told).await),
            TargetAction::Start => now.start(core).await,
            TargetAction::Discard => {
                now.discard().await;
                continue;
            }
            TargetAction::Propose(change) => {
                // The source waits for the answer, which is certain already; the record can follow.
                if let Some(TargetAction::Answer(answer)) = todo.front().cloned()
                    && let Some(tell) = tell.take()
                {
                    todo.pop_front();
                    let _gone = tell.send(answer);
                }
                let (vm, change) = (now.of.vm.clone(), now.with_saved(core, change).await);
                drop(now);
                let reply = propose_outcome(core, &vm, &change).await;
                // The order of these two: whoever holds the attempt may wait for the decision.
                decision = None;
                now = attempt.lock().await;
                TargetEvent::Cas(reply)
            }
            TargetAction::Answer(_) => unreachable!("answered above"),
        };
        todo.extend(now.machine.step(event));
    }
    if now.machine.is_running() && !now.machine.is_waiting() {
        now.clean_up(core);
    }
}

async fn propose_outcome(core: &Arc<Core>, vm: &str, change: &Change) -> CasReply {
    match view::vm(&core.state(), vm).cloned() {
        Ok(record) => propose(core, &record, change).await,
        Err(_) => CasReply::Lost(None),
    }
}

impl Attempt {
    /// What the record is to say, with the saved state as long as the VM can still be started from it.
    async fn with_saved(&self, core: &Arc<Core>, mut change: Change) -> Change {
        if change.to.state == VmState::Failed {
            change.saved = self.saved_in_record(core).await;
        }
        change
    }

    /// The VM's record. A commit that is in this node's own copy stands. After the source's word it mostly is, or is about to
    /// come: the guest stands still, and asking the quorum takes longer.
    async fn record(&self, core: &Arc<Core>, told: bool) -> Option<RecordView> {
        let vm = &self.of.vm;
        let patience = if told { COPY_WITHIN } else { Duration::ZERO };
        if tokio::time::timeout(patience, committed(core, &self.of)).await.is_ok() {
            return core.state().vms.get(vm).map(RecordView::from);
        }
        read_record(core, vm).await
    }

    /// Starts a process that loads the state, for the epoch that the record would give to this node.
    async fn load(&mut self, core: &Arc<Core>) -> TargetEvent {
        match self.try_load(core).await {
            Ok(runner) => self.expect_memory(core, runner).await,
            Err(error) => TargetEvent::LoadFailed(error.message),
        }
    }

    /// From here on memory streams are taken, if this is a live move.
    async fn expect_memory(&mut self, core: &Arc<Core>, runner: Arc<Runner>) -> TargetEvent {
        self.runner = Some(Arc::clone(&runner));
        if self.is_streamed() {
            match Arrival::expect(core, &runner).await {
                Ok(arrival) => {
                    core.vms.moves.arrivals().insert(self.of.clone(), Arc::downgrade(&arrival));
                    self.arrival = Some(arrival);
                }
                Err(reason) => return TargetEvent::LoadFailed(reason),
            }
        }
        TargetEvent::Loaded
    }

    fn is_streamed(&self) -> bool {
        self.saved.as_ref().is_some_and(Saved::is_streamed)
    }

    async fn try_load(&self, core: &Arc<Core>) -> Result<Arc<Runner>, Error> {
        core.vms.rehearsal.pass("load").await;
        let saved = self.saved.as_ref().ok_or_else(|| Error::usage("the move names no saved state"))?;
        let mut record: VmRecord = view::vm(&core.state(), &self.of.vm)?.clone();
        record.owner = core.me;
        record.epoch = self.of.epoch + 1;
        let spec = spec_of(&record)?;
        let content = match (saved.is_streamed(), self.machine.is_owned()) {
            (true, true) => {
                return Err(Error::failed("its memory was lost with the process that had it here"));
            }
            (true, false) => Content::Streamed,
            (false, _) => {
                Content::Saved(VolumePath { volume: saved.volume.clone(), path: saved.path.clone() })
            }
        };
        let runner = Runner::start(core, &record, &spec, content).await?;
        core.vms.add(&runner);
        supervise(core, &runner);
        Ok(runner)
    }

    /// The record names this node: the guest runs here from now on.
    async fn start(&mut self, core: &Arc<Core>) -> TargetEvent {
        let Some(runner) = self.runner.clone() else {
            return TargetEvent::StartFailed("its process is gone".to_owned());
        };
        // This node's copy of the records may be a moment behind what was just read; nobody shall look at an older one.
        let mut state = core.cluster.watch();
        let (vm, epoch) = (self.of.vm.clone(), self.of.epoch + 1);
        drop(state.wait_for(|state| state.vms.get(&vm).is_none_or(|record| record.epoch >= epoch)).await);
        core.vms.rehearsal.pass("start").await;
        let used_up = if self.is_streamed() { Ok(()) } else { self.use_up_saved(core).await };
        let ready = match (used_up, &self.arrival) {
            (Ok(()), Some(arrival)) => arrival.activate().await,
            (Ok(()), None) => runner.control().activate().await,
            (Err(error), _) => Err(error),
        };
        match ready {
            Ok(()) => TargetEvent::Started,
            Err(error) => TargetEvent::StartFailed(error.message),
        }
    }

    /// The saved state, as long as the guest cannot have run: the VM can still be started from it.
    async fn saved_in_record(&self, core: &Arc<Core>) -> Option<String> {
        core.cluster.read().await.ok()?.vms.get(&self.of.vm)?.saved.clone()
    }

    /// The record no longer names the saved state from the moment on at which the guest may run: should this node die
    /// before the record says `running`, nobody goes on with a memory that is older than the disks.
    async fn use_up_saved(&self, core: &Arc<Core>) -> Result<(), Error> {
        let record = view::vm(&core.state(), &self.of.vm)?.clone();
        if record.saved.is_none() {
            return Err(Error::conflict(
                "its guest may have run here before: its saved memory is older than its disks",
            ));
        }
        loop {
            let used_up = record.update(|record| record.saved = None);
            match core.cluster.propose(used_up).await {
                Ok(_) => return Ok(()),
                Err(ProposeError::NoQuorum { .. } | ProposeError::OutcomeUnknown { .. })
                    if !core.stop.is_cancelled() => {}
                Err(error) => return Err(refused(&error)),
            }
        }
    }

    /// Ends the process, and sees its end: it may have opened the disks.
    async fn discard(&mut self) {
        if let Some(arrival) = self.arrival.take() {
            arrival.give_up("the move is off");
        }
        if let Some(runner) = self.runner.take() {
            runner.release();
            runner.kill();
            runner.ended().await;
        }
    }

    /// The guest runs and the record says so: the saved state is of no use any more, and neither is this daemon's view of the
    /// RAM. Taking the view down takes a while for each GiB that was written, which nobody waits for here.
    fn clean_up(&mut self, core: &Arc<Core>) {
        if let Some(arrival) = self.arrival.take() {
            core.runtime.spawn_blocking(move || drop(arrival));
        }
        if let Some(saved) = self.saved.take().filter(|saved| !saved.is_streamed()) {
            let file = VolumePath { volume: saved.volume, path: saved.path };
            match &self.runner {
                Some(runner) => remove_when_read(core, runner, file),
                None => remove_state(core, file),
            }
        }
    }
}
