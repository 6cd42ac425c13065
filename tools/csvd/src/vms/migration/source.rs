//! The source of a quick move: carries out what [`migrator::Migration`] decides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use api::{Error, pb};
use hv::control::VmRunState;
use hv_runner::config::VolumePath;
use lockmgr::cluster::{Member, VmRecord, VmState};
use migrator::preflight::{self, Problem};
use migrator::protocol::{FromTarget, Move, Saved, ToTarget};
use migrator::{Action, Event, Failure, Migration, Plan, Report, SaveFigures, TargetAnswer};

use super::{check, facts, propose, read_record, remove_state, saved_name};
use crate::core::Core;
use crate::forward;
use crate::messages::{NodeAnswer, NodeOp};
use crate::view;
use crate::vms::runner::{Runner, state_volume};
use crate::vms::{running_here, spec_of};

/// Longest time until the record says that a VM that was seen running runs.
const RECORDED_WITHIN: Duration = Duration::from_secs(5);
/// Longest time that a target may take to answer one message; it may have to load the whole memory.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);

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
    let volume = state_volume(core, &spec)?;
    let file = VolumePath { volume, path: format!(".{}-{}.vmstate", record.name, record.epoch) };
    let of = Move {
        vm: record.name.clone(),
        vm_id: record.id,
        from: core.me,
        to: to.id,
        epoch: record.epoch,
        attempt: core.clients.new_serial(),
    };
    let _moving = runner.begin_move().ok_or_else(|| {
        Error::conflict(format!("vm migrate {}: it is being moved already", record.name))
            .hint("wait until it has arrived")
    })?;
    let source = Source { core, record, runner, to, spec, file, of, start: now() };
    source.run().await
}

/// A move in progress.
struct Source<'a> {
    core: &'a Arc<Core>,
    /// As it was before the move.
    record: VmRecord,
    runner: Arc<Runner>,
    to: Member,
    spec: pb::VmSpec,
    file: VolumePath,
    of: Move,
    start: Instant,
}

/// What an action came to.
enum Carried {
    Event(Event),
    Nothing,
    End(Result<Report, Failure>),
}

impl Source<'_> {
    async fn run(&self) -> Result<pb::MigrateReport, Error> {
        let plan = Plan {
            vm: self.record.name.clone(),
            record: (&self.record).into(),
            to: self.to.id,
            saved: saved_name(&self.file),
        };
        let mut machine = Migration::new(plan);
        let mut todo = VecDeque::from(machine.step(self.now_us(), Event::Begin));
        while let Some(action) = todo.pop_front() {
            match self.carry_out(action).await {
                Carried::Event(event) => todo.extend(machine.step(self.now_us(), event)),
                Carried::Nothing => {}
                Carried::End(Ok(report)) => return Ok(self.finished(&report).await),
                Carried::End(Err(failure)) => return Err(self.failed(&failure)),
            }
        }
        Err(Error::failed(format!("vm migrate {}: the move ended without an outcome", self.record.name)))
    }

    async fn carry_out(&self, action: Action) -> Carried {
        tracing::debug!(vm = self.record.name, ?action, "move");
        match action {
            Action::Preflight => Carried::Event(Event::Checked(self.preflight().await)),
            Action::Propose(change) => {
                Carried::Event(Event::Cas(propose(self.core, &self.record, &change).await))
            }
            Action::ReadRecord => {
                Carried::Event(Event::Record(read_record(self.core, &self.record.name).await))
            }
            Action::Save => Carried::Event(self.save().await),
            Action::PrepareTarget => Carried::Event(self.prepare().await),
            Action::ActivateTarget => Carried::Event(self.activate().await),
            Action::CancelTarget => {
                drop(self.tell(&ToTarget::Cancel(self.of.clone())).await);
                Carried::Nothing
            }
            Action::ResumeSource { epoch } => Carried::Event(self.resume(epoch).await),
            Action::EndSource => {
                self.end_source();
                Carried::Nothing
            }
            Action::CancelRefused(_) => Carried::Nothing,
            Action::Finished(report) => Carried::End(Ok(report)),
            Action::Failed(failure) => Carried::End(Err(failure)),
        }
    }

    async fn preflight(&self) -> Vec<Problem> {
        let needs = facts::needs(self.core, &self.spec, self.to.id);
        let asked = ToTarget::Inquire { of: self.of.clone(), paths: needs.paths.clone() };
        let down = |reason: String| vec![Problem::NodeDown { node: self.to.id, reason }];
        match self.tell(&asked).await {
            Ok(FromTarget::Facts(facts)) => preflight::check(&needs, &facts),
            Ok(FromTarget::Answer(_)) => down("it gave an answer that makes no sense".to_owned()),
            Err(error) => down(error.message),
        }
    }

    async fn save(&self) -> Event {
        match self.runner.control().save(&self.file.volume, &self.file.path).await {
            Ok(saved) => Event::Saved(SaveFigures {
                drain_us: us(saved.drain_ms),
                memory_us: us(saved.memory_ms),
                state_us: us(saved.state_ms),
            }),
            Err(error) => Event::SaveFailed(error.message),
        }
    }

    async fn prepare(&self) -> Event {
        match self.tell(&ToTarget::Prepare(self.of.clone(), self.saved())).await {
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
        Saved {
            volume: self.file.volume.clone(),
            path: self.file.path.clone(),
            spec: self.record.spec.to_vec(),
        }
    }

    /// The guest runs on here. A process that could not save has never stopped running it.
    async fn resume(&self, epoch: u64) -> Event {
        self.runner.epoch.store(epoch, Ordering::Release);
        let resumed = match self.runner.control().status().await {
            Ok(status) if status.state() == VmRunState::Saved => self.runner.control().abandon().await,
            Ok(status) if matches!(status.state(), VmRunState::Running | VmRunState::Paused) => Ok(()),
            Ok(status) => Err(Error::failed(format!("its process says {:?}", status.state()))),
            Err(error) => Err(error),
        };
        remove_state(self.core, self.file.clone());
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

    /// The process never runs the guest again: it has closed the disks, and is ended without being waited for.
    fn end_source(&self) {
        self.runner.release();
        let runner = Arc::clone(&self.runner);
        self.core.runtime.spawn(async move {
            if let Err(error) = runner.stop(true).await {
                tracing::warn!(vm = runner.name, %error, "process of a VM that has moved: killed");
                runner.kill();
            }
        });
    }

    async fn tell(&self, message: &ToTarget) -> Result<FromTarget, Error> {
        let op = NodeOp::VmIncoming(message.encode().into());
        let asked = tokio::time::timeout(ANSWER_WITHIN, forward::ask(self.core, self.to.id, op));
        match asked.await {
            Ok(Ok(NodeAnswer::Incoming(body))) => FromTarget::decode(&body).map_err(Error::failed),
            Ok(Ok(_)) => Err(Error::failed("the target's answer cannot be read")),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(Error::failed(format!("no answer within {} s", ANSWER_WITHIN.as_secs()))),
        }
    }

    async fn finished(&self, report: &Report) -> pb::MigrateReport {
        self.await_recorded().await;
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
        };
        let text = format!(
            "vm {} moved from {} to {} (quick) as asked; it stood still for {:.1} ms",
            shown.vm, shown.from, shown.to, shown.blackout_ms
        );
        self.core.note("vm.moved", &shown.vm, text);
        shown
    }

    /// The guest runs; whoever asks for the VM next shall read so too.
    async fn await_recorded(&self) {
        let mut state = self.core.cluster.watch();
        let recorded = state.wait_for(|state| {
            let record = state.vms.get(&self.record.name);
            record.is_none_or(|record| record.epoch > self.record.epoch && record.state != VmState::Saved)
        });
        drop(tokio::time::timeout(RECORDED_WITHIN, recorded).await);
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

/// Whole microseconds of a duration in milliseconds.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float cast saturates, and the value is a measured duration"
)]
fn us(ms: f64) -> u64 {
    (ms * 1000.0) as u64
}

#[expect(clippy::disallowed_methods, reason = "measures the phases that it reports")]
fn now() -> Instant {
    Instant::now()
}
