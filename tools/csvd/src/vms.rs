//! The virtual machines: their records, and the `hv` processes of those that run here.
//!
//! ```text
//!   Stopped --start: CAS Starting, epoch + 1--> hv process --ready: CAS--> Running <--pause/resume--> Paused
//!                                                  |                          |
//!                                                  '---- its end: CAS Stopped or Failed, with the reason; ha.rs starts it
//!                                                        again when its node is gone, or its guest has reset the machine
//!   migration.rs    Running here --> saved on the volume --> one CAS of the owner --> Running there
//! ```
//!
//! **Invariant (H1):** an `hv` process runs a guest only in the epoch that the record has given to this node.

mod checkpoints;
mod console;
mod control;
mod disks;
mod ha;
mod hotplug;
mod images;
mod leftovers;
mod migration;
mod processor;
mod runner;
mod save;
mod trouble;
pub(crate) mod user;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::{Error, pb};
use hv::control::VmRunState;
use hv_runner::config::VolumePath;
use lockmgr::cluster::{ClusterState, Command, ProposeError, VmRecord, VmState};
use lockmgr::{NodeId, VolumeId};
use prost::Message;
use uuid::Uuid;

use crate::core::Core;
use crate::messages::VmLoad;
use crate::view;

pub(crate) use checkpoints::checkpoint;
pub(crate) use console::{console, type_in};
pub(crate) use disks::users;
pub(crate) use ha::{Priority, has_arrived, lost, run as restart_lost};
pub(crate) use hotplug::{change_disk, set_balloon};
pub(crate) use images::{image_progress, work_on_image};
pub(crate) use migration::{
    Moves, Rehearsal, await_arrival, cancel, check as check_migrate, incoming, migrate, problems, progress,
    streamed,
};
pub(crate) use trouble::is_halted;

pub(crate) use processor::publish as publish_processor;
use runner::{Content, Runner};
pub(crate) use save::{is_put_by, save};

/// Longest name of a VM.
const NAME_BYTES_MAX: usize = 64;
/// Least memory of a VM.
const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// How often is looked at what stands against a guest's I/O. Its end is told at once.
const LOOK_AT_GUEST_EVERY: Duration = Duration::from_secs(1);
/// Pause before the record is read again, when the end of a VM could not be written there.
const RECORD_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Longest wait for the present of the records, when they are only to be shown.
const PRESENT_WITHIN: Duration = Duration::from_secs(1);

/// The processes of this node's VMs.
#[derive(Debug, Default)]
pub(crate) struct Vms {
    /// By name. Rank: a leaf.
    running: Mutex<HashMap<String, Arc<Runner>>>,
    /// The csvfs clients that processes were started as. Held while one is started. Rank: a leaf.
    serials: Mutex<HashMap<u64, Expected>>,
    /// Whether processes get a user of their own.
    own_user: bool,
    /// The moves to this node.
    moves: Moves,
    /// What this node can give to guests.
    pub(crate) processors: processor::Processors,
    consoles: console::Consoles,
    /// Where moves are held, in rehearsals.
    pub(crate) rehearsal: Rehearsal,
    /// By name: held while it is decided whether a VM starts here. Two ways lead to a running process, a start and a move,
    /// and only one of them may act on a record. Rank of the map: a leaf; of the locks: above everything.
    deciding: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// A process that was started.
#[derive(Debug)]
struct Expected {
    pid: u32,
    volumes: Vec<VolumeId>,
}

impl Vms {
    pub(crate) fn new(own_user: bool) -> Self {
        Self { own_user, ..Self::default() }
    }

    fn get(&self, name: &str) -> Option<Arc<Runner>> {
        self.lock().get(name).cloned()
    }

    /// Keeps everybody else from starting this VM here.
    async fn decide(&self, name: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut deciding = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(deciding.entry(name.to_owned()).or_default())
        };
        lock.lock_owned().await
    }

    fn add(&self, runner: &Arc<Runner>) {
        self.lock().insert(runner.name.clone(), Arc::clone(runner));
    }

    /// Forgets the process, unless another one has taken its place.
    fn remove(&self, runner: &Arc<Runner>) {
        let mut running = self.lock();
        if running.get(&runner.name).is_some_and(|other| Arc::ptr_eq(other, runner)) {
            running.remove(&runner.name);
        }
    }

    fn serials(&self) -> MutexGuard<'_, HashMap<u64, Expected>> {
        self.serials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process, which has the number that `start` gives, as the csvfs client `serial` with these volumes.
    fn expect<T>(
        &self,
        serial: u64,
        volumes: Vec<VolumeId>,
        start: impl FnOnce() -> Result<(u32, T), Error>,
    ) -> Result<(u32, T), Error> {
        // Held meanwhile, so that its first request finds it known, and nobody else's is taken for one of it.
        let mut serials = self.serials();
        let (pid, started) = start()?;
        serials.insert(serial, Expected { pid, volumes });
        Ok((pid, started))
    }

    fn expect_no_more(&self, serial: u64) {
        self.serials().remove(&serial);
    }

    /// Whether there is, or may still be, a process that is this client.
    pub(crate) fn is_expected(&self, serial: u64) -> bool {
        self.serials().contains_key(&serial)
    }

    /// Whether the process `pid` was started as the csvfs client `serial`.
    pub(crate) fn owns_serial(&self, serial: u64, pid: u32) -> bool {
        self.serials().get(&serial).is_some_and(|process| process.pid == pid)
    }

    /// Whether it was started with this volume.
    pub(crate) fn may_use(&self, serial: u64, pid: u32, volume: VolumeId) -> bool {
        let serials = self.serials();
        serials.get(&serial).is_some_and(|process| process.pid == pid && process.volumes.contains(&volume))
    }

    /// Whether a VM may be on its way here.
    pub(crate) fn expects_any(&self) -> bool {
        self.moves.expects_any()
    }

    /// Kills all VMs of this node at once: it has no right to run them any more.
    pub(crate) fn kill_all(&self) {
        for runner in self.lock().values() {
            runner.kill();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Runner>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A record as the admin interface shows it.
pub(crate) fn describe(state: &ClusterState, record: &VmRecord) -> pb::Vm {
    pb::Vm {
        name: record.name.clone(),
        id: record.id.to_string(),
        state: record.state.to_string(),
        owner: view::node_name(state, record.owner),
        epoch: record.epoch,
        reason: record.reason.clone(),
        spec: pb::VmSpec::decode(record.spec.clone()).ok(),
        ..pb::Vm::default()
    }
}

fn described(core: &Core, name: &str) -> Result<pb::Vm, Error> {
    let state = core.state();
    Ok(describe(&state, view::vm(&state, name)?))
}

/// What the VM is made of.
pub(crate) fn spec_of(record: &VmRecord) -> Result<pb::VmSpec, Error> {
    pb::VmSpec::decode(record.spec.clone()).map_err(|error| {
        Error::failed(format!("the configuration of VM {} cannot be read: {error}", record.name))
            .hint("it may have been written by a newer version")
    })
}

/// Defines a VM that belongs to this node.
pub(crate) async fn create(core: &Arc<Core>, name: &str, spec: pb::VmSpec) -> Result<pb::Vm, Error> {
    let during = |error: Error| error.during(format!("vm create {name}"));
    check_name(name)?;
    if spec.memory_bytes < MEMORY_BYTES_MIN || !spec.memory_bytes.is_multiple_of(4096) {
        return Err(during(
            Error::usage(format!("{} bytes of memory", spec.memory_bytes))
                .hint("give it at least 1M, in steps of 4K"),
        ));
    }
    if !(1..=hv::CPUS_MAX).contains(&spec.cpus) {
        return Err(during(
            Error::usage(format!("{} processors were asked for", spec.cpus))
                .hint(format!("a VM has 1 to {}", hv::CPUS_MAX)),
        ));
    }
    if core.state().vms.contains_key(name) {
        return Err(Error::conflict(format!("vm create: there is already a VM {name}"))
            .hint("choose another name, or delete the old one"));
    }
    disks::of(core, &spec).await.map_err(during)?;
    disks::refuse_parents(core, &spec.disks).await.map_err(during)?;
    let command = Command::CreateVm {
        name: name.to_owned(),
        id: Uuid::new_v4(),
        owner: core.me,
        spec: spec.encode_to_vec().into(),
    };
    core.propose(command).await.map_err(during)?;
    described(core, name)
}

fn check_name(name: &str) -> Result<(), Error> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(good) && !name.starts_with('.') {
        return Ok(());
    }
    Err(Error::usage(format!("`{name}` cannot be a VM's name"))
        .hint(format!("use up to {NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`")))
}

/// A VM that runs nowhere comes to this node, so that it starts here.
pub(crate) async fn claim_stopped(core: &Arc<Core>, name: &str) -> Result<(), Error> {
    // Not older than what the user has just seen done on another node.
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?;
    // What a move has saved belongs to its owner, which may go on with it at any moment: also one that is being cut off (A4).
    let idle = match record.state {
        VmState::Stopped | VmState::Failed => true,
        VmState::Saved => is_put_by(record) || view::is_certainly_off(&state, record.owner),
        _ => false,
    };
    if !idle || record.owner == core.me || state.is_closed(core.me) {
        return Ok(());
    }
    let command = record.update(|record| {
        record.owner = core.me;
        record.epoch += 1;
        record.peer = None;
    });
    core.propose(command).await.map(drop).map_err(|error| error.during(format!("vm start {name}")))
}

/// Starts a VM that belongs to this node.
pub(crate) async fn start(core: &Arc<Core>, name: &str) -> Result<pb::Vm, Error> {
    let _decision = core.vms.decide(name).await;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?;
    if core.vms.moves.expects(name) {
        return Err(Error::conflict(format!("vm start {name}: it is arriving from another node"))
            .hint("wait a moment; `csvctl vm show` tells where it is"));
    }
    if state.is_closed(core.me) {
        return Err(Error::conflict(format!("vm start {name}: node {} is drained", core.config.name))
            .hint("start it on another node, or let this one take part again with `csvctl node resume`"));
    }
    if !matches!(record.state, VmState::Stopped | VmState::Failed | VmState::Saved) {
        return Err(Error::conflict(format!("vm start {name}: it is {}", record.state))
            .hint("`csvctl vm show` tells where it is"));
    }
    let during = |error: Error| error.during(format!("vm start {name}"));
    let mut spec = spec_of(record)?;
    if record.saved.is_none() {
        // A guest that boots sees what all nodes can give; one that goes on keeps what it has seen.
        spec.baseline = processor::newest(core);
        spec.devices = migration::devices_of_all(core);
    }
    let wanted = disks::of(core, &spec).await.map_err(during)?;
    disks::refuse_shared(core, name, &wanted, &state).await.map_err(during)?;
    let wanted_spec = spec.encode_to_vec();
    // Whether it is ours to start must be known for certain: a start that is recorded and that nobody goes through with would
    // keep everybody else from starting it.
    let starting = settle(core, record, |record| {
        record.state = VmState::Starting;
        record.epoch += 1;
        record.peer = None;
        record.reason = String::new();
        record.restarts_left = 0;
        record.spec = wanted_spec.clone().into();
    });
    let mut starting = starting.await.map_err(during)?;
    // Once more, now that everybody sees that this VM wants them: of two that start at once none overlooks the other.
    if let Err(error) = disks_are_free(core, name, &wanted).await {
        let before =
            |after: &mut VmRecord| (after.state, after.reason) = (record.state, record.reason.clone());
        insist(core, &starting, before).await;
        return Err(during(error));
    }
    let saved = migration::saved_file(&starting);
    match launch(core, &mut starting, &spec, saved.clone()).await {
        Ok(runner) => {
            if let Err(error) = settle(core, &starting, |record| record.state = VmState::Running).await {
                // The record is not ours any more, or cannot say so: then nothing may run, and the end is recorded.
                runner.kill();
                return Err(during(error));
            }
            if let Some(file) = saved {
                migration::remove_when_read(core, &runner, file);
            }
            leftovers::sweep(core, name);
            described(core, name)
        }
        Err(error) => {
            let failed = |record: &mut VmRecord| {
                record.state = VmState::Failed;
                record.reason.clone_from(&error.message);
            };
            insist(core, &starting, failed).await;
            Err(during(error))
        }
    }
}

async fn disks_are_free(core: &Arc<Core>, name: &str, wanted: &[disks::Disk]) -> Result<(), Error> {
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    disks::refuse_shared(core, name, wanted, &state).await
}

/// Starts the process, from a saved state when there is one.
async fn launch(
    core: &Arc<Core>,
    record: &mut VmRecord,
    spec: &pb::VmSpec,
    saved: Option<VolumePath>,
) -> Result<Arc<Runner>, Error> {
    let restored = saved.is_some();
    let runner = Runner::start(core, record, spec, saved.map_or(Content::Booted, Content::Saved)).await?;
    core.vms.add(&runner);
    supervise(core, &runner);
    if restored && let Err(error) = go_on(core, record, &runner).await {
        runner.kill();
        runner.ended().await;
        return Err(error);
    }
    Ok(runner)
}

/// Lets a guest go on from its saved state. The record no longer names that state from the moment on at which the guest
/// may run: its memory would be older than its disks.
async fn go_on(core: &Arc<Core>, record: &mut VmRecord, runner: &Runner) -> Result<(), Error> {
    *record = settle(core, record, |record| record.saved = None).await?;
    runner.control().activate().await
}

/// Watches a process to its end, and records it.
fn supervise(core: &Arc<Core>, runner: &Arc<Runner>) {
    let (core, runner) = (Arc::clone(core), Arc::clone(runner));
    let runtime = core.runtime.clone();
    runtime.spawn(async move {
        let end = tokio::select! {
            // It waits for the end of the process too, and knows more about it.
            biased;
            end = guest_ended(&core, &runner) => end,
            end = runner.ended() => end,
        };
        core.vms.remove(&runner);
        runner::forget_client(&core, runner.serial).await;
        tracing::info!(vm = runner.name, pid = runner.pid, %end, "VM process ended");
        record_end(&core, &runner, &end).await;
    });
}

/// A guest that shuts down, resets its machine or crashes leaves its process behind, which can still tell about it. Returns after
/// the end of the process, with the guest's reason.
async fn guest_ended(core: &Arc<Core>, runner: &Arc<Runner>) -> runner::End {
    loop {
        let Ok(status) = runner.control().status_within(LOOK_AT_GUEST_EVERY).await else {
            tokio::time::sleep(LOOK_AT_GUEST_EVERY).await;
            continue;
        };
        let state = status.state();
        if !is_over(state) {
            trouble::look(core, runner, &status).await;
            if !status.waited {
                // A process of an older release.
                tokio::time::sleep(LOOK_AT_GUEST_EVERY).await;
            }
            continue;
        }
        if runner.is_stopping() {
            // Who has asked for its end sees to it, and is told of it.
            runner.stop_failed().await;
            continue;
        }
        console::keep(core, runner).await;
        let crashed = state == VmRunState::Crashed;
        if let Err(error) = runner.stop(crashed).await {
            tracing::warn!(vm = runner.name, %error, "process of a guest that has ended: killed");
            runner.kill();
        }
        runner.ended().await;
        return runner::End::of_guest(state, status.reason);
    }
}

fn is_over(state: VmRunState) -> bool {
    matches!(state, VmRunState::Crashed | VmRunState::Stopped | VmRunState::Reset)
}

/// The process has ended: the VM is stopped, or failed, unless the record has gone on without it. A change of the record
/// may be under way while this one is proposed, or its outcome may be lost, so the record is read again until it fits (H6).
async fn record_end(core: &Arc<Core>, runner: &Runner, end: &runner::End) {
    loop {
        // A start or an arrival that is about to say `running` does so first; otherwise nobody would take it back.
        let decision = core.vms.decide(&runner.name).await;
        let proposed = match core.cluster.read().await {
            Ok(state) => match end_of(core, &state, runner, end) {
                Some(command) => core.cluster.propose(command).await.map(drop),
                None => break,
            },
            Err(error) => Err(error),
        };
        drop(decision);
        let Err(error) = proposed else { break };
        tracing::warn!(vm = runner.name, %error, "end of the VM not recorded yet");
        if matches!(error, ProposeError::Invalid { .. } | ProposeError::Stopped { .. }) {
            break;
        }
        tokio::select! {
            // The next incarnation of this node finds the record and puts it right.
            () = core.stop.cancelled() => break,
            () = tokio::time::sleep(RECORD_AGAIN_AFTER) => {}
        }
    }
    runner.recorded();
}

/// The change that records the end of a process, if the record still counts on it.
fn end_of(core: &Core, state: &ClusterState, runner: &Runner, end: &runner::End) -> Option<Command> {
    let record = state.vms.get(&runner.name)?;
    let ours = record.owner == core.me && record.epoch == runner.epoch();
    let runs = matches!(record.state, VmState::Starting | VmState::Running | VmState::Paused);
    (ours && runs).then(|| {
        if end.again {
            return ha::again(record, end.to_string());
        }
        record.update(|record| {
            record.state = if end.in_order { VmState::Stopped } else { VmState::Failed };
            record.reason = if end.in_order { String::new() } else { end.to_string() };
        })
    })
}

fn running_here(core: &Core, name: &str, doing: &str) -> Result<(VmRecord, Arc<Runner>), Error> {
    let state = core.state();
    let record = view::vm(&state, name)?;
    match core.vms.get(name) {
        Some(runner) if record.owner == core.me && record.epoch == runner.epoch() => {
            Ok((record.clone(), runner))
        }
        _ => Err(Error::conflict(format!("vm {doing} {name}: it is {}", record.state))
            .hint("`csvctl vm show` tells where it is")),
    }
}

/// Stops a VM of this node.
pub(crate) async fn stop(core: &Arc<Core>, name: &str, force: bool) -> Result<pb::Vm, Error> {
    let state = core.state();
    let record = view::vm(&state, name)?;
    if record.state == VmState::Failed {
        // Nothing runs: what failed is put away.
        let command = record.update(|record| {
            record.state = VmState::Stopped;
            record.reason = String::new();
            record.restarts_left = 0;
        });
        core.propose(command).await.map_err(|error| error.during(format!("vm stop {name}")))?;
        return described(core, name);
    }
    if matches!(record.state, VmState::Saving | VmState::Migrating) {
        return Err(
            Error::conflict(format!("vm stop {name}: it is being moved")).hint("wait until it has arrived")
        );
    }
    let (_, runner) = running_here(core, name, "stop")?;
    console::keep(core, &runner).await;
    runner.stop(force).await.map_err(|error| error.during(format!("vm stop {name}")))?;
    runner.record_written().await;
    described(core, name)
}

pub(crate) async fn pause(core: &Arc<Core>, name: &str) -> Result<pb::Vm, Error> {
    halt(core, name, "pause", VmState::Running, VmState::Paused).await
}

pub(crate) async fn resume(core: &Arc<Core>, name: &str) -> Result<pb::Vm, Error> {
    halt(core, name, "resume", VmState::Paused, VmState::Running).await
}

async fn halt(
    core: &Arc<Core>,
    name: &str,
    doing: &str,
    from: VmState,
    to: VmState,
) -> Result<pb::Vm, Error> {
    let (record, runner) = running_here(core, name, doing)?;
    if record.state != from {
        return Err(Error::conflict(format!("vm {doing} {name}: it is {}", record.state)));
    }
    if is_halted(&record) {
        return Err(Error::conflict(format!("vm {doing} {name}: its node has halted it: {}", record.reason))
            .hint("it goes on by itself when that is over"));
    }
    let during = |error: Error| error.during(format!("vm {doing} {name}"));
    if to == VmState::Paused {
        runner.control().pause().await.map_err(during)?;
    } else {
        runner.control().resume().await.map_err(during)?;
    }
    record_halted(core, record, to).await.map_err(during)?;
    described(core, name)
}

/// The guest is in state `to`, and the record shall say so. Its configuration may have changed since it was read.
async fn record_halted(core: &Arc<Core>, mut record: VmRecord, to: VmState) -> Result<(), Error> {
    let from = record.state;
    loop {
        match core.cluster.propose(record.update(|record| record.state = to)).await {
            Ok(_) => return Ok(()),
            Err(error @ ProposeError::Conflict { .. }) => {
                let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
                let now = view::vm(&state, &record.name)?.clone();
                let same = (now.owner, now.epoch, now.state) == (record.owner, record.epoch, from);
                if !same || now.spec == record.spec {
                    return Err(crate::core::refused(&error));
                }
                record = now;
            }
            Err(error) => return Err(crate::core::refused(&error)),
        }
    }
}

/// Changes a record, and says for certain whether it is changed: where the answer was lost, the record tells (H6).
async fn settle(
    core: &Arc<Core>,
    record: &VmRecord,
    change: impl Fn(&mut VmRecord),
) -> Result<VmRecord, Error> {
    let mut wanted = record.clone();
    change(&mut wanted);
    loop {
        let error = match core.cluster.propose(record.update(&change)).await {
            Ok(_) => return Ok(wanted),
            Err(error @ (ProposeError::NoQuorum { .. } | ProposeError::Invalid { .. })) => {
                return Err(crate::core::refused(&error));
            }
            Err(error) => error,
        };
        let Ok(state) = core.cluster.read().await else {
            if core.stop.is_cancelled() {
                return Err(crate::core::refused(&error));
            }
            tokio::time::sleep(RECORD_AGAIN_AFTER).await;
            continue;
        };
        match state.vms.get(&record.name) {
            Some(now) if *now == wanted => return Ok(wanted),
            Some(now) if now == record => {}
            _ => return Err(crate::core::refused(&error)),
        }
    }
}

/// As [`settle`], and again while there is no quorum, until the record says so or has gone on without this change.
async fn insist(core: &Arc<Core>, record: &VmRecord, change: impl Fn(&mut VmRecord)) {
    while let Err(error) = settle(core, record, &change).await {
        tracing::warn!(vm = record.name, %error, "not in the record of the VM yet");
        // The next incarnation of this node finds the record and puts it right.
        if error.kind != api::Kind::Unreachable || core.stop.is_cancelled() {
            return;
        }
        tokio::time::sleep(RECORD_AGAIN_AFTER).await;
    }
}

/// The records as they are now: whoever was told of a change on another node shall not be shown what was before it. Without
/// a quorum, as they were last.
async fn present(core: &Core) -> Arc<ClusterState> {
    match tokio::time::timeout(PRESENT_WITHIN, core.cluster.read()).await {
        Ok(Ok(state)) => state,
        Ok(Err(_)) | Err(_) => core.state(),
    }
}

/// The record, with what the process of this node knows.
pub(crate) async fn show(core: &Arc<Core>, name: &str) -> Result<pb::Vm, Error> {
    let state = present(core).await;
    let mut vm = describe(&state, view::vm(&state, name)?);
    let Some(runner) = core.vms.get(name) else { return Ok(vm) };
    vm.pid = runner.pid.into();
    vm.start_ms = runner.started_in.as_secs_f64() * 1000.0;
    if let Ok(status) = runner.control().status().await {
        vm.memory_used_bytes = status.memory_used_bytes;
        vm.balloon = status.balloon.map(|balloon| pb::VmBalloonStatus {
            target_bytes: balloon.target_bytes,
            actual_bytes: balloon.actual_bytes,
            has_driver: balloon.has_driver,
            total_bytes: balloon.total_bytes,
            free_bytes: balloon.free_bytes,
            available_bytes: balloon.available_bytes,
            cached_bytes: balloon.cached_bytes,
        });
        vm.console_bytes = status.console_bytes;
        vm.exits = status.exits;
        if !status.reason.is_empty() && vm.reason.is_empty() {
            vm.reason = status.reason;
        }
        let disks = status.disks.into_iter().map(|disk| pb::VmDiskStatus {
            path: disk.path,
            size_bytes: disk.size_bytes,
            reads: disk.reads,
            writes: disk.writes,
            flushes: disk.flushes,
            errors: disk.errors,
            slot: disk.slot,
            iops_limit: disk.iops_limit,
            bytes_per_second_limit: disk.bytes_per_second_limit,
            parents: disk.parents,
        });
        vm.disks = disks.collect();
    }
    Ok(vm)
}

/// What the VMs of this node have done; those whose process does not answer now are left out.
pub(crate) async fn loads(core: &Core) -> Vec<VmLoad> {
    let runners: Vec<_> = core.vms.lock().values().cloned().collect();
    let mut loads = Vec::new();
    for runner in runners {
        let Ok(status) = runner.control().status().await else { continue };
        let sum = |of: fn(&hv::control::DiskStatus) -> u64| status.disks.iter().map(of).sum::<u64>();
        loads.push(VmLoad {
            name: runner.name.clone(),
            reads: sum(|disk| disk.reads),
            writes: sum(|disk| disk.writes),
            flushes: sum(|disk| disk.flushes),
            errors: sum(|disk| disk.errors),
            moving: runner.progress().map(|progress| progress.now().phase).unwrap_or_default(),
        });
    }
    loads
}

/// Forgets a VM that runs nowhere.
pub(crate) async fn delete(core: &Arc<Core>, name: &str, dry_run: bool) -> Result<(), Error> {
    let _decision = core.vms.decide(name).await;
    let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
    let record = view::vm(&state, name)?;
    if core.vms.moves.expects(name) {
        return Err(Error::conflict(format!("vm delete {name}: it is arriving from another node"))
            .hint("wait a moment; `csvctl vm show` tells where it is"));
    }
    if !matches!(record.state, VmState::Stopped | VmState::Failed | VmState::Saved) {
        return Err(
            Error::conflict(format!("vm delete {name}: it is {}", record.state)).hint("stop it first")
        );
    }
    if dry_run {
        return Ok(());
    }
    let command = Command::DeleteVm { name: name.to_owned(), expect_epoch: record.epoch };
    core.propose(command).await.map_err(|error| error.during(format!("vm delete {name}")))?;
    core.vms.consoles.forget(name);
    // Its disks stay, those of its checkpoints too; a memory without its VM is of no use.
    let checkpoints = spec_of(record).map(|spec| spec.checkpoints).unwrap_or_default();
    let memories =
        checkpoints.iter().map(|checkpoint| checkpoint.state.as_str()).chain(record.saved.as_deref());
    for file in memories.filter_map(migration::parse_saved) {
        migration::remove_state(core, file);
    }
    leftovers::sweep(core, name);
    Ok(())
}

/// A new epoch begins without VMs: what the records say of the last one is over. Returns when they say so.
pub(crate) async fn adopt(core: &Arc<Core>) {
    loop {
        let recorded = record_lost(core).await;
        if let Err(error) = &recorded {
            tracing::warn!(%error, "what was lost with the last epoch is not recorded yet");
        }
        if recorded.is_ok() || core.stop.is_cancelled() {
            return;
        }
        tokio::time::sleep(RECORD_AGAIN_AFTER).await;
    }
}

async fn record_lost(core: &Arc<Core>) -> Result<(), ProposeError> {
    let state = core.cluster.read().await?;
    for command in lost_with_last_epoch(&state, core.me, &core.config.name) {
        core.cluster.propose(command).await?;
    }
    Ok(())
}

/// The changes that record the end of what ran here before this epoch.
pub(crate) fn lost_with_last_epoch(state: &ClusterState, me: NodeId, name: &str) -> Vec<Command> {
    let gone = state.vms.values().filter(|vm| {
        let ran = matches!(
            vm.state,
            VmState::Starting | VmState::Running | VmState::Paused | VmState::Saving | VmState::Migrating
        );
        vm.owner == me && (ran || has_arrived(vm))
    });
    let ended = |vm: &VmRecord| lost(vm, format!("node {name} was restarted"));
    gone.map(ended).collect()
}

/// The daemon ends: its VMs are stopped in order.
pub(crate) async fn end_all(core: &Arc<Core>) {
    let runners: Vec<_> = core.vms.lock().values().cloned().collect();
    for runner in runners {
        if let Err(error) = runner.stop(false).await {
            tracing::warn!(vm = runner.name, %error, "VM not stopped in order");
            runner.kill();
        }
        runner.record_written().await;
    }
}
