//! The source of a move: carries out what [`migrator::Migration`] decides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use api::{Error, pb};
use hv::control::VmRunState;
use hv_runner::config::VolumePath;
use lockmgr::NodeId;
use lockmgr::cluster::{Member, VmRecord};
use migrator::preflight::{self, Facts, Problem};
use migrator::protocol::{FromTarget, Move, Saved, ToTarget};
use migrator::{Action, Event, Failure, Kind, Migration, Plan, Report, SaveFigures, TargetAnswer};

use super::copy::Copy;
use super::progress::Progress;
use super::{await_arrival, check, facts, propose, read_record, remove_state, saved_name, us};
use crate::core::Core;
use crate::forward;
use crate::messages::{NodeAnswer, NodeOp};
use crate::view;
use crate::vms::runner::{Runner, state_volume};
use crate::vms::{running_here, spec_of};

/// Longest time that a target may take to answer one message; it may have to load the whole memory.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
/// Longest standstill that nobody has to ask for.
const BLACKOUT_MAX: Duration = Duration::from_millis(300);

/// Moves a VM of this node.
pub(crate) async fn migrate(
    core: &Arc<Core>,
    request: pb::VmMigrateRequest,
) -> Result<pb::MigrateReport, Error> {
    let state = core.state();
    let to = view::member(&state, &request.to)?.clone();
    let (record, runner) = running_here(core, &request.name, "migrate")?;
    check(&state, &record, &to, &request.r#type)?;
    let spec = spec_of(&record)?;
    let file = match request.r#type.as_str() {
        "quick" => Some(VolumePath {
            volume: state_volume(core, &spec)?,
            path: format!(".{}-{}.vmstate", record.name, record.epoch),
        }),
        _ => None,
    };
    let of = new_move(core, &record, to.id);
    let moving = runner.begin_move().ok_or_else(|| {
        Error::conflict(format!("vm migrate {}: it is being moved already", record.name))
            .hint("wait until it has arrived, or give that move up with --cancel")
    })?;
    let blackout_max = match request.max_blackout_ms {
        0 => BLACKOUT_MAX,
        ms => Duration::from_millis(ms),
    };
    let reason = if request.reason.is_empty() { "as asked".to_owned() } else { request.reason };
    let progress = Arc::clone(&moving.progress);
    let (deltas, copy, over, start) = (false, None, false, now());
    let mut source = Source {
        core,
        record,
        runner,
        to,
        spec,
        file,
        blackout_max,
        of,
        reason,
        progress,
        deltas,
        copy,
        over,
        start,
    };
    source.run().await
}

/// What stands against moving a VM of this node to another one: what a move would be refused with.
pub(crate) async fn problems(
    core: &Arc<Core>,
    request: &pb::VmCheckMigrateRequest,
) -> Result<pb::MigrateProblems, Error> {
    let state = core.state();
    let record = view::vm(&state, &request.name)?;
    let to = view::member(&state, &request.to)?;
    let (spec, of) = (spec_of(record)?, new_move(core, record, to.id));
    let found = preflight(core, &spec, &of).await.err().unwrap_or_default();
    let shown = found
        .iter()
        .map(|problem| pb::MigrateProblem { kind: problem.kind().to_owned(), message: problem.to_string() });
    Ok(pb::MigrateProblems { vm: request.name.clone(), to: to.name.clone(), problems: shown.collect() })
}

fn new_move(core: &Core, record: &VmRecord, to: NodeId) -> Move {
    Move {
        vm: record.name.clone(),
        vm_id: record.id,
        from: core.me,
        to,
        epoch: record.epoch,
        attempt: core.clients.new_serial(),
    }
}

/// What the target is and has, unless something stands against the move.
async fn preflight(core: &Arc<Core>, spec: &pb::VmSpec, of: &Move) -> Result<Facts, Vec<Problem>> {
    let down = |node, reason: String| vec![Problem::NodeDown { node, reason }];
    let needs = facts::needs(core, spec, of.to).map_err(|error| down(core.me, error.message))?;
    let asked = ToTarget::Inquire { of: of.clone(), paths: needs.paths.clone() };
    let facts = match tell(core, of.to, &asked).await {
        Ok(FromTarget::Facts(facts)) => facts,
        Ok(FromTarget::Answer(_)) => {
            return Err(down(of.to, "it gave an answer that makes no sense".to_owned()));
        }
        Err(error) => return Err(down(of.to, error.message)),
    };
    let problems = preflight::check(&needs, &facts);
    if problems.is_empty() { Ok(facts) } else { Err(problems) }
}

async fn tell(core: &Arc<Core>, to: NodeId, message: &ToTarget) -> Result<FromTarget, Error> {
    let lost = |name: &str| match core.vms.rehearsal.is_lost(name) {
        true => Err(Error::failed("the connection is gone")),
        false => Ok(()),
    };
    let name = match message {
        ToTarget::Inquire { .. } => "inquire",
        ToTarget::Prepare(..) => "prepare",
        ToTarget::Activate(..) => "activate",
        ToTarget::Cancel(_) => "cancel",
    };
    lost(name)?;
    let answer = ask(core, to, message).await;
    lost(&format!("{name}-answer"))?;
    answer
}

async fn ask(core: &Arc<Core>, to: NodeId, message: &ToTarget) -> Result<FromTarget, Error> {
    let op = NodeOp::VmIncoming(message.encode().into());
    let asked = tokio::time::timeout(ANSWER_WITHIN, forward::ask(core, to, op));
    match asked.await {
        Ok(Ok(NodeAnswer::Incoming(body))) => FromTarget::decode(&body).map_err(Error::failed),
        Ok(Ok(_)) => Err(Error::failed("the target's answer cannot be read")),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::failed(format!("no answer within {} s", ANSWER_WITHIN.as_secs()))),
    }
}

/// A move in progress.
struct Source<'a> {
    core: &'a Arc<Core>,
    /// As it was before the move.
    record: VmRecord,
    runner: Arc<Runner>,
    to: Member,
    spec: pb::VmSpec,
    /// Where the state of a quick move is saved; a live move has none.
    file: Option<VolumePath>,
    blackout_max: Duration,
    of: Move,
    /// Why it moves, for the events.
    reason: String,
    progress: Arc<Progress>,
    /// Both sides have pages as differences.
    deltas: bool,
    /// The memory of a live move, until the guest runs somewhere.
    copy: Option<Copy>,
    /// The process here is to be ended: the VM is not this node's any more.
    over: bool,
    start: Instant,
}

/// What an action came to.
enum Carried {
    Event(Event),
    Nothing,
    End(Result<Report, Failure>),
}

impl Source<'_> {
    async fn run(&mut self) -> Result<pb::MigrateReport, Error> {
        let kind = match &self.file {
            Some(file) => Kind::Quick { saved: saved_name(file) },
            None => Kind::Live,
        };
        let plan = Plan { vm: self.record.name.clone(), record: (&self.record).into(), to: self.to.id, kind };
        let mut machine = Migration::new(plan);
        let mut cancelled = false;
        let mut todo = VecDeque::from(machine.step(self.now_us(), Event::Begin));
        while let Some(action) = todo.pop_front() {
            self.progress.phase(machine.phase());
            self.core.vms.rehearsal.pass(machine.phase()).await;
            match self.carry_out(action).await {
                Carried::Event(event) => {
                    // Told before the answer, which may be what the cancellation has made of it.
                    if !cancelled && self.progress.cancel.is_cancelled() {
                        cancelled = true;
                        todo.extend(machine.step(self.now_us(), Event::Cancel));
                    }
                    todo.extend(machine.step(self.now_us(), event));
                }
                Carried::Nothing => {}
                Carried::End(outcome) => {
                    self.let_go();
                    return match outcome {
                        Ok(report) => Ok(self.finished(&report).await),
                        Err(failure) => Err(self.failed(&failure)),
                    };
                }
            }
        }
        Err(Error::failed(format!("vm migrate {}: the move ended without an outcome", self.record.name)))
    }

    async fn carry_out(&mut self, action: Action) -> Carried {
        tracing::debug!(vm = self.record.name, ?action, "move");
        match action {
            Action::Preflight => Carried::Event(self.check().await),
            Action::Propose(change) => {
                Carried::Event(Event::Cas(propose(self.core, &self.record, &change).await))
            }
            Action::ReadRecord => {
                Carried::Event(Event::Record(read_record(self.core, &self.record.name).await))
            }
            Action::Save => Carried::Event(self.save().await),
            Action::Copy => Carried::Event(self.copy().await),
            Action::Halt => Carried::Event(self.halt().await),
            Action::PrepareTarget => Carried::Event(self.prepare().await),
            Action::ActivateTarget => {
                let answer = self.activate().await;
                self.let_go();
                Carried::Event(answer)
            }
            Action::CancelTarget => {
                drop(self.tell(&ToTarget::Cancel(self.of.clone())).await);
                Carried::Nothing
            }
            Action::ResumeSource { epoch } => Carried::Event(self.resume(epoch).await),
            Action::EndSource => {
                self.runner.release();
                self.over = true;
                Carried::Nothing
            }
            Action::CancelRefused(_) => Carried::Nothing,
            Action::Finished(report) => Carried::End(Ok(report)),
            Action::Failed(failure) => Carried::End(Err(failure)),
        }
    }

    async fn check(&mut self) -> Event {
        let found = tokio::select! {
            found = preflight(self.core, &self.spec, &self.of) => found,
            // The machine has heard of the cancellation before it hears of this.
            () = self.progress.cancel.cancelled() => return Event::Checked(Vec::new()),
        };
        match found {
            Ok(facts) => {
                self.deltas = facts.takes_deltas && facts::has_deltas();
                Event::Checked(Vec::new())
            }
            Err(problems) => Event::Checked(problems),
        }
    }

    async fn save(&self) -> Event {
        let Some(file) = &self.file else { return Event::SaveFailed("a live move saves nothing".to_owned()) };
        match self.runner.control().save(&file.volume, &file.path).await {
            Ok(saved) => Event::Saved(SaveFigures {
                drain_us: us(saved.drain_ms),
                memory_us: us(saved.memory_ms),
                state_us: us(saved.state_ms),
                ..SaveFigures::default()
            }),
            Err(error) => Event::SaveFailed(error.message),
        }
    }

    async fn copy(&mut self) -> Event {
        if let Some(file) = &self.file {
            return self.copy_to(file).await;
        }
        let progress = Arc::clone(&self.progress);
        let (most, deltas) = (self.blackout_max, self.deltas);
        let begun = Copy::begin(self.core, &self.runner, &self.of, most, deltas, progress).await;
        let copied = match begun {
            Ok(copy) => self.copy.insert(copy).run(&self.progress.cancel).await,
            Err(reason) => Err(reason),
        };
        match copied {
            Ok(()) => Event::Copied,
            Err(reason) => {
                self.copy = None;
                Event::CopyFailed(reason)
            }
        }
    }

    /// A quick move: memory goes to the volume while the guest runs.
    async fn copy_to(&self, file: &VolumePath) -> Event {
        let copied = tokio::select! {
            copied = self.runner.control().copy_memory(&file.volume, &file.path) => copied,
            () = self.progress.cancel.cancelled() => Err(Error::failed("it was cancelled")),
        };
        match copied {
            Ok(()) => Event::Copied,
            Err(error) => Event::CopyFailed(error.message),
        }
    }

    async fn halt(&mut self) -> Event {
        let Some(copy) = &mut self.copy else {
            return Event::SaveFailed("no memory was sent".to_owned());
        };
        match copy.halt().await {
            Ok(figures) => Event::Saved(figures),
            Err(reason) => {
                // The target sees its streams end.
                self.copy = None;
                Event::SaveFailed(reason)
            }
        }
    }

    async fn prepare(&self) -> Event {
        let prepare = ToTarget::Prepare(self.of.clone(), self.saved());
        let answered = tokio::select! {
            answered = self.tell(&prepare) => answered,
            () = self.progress.cancel.cancelled() => return Event::TargetLost("it was cancelled".to_owned()),
        };
        match answered {
            Ok(FromTarget::Answer(TargetAnswer::Prepared)) => Event::Prepared,
            Ok(FromTarget::Answer(TargetAnswer::Refused(reason))) => Event::Refused(reason),
            Ok(_) => Event::Refused("the target gave an answer that makes no sense".to_owned()),
            Err(error) => Event::TargetLost(error.message),
        }
    }

    async fn activate(&self) -> Event {
        match self.tell(&ToTarget::Activate(self.of.clone(), self.saved())).await {
            Ok(FromTarget::Answer(TargetAnswer::Activated)) => Event::Activated,
            Ok(FromTarget::Answer(TargetAnswer::ActivateFailed(reason))) => Event::ActivateFailed(reason),
            // It may have answered before, and that answer was lost: the record tells.
            Ok(FromTarget::Answer(TargetAnswer::Refused(reason))) => Event::TargetLost(reason),
            Ok(_) => Event::TargetLost("the target gave an answer that makes no sense".to_owned()),
            Err(error) => {
                // The target looks at the record by itself; asking again at once would only flood it.
                tokio::time::sleep(super::READ_AGAIN_AFTER).await;
                Event::TargetLost(error.message)
            }
        }
    }

    fn saved(&self) -> Saved {
        let spec = self.record.spec.to_vec();
        match &self.file {
            Some(file) => Saved { volume: file.volume.clone(), path: file.path.clone(), spec },
            None => Saved::nowhere(spec),
        }
    }

    /// The guest runs on here. A process that could not save has never stopped running it.
    async fn resume(&self, epoch: u64) -> Event {
        self.runner.epoch.store(epoch, Ordering::Release);
        let resumed = match self.runner.control().status().await {
            Ok(status) if status.state() == VmRunState::Saved => {
                self.runner.control().abandon(Vec::new()).await
            }
            Ok(status) if matches!(status.state(), VmRunState::Running | VmRunState::Paused) => Ok(()),
            Ok(status) => Err(Error::failed(format!("its process says {:?}", status.state()))),
            Err(error) => Err(error),
        };
        if let Some(file) = &self.file {
            remove_state(self.core, file.clone());
        }
        self.follow_no_more().await;
        match resumed {
            Ok(()) => Event::Resumed,
            Err(error) => {
                // The record is about to say that it runs nowhere, and then any node may start it (H1).
                self.runner.kill();
                self.runner.ended().await;
                Event::ResumeFailed(error.message)
            }
        }
    }

    /// The guest runs, so this can take its time.
    async fn follow_no_more(&self) {
        if let Err(error) = self.runner.control().untrack().await {
            tracing::warn!(vm = self.record.name, %error, "written pages are still noted; the next move puts it right");
        }
    }

    /// Takes down what the move has left here. The process of a VM that has moved is halted for good and has closed its disks:
    /// it is ended only now, because giving back a GiB of memory keeps a core busy for a tenth of a second, which the guest
    /// would stand still for.
    fn let_go(&mut self) {
        if let Some(copy) = self.copy.take() {
            self.core.runtime.spawn_blocking(move || drop(copy));
        }
        if !std::mem::take(&mut self.over) {
            return;
        }
        let runner = Arc::clone(&self.runner);
        self.core.runtime.spawn(async move {
            if let Err(error) = runner.stop(true).await {
                tracing::warn!(vm = runner.name, %error, "process of a VM that has moved: killed");
                runner.kill();
            }
        });
    }

    async fn tell(&self, message: &ToTarget) -> Result<FromTarget, Error> {
        tell(self.core, self.to.id, message).await
    }

    async fn finished(&self, report: &Report) -> pb::MigrateReport {
        if self.file.is_none() {
            self.core.vms.moves.learn_overhead(us(report.blackout.overhead_ms()));
        }
        await_arrival(self.core, &self.record.name, self.record.epoch).await;
        let shown = pb::MigrateReport {
            vm: report.vm.clone(),
            from: self.core.config.name.clone(),
            to: self.to.name.clone(),
            r#type: report.kind.to_owned(),
            total_ms: report.total_ms,
            blackout_ms: report.blackout_ms,
            blackout: Some(pb::Blackout {
                drain_ms: report.blackout.drain_ms,
                memory_ms: report.blackout.memory_ms,
                state_ms: report.blackout.state_ms,
                handoff_ms: report.blackout.handoff_ms,
            }),
            rounds: report.rounds,
            memory_bytes_sent: report.memory_bytes_sent,
            disk_bytes_copied: report.disk_bytes_copied,
            delta_pages: report.delta_pages,
            delta_bytes_saved: report.delta_bytes_saved,
        };
        let text = format!(
            "vm {} moved from {} to {} ({}) {}; it stood still for {:.1} ms",
            shown.vm, shown.from, shown.to, shown.r#type, self.reason, shown.blackout_ms
        );
        self.core.note("vm.moved", &shown.vm, text);
        shown
    }

    fn failed(&self, failure: &Failure) -> Error {
        let name = &self.record.name;
        self.core.note("vm.not_moved", name, failure.to_string());
        let error = match failure {
            Failure::NotPossible { .. } => Error::conflict(failure),
            _ => Error::failed(failure),
        };
        let hint = match failure {
            Failure::NotPossible { .. } => "put right what is listed, or choose another node",
            Failure::Kept { .. } => "the VM is as it was; `csvctl health` shows what may be wrong",
            _ => "`csvctl vm show` tells where it is",
        };
        error.during(format!("vm migrate {name} to {}", self.to.name)).hint(hint)
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

#[expect(clippy::disallowed_methods, reason = "measures the phases that it reports")]
fn now() -> Instant {
    Instant::now()
}
