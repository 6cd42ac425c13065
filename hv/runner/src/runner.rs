//! The life of one VM in this process.
//!
//! ```text
//!   start ----------> Live <--- abandon --- Saved        Live: the VM decides (running, paused, stopped, crashed)
//!   start incoming -> Incoming -- activate --> Live      Saved: disks closed, state elsewhere, may be abandoned
//!                                 any -- stop --> Ended
//! ```
//! **Invariants:** the disks are open for writing only in `Live`; before the hand-over the source may always go on
//! (`abandon`), and whether the hand-over happened is not known here: the supervisor reads the record (H1).

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use blockio::{BlockDevice, Tripwire};
use hv::control::{DiskPlace, SaveReply, StatusReply, VmRunState};
use hv::{
    BootSource, DiskConfig, DiskLimits, NetConfig, Processor, RunState, Userfault, Vm, VmConfig, VmError,
};
use lockmgr::Epoch;
use threads::Kind;

use crate::boot::{BootFiles, firmware_for};
use crate::config::{DiskSpec, ProcessorSpec, RunnerConfig, VolumePath};
use crate::disk::{RunnerDisk, of_slot};
use crate::failure::Failure;
use crate::images::Works;
use crate::saved::Copying;
use crate::volume::Volumes;
use crate::{control, lease, privileges, sandbox, saved, tap};

const WATCH_STACK_BYTES: usize = 256 << 10;

/// One VM with everything that it needs.
pub struct Runner {
    config: RunnerConfig,
    /// The control socket until it is served. A leaf.
    listener: Mutex<Option<UnixListener>>,
    vm: Vm,
    volumes: Volumes,
    /// Held over a whole operation, so that operations come one after the other. Never taken by an I/O thread.
    work: Mutex<Vec<RunnerDisk>>,
    /// Protects the phase only; taken under `work`.
    phase: Mutex<Phase>,
    /// Where each disk lies, for those who must not wait for work. A leaf.
    shown: Mutex<Vec<Shown>>,
    works: Works,
    /// RAM on its way to a file. Taken under `work`.
    copying: Mutex<Option<Copying>>,
    /// Set by whoever wants a copy of RAM no longer.
    copy_off: AtomicBool,
    ended: Sender<Ended>,
}

/// Where a disk lies, and its parents.
struct Shown {
    slot: u32,
    path: String,
    parents: Vec<String>,
}

/// Why the process ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Somebody asked for it.
    Stopped,
    /// The node's right to do I/O is over; why.
    LeaseOver(String),
    /// The guest runs without a part of its memory, which cannot be read; why.
    MemoryLost(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// `loaded`: RAM and state are complete.
    Incoming {
        loaded: bool,
    },
    Live,
    Saved {
        ran: bool,
    },
    Ended,
}

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("vm", &self.vm).finish_non_exhaustive()
    }
}

impl Runner {
    /// Opens everything; a VM that is not incoming runs when this returns. What ends the process comes out of the
    /// receiver.
    ///
    /// # Errors
    /// What could not be opened and what to do about it.
    pub fn start(mut config: RunnerConfig) -> Result<(Arc<Self>, Receiver<Ended>), Failure> {
        config.check()?;
        // First of all, while this is the only thread, and everything can be opened.
        let net = config.net.as_ref().map(|net| tap::card(net, config.vm_id)).transpose()?;
        // Without rights nobody may hear of pages that the kernel itself misses.
        let fault = config.restore_from.as_ref().and_then(|_| open_fault());
        let lease = lease::open(&config.lease_page)?;
        let kernel = BootFiles::of(&config)?;
        let listener = Mutex::new(Some(control::listen(&config.control_socket)?));
        if let Some(user) = &config.own_user {
            hv::keep_kvm_open().map_err(|error| not_built(&VmError::Kvm(error)))?;
            privileges::become_own_user(user)?;
            config.see_from_root();
        }
        privileges::drop_all()?;
        sandbox::enter()?;
        let (ended, told) = channel();
        let (over, cut) = (ended.clone(), ended.clone());
        let wire = Tripwire::new(move |why| drop(cut.send(Ended::LeaseOver(why.to_owned()))));
        let volumes = Volumes::open(&config, &lease, &wire)?;
        let epoch = Epoch(config.node_epoch);
        lease::watch(lease, epoch, volumes.gates(), move |why| drop(over.send(Ended::LeaseOver(why))))?;
        let mut disks = RunnerDisk::all(&config.disks);
        let vm = match &config.restore_from {
            Some(from) => {
                let lost = ended.clone();
                let lost = move |why| drop(lost.send(Ended::MemoryLost(why)));
                restored(&config, &volumes, (&mut disks, net), from, fault, lost)
                    .map(|vm| (vm, Phase::Incoming { loaded: true }))
            }
            None if config.incoming => {
                incoming(&config, &volumes, &mut disks, net).map(|vm| (vm, Phase::Incoming { loaded: false }))
            }
            None => boot(&config, &kernel, &volumes, &mut disks, net).map(|vm| (vm, Phase::Live)),
        };
        // Nobody waits for grants of a process that is about to end.
        let (vm, phase) = vm.inspect_err(|_| volumes.detach())?;
        let shown = Mutex::new(shown(&disks));
        let copy_off = AtomicBool::new(false);
        let (work, phase, copying) = (Mutex::new(disks), Mutex::new(phase), Mutex::default());
        let works = Works::default();
        let runner = Arc::new(Self {
            config,
            listener,
            vm,
            volumes,
            work,
            phase,
            shown,
            works,
            copying,
            copy_off,
            ended,
        });
        watch_end(&runner)?;
        Ok((runner, told))
    }

    pub(crate) fn config(&self) -> &RunnerConfig {
        &self.config
    }

    pub(crate) fn control_socket(&self) -> &Path {
        &self.config.control_socket
    }

    pub(crate) fn take_listener(&self) -> Option<UnixListener> {
        self.listener.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The VM, for its console.
    #[must_use]
    pub fn vm(&self) -> &Vm {
        &self.vm
    }

    /// Stops the guest's processor.
    ///
    /// # Errors
    /// When it does not run.
    pub fn pause(&self) -> Result<(), Failure> {
        let _work = self.work_in("paused", &[Phase::Live])?;
        self.vm.pause().map_err(|error| not_now(&error))
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// When it is not paused.
    pub fn resume(&self) -> Result<(), Failure> {
        let _work = self.work_in("resumed", &[Phase::Live])?;
        self.vm.resume().map_err(|error| not_now(&error))
    }

    /// Writes RAM to a file while the guest runs, for a save that follows.
    ///
    /// # Errors
    /// What failed; the VM runs on, and a save writes everything.
    pub fn copy_memory(&self, to: &VolumePath) -> Result<(), Failure> {
        let _work = self.work_in("saved", &[Phase::Live])?;
        *self.copying() = None;
        self.copy_off.store(false, Ordering::Relaxed);
        let copying = Copying::begin(to, self.volumes.create_file(to)?, &self.vm, &self.copy_off);
        if copying.is_err() {
            self.copy_no_more();
        }
        *self.copying() = Some(copying?);
        Ok(())
    }

    /// Returns when all of its memory is here, so that the file that it comes from is of no use any more.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub fn await_memory(&self) -> Result<(), Failure> {
        self.vm.await_memory().map_err(|error| not_now(&error))
    }

    /// Ends a copy of RAM that is under way.
    pub(crate) fn give_up_copy(&self) {
        self.copy_off.store(true, Ordering::Relaxed);
    }

    fn copying(&self) -> MutexGuard<'_, Option<Copying>> {
        self.copying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Written pages are noted no more.
    fn copy_no_more(&self) {
        *self.copying() = None;
        if let Err(error) = self.vm.untrack_writes() {
            tracing::warn!(%error, "written pages are still noted; the next save or move puts it right");
        }
    }

    /// Pauses, drains, closes the disks, and writes RAM and state to a file. On any error the VM goes on as before.
    ///
    /// # Errors
    /// What failed; the VM goes on.
    pub fn save(&self, to: &VolumePath) -> Result<SaveReply, Failure> {
        let mut disks = self.work_in("saved", &[Phase::Live])?;
        let ran = self.vm.run_state() == RunState::Running;
        let reply = self.write_everything(&mut disks, to, ran);
        match reply {
            Ok(reply) => {
                *self.phase() = Phase::Saved { ran };
                Ok(reply)
            }
            Err(failure) => {
                tracing::warn!(%failure, "saving failed, the VM goes on");
                self.go_on(&mut disks, ran)?;
                self.copy_no_more();
                Err(failure)
            }
        }
    }

    fn write_everything(
        &self,
        disks: &mut [RunnerDisk],
        to: &VolumePath,
        ran: bool,
    ) -> Result<SaveReply, Failure> {
        let mut watch = Stopwatch::start();
        if ran {
            self.vm.pause().map_err(|error| not_now(&error))?;
        }
        self.close_disks(disks)?;
        let drain_ms = watch.lap_ms();
        let begun = self.copying().take().filter(|copying| copying.to == *to);
        let (file, ram) = match begun {
            Some(copying) => copying.finish(&self.vm)?,
            None => {
                let file = self.volumes.create_file(to)?;
                let ram = saved::write_ram(&file, &self.vm)?;
                (file, ram)
            }
        };
        let memory_ms = watch.lap_ms();
        let stats = saved::write_state(&file, &self.vm, ram, &self.config)?;
        let state_ms = watch.lap_ms();
        Ok(SaveReply {
            drain_ms,
            memory_ms,
            state_ms,
            memory_bytes_written: stats.memory_bytes_written,
            memory_bytes_total: stats.memory_bytes_total,
        })
    }

    /// Takes a save back: the disks are opened again, those in `places` as the images that are named there, and the VM goes on
    /// here.
    ///
    /// # Errors
    /// When nothing was saved, or a disk cannot be opened; it can be tried again.
    pub fn abandon(&self, places: &[DiskPlace]) -> Result<(), Failure> {
        let mut disks =
            self.work_in("taken back", &[Phase::Saved { ran: true }, Phase::Saved { ran: false }])?;
        let ran = *self.phase() == Phase::Saved { ran: true };
        for DiskPlace { slot, path } in places {
            of_slot(&mut disks, *slot)?.is_now(path);
        }
        self.go_on(&mut disks, ran)?;
        *self.phase() = Phase::Live;
        self.copy_no_more();
        Ok(())
    }

    /// The VM belongs to this process now: opens its disks anew and runs it.
    ///
    /// # Errors
    /// When it is not incoming, or a disk cannot be opened; it can be tried again.
    pub fn activate(&self) -> Result<(), Failure> {
        let mut disks = self.work_in("activated", &[Phase::Incoming { loaded: true }])?;
        self.go_on(&mut disks, true)?;
        *self.phase() = Phase::Live;
        Ok(())
    }

    /// Makes `to`, on the disk's volume, a clone of a disk: as the guest has it at one moment, and clean, because the guest is
    /// held still and all its disks are closed for it. The guest runs on afterwards, whatever became of the clone.
    ///
    /// # Errors
    /// What failed.
    pub fn clone_disk(&self, slot: u32, to: &str) -> Result<(), Failure> {
        let mut disks = self.work_in("cloned", &[Phase::Live])?;
        let spec = disks.iter().find(|disk| disk.slot() == slot).map(|disk| disk.spec().clone());
        let spec = spec.ok_or_else(|| {
            Failure::new(format!("there is no disk in slot {slot}"), "`csvctl vm show` lists the disks")
        })?;
        let ran = self.vm.run_state() == RunState::Running;
        let outcome = self.clone_held_still(&mut disks, ran, (&spec, to));
        self.go_on(&mut disks, ran)?;
        outcome
    }

    fn clone_held_still(
        &self,
        disks: &mut [RunnerDisk],
        ran: bool,
        (spec, to): (&DiskSpec, &str),
    ) -> Result<(), Failure> {
        if ran {
            self.vm.pause().map_err(|error| not_now(&error))?;
        }
        self.close_disks(disks)?;
        let from = VolumePath { volume: spec.volume.clone(), path: spec.path.clone() };
        self.volumes.clone_file(&from, to)
    }

    /// Opens what is closed, and runs the VM if it ran.
    pub(crate) fn go_on(&self, disks: &mut [RunnerDisk], run: bool) -> Result<(), Failure> {
        for disk in disks.iter_mut() {
            if self.vm.is_disk_attached(disk.slot()) {
                continue;
            }
            let device = disk.open(&self.volumes)?;
            self.vm.attach_disk(disk.slot(), device).map_err(|error| {
                let at = format!("{}:{}", disk.spec().volume, disk.spec().path);
                Failure::new(
                    format!("the disk {at} cannot be attached: {error}"),
                    "was it changed while the VM was saved?",
                )
            })?;
        }
        self.show(disks);
        if run && self.vm.run_state() != RunState::Running {
            self.vm.resume().map_err(|error| not_now(&error))?;
        }
        Ok(())
    }

    /// Puts a disk into an empty slot of the running VM.
    ///
    /// # Errors
    /// When it cannot be opened, or the slot is taken; nothing has changed.
    pub fn add_disk(&self, slot: u32, spec: DiskSpec) -> Result<(), Failure> {
        let mut disks = self.work_in("given a disk", &[Phase::Live])?;
        let mut disk = RunnerDisk::new(slot, spec);
        let device = disk.open(&self.volumes)?;
        if let Err(failure) = disk.reserve_structures(&self.volumes) {
            disk.close()?;
            return Err(failure);
        }
        let serial = disk.serial(self.config.vm_id);
        if let Err(error) = self.vm.insert_disk(slot, device, disk.spec().read_only, &serial) {
            disk.close()?;
            return Err(not_changed(&error));
        }
        disks.push(disk);
        self.show(&disks);
        Ok(())
    }

    /// Takes a disk out of the running VM and closes it.
    ///
    /// # Errors
    /// When the slot is empty, or requests do not end: then the disk stays.
    pub fn remove_disk(&self, slot: u32) -> Result<(), Failure> {
        let mut disks = self.work_in("freed of a disk", &[Phase::Live])?;
        self.vm.eject_disk(slot).map_err(|error| not_changed(&error))?;
        let place = disks.iter().position(|disk| disk.slot() == slot);
        let closed = place.map_or(Ok(()), |place| disks.remove(place).close());
        self.show(&disks);
        closed
    }

    /// Changes the size of a disk, and tells the guest.
    ///
    /// # Errors
    /// When the slot is empty, or the size is not possible: then nothing has changed.
    pub fn resize_disk(&self, slot: u32, size_bytes: u64) -> Result<(), Failure> {
        let disks = self.work_in("given a larger disk", &[Phase::Live])?;
        let disk = disks.iter().find(|disk| disk.slot() == slot);
        disk.ok_or_else(|| not_changed(&VmError::NoDisk(slot)))?.resize(size_bytes)?;
        self.remeasure(slot)
    }

    /// Sets or lifts the limits of a disk, at once.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn limit_disk(&self, slot: u32, limits: DiskLimits) -> Result<(), Failure> {
        self.vm.limit_disk(slot, limits).map_err(|error| not_changed(&error))
    }

    /// Types at the guest's serial console; gives how many bytes were taken. Waits for room up to `limit`.
    ///
    /// # Errors
    /// When the guest does not run here: what it is given now would be lost, or wait for nobody.
    pub fn type_in(&self, bytes: &[u8], limit: Duration) -> Result<usize, Failure> {
        let state = self.run_state().0;
        if state != VmRunState::Running {
            let now = format!("{state:?}").to_lowercase();
            return Err(Failure::new(
                format!("a VM that is {now} takes no input"),
                "look at its state with `csvctl vm show`",
            ));
        }
        Ok(self.vm.type_in(bytes, limit))
    }

    /// Asks the guest to give so much of its memory back.
    ///
    /// # Errors
    /// When too little would be left.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), Failure> {
        self.vm.set_balloon(bytes).map_err(|error| not_changed(&error))
    }

    /// The volumes of this process.
    pub(crate) fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    pub(crate) fn works(&self) -> &Works {
        &self.works
    }

    /// The size of a disk has changed: tells the guest.
    pub(crate) fn remeasure(&self, slot: u32) -> Result<(), Failure> {
        self.vm.remeasure_disk(slot).map(drop).map_err(|error| not_changed(&error))
    }

    pub(crate) fn show(&self, disks: &[RunnerDisk]) {
        *self.shown() = shown(disks);
    }

    fn shown(&self) -> MutexGuard<'_, Vec<Shown>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the VM. Without `force` its disks are drained and closed first.
    ///
    /// # Errors
    /// When a disk cannot be closed; the process ends all the same.
    pub fn stop(&self, force: bool) -> Result<(), Failure> {
        let closed = if force { Ok(()) } else { self.stop_cleanly() };
        *self.phase() = Phase::Ended;
        // The receiver lives in `main`; when it is gone, the process ends already.
        let _ = self.ended.send(Ended::Stopped);
        closed
    }

    fn stop_cleanly(&self) -> Result<(), Failure> {
        let mut disks = self.work();
        if self.vm.run_state() == RunState::Running {
            // It may end by itself in this very moment.
            drop(self.vm.pause());
        }
        let closed = self.close_disks(&mut disks);
        self.volumes.detach();
        closed
    }

    pub(crate) fn close_disks(&self, disks: &mut [RunnerDisk]) -> Result<(), Failure> {
        self.vm.detach_disks().map_err(|error| not_now(&error))?;
        disks.iter_mut().try_for_each(RunnerDisk::close)
    }

    /// Everything about the VM that a person wants to see.
    #[must_use]
    pub fn status(&self) -> StatusReply {
        let (state, reason) = self.run_state();
        // Before the list is locked below, which this looks at too.
        let stalled = self.stalled();
        let (sizes, stats) = (self.vm.disk_sizes(), self.vm.disk_stats());
        let disk = |shown: &Shown| {
            let index = usize::try_from(shown.slot).ok()?;
            let (stats, limits) = (stats.get(index)?, self.vm.disk_limits(shown.slot).ok()?);
            Some(hv::control::DiskStatus {
                path: shown.path.clone(),
                size_bytes: *sizes.get(index)?,
                reads: stats.reads,
                writes: stats.writes,
                flushes: stats.flushes,
                errors: stats.errors,
                slot: shown.slot,
                iops_limit: limits.iops,
                bytes_per_second_limit: limits.bytes_per_second,
                parents: shown.parents.clone(),
            })
        };
        StatusReply {
            state: state.into(),
            reason,
            memory_bytes: self.config.memory_bytes,
            exits: self.vm.exits(),
            console_bytes: self.vm.console().end(),
            disks: self.shown().iter().filter_map(disk).collect(),
            stalled,
            waited: false,
            balloon: Some(balloon_status(&self.vm)),
            memory_used_bytes: self.vm.ram().used_bytes(),
        }
    }

    fn run_state(&self) -> (VmRunState, String) {
        match self.phase().clone() {
            Phase::Incoming { .. } => return (VmRunState::Incoming, String::new()),
            Phase::Saved { .. } => return (VmRunState::Saved, String::new()),
            Phase::Ended => return (VmRunState::Stopped, "stopped on request".into()),
            Phase::Live => {}
        }
        match self.vm.run_state() {
            RunState::Running => (VmRunState::Running, self.disk_trouble()),
            RunState::Created | RunState::Restored | RunState::Paused => (VmRunState::Paused, String::new()),
            RunState::Stopped(why) => (VmRunState::Stopped, why),
            RunState::Reset => (VmRunState::Reset, "the guest has reset its machine".into()),
            RunState::Crashed(why) => (VmRunState::Crashed, why),
        }
    }

    fn stalled(&self) -> String {
        let Some((slot, why)) = self.vm.stalled_disk() else { return String::new() };
        let shown = self.shown();
        let path = shown.iter().find(|shown| shown.slot == slot).map_or("", |shown| shown.path.as_str());
        format!("disk {path}: {why}")
    }

    fn disk_trouble(&self) -> String {
        let last = self.vm.disk_stats().into_iter().find_map(|disk| disk.last_error);
        last.map_or(String::new(), |error| format!("a disk request failed: {error}"))
    }

    /// The guest has ended by itself: its disks need nobody any more.
    fn guest_ended(&self) {
        let mut disks = self.work();
        if *self.phase() == Phase::Live
            && let Err(failure) = self.close_disks(&mut disks)
        {
            tracing::warn!(%failure, "closing the disks of a guest that has ended failed");
        }
    }

    pub(crate) fn work_in(
        &self,
        what: &str,
        phases: &[Phase],
    ) -> Result<MutexGuard<'_, Vec<RunnerDisk>>, Failure> {
        let work = self.work();
        let phase = self.phase().clone();
        if phases.contains(&phase) {
            return Ok(work);
        }
        let now = match phase {
            Phase::Incoming { loaded: true } => "incoming",
            Phase::Incoming { loaded: false } => "not complete",
            Phase::Live => "live",
            Phase::Saved { .. } => "saved",
            Phase::Ended => "ended",
        };
        Err(Failure::new(
            format!("a VM that is {now} cannot be {what}"),
            "look at its state with `csvctl vm show`",
        ))
    }

    fn work(&self) -> MutexGuard<'_, Vec<RunnerDisk>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A VM that runs when this returns.
fn boot(
    config: &RunnerConfig,
    files: &BootFiles,
    volumes: &Volumes,
    disks: &mut [RunnerDisk],
    net: Option<NetConfig>,
) -> Result<Vm, Failure> {
    let mut devices = Vec::new();
    for disk in disks.iter_mut() {
        let device = disk.open(volumes)?;
        disk.reserve_structures(volumes)?;
        devices.push(Some(device));
    }
    let firmware = firmware_for(config);
    let BootFiles { kernel, cmdline, initrd } = files;
    let source = BootSource { kernel, initrd: initrd.as_deref(), cmdline, firmware };
    let vm = build(config, Some(source), disks, devices, net)?;
    // Each start has an epoch of its own, and what goes on elsewhere takes the number along.
    vm.console().begin(config.vm_epoch);
    vm.resume().map_err(|error| not_built(&error))?;
    Ok(vm)
}

/// A VM without content; RAM and state come from outside, the disks follow when it is activated.
fn incoming(
    config: &RunnerConfig,
    volumes: &Volumes,
    disks: &mut [RunnerDisk],
    net: Option<NetConfig>,
) -> Result<Vm, Failure> {
    for disk in disks.iter_mut() {
        disk.stand_by(volumes)?;
    }
    build(config, None, disks, disks.iter().map(|_| None).collect(), net)
}

/// A VM with its RAM and state; the disks follow when it is activated.
fn restored(
    config: &RunnerConfig,
    volumes: &Volumes,
    (disks, net): (&mut [RunnerDisk], Option<NetConfig>),
    from: &VolumePath,
    fault: Option<Userfault>,
    lost: impl Fn(String) + Send + Sync + 'static,
) -> Result<Vm, Failure> {
    let file = volumes.open_file(from)?;
    let image = saved::read(&file, from, config)?;
    let vm = incoming(config, volumes, disks, net)?;
    saved::load(&file, from, &image, &vm, fault, lost)?;
    // What the record says holds, whatever was asked for when it was saved.
    vm.set_balloon(config.balloon_bytes).map_err(|error| not_built(&error))?;
    Ok(vm)
}

/// Without it memory is read before the guest runs, which takes longer and needs no rights.
fn open_fault() -> Option<Userfault> {
    let opened = Userfault::open();
    opened.inspect_err(|error| tracing::warn!(%error, "memory cannot come while the guest runs")).ok()
}

fn build(
    config: &RunnerConfig,
    boot: Option<BootSource<'_>>,
    disks: &[RunnerDisk],
    devices: Vec<Option<Arc<dyn BlockDevice>>>,
    net: Option<NetConfig>,
) -> Result<Vm, Failure> {
    let each = disks.iter().zip(devices).map(|(disk, device)| DiskConfig {
        slot: disk.slot(),
        device,
        read_only: disk.spec().read_only,
        serial: disk.serial(config.vm_id),
    });
    let cpu = |spec: &Option<ProcessorSpec>| spec.as_ref().map(ProcessorSpec::cpu).transpose();
    let processor = Processor { baseline: cpu(&config.baseline)?, limit: cpu(&config.host_limit)? };
    let machine = VmConfig {
        memory_bytes: config.memory_bytes,
        cpus: config.cpus,
        boot,
        disks: each.collect(),
        net,
        console_bytes: config.console_log_bytes,
        devices: config.devices,
    };
    let vm = Vm::build_with(machine, &processor).map_err(|error| not_built(&error))?;
    for disk in disks {
        let limits = DiskLimits { iops: disk.spec().iops, bytes_per_second: disk.spec().bytes_per_second };
        vm.limit_disk(disk.slot(), limits).map_err(|error| not_built(&error))?;
    }
    vm.set_balloon(config.balloon_bytes).map_err(|error| not_built(&error))?;
    Ok(vm)
}

fn balloon_status(vm: &Vm) -> hv::control::BalloonStatus {
    let hv::BalloonStatus { target_bytes, actual_bytes, has_driver, figures } = vm.balloon();
    hv::control::BalloonStatus {
        target_bytes,
        actual_bytes,
        has_driver,
        total_bytes: figures.total_bytes.unwrap_or(0),
        free_bytes: figures.free_bytes.unwrap_or(0),
        available_bytes: figures.available_bytes.unwrap_or(0),
        cached_bytes: figures.cached_bytes.unwrap_or(0),
    }
}

fn shown(disks: &[RunnerDisk]) -> Vec<Shown> {
    let shown = |disk: &RunnerDisk| Shown {
        slot: disk.slot(),
        path: format!("{}:{}", disk.spec().volume, disk.spec().path),
        parents: disk.parents(),
    };
    disks.iter().map(shown).collect()
}

fn watch_end(runner: &Arc<Runner>) -> Result<(), Failure> {
    let end = runner.vm.end();
    let runner = Arc::downgrade(runner);
    let work = move || {
        end.wait();
        if let Some(runner) = runner.upgrade() {
            runner.guest_ended();
        }
    };
    let builder = Builder::new().name("guest-end".into()).stack_size(WATCH_STACK_BYTES);
    threads::spawn(Kind::Control, builder, work)
        .map(drop)
        .map_err(|error| Failure::new(format!("cannot start a thread: {error}"), "check the limits"))
}

fn not_built(error: &VmError) -> Failure {
    let hint = match error {
        VmError::Cpu(_) => "`csvctl vm check-migrate` tells which nodes can run it",
        VmError::Kvm(_) => "is KVM available on this node, and may this process open /dev/kvm?",
        VmError::Memory(_) => "choose another memory size",
        VmError::Boot(_) => "choose another kernel or command line",
        _ => "look at the VM's configuration with `csvctl vm show`",
    };
    Failure::new(format!("the VM cannot be started: {error}"), hint)
}

pub(crate) fn not_now(error: &VmError) -> Failure {
    let hint = match error {
        VmError::Drain(_) => "the storage does not answer: look at the volume with `csvctl volume show`",
        _ => "look at its state with `csvctl vm show`",
    };
    Failure::new(error.to_string(), hint)
}

fn not_changed(error: &VmError) -> Failure {
    let hint = match error {
        VmError::Slot(hv::SlotError::Drain(_)) => {
            "the storage does not answer: look at the volume with `csvctl volume show`"
        }
        VmError::Balloon { .. } => "choose a smaller one",
        VmError::Slot(hv::SlotError::BlockSize { .. }) => "stop the VM, add the disk, and start it",
        _ => "look at its disks with `csvctl vm show`",
    };
    Failure::new(error.to_string(), hint)
}

/// Milliseconds between the steps of a save.
pub(crate) struct Stopwatch(Instant);

impl Stopwatch {
    #[expect(clippy::disallowed_methods, reason = "a process that reports how long its own steps took")]
    pub(crate) fn start() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn lap_ms(&mut self) -> f64 {
        let next = Self::start();
        let lap: Duration = next.0 - self.0;
        *self = next;
        lap.as_secs_f64() * 1000.0
    }
}
