//! One virtual machine.
//!
//! ```text
//!   build --> Created --resume--> Running <--pause / resume--> Paused --drain, save_state--> (saved)
//!                | restore_state      ^           |
//!                +--> Restored -------+           +--> Stopped, Reset, Crashed: kept, so that one can look at it
//! ```
//! **Invariants:** device threads and the vCPUs run only in `Running`; a state is saved only when paused and drained, the
//! chips after everything that may still raise an interrupt (H3).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blockio::BlockDevice;

use crate::board::{Board, NetConfig};
use crate::boot::{self, BootError, BootSource};
use crate::console::Console;
use crate::cpu::{Cpu, CpuProblem};
use crate::devices::virtio::DEVICES_VERSION;
use crate::devices::virtio::balloon::BalloonStatus;
use crate::devices::virtio::block::{DiskStats, SlotError};
use crate::devices::virtio::limiter::DiskLimits;
use crate::devices::virtio::queue::DrainTimeout;
use crate::dirty::WrittenPages;
use crate::kvm::{HostCaps, KvmError, Machine};
use crate::lazy::{LazyError, LazyRam, Userfault};
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES};
use crate::state::{self, STATE_VERSION, SavedMachine, StateError};
use crate::throttle::Throttle;
use crate::vcpu::{Stop, VcpuContext};
use crate::vcpus::Vcpus;
use crate::{CPUS_MAX, DISKS_MAX};

/// What a VM is made of.
#[derive(Debug)]
pub struct VmConfig<'a> {
    /// Guest RAM in bytes.
    pub memory_bytes: u64,
    /// Processors, 1 to [`CPUS_MAX`].
    pub cpus: u32,
    /// What to boot; `None` for a VM whose state will be restored.
    pub boot: Option<BootSource<'a>>,
    /// Disks; all other slots are empty.
    pub disks: Vec<DiskConfig>,
    /// Its network card.
    pub net: Option<NetConfig>,
    /// Console output that is kept, in bytes.
    pub console_bytes: usize,
    /// Version of the devices that drivers find, up to [`DEVICES_VERSION`].
    pub devices: u32,
}

/// A disk of a VM.
pub struct DiskConfig {
    /// Its slot, below [`DISKS_MAX`].
    pub slot: u32,
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
            .field("slot", &self.slot)
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
    /// The guest has reset its machine, and wants to be started anew.
    Reset,
    /// The guest cannot go on; why.
    Crashed(String),
}

impl RunState {
    /// Whether the guest never runs again.
    fn is_end(&self) -> bool {
        matches!(self, Self::Stopped(_) | Self::Reset | Self::Crashed(_))
    }
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
    /// RAM cannot come lazily.
    #[error(transparent)]
    Lazy(#[from] LazyError),
    /// RAM is not whole.
    #[error("the rest of its memory cannot be read: {0}")]
    Incomplete(String),
    /// This host cannot give the guest its processor.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Cpu(Vec<CpuProblem>),
    /// Requests in flight did not end.
    #[error(transparent)]
    Drain(#[from] DrainTimeout),
    /// The number of processors is out of bounds.
    #[error("{0} processors were asked for; a VM has 1 to {CPUS_MAX}")]
    Cpus(u32),
    /// Its devices are of a newer build.
    #[error("the VM has devices of version {0}, this build has them up to {DEVICES_VERSION}")]
    Devices(u32),
    /// A disk is not there.
    #[error("disk {0} has no content yet: attach it before the VM runs")]
    NotAttached(u32),
    /// There is no such slot.
    #[error("there is no disk slot {0}; a VM has {DISKS_MAX}")]
    NoDisk(u32),
    /// Two disks were given one slot.
    #[error("two disks were given slot {0}")]
    SlotTwice(u32),
    /// A disk cannot come or go.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The guest would be left without memory.
    #[error("a balloon of {bytes} bytes was asked for; at most {most} of this VM's RAM can be given back")]
    Balloon {
        /// What was asked for.
        bytes: u64,
        /// The largest one.
        most: u64,
    },
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
    /// Protects the state only. Only the lock of the console is taken under it.
    state: Mutex<RunState>,
    changed: Condvar,
    console: Arc<Console>,
}

/// What a VM can be asked to give back: a guest needs some memory to go on.
#[must_use]
pub fn balloon_bytes_max(memory_bytes: u64) -> u64 {
    (memory_bytes - memory_bytes / 16) / PAGE_BYTES * PAGE_BYTES
}

fn suits(guest: &Cpu, hosts: &[Cpu]) -> Result<(), VmError> {
    let problems: Vec<_> = hosts.iter().flat_map(|host| guest.problems_on(host)).collect();
    none_of(problems)
}

fn none_of(problems: Vec<CpuProblem>) -> Result<(), VmError> {
    if problems.is_empty() { Ok(()) } else { Err(VmError::Cpu(problems)) }
}

/// A virtual machine.
#[derive(Debug)]
pub struct Vm {
    // Fields are dropped in this order: the vCPUs first, the machine after everything that uses it.
    /// Holds the guest back while a move needs it; protects that only.
    throttle: Mutex<Option<Throttle>>,
    vcpus: Vcpus,
    board: Board,
    life: Arc<Life>,
    exits: Arc<AtomicU64>,
    /// RAM that is still coming; protects that only.
    lazy: Mutex<Option<Arc<LazyRam>>>,
    ram: GuestRam,
    /// What a move has to send; `None` while nobody asks for it. Held over calls to KVM, never together with another lock.
    written: Mutex<Option<WrittenPages>>,
    /// The guest's clock when it was last stopped; protects that only.
    stopped_at: Mutex<Option<state::Clock>>,
    /// What this host can give to a guest, and what it is held to have at most.
    hosts: Vec<Cpu>,
    machine: Machine,
}

/// Which processor a guest gets.
#[derive(Clone, Debug, Default)]
pub struct Processor {
    /// The baseline of its cluster; without one it gets all that the host can give.
    pub baseline: Option<Cpu>,
    /// What the host is held to have at most, whatever it has.
    pub limit: Option<Cpu>,
}

impl Vm {
    /// Makes a VM that has not run yet.
    ///
    /// # Errors
    /// What could not be made; nothing is left behind.
    pub fn build(config: VmConfig<'_>) -> Result<Self, VmError> {
        Self::build_with(config, &Processor::default())
    }

    /// Makes a VM with a chosen processor.
    ///
    /// # Errors
    /// As [`Vm::build`], and [`VmError::Cpu`] when this host cannot give that processor.
    pub fn build_with(config: VmConfig<'_>, processor: &Processor) -> Result<Self, VmError> {
        if !(1..=CPUS_MAX).contains(&config.cpus) {
            return Err(VmError::Cpus(config.cpus));
        }
        if config.devices > DEVICES_VERSION {
            return Err(VmError::Devices(config.devices));
        }
        let ram = GuestRam::new(config.memory_bytes)?;
        let machine = Machine::new(ram.clone())?;
        let console = Arc::new(Console::new(config.console_bytes));
        let board = Board::build(&machine, &ram, &console, config.disks, config.net, config.devices)?;
        let life = Arc::new(Life { state: Mutex::new(RunState::Created), changed: Condvar::new(), console });
        let exits = Arc::new(AtomicU64::new(0));
        let (msrs, xsave_bytes) = (machine.saved_msrs()?, HostCaps::probe()?.xsave_bytes);
        let context = |id: u32, on_stop| {
            Ok(VcpuContext {
                id,
                fd: machine.create_vcpu(id.into())?,
                ram: ram.clone(),
                bus: Arc::clone(&board.bus),
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
        let mut hosts: Vec<Cpu> = [machine.host_cpu()?].into_iter().chain(processor.limit.clone()).collect();
        let cpu = processor.baseline.clone().unwrap_or_else(|| hosts[0].clone());
        suits(&cpu, &hosts)?;
        // Also of a VM that is still to come: what KVM does not take is known before anything moves.
        let kept = vcpus.identify(&cpu)?;
        if processor.baseline.is_some() {
            none_of(cpu.dropped_in(&kept))?;
        }
        hosts = hosts.into_iter().map(|host| host.with_extras(&cpu, &kept)).collect();
        if let Some(source) = &config.boot {
            vcpus.boot(boot::load(&ram, source, config.cpus, &board.places())?)?;
        }
        Ok(Self {
            throttle: Mutex::default(),
            vcpus,
            board,
            life,
            exits,
            lazy: Mutex::default(),
            ram,
            written: Mutex::default(),
            stopped_at: Mutex::default(),
            hosts,
            machine,
        })
    }

    /// Lets the VM run, for the first time or again. Every queue is looked at once before the vCPUs go on.
    ///
    /// # Errors
    /// When it has ended, or a disk has no content.
    pub fn resume(&self) -> Result<(), VmError> {
        self.expect_state("run", |state| *state != RunState::Running && !state.is_end())?;
        if let Some(slot) = self.board.bus.slots.iter().find(|slot| slot.disk.lacks_content()) {
            return Err(VmError::NotAttached(slot.disk.slot()));
        }
        self.board.release();
        if self.run_state() == RunState::Restored {
            self.board.announce();
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
        // What follows a pause reads RAM, which must be whole then. The guest runs on meanwhile.
        self.await_memory()?;
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
        Ok(self.board.drain()?)
    }

    /// The whole state but RAM. The VM is unchanged and may resume.
    ///
    /// # Errors
    /// When it is not paused, or KVM does not tell something.
    pub fn save_state(&self) -> Result<SavedMachine, VmError> {
        self.expect_state("saved", |state| matches!(state, RunState::Paused | RunState::Restored))?;
        self.drain()?;
        // Devices are silent now. What they have raised must be in the chips and the APIC before these are read.
        self.machine.settle_lines()?;
        let vcpus = self.vcpus.save()?;
        let output = self.console().read(0, usize::MAX);
        let mut machine = SavedMachine {
            version: STATE_VERSION,
            memory_bytes: self.ram.bytes(),
            clock: *self.stopped_at(),
            vcpus,
            console: Some(state::Console { start: output.from, data: output.data, boot: output.boot }),
            ..SavedMachine::default()
        };
        self.board.save(&mut machine);
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
        for vcpu in &saved.vcpus {
            suits(&Cpu::of_saved(&vcpu.cpuid), &self.hosts)?;
        }
        self.vcpus.restore(&saved.vcpus)?;
        self.machine.restore_chips(saved)?;
        let console = state::part(saved.console.as_ref(), "console")?;
        self.console().restore(console.boot, console.start, &console.data);
        self.board.restore(saved)?;
        *self.stopped_at() = saved.clock;
        self.life.set(RunState::Restored);
        Ok(())
    }

    /// Lets RAM come from a saved VM while the guest runs: to be called before the state is restored, on a VM that nobody has
    /// touched. `failed` is called, once, when a page cannot be had: the guest then stands still for ever.
    ///
    /// # Errors
    /// When the kernel refuses, or the saved VM is damaged.
    pub fn fill_lazily(
        &self,
        fault: Userfault,
        file: Arc<dyn BlockDevice>,
        image: &state::SavedImage,
        failed: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<(), VmError> {
        self.expect_state("filled", |state| matches!(state, RunState::Created))?;
        self.board.balloon.memory_comes();
        let balloon = Arc::clone(&self.board.balloon);
        let there = move || balloon.memory_is_there();
        let lazy = LazyRam::start(fault, file, image, &self.ram, there, failed)?;
        *self.lazy.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(lazy));
        Ok(())
    }

    /// Returns when all of RAM is there. Only then others may read it.
    ///
    /// # Errors
    /// Why it never will be.
    pub fn await_memory(&self) -> Result<(), VmError> {
        let lazy = self.lazy.lock().unwrap_or_else(PoisonError::into_inner).clone();
        lazy.map_or(Ok(()), |lazy| lazy.wait()).map_err(VmError::Incomplete)
    }

    /// Begins to note which pages the guest and its devices write. Everything counts as not sent yet.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn track_writes(&self) -> Result<(), VmError> {
        self.await_memory()?;
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

    /// The written pages that were not taken, a bit each for all of RAM; they count as written still. Of a VM that is paused and
    /// drained these are the last ones.
    ///
    /// # Errors
    /// [`VmError::NotTracked`], or when KVM refuses.
    pub fn rest_of_written(&self) -> Result<Vec<u64>, VmError> {
        let mut written = self.written();
        let pages = written.as_mut().ok_or(VmError::NotTracked)?;
        Ok(pages.rest(&self.machine, &self.ram)?)
    }

    /// Gives a disk its content, once its writer elsewhere is gone. It must have the size that the guest knows.
    ///
    /// # Errors
    /// When there is no such disk, or its size differs.
    pub fn attach_disk(&self, slot: u32, device: Arc<dyn BlockDevice>) -> Result<(), VmError> {
        Ok(self.board.slot(slot)?.disk.attach(device)?)
    }

    /// Puts a disk into an empty slot, while the guest runs; it learns that by a configuration interrupt.
    ///
    /// # Errors
    /// When the slot is taken, or the guest's driver cannot use this disk; nothing has changed.
    pub fn insert_disk(
        &self,
        slot: u32,
        device: Arc<dyn BlockDevice>,
        read_only: bool,
        serial: &str,
    ) -> Result<(), VmError> {
        Ok(self.board.slot(slot)?.disk.insert(device, read_only, serial.to_owned())?)
    }

    /// Takes a disk out, after its requests in flight; the guest sees a disk of no capacity.
    ///
    /// # Errors
    /// When the slot is empty, or requests do not end: then the disk stays.
    pub fn eject_disk(&self, slot: u32) -> Result<(), VmError> {
        Ok(self.board.slot(slot)?.disk.eject()?)
    }

    /// Tells the guest the size that a disk has now.
    ///
    /// # Errors
    /// When the slot is empty.
    pub fn remeasure_disk(&self, slot: u32) -> Result<u64, VmError> {
        Ok(self.board.slot(slot)?.disk.remeasure()?)
    }

    /// Limits what a disk may do; without limits it is bounded by the storage alone.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn limit_disk(&self, slot: u32, limits: DiskLimits) -> Result<(), VmError> {
        self.board.slot(slot)?.disk.set_limits(limits);
        Ok(())
    }

    /// The limits of a disk.
    ///
    /// # Errors
    /// When there is no such slot.
    pub fn disk_limits(&self, slot: u32) -> Result<DiskLimits, VmError> {
        Ok(self.board.slot(slot)?.disk.limits())
    }

    /// Asks the guest to give so much of its RAM back, in whole pages; running or not. It does as it can, and takes back what it needs.
    ///
    /// # Errors
    /// [`VmError::Balloon`] when less than a sixteenth of its RAM would be left.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), VmError> {
        let most = balloon_bytes_max(self.ram.bytes());
        if bytes > most {
            return Err(VmError::Balloon { bytes, most });
        }
        let pages = u32::try_from(bytes / PAGE_BYTES).expect("RAM has fewer pages");
        self.board.balloon.set_target(pages);
        Ok(())
    }

    /// How much of its RAM the guest has given back. Newer figures of its memory are asked for by this.
    #[must_use]
    pub fn balloon(&self) -> BalloonStatus {
        self.board.balloon.status()
    }

    /// Why requests of a disk wait, by slot: they found no space, and wait for it without an answer.
    #[must_use]
    pub fn stalled_disk(&self) -> Option<(u32, String)> {
        self.board.bus.slots.iter().find_map(|slot| Some((slot.disk.slot(), slot.disk.stall_reason()?)))
    }

    /// There may be space now: does the requests that wait once more, whether the guest runs or not.
    pub fn retry_stalled(&self) {
        for slot in &self.board.bus.slots {
            slot.disk.retry();
        }
    }

    /// Drains all disks and lets go of their content, so that it can be closed.
    ///
    /// # Errors
    /// When requests do not end.
    pub fn detach_disks(&self) -> Result<(), VmError> {
        self.drain()?;
        for slot in &self.board.bus.slots {
            slot.disk.detach();
        }
        Ok(())
    }

    /// What the guest has said.
    #[must_use]
    pub fn console(&self) -> &Arc<Console> {
        &self.life.console
    }

    /// Types into the guest's serial port, as far as there is room, for which it waits up to `limit`; gives how many bytes were
    /// taken. What is taken and not read goes along with the state.
    #[must_use]
    pub fn type_in(&self, bytes: &[u8], limit: Duration) -> usize {
        self.board.bus.serial.receive(bytes, limit)
    }

    /// Its RAM.
    #[must_use]
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The VM is about to go: whoever waits for output or for its end waits no longer.
    pub fn let_go(&self) {
        self.life.say_ended(self.life.lock());
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
        self.board.slot(slot).is_ok_and(|slot| slot.disk.is_attached())
    }

    /// Size of the disk in each slot, as the guest sees it; 0 for an empty one.
    #[must_use]
    pub fn disk_sizes(&self) -> Vec<u64> {
        self.board.bus.slots.iter().map(|slot| slot.disk.shape().size_bytes).collect()
    }

    /// How often the guest has left for this process.
    #[must_use]
    pub fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    /// What the disk in each slot has done.
    #[must_use]
    pub fn disk_stats(&self) -> Vec<DiskStats> {
        self.board.bus.slots.iter().map(|slot| slot.disk.stats()).collect()
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
        let lives = |state: &mut RunState| !state.is_end();
        let waited = self.0.changed.wait_while(self.0.lock(), lives);
        waited.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The same, but not longer than `limit`, and not when the VM is about to go, see [`Vm::let_go`].
    pub fn wait_within(&self, limit: Duration) {
        let lives = |state: &mut RunState| !state.is_end() && !self.0.console.is_closed();
        drop(self.0.changed.wait_timeout_while(self.0.lock(), limit, lives));
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let mut state = self.life.lock();
        *state = RunState::Stopped("the VM was dropped".into());
        self.life.say_ended(state);
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
        if state.is_end() {
            return;
        }
        match &stop {
            Stop::Ended(why) => tracing::info!(%why, "the guest has ended"),
            Stop::Reset => tracing::info!("the guest has reset its machine"),
            Stop::Crashed(why) => tracing::error!(%why, "the guest has crashed"),
        }
        *state = match stop {
            Stop::Ended(why) => RunState::Stopped(why),
            Stop::Reset => RunState::Reset,
            Stop::Crashed(why) => RunState::Crashed(why),
        };
        self.say_ended(state);
    }

    /// Closes the console before the end can be seen: who sees a VM that has ended has all of its output.
    fn say_ended(&self, state: MutexGuard<'_, RunState>) {
        self.console.close();
        drop(state);
        self.changed.notify_all();
    }
}
