//! One virtual machine.
//!
//! ```text
//!   build --> Created --resume--> Running <--pause / resume--> Paused --drain, save_state--> (saved)
//!                | restore_state      ^           |
//!                +--> Restored -------+           +--> Stopped, Crashed: kept, so that one can look at it
//! ```
//! **Invariants:** device threads and the vCPUs run only in `Running`; a state is saved only when paused and drained, the
//! chips after everything that may still raise an interrupt (H3).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use blockio::BlockDevice;

use crate::boot::{self, BootError, BootSource};
use crate::console::Console;
use crate::devices::bus::{Bus, Place, Slot};
use crate::devices::rtc::Rtc;
use crate::devices::serial::{COM1_LINE, SerialPort};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Disk, DiskStats, shape_of};
use crate::devices::virtio::mmio::{NOTIFY, Transport};
use crate::devices::virtio::queue::DrainTimeout;
use crate::devices::virtio::request::Shape;
use crate::dirty::WrittenPages;
use crate::kvm::{HostCaps, KvmError, Machine, Tried};
use crate::memory::{GuestRam, MemoryError};
use crate::state::{self, STATE_VERSION, SavedMachine, StateError};
use crate::throttle::Throttle;
use crate::vcpu::{Stop, VcpuContext};
use crate::vcpus::Vcpus;
use crate::{CPUS_MAX, DISKS_MAX};

/// A worker's calls are shallow, too; the depth is in the disk's own stack of layers.
const WORKER_STACK_BYTES: usize = 256 << 10;

/// What a VM is made of.
#[derive(Debug)]
pub struct VmConfig<'a> {
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Processors, 1 to [`CPUS_MAX`].
    pub cpus: u32,
    /// What to boot; `None` for a VM whose state will be restored.
    pub boot: Option<BootSource<'a>>,
    /// Disks in the order of their slots.
    pub disks: Vec<DiskConfig>,
    /// Console output that is kept, in bytes.
    pub console_bytes: usize,
}

/// A disk of a VM.
pub struct DiskConfig {
    /// Its content; `None` when it will be attached before the VM runs, after a restore.
    pub device: Option<Arc<dyn BlockDevice>>,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest sees as serial number: at most 20 bytes, the same wherever the VM runs.
    pub serial: String,
}

impl std::fmt::Debug for DiskConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DiskConfig")
            .field("read_only", &self.read_only)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}

/// Where a VM is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunState {
    /// At its entry; it has not run.
    Created,
    /// Taken over from elsewhere; it has not run here.
    Restored,
    /// Its vCPUs execute.
    Running,
    /// Stopped by us, ready to go on.
    Paused,
    /// The guest has ended itself.
    Stopped(String),
    /// The guest cannot go on; why.
    Crashed(String),
}

/// Why something could not be done to a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// RAM could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A saved state does not fit.
    #[error(transparent)]
    State(#[from] StateError),
    /// Requests in flight did not end.
    #[error(transparent)]
    Drain(#[from] DrainTimeout),
    /// The number of processors is out of bounds.
    #[error("{0} processors were asked for; a VM has 1 to {CPUS_MAX}")]
    Cpus(u32),
    /// There are too many disks.
    #[error("{0} disks were asked for; a VM has at most {DISKS_MAX}")]
    Disks(usize),
    /// A disk is not there.
    #[error("disk {0} has no content yet: attach it before the VM runs")]
    NotAttached(u32),
    /// The VM has no such disk.
    #[error("the VM has no disk {0}")]
    NoDisk(u32),
    /// The VM is in a state in which this cannot be done.
    #[error("a VM that is {found:?} cannot be {wanted}")]
    WrongState {
        /// What was asked for.
        wanted: &'static str,
        /// Its state.
        found: RunState,
    },
    /// Nobody has asked for the pages that are written.
    #[error("written pages are not tracked: begin the move anew")]
    NotTracked,
    /// A chunk of pages that is not a part of RAM.
    #[error("{pages} pages from page {first_page} on are no chunk of this VM's RAM")]
    Chunk {
        /// The first one.
        first_page: u64,
        /// How many.
        pages: u64,
    },
    /// A vCPU's thread has ended or does not answer.
    #[error("a vCPU does not answer")]
    VcpuGone,
}

/// What may change at any time, by a vCPU's thread or by a caller.
#[derive(Debug)]
struct Life {
    /// Protects the state only. No other lock is taken under it.
    state: Mutex<RunState>,
    changed: Condvar,
    console: Arc<Console>,
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    // Fields are dropped in this order: the vCPUs first, the machine after everything that uses it.
    /// Holds the guest back while a move needs it; protects that only.
    throttle: Mutex<Option<Throttle>>,
    vcpus: Vcpus,
    workers: Vec<JoinHandle<()>>,
    bus: Arc<Bus>,
    life: Arc<Life>,
    exits: Arc<AtomicU64>,
    ram: GuestRam,
    /// What a move has to send; `None` while nobody asks for it. Held over calls to KVM, never together with another lock.
    written: Mutex<Option<WrittenPages>>,
    /// The guest's clock when it was last stopped; protects that only.
    stopped_at: Mutex<Option<state::Clock>>,
    machine: Machine,
}

impl Vm {
    /// Makes a VM that has not run yet.
    ///
    /// # Errors
    /// What could not be made; nothing is left behind.
    pub fn build(config: VmConfig<'_>) -> Result<Self, VmError> {
        if config.disks.len() > DISKS_MAX {
            return Err(VmError::Disks(config.disks.len()));
        }
        if !(1..=CPUS_MAX).contains(&config.cpus) {
            return Err(VmError::Cpus(config.cpus));
        }
        let places: Vec<_> = (0..config.disks.len()).map(Place::of_slot).collect();
        let ram = GuestRam::new(config.memory_bytes)?;
        let machine = Machine::new(ram.clone())?;
        let console = Arc::new(Console::new(config.console_bytes));
        let bus = Arc::new(make_bus(&machine, &ram, &console, config.disks)?);
        let life = Arc::new(Life { state: Mutex::new(RunState::Created), changed: Condvar::new(), console });
        let exits = Arc::new(AtomicU64::new(0));
        let (msrs, xsave_bytes) = (machine.saved_msrs()?, HostCaps::probe()?.xsave_bytes);
        let context = |id: u32, on_stop| {
            Ok(VcpuContext {
                id,
                fd: machine.create_vcpu(id.into())?,
                ram: ram.clone(),
                bus: Arc::clone(&bus),
                msrs: msrs.clone(),
                xsave_bytes,
                exits: Arc::clone(&exits),
                on_stop,
            })
        };
        let vcpus = Vcpus::spawn(config.cpus, context, {
            let life = Arc::clone(&life);
            move |stop| life.ended(stop)
        })?;
        if let Some(source) = &config.boot {
            let entry = boot::load(&ram, source, config.cpus, &places)?;
            vcpus.boot(entry, |id| machine.cpuid(id, config.cpus))?;
        }
        let workers = bus.slots.iter().map(spawn_worker).collect::<Result<_, _>>()?;
        Ok(Self {
            throttle: Mutex::default(),
            vcpus,
            workers,
            bus,
            life,
            exits,
            ram,
            written: Mutex::default(),
            stopped_at: Mutex::default(),
            machine,
        })
    }

    /// Lets the VM run, for the first time or again. Every queue is looked at once before the vCPUs go on.
    ///
    /// # Errors
    /// When it has ended, or a disk has no content.
    pub fn resume(&self) -> Result<(), VmError> {
        self.expect_state("run", |state| {
            !matches!(state, RunState::Running | RunState::Stopped(_) | RunState::Crashed(_))
        })?;
        if let Some(slot) = self.bus.slots.iter().find(|slot| !slot.disk.is_attached()) {
            return Err(VmError::NotAttached(slot.disk.slot()));
        }
        for slot in &self.bus.slots {
            slot.disk.release();
        }
        self.life.set(RunState::Running);
        self.vcpus.run()
    }

    /// Stops the vCPUs. Disk requests that they have posted go on; [`Vm::drain`] waits for them.
    ///
    /// # Errors
    /// When it does not run, or a vCPU does not answer.
    pub fn pause(&self) -> Result<(), VmError> {
        self.expect_state("paused", |state| matches!(state, RunState::Running))?;
        self.vcpus.pause()?;
        // Read at once: whatever comes next takes time that the guest has not lived.
        *self.stopped_at() = Some(self.machine.clock()?);
        let mut state = self.life.lock();
        // It may have ended by itself in the very last moment.
        if *state == RunState::Running {
            *state = RunState::Paused;
        }
        Ok(())
    }

    /// Waits until no disk request is in flight, and takes no new ones until the VM resumes.
    ///
    /// # Errors
    /// [`VmError::Drain`] when the storage does not answer; the VM can still resume.
    pub fn drain(&self) -> Result<(), VmError> {
        for slot in &self.bus.slots {
            slot.disk.hold_and_drain()?;
        }
        Ok(())
    }

    /// The whole state but RAM. The VM is unchanged and may resume.
    ///
    /// # Errors
    /// When it is not paused, or KVM does not tell something.
    pub fn save_state(&self) -> Result<SavedMachine, VmError> {
        self.expect_state("saved", |state| matches!(state, RunState::Paused | RunState::Restored))?;
        self.drain()?;
        let disks = self.bus.slots.iter().map(save_disk).collect();
        let serial = Some(self.bus.serial.save());
        // Devices are silent now. What they have raised must be in the chips and the APIC before these are read.
        self.machine.settle_lines()?;
        let vcpus = self.vcpus.save()?;
        let output = self.console().read(0, usize::MAX);
        let mut machine = SavedMachine {
            version: STATE_VERSION,
            memory_bytes: self.ram.bytes(),
            clock: *self.stopped_at(),
            vcpus,
            serial,
            rtc_register: self.bus.rtc.selected().into(),
            disks,
            console: Some(state::Console { start: output.from, data: output.data }),
            ..SavedMachine::default()
        };
        self.machine.save_chips(&mut machine)?;
        Ok(machine)
    }

    /// Takes over a saved state. RAM is loaded separately, before the VM runs.
    ///
    /// # Errors
    /// When the state does not fit this VM or is damaged; the VM must then be dropped.
    pub fn restore_state(&self, saved: &SavedMachine) -> Result<(), VmError> {
        self.expect_state("restored", |state| matches!(state, RunState::Created))?;
        saved.check_version()?;
        if saved.memory_bytes != self.ram.bytes() {
            return Err(StateError::mismatch("RAM in bytes", saved.memory_bytes, self.ram.bytes()).into());
        }
        if saved.disks.len() != self.bus.slots.len() {
            let what = "the number of disks";
            return Err(StateError::mismatch(what, saved.disks.len(), self.bus.slots.len()).into());
        }
        self.vcpus.restore(&saved.vcpus)?;
        self.machine.restore_chips(saved)?;
        let console = state::part(saved.console.as_ref(), "console")?;
        self.console().restore(console.start, &console.data);
        self.bus.serial.restore(state::part(saved.serial.as_ref(), "serial port")?)?;
        self.bus.rtc.select(state::byte(saved.rtc_register)?);
        for disk in &saved.disks {
            restore_disk(self.slot(disk.slot)?, disk)?;
        }
        *self.stopped_at() = saved.clock;
        self.life.set(RunState::Restored);
        Ok(())
    }

    /// Begins to note which pages the guest and its devices write. Everything counts as not sent yet.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn track_writes(&self) -> Result<(), VmError> {
        let mut written = self.written();
        // A log that an earlier move has left on would begin with what that one has cleared.
        if written.take().is_some() {
            self.machine.log_writes(false)?;
        }
        *written = Some(WrittenPages::start(&self.machine, &self.ram)?);
        Ok(())
    }

    /// Ends it. After the hand-over, or after a move that failed: switching the log takes time.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn untrack_writes(&self) -> Result<(), VmError> {
        let mut written = self.written();
        if written.take().is_some() {
            self.machine.log_writes(false)?;
        }
        Ok(())
    }

    /// Holds the guest's processors back for this share of their time, 0 to let them go. Running or not.
    ///
    /// # Errors
    /// When the system has no thread for it.
    pub fn hold_back(&self, percent: u8) -> Result<(), VmError> {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        if percent == 0 {
            *throttle = None;
            return Ok(());
        }
        let throttle = match throttle.take() {
            Some(held) => throttle.insert(held),
            None => throttle.insert(Throttle::start(self.vcpus.remotes())?),
        };
        throttle.set(percent);
        Ok(())
    }

    /// Begins a pass over the written pages; gives their number.
    ///
    /// # Errors
    /// [`VmError::NotTracked`], or when KVM refuses.
    pub fn fetch_written(&self) -> Result<u64, VmError> {
        let mut written = self.written();
        let pages = written.as_mut().ok_or(VmError::NotTracked)?;
        Ok(pages.fetch(&self.machine, &self.ram)?)
    }

    /// The written pages of a chunk, a bit each; from here on they count as sent. To be read after this call.
    ///
    /// # Errors
    /// [`VmError::Chunk`] when it is not a part of RAM or not aligned to [`crate::CHUNK_ALIGNMENT_PAGES`].
    pub fn take_written(&self, first_page: u64, pages: u64) -> Result<Vec<u64>, VmError> {
        let mut written = self.written();
        let set = written.as_mut().ok_or(VmError::NotTracked)?;
        set.take(&self.machine, first_page, pages)?.ok_or(VmError::Chunk { first_page, pages })
    }

    /// Gives a disk its content, once its writer elsewhere is gone. It must have the size that the guest knows.
    ///
    /// # Errors
    /// When there is no such disk, or its size differs.
    pub fn attach_disk(&self, slot: u32, device: Arc<dyn BlockDevice>) -> Result<(), VmError> {
        Ok(self.slot(slot)?.disk.attach(device)?)
    }

    /// Drains all disks and lets go of their content, so that it can be closed.
    ///
    /// # Errors
    /// When requests do not end.
    pub fn detach_disks(&self) -> Result<(), VmError> {
        self.drain()?;
        for slot in &self.bus.slots {
            slot.disk.detach();
        }
        Ok(())
    }

    /// What the guest has said.
    #[must_use]
    pub fn console(&self) -> &Arc<Console> {
        &self.life.console
    }

    /// Its RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where it is in its life.
    #[must_use]
    pub fn run_state(&self) -> RunState {
        self.life.lock().clone()
    }

    /// To wait for the guest's end, while somebody else owns the VM.
    #[must_use]
    pub fn end(&self) -> GuestEnd {
        GuestEnd(Arc::clone(&self.life))
    }

    /// Whether a disk has its content.
    #[must_use]
    pub fn is_disk_attached(&self, slot: u32) -> bool {
        self.slot(slot).is_ok_and(|slot| slot.disk.is_attached())
    }

    /// Size of each disk in bytes, as the guest sees it.
    #[must_use]
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.bus.slots.iter().map(|slot| slot.disk.shape().size_bytes).collect()
    }

    /// How often the guest has left for this process.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// What each disk has done.
    #[must_use]
    pub fn disk_stats(&self) -> Vec<DiskStats> {
        self.bus.slots.iter().map(|slot| slot.disk.stats()).collect()
    }

    fn slot(&self, slot: u32) -> Result<&Slot, VmError> {
        let index = usize::try_from(slot).unwrap_or(usize::MAX);
        self.bus.slots.get(index).ok_or(VmError::NoDisk(slot))
    }

    fn expect_state(
        &self,
        wanted: &'static str,
        fits: impl FnOnce(&RunState) -> bool,
    ) -> Result<(), VmError> {
        let state = self.life.lock();
        if fits(&state) { Ok(()) } else { Err(VmError::WrongState { wanted, found: state.clone() }) }
    }

    fn written(&self) -> MutexGuard<'_, Option<WrittenPages>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped_at(&self) -> MutexGuard<'_, Option<state::Clock>> {
        self.stopped_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a guest: by itself, by a crash, or with its VM.
#[derive(Clone, Debug)]
pub struct GuestEnd(Arc<Life>);

impl GuestEnd {
    /// Waits for it.
    pub fn wait(&self) -> RunState {
        let lives = |state: &mut RunState| !matches!(state, RunState::Stopped(_) | RunState::Crashed(_));
        let waited = self.0.changed.wait_while(self.0.lock(), lives);
        waited.unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.life.set(RunState::Stopped("the VM was dropped".into()));
        for slot in &self.bus.slots {
            slot.disk.stop();
        }
        for worker in self.workers.drain(..) {
            drop(worker.join());
        }
        self.life.console.close();
    }
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, RunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: RunState) {
        *self.lock() = state;
        self.changed.notify_all();
    }

    fn ended(&self, stop: Stop) {
        let mut state = self.lock();
        // The first vCPU's word counts; another one may fail because of what the first has done.
        if matches!(*state, RunState::Stopped(_) | RunState::Crashed(_)) {
            return;
        }
        match &stop {
            Stop::Ended(why) => tracing::info!(%why, "the guest has ended"),
            Stop::Crashed(why) => tracing::error!(%why, "the guest has crashed"),
        }
        *state = match stop {
            Stop::Ended(why) => RunState::Stopped(why),
            Stop::Crashed(why) => RunState::Crashed(why),
        };
        drop(state);
        self.changed.notify_all();
        self.console.close();
    }
}

fn make_bus(
    machine: &Machine,
    ram: &GuestRam,
    console: &Arc<Console>,
    disks: Vec<DiskConfig>,
) -> Result<Bus, VmError> {
    let serial = SerialPort::new(Arc::clone(console), machine.line(COM1_LINE)?);
    let mut slots = Vec::new();
    for (slot, config) in (0..).zip(disks) {
        slots.push(make_slot(machine, ram, slot, Place::of_slot(slots.len()), config)?);
    }
    Ok(Bus { serial, rtc: Rtc::default(), slots })
}

fn make_slot(
    machine: &Machine,
    ram: &GuestRam,
    slot: u32,
    place: Place,
    config: DiskConfig,
) -> Result<Slot, VmError> {
    let shape = match &config.device {
        Some(device) => shape_of(&device.geometry(), config.read_only),
        None => Shape { size_bytes: 0, block_bytes: 512, read_only: config.read_only, can_discard: false },
    };
    let disk = Disk::new(slot, config.serial, shape, ram.clone(), machine.line(place.line)?)
        .tried("making a disk")?;
    let disk = Arc::new(disk);
    if let Some(device) = config.device {
        disk.attach(device)?;
    }
    machine.notify_on_write(place.start + NOTIFY, disk.wake())?;
    let device: Arc<dyn VirtioDevice> = disk.clone();
    Ok(Slot { disk, transport: Transport::new(device, ram.clone()) })
}

fn spawn_worker(slot: &Slot) -> Result<JoinHandle<()>, KvmError> {
    let disk = Arc::clone(&slot.disk);
    thread::Builder::new()
        .name(format!("disk{}", disk.slot()))
        .stack_size(WORKER_STACK_BYTES)
        .spawn(move || disk.serve())
        .tried("starting a disk's thread")
}

fn save_disk(slot: &Slot) -> state::Disk {
    state::Disk { transport: Some(slot.transport.save()), ..slot.disk.save() }
}

fn restore_disk(slot: &Slot, saved: &state::Disk) -> Result<(), StateError> {
    slot.disk.restore(saved)?;
    slot.transport.restore(state::part(saved.transport.as_ref(), "registers of a disk")?)
}
