//! An `hv` process: started with a configuration file, watched to its end.
//!
//! **Invariant:** its csvfs client is told to be gone only after the process has ended: until then it may write.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::{Error, pb};
use hv::control::VmRunState;
use hv_runner::config::{DiskSpec, NetSpec, RunnerConfig, VolumePath, VolumeSpec};
use hv_runner::{FORBIDDEN_CALL, Failure};
use lockmgr::VolumeId;
use lockmgr::cluster::VmRecord;
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::sync::watch;
use wire::Local;

use super::control::Control;
use super::migration::Progress;
use crate::core::Core;
use crate::messages::{NodeOp, OfClient};
use crate::{forward, view};

/// Longest time until a process is ready: it opens LUN, volume and disks, and reads a saved memory.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Longest time that a process may take to end after it has agreed to.
const END_WITHIN: Duration = Duration::from_secs(30);
/// Console output that a process keeps.
pub(super) const CONSOLE_BYTES: usize = 1 << 20;
/// Of what a process says before it dies, so much is kept.
const WORDS_BYTES_MAX: u64 = 4096;

/// What the kernel sends to a process that makes a system call that is forbidden to it.
const SIGSYS: i32 = 31;

/// A running `hv` process.
#[derive(Debug)]
pub(crate) struct Runner {
    pub(crate) name: String,
    /// Epoch of the VM's record that allows it to run.
    pub(crate) epoch: AtomicU64,
    pub(crate) pid: u32,
    /// Its node has halted the guest, see trouble.rs.
    pub(super) halted: AtomicBool,
    /// Its csvfs client.
    pub(crate) serial: u64,
    /// How long its start took until it was ready.
    pub(crate) started_in: Duration,
    /// The move in progress, if there is one. Rank: a leaf.
    moving: Mutex<Option<Arc<Progress>>>,
    /// How far the work on an image is. Rank: a leaf.
    pub(super) image: Mutex<pb::VmImageProgress>,
    control: Control,
    end: watch::Receiver<Option<End>>,
    /// Set when somebody asked it to stop: then its end is in order.
    stopping: watch::Sender<bool>,
    recorded: watch::Sender<bool>,
}

/// Where the content of a VM comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// It boots; the guest runs when the process is ready.
    Booted,
    /// From a saved state; it waits to be activated.
    Saved(VolumePath),
    /// From another node, over memory streams; it waits for its content, then to be activated.
    Streamed,
}

/// A move in progress.
#[derive(Debug)]
pub(super) struct Moving {
    runner: Arc<Runner>,
    pub(super) progress: Arc<Progress>,
}

impl Drop for Moving {
    fn drop(&mut self) {
        *self.runner.moving() = None;
    }
}

/// How a process ended.
#[derive(Clone, Debug)]
pub(crate) struct End {
    /// The guest shut down, or the process was asked to stop.
    pub(crate) in_order: bool,
    /// The guest has reset its machine: it is to be started again.
    pub(super) again: bool,
    how: String,
}

impl End {
    /// The guest itself has ended.
    pub(super) fn of_guest(state: VmRunState, reason: String) -> Self {
        let how = if reason.is_empty() { "the guest has ended".to_owned() } else { reason };
        Self { in_order: state != VmRunState::Crashed, again: state == VmRunState::Reset, how }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.how)
    }
}

impl Runner {
    /// Starts a process for the record's epoch and waits until it is ready.
    pub(super) async fn start(
        core: &Arc<Core>,
        record: &VmRecord,
        spec: &pb::VmSpec,
        content: Content,
    ) -> Result<Arc<Self>, Error> {
        let serial = core.clients.new_serial();
        let config = config(core, record, spec, serial, content)?;
        let file = write_config(core, &config)?;
        let volumes = config.volumes.iter().map(|volume| VolumeId(volume.id)).collect();
        let begun = now();
        let (pid, (mut child, stdout)) = core.vms.expect(serial, volumes, || {
            let (child, stdout) = spawn(&file)?;
            let pid = child.id().ok_or_else(|| Error::failed("the VM's process ended at once"))?;
            Ok((pid, (child, stdout)))
        })?;
        let local = Local {
            cluster: core.config.cluster_id,
            node: core.config.id,
            name: format!("csvd of {}", core.config.name),
        };
        let started = match tokio::time::timeout(READY_WITHIN, ready(stdout)).await {
            Ok(started) => started,
            Err(_) => Err(Error::failed(format!("it was not ready after {} s", READY_WITHIN.as_secs()))),
        };
        if let Err(error) = started {
            drop(child.start_kill());
            drop(child.wait().await);
            drop(std::fs::remove_file(&config.control_socket));
            forget_client(core, serial).await;
            return Err(last_words(&file.with_extension("log")).unwrap_or(error));
        }
        let started_in = begun.elapsed();
        let (tell, end) = watch::channel(None);
        let runner = Arc::new(Self {
            name: record.name.clone(),
            epoch: AtomicU64::new(record.epoch),
            pid,
            halted: AtomicBool::new(false),
            serial,
            started_in,
            moving: Mutex::default(),
            image: Mutex::default(),
            control: Control::new(&config.control_socket, local),
            end,
            stopping: watch::Sender::new(false),
            recorded: watch::Sender::new(false),
        });
        let watched = Arc::clone(&runner);
        let socket = config.control_socket;
        let log = file.with_extension("log");
        core.runtime.spawn(async move {
            let status = child.wait().await;
            // A process that was killed leaves it behind.
            drop(std::fs::remove_file(socket));
            let asked = *watched.stopping.borrow();
            let how = match &status {
                Ok(status) => how_it_ended(*status, &log),
                Err(error) => format!("its process cannot be watched: {error}"),
            };
            let in_order = asked || status.is_ok_and(|status| status.success());
            tell.send_replace(Some(End { in_order, again: false, how }));
        });
        tracing::info!(vm = record.name, epoch = record.epoch, pid, serial, "VM process started");
        Ok(runner)
    }

    /// Epoch of the VM's record that allows it to run.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// Marks the VM as being moved, until what this gives is dropped. `None`: it is being moved already.
    pub(super) fn begin_move(self: &Arc<Self>) -> Option<Moving> {
        let mut moving = self.moving();
        if moving.is_some() {
            return None;
        }
        let progress = Arc::clone(moving.insert(Arc::default()));
        Some(Moving { runner: Arc::clone(self), progress })
    }

    /// How far the move in progress is.
    pub(super) fn progress(&self) -> Option<Arc<Progress>> {
        self.moving().clone()
    }

    fn moving(&self) -> MutexGuard<'_, Option<Arc<Progress>>> {
        self.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the process has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Returns when the process has ended.
    pub(crate) async fn ended(&self) -> End {
        let mut end = self.end.clone();
        let ended = end.wait_for(Option::is_some).await;
        let gone = || End { in_order: false, again: false, how: "it is no longer watched".to_owned() };
        ended.ok().and_then(|end| end.clone()).unwrap_or_else(gone)
    }

    /// Asks the process to flush its disks and end, and waits for it. With `force` it need not flush.
    pub(super) async fn stop(&self, force: bool) -> Result<(), Error> {
        self.stopping.send_replace(true);
        if let Err(error) = self.control.stop(force).await {
            // An answer that is lost because the process has ended is none.
            if self.end.borrow().is_none() && !force {
                self.stopping.send_replace(false);
                return Err(error.hint("`csvctl vm stop --force` pulls the plug"));
            }
        }
        if tokio::time::timeout(END_WITHIN, self.ended()).await.is_err() {
            tracing::warn!(vm = self.name, pid = self.pid, "VM process does not end: killed");
            self.kill();
            self.ended().await;
        }
        Ok(())
    }

    /// Whether somebody has asked it to end.
    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Returns when nobody wants it to end any more: it could not be asked.
    pub(super) async fn stop_failed(&self) {
        let mut stopping = self.stopping.subscribe();
        drop(stopping.wait_for(|stopping| !*stopping).await);
    }

    /// Its end is expected from here on: the VM has gone elsewhere.
    pub(super) fn release(&self) {
        self.stopping.send_replace(true);
    }

    /// Kills the process, if it is still there.
    pub(crate) fn kill(&self) {
        // Only while it is not reaped: its number is not somebody else's then.
        if self.end.borrow().is_some() {
            return;
        }
        if let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) {
            let _gone = rustix::process::kill_process(pid, Signal::KILL);
        }
    }

    /// Its end is in the records.
    pub(super) fn recorded(&self) {
        self.recorded.send_replace(true);
    }

    /// Returns when its end is in the records (or could not be written there in time).
    pub(super) async fn record_written(&self) {
        let mut recorded = self.recorded.subscribe();
        drop(tokio::time::timeout(END_WITHIN, recorded.wait_for(|recorded| *recorded)).await);
    }

    /// A piece of the console from byte `from` of boot `boot` on, waiting up to `limit` for one. When nothing will come any more
    /// it waits for the record of the end instead: then others know what becomes of the VM.
    pub(super) async fn console(
        &self,
        (boot, from): (u64, u64),
        limit: Duration,
    ) -> Result<pb::ConsoleChunk, Error> {
        let now = self.control.console(boot, from, false).await?;
        if !now.data.is_empty() || limit.is_zero() {
            return Ok(shown(now));
        }
        let more = async {
            let more = self.control.console(boot, now.next, true).await?;
            if more.data.is_empty() && more.last {
                self.record_written().await;
            }
            Ok(shown(more))
        };
        tokio::time::timeout(limit, more).await.unwrap_or_else(|_| Ok(shown(now.clone())))
    }
}

fn shown(part: hv::control::ConsoleReply) -> pb::ConsoleChunk {
    pb::ConsoleChunk {
        data: part.data,
        from: part.from,
        next: part.next,
        boot: part.boot,
        last: part.last,
        ended: String::new(),
    }
}

fn how_it_ended(status: ExitStatus, log: &Path) -> String {
    // Nobody else sends this signal.
    if status.signal() == Some(SIGSYS) {
        let call = forbidden_call(log).map_or(String::new(), |call| format!(" ({call})"));
        return format!(
            "its process was ended by the kernel: it made a system call that is forbidden to it{call}"
        );
    }
    format!("its process ended ({status})")
}

fn config(
    core: &Arc<Core>,
    record: &VmRecord,
    spec: &pb::VmSpec,
    serial: u64,
    content: Content,
) -> Result<RunnerConfig, Error> {
    let state = core.state();
    let mut volumes = Vec::new();
    for volume in state.volumes.values() {
        let used = spec.disks.iter().any(|disk| disk.volume == volume.name);
        let holds_state = state_volume(core, spec).is_ok_and(|name| name == volume.name);
        if used || holds_state {
            volumes.push(VolumeSpec {
                name: volume.name.clone(),
                id: volume.id.0,
                lun_uri: volume.lun_uri.clone(),
                node_socket: core.config.node_socket(),
                term: volume.term.0,
            });
        }
    }
    let disks = spec.disks.iter().map(|disk| DiskSpec {
        volume: disk.volume.clone(),
        path: disk.path.clone(),
        read_only: disk.read_only,
        slot: disk.slot,
        iops: disk.iops,
        bytes_per_second: disk.bytes_per_second,
    });
    let epoch = core.epoch().ok_or_else(|| Error::unreachable("this node has not joined yet"))?;
    let own_user = super::user::of_vm(core, &volumes);
    Ok(RunnerConfig {
        own_user,
        vm: record.name.clone(),
        vm_id: record.id,
        vm_epoch: record.epoch,
        memory_bytes: spec.memory_bytes,
        balloon_bytes: spec.balloon_bytes,
        cpus: spec.cpus,
        kernel: spec.kernel.clone(),
        initrd: (!spec.initrd.is_empty()).then(|| PathBuf::from(&spec.initrd)),
        cmdline: spec.cmdline.clone(),
        disks: disks.collect(),
        net: (!spec.net.is_empty()).then(|| NetSpec { tap: spec.net.clone() }),
        volumes,
        node: core.me.0,
        node_epoch: epoch.0,
        client_serial: serial,
        lease_page: core.config.lease_page(),
        // Not the VM's name: a process that has given the VM away may still be ending when the next one comes.
        control_socket: core.config.vm_dir().join(format!("{serial}.sock")),
        console_log_bytes: CONSOLE_BYTES,
        devices: spec.devices,
        baseline: super::processor::baseline(&state, spec.baseline)?.map(|cpu| (&cpu).into()),
        host_limit: core.vms.processors.limit().map(|cpu| (&cpu).into()),
        incoming: content == Content::Streamed,
        restore_from: match content {
            Content::Saved(file) => Some(file),
            Content::Booted | Content::Streamed => None,
        },
    })
}

/// The volume that a VM's state is saved to: the one of its first disk, or any.
pub(super) fn state_volume(core: &Core, spec: &pb::VmSpec) -> Result<String, Error> {
    match spec.disks.first() {
        Some(disk) => Ok(disk.volume.clone()),
        None => core
            .state()
            .volumes
            .keys()
            .next()
            .cloned()
            .ok_or_else(|| Error::conflict("there is no volume to save the VM's state to")),
    }
}

fn write_config(core: &Core, config: &RunnerConfig) -> Result<PathBuf, Error> {
    let path = core.config.vm_dir().join(format!("{}.json", config.vm));
    let text = serde_json::to_vec_pretty(config).map_err(Error::failed)?;
    match std::fs::remove_file(&config.control_socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::failed(format!("remove {}: {error}", config.control_socket.display())));
        }
        _ => {}
    }
    std::fs::write(&path, text)
        .map_err(|error| Error::failed(format!("write {}: {error}", path.display())))?;
    Ok(path)
}

/// The program: beside the daemon's, or what `CSV_HV` names.
fn program() -> Result<PathBuf, Error> {
    if let Some(path) = std::env::var_os("CSV_HV") {
        return Ok(path.into());
    }
    let here = std::env::current_exe().map_err(|error| Error::failed(format!("finding csvd: {error}")))?;
    Ok(here.with_file_name("hv"))
}

fn spawn(config: &Path) -> Result<(Child, ChildStdout), Error> {
    let program = program()?;
    let log = std::fs::File::create(config.with_extension("log"))
        .map_err(|error| Error::failed(format!("log of the VM's process: {error}")))?;
    let mut child = tokio::process::Command::new(&program)
        .arg("--config")
        .arg(config)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(|error| {
            Error::failed(format!("start {}: {error}", program.display())).hint("install hv beside csvd")
        })?;
    let stdout = child.stdout.take().expect("stdout is piped");
    Ok((child, stdout))
}

/// Reads what the process says until it is ready. After that it says nothing more.
async fn ready(stdout: ChildStdout) -> Result<(), Error> {
    #[derive(serde::Deserialize)]
    struct Line {
        state: String,
    }
    let mut lines = BufReader::new(stdout.take(WORDS_BYTES_MAX)).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str::<Line>(&line) {
            Ok(line) if !line.state.is_empty() => return Ok(()),
            _ => {}
        }
    }
    Err(Error::failed("the VM's process ended before it was ready"))
}

/// What a process says right before the kernel ends it for a call.
fn forbidden_call(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    text.lines().rev().find(|line| line.starts_with(FORBIDDEN_CALL)).map(str::to_owned)
}

/// Why a process could not start: its last words are one line of JSON.
fn last_words(log: &Path) -> Option<Error> {
    if let Some(call) = forbidden_call(log) {
        return Some(Error::failed(format!("the VM's process made {call}")));
    }
    let text = std::fs::read_to_string(log).ok()?;
    let failure = text.lines().rev().find_map(|line| serde_json::from_str::<Failure>(line).ok())?;
    Some(Error::failed(failure.error).hint(failure.hint))
}

/// Tells the coordinators of all volumes that the process used that its client is gone for certain.
pub(super) async fn forget_client(core: &Arc<Core>, serial: u64) {
    core.vms.expect_no_more(serial);
    let client = core.client(serial);
    for volume in core.clients.volumes_of(serial) {
        core.clients.remove(volume, serial);
        let state = core.state();
        let Some(record) = view::volume_by_id(&state, volume) else { continue };
        let op = NodeOp::ClientGone(OfClient::new(&record.name, client));
        // A coordinator that cannot be told now asks which clients are over when it is opened again.
        if let Err(error) = forward::ask(core, record.owner, op).await {
            tracing::warn!(%client, volume = record.name, %error, "coordinator not told that the client is gone");
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "measures the start of a process, for people")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forbidden_system_call_is_told_from_other_ends() {
        let log = tempfile::NamedTempFile::new().expect("a file");
        let ended = |signal| how_it_ended(ExitStatus::from_raw(signal), log.path());
        assert!(ended(SIGSYS).ends_with("forbidden to it"), "{}", ended(SIGSYS));
        assert_eq!(ended(9), "its process ended (signal: 9 (SIGKILL))");
        let call = format!("{FORBIDDEN_CALL}, number 41, of a thread of kind vcpu");
        std::fs::write(log.path(), format!("something\n{call}\n")).expect("it is written");
        assert!(ended(SIGSYS).ends_with(&format!("({call})")), "{}", ended(SIGSYS));
    }
}
