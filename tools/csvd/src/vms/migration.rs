//! Quick migration, driven by the source.
//!
//! ```text
//!   source                              record                              target
//!   preflight ---- Prepare? ----------------------------------------------> can it? (nothing is kept)
//!   CAS                                 Running -> Migrating, peer = target
//!   hv: pause, drain, flush, save to the volume
//!                  ---- Load -------------------------------------------> hv started, loads the state, waits
//!   commit: one CAS                     (source, e) Migrating -> (target, e + 1) Saved
//!                  ---- Activate ---------------------------------------> disks re-read and opened, the guest runs
//!   the source's process ends           Saved -> Running
//! ```
//! Before the commit any error leads back: the source gives the save up and the guest runs on there. After it the source
//! never runs the guest again; what the target cannot finish stays `Saved` in the record, with the reason, and
//! `vm start` goes on from the saved state.
//!
//! **Invariant (H1, H6):** whether the commit has happened is what the record says, never a guess.

use std::sync::Arc;
use std::time::{Duration, Instant};

use api::{Error, pb};
use bytes::Bytes;
use hv_runner::config::VolumePath;
use lockmgr::cluster::{ClusterState, Command, Member, MemberState, ProposeError, VmRecord, VmState};
use prost::Message;

use super::runner::{Runner, state_volume};
use super::{running_here, spec_of, supervise, usable};
use crate::core::Core;
use crate::forward;
use crate::messages::{NodeAnswer, NodeOp};
use crate::view;

/// Pause before the record is asked again whether the commit has happened.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// From the source to the target.
#[derive(Clone, PartialEq, Message)]
struct Incoming {
    #[prost(string, tag = "1")]
    vm: String,
    #[prost(oneof = "Step", tags = "2, 3, 4, 5")]
    step: Option<Step>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Step {
    /// Could this VM run here? Nothing is kept of the answer.
    #[prost(message, tag = "2")]
    Prepare(pb::Done),
    /// Start a process that loads this state for this epoch, and keep it waiting.
    #[prost(message, tag = "3")]
    Load(Load),
    /// The record is yours: run.
    #[prost(message, tag = "4")]
    Activate(pb::Done),
    /// It will not come: end the waiting process.
    #[prost(message, tag = "5")]
    Cancel(pb::Done),
}

/// From the target.
#[derive(Clone, Copy, PartialEq, Message)]
struct StepDone {
    /// After [`Step::Activate`]: for how long the guest has been running again.
    #[prost(double, tag = "1")]
    ran_ms: f64,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct Load {
    #[prost(uint64, tag = "1")]
    epoch: u64,
    #[prost(string, tag = "2")]
    volume: String,
    #[prost(string, tag = "3")]
    path: String,
}

/// Whether the records allow this move.
pub(crate) fn check(state: &ClusterState, record: &VmRecord, to: &Member, kind: &str) -> Result<(), Error> {
    let name = &record.name;
    if kind != "quick" {
        return Err(Error::usage(format!("vm migrate {name}: type {kind} is not there yet"))
            .hint("use --type quick: the state is saved to the volume and restored on the other node"));
    }
    if to.id == record.owner {
        return Err(Error::conflict(format!("vm migrate {name}: it is already on {}", to.name))
            .hint("name another node with --to"));
    }
    if to.state != MemberState::Up {
        return Err(Error::conflict(format!("vm migrate {name}: node {} is {}", to.name, to.state))
            .hint("`csvctl node list` shows which nodes are up"));
    }
    if record.state != VmState::Running {
        let on = view::node_name(state, record.owner);
        return Err(Error::conflict(format!("vm migrate {name}: it is {} on {on}", record.state))
            .hint("only a running VM can be moved; a stopped one is started where `vm start` is asked for"));
    }
    Ok(())
}

/// Moves a VM of this node.
pub(crate) async fn migrate(
    core: &Arc<Core>,
    request: pb::VmMigrateRequest,
) -> Result<pb::MigrateReport, Error> {
    let state = core.state();
    let to = view::member(&state, &request.to)?.clone();
    let (record, runner) = running_here(core, &request.name, "migrate")?;
    check(&state, &record, &to, &request.r#type)?;
    if !usable(core, &to) {
        return Err(Error::conflict(format!("vm migrate {}: node {} does not answer", record.name, to.name))
            .hint("`csvctl node list` shows which nodes are up"));
    }
    let spec = spec_of(&record)?;
    let volume = state_volume(core, &spec)?;
    let path = format!(".{}-{}.vmstate", record.name, record.epoch);
    let quick = Quick { core, record, runner, to, file: VolumePath { volume, path } };
    let name = quick.record.name.clone();
    quick.run().await.map_err(|error| error.during(format!("vm migrate {name} to {}", request.to)))
}

/// A move in progress, at the source.
struct Quick<'a> {
    core: &'a Arc<Core>,
    /// As it was before the move.
    record: VmRecord,
    runner: Arc<Runner>,
    to: Member,
    file: VolumePath,
}

impl Quick<'_> {
    async fn run(&self) -> Result<pb::MigrateReport, Error> {
        let start = now();
        self.tell(Step::Prepare(pb::Done {})).await?;
        let moving = self.announce().await?;

        let paused = now();
        let saved = match self.runner.control().save(&self.file.volume, &self.file.path).await {
            Ok(saved) => saved,
            Err(error) => return Err(self.give_up(&moving, error).await),
        };
        let loading = now();
        let load = Load {
            epoch: self.record.epoch + 1,
            volume: self.file.volume.clone(),
            path: self.file.path.clone(),
        };
        if let Err(error) = self.tell(Step::Load(load)).await {
            return Err(self.give_up(&moving, error).await);
        }
        let load_ms = ms(loading.elapsed());
        if let Err(error) = self.commit(&moving).await {
            return Err(self.give_up(&moving, error).await);
        }

        // From here on the target owns the VM; whatever happens, this process never runs it again.
        self.runner.release();
        let activated = self.tell(Step::Activate(pb::Done {})).await;
        let until_told_ms = ms(paused.elapsed());
        drop(self.runner.stop(true).await);
        let activated = activated.map_err(|error| {
            error.hint(format!(
                "its state is saved; `csvctl vm start {}` goes on from there",
                self.record.name
            ))
        })?;
        let blackout_ms = (until_told_ms - activated.ran_ms).max(0.0);
        let report = self.report(&saved, load_ms, blackout_ms, ms(start.elapsed()));
        self.core.note(
            "vm.moved",
            &report.vm,
            format!(
                "vm {} moved from {} to {} (quick) as asked; it stood still for {blackout_ms:.1} ms",
                report.vm, report.from, report.to
            ),
        );
        Ok(report)
    }

    /// The record shows that the VM is moving; nobody else touches it meanwhile.
    async fn announce(&self) -> Result<VmRecord, Error> {
        let to = self.to.id;
        let command = self.record.update(|record| {
            record.state = VmState::Migrating;
            record.peer = Some(to);
        });
        self.core.propose(command).await?;
        let mut moving = self.record.clone();
        moving.state = VmState::Migrating;
        moving.peer = Some(to);
        Ok(moving)
    }

    /// The one step that gives the VM to the target.
    async fn commit(&self, moving: &VmRecord) -> Result<(), Error> {
        let to = self.to.id;
        let saved = format!("{}:/{}", self.file.volume, self.file.path);
        let commit = moving.update(|record| {
            record.owner = to;
            record.epoch += 1;
            record.state = VmState::Saved;
            record.peer = None;
            record.saved = Some(saved);
        });
        match self.core.cluster.propose(commit).await {
            Ok(_) => Ok(()),
            Err(ProposeError::OutcomeUnknown { .. }) => self.ask_record(moving).await,
            Err(error) => Err(crate::core::refused(&error)),
        }
    }

    /// A compare-and-swap back to this node can succeed only if the commit has not happened, and keeps it from happening
    /// later. It is repeated until the cluster has answered.
    async fn ask_record(&self, moving: &VmRecord) -> Result<(), Error> {
        loop {
            match self.core.cluster.propose(back(moving)).await {
                Ok(_) => {
                    return Err(Error::failed("the cluster did not answer in time; the move was undone"));
                }
                Err(ProposeError::Conflict { .. }) => {
                    // Either the commit, or somebody who has declared the VM lost: in both cases it is not ours.
                    return Ok(());
                }
                Err(error) => {
                    tracing::warn!(vm = self.record.name, %error, "it is not known yet whether the move was committed");
                    tokio::time::sleep(ASK_AGAIN_AFTER).await;
                }
            }
        }
    }

    /// Before the commit: the guest runs on here.
    async fn give_up(&self, moving: &VmRecord, why: Error) -> Error {
        tracing::warn!(vm = self.record.name, error = %why, "move given up");
        drop(self.tell(Step::Cancel(pb::Done {})).await);
        let abandoned = self.runner.control().abandon().await;
        let end = match &abandoned {
            Ok(()) => back(moving),
            Err(error) => {
                let reason = format!("a move failed, and it could not go on: {error}");
                self.runner.kill();
                moving.update(|record| {
                    record.state = VmState::Failed;
                    record.peer = None;
                    record.reason = reason;
                })
            }
        };
        if let Err(error) = self.core.propose(end).await {
            tracing::warn!(vm = self.record.name, %error, "end of the move not recorded");
        }
        remove_state(self.core, &self.file).await;
        match abandoned {
            Ok(()) => why.during(format!("it goes on running on {}", self.core.config.name)),
            Err(error) => why.during(error),
        }
    }

    async fn tell(&self, step: Step) -> Result<StepDone, Error> {
        let body = Incoming { vm: self.record.name.clone(), step: Some(step) }.encode_to_vec();
        match forward::ask(self.core, self.to.id, NodeOp::VmIncoming(body.into())).await? {
            NodeAnswer::Incoming(body) => StepDone::decode(body).map_err(Error::failed),
            _ => Err(Error::failed("the target's answer cannot be read")),
        }
    }

    fn report(
        &self,
        saved: &hv::control::SaveReply,
        load_ms: f64,
        blackout_ms: f64,
        total_ms: f64,
    ) -> pb::MigrateReport {
        let memory_ms = saved.memory_ms + load_ms;
        let handoff_ms = (blackout_ms - saved.drain_ms - memory_ms - saved.state_ms).max(0.0);
        pb::MigrateReport {
            vm: self.record.name.clone(),
            from: self.core.config.name.clone(),
            to: self.to.name.clone(),
            r#type: "quick".to_owned(),
            total_ms,
            blackout_ms,
            blackout: Some(pb::Blackout {
                drain_ms: saved.drain_ms,
                memory_ms,
                state_ms: saved.state_ms,
                handoff_ms,
            }),
            rounds: 1,
            // Memory went through the volume, disks stayed where they are.
            memory_bytes_sent: 0,
            disk_bytes_copied: 0,
        }
    }
}

fn back(moving: &VmRecord) -> Command {
    moving.update(|record| {
        record.state = VmState::Running;
        record.peer = None;
    })
}

/// A step of a move to this node.
pub(crate) async fn incoming(core: &Arc<Core>, body: Bytes) -> Result<Bytes, Error> {
    let incoming = Incoming::decode(body)
        .map_err(|error| Error::usage(format!("unreadable step of a move: {error}")))?;
    let name = &incoming.vm;
    let mut done = StepDone::default();
    match incoming.step {
        Some(Step::Prepare(_)) => prepare(core, name).await?,
        Some(Step::Load(load)) => self::load(core, name, load).await?,
        Some(Step::Activate(_)) => done.ran_ms = activate(core, name).await?,
        Some(Step::Cancel(_)) => cancel(core, name),
        None => return Err(Error::usage("this node does not know the step of the move")),
    }
    Ok(done.encode_to_vec().into())
}

/// The same checks as for a start: disks must be there.
async fn prepare(core: &Arc<Core>, name: &str) -> Result<(), Error> {
    let record = view::vm(&core.state(), name)?.clone();
    super::check_disks(core, &spec_of(&record)?).await
}

/// Starts the process that will run the VM once the record says so.
async fn load(core: &Arc<Core>, name: &str, load: Load) -> Result<(), Error> {
    let mut record = view::vm(&core.state(), name)?.clone();
    record.owner = core.me;
    record.epoch = load.epoch;
    let spec = spec_of(&record)?;
    let file = VolumePath { volume: load.volume, path: load.path };
    let runner = Runner::start(core, &record, &spec, Some(file)).await?;
    core.vms.add(&runner);
    supervise(core, &runner);
    Ok(())
}

/// The record names this node: the guest runs here from now on. Gives the time that it has been running when this
/// returns.
async fn activate(core: &Arc<Core>, name: &str) -> Result<f64, Error> {
    let (record, runner) = await_ours(core, name).await?;
    if let Err(error) = runner.control().activate().await {
        // It may have written to its disks: whoever starts it next must see the end of this process first.
        runner.kill();
        runner.ended().await;
        let reason = format!("it could not go on after a move: {error}");
        drop(core.propose(record.update(|record| record.reason = reason)).await);
        return Err(error);
    }
    let running = now();
    let file = saved_file(&record);
    let command = record.update(|record| {
        record.state = VmState::Running;
        record.saved = None;
        record.reason = String::new();
    });
    if let Err(error) = core.propose(command).await {
        tracing::warn!(vm = name, %error, "the VM runs, which is not recorded yet");
    }
    if let Some(file) = file {
        let (core, runtime) = (Arc::clone(core), core.runtime.clone());
        runtime.spawn(async move { remove_state(&core, &file).await });
    }
    Ok(ms(running.elapsed()))
}

/// The commit is on a majority; this node's copy of the records may be a moment behind.
async fn await_ours(core: &Arc<Core>, name: &str) -> Result<(VmRecord, Arc<Runner>), Error> {
    let runner =
        core.vms.get(name).ok_or_else(|| Error::conflict(format!("VM {name} was not loaded here")))?;
    let mut state = core.cluster.watch();
    let ours =
        |state: &Arc<ClusterState>| state.vms.get(name).is_none_or(|record| record.epoch >= runner.epoch);
    let state = state.wait_for(ours).await.map_err(|_| Error::failed("the daemon is ending"))?.clone();
    let record = view::vm(&state, name)?;
    if record.owner != core.me || record.epoch != runner.epoch {
        return Err(Error::conflict(format!("VM {name} belongs to another node now")));
    }
    Ok((record.clone(), runner))
}

/// The VM does not come.
fn cancel(core: &Arc<Core>, name: &str) {
    let Some(runner) = core.vms.get(name) else { return };
    let committed = core
        .state()
        .vms
        .get(name)
        .is_some_and(|record| record.owner == core.me && record.epoch == runner.epoch);
    if !committed {
        runner.release();
        runner.kill();
    }
}

/// The file that a record's saved state lies in.
pub(super) fn saved_file(record: &VmRecord) -> Option<VolumePath> {
    let (volume, path) = record.saved.as_deref()?.split_once(":/")?;
    Some(VolumePath { volume: volume.to_owned(), path: path.to_owned() })
}

/// A state that was loaded is of no use any more.
pub(super) async fn remove_state(core: &Arc<Core>, file: &VolumePath) {
    let node = core.state().volumes.get(&file.volume).and_then(|record| core.volumes.get(record.id)?.node());
    let Some(node) = node else { return };
    let path = file.path.clone();
    let removed = tokio::task::spawn_blocking(move || node.unlink(csvfs::node::ROOT_INO, path.as_bytes()));
    if let Ok(Err(error)) = removed.await
        && error.errno() != libc::ENOENT
    {
        tracing::warn!(volume = file.volume, path = file.path, %error, "saved state not removed");
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[expect(clippy::disallowed_methods, reason = "measures the phases that it reports")]
fn now() -> Instant {
    Instant::now()
}
