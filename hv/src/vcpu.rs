//! A virtual CPU and its thread.
//!
//! ```text
//!   Vcpus --command, signal--> thread:  stopped: wait for a command      running: KVM_RUN, serve the exit, look for commands
//! ```
//! A command to a running vCPU is sent first and signalled second. The signal's handler sets `immediate_exit`, so a signal
//! that comes just before KVM_RUN is not lost: the call returns at once.
//!
//! **Invariant:** a vCPU that answers `Pause` has completed the instruction it left in (H5): its registers are true.
#![expect(unsafe_code, reason = "the signal handler writes into the page that KVM shares with a vCPU")]

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use threads::Kind;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::cpu::Cpu;
use crate::devices::bus::{Bus, Effect};
use crate::kvm::processor::{self, Entry};
use crate::kvm::{KvmError, Tried};
use crate::memory::GuestRam;
use crate::state;
use crate::vm::VmError;

/// Plenty for this thread's shallow calls; it keeps a VM's memory small.
const STACK_BYTES: usize = 256 << 10;
/// An instruction that goes over page borders leaves a few times before it is complete.
const PARTIAL_EXITS_MAX: usize = 64;
/// Longest instruction.
const INSTRUCTION_BYTES_MAX: usize = 15;

/// Why a vCPU stopped by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The guest ended itself.
    Ended(String),
    /// The guest reset its machine.
    Reset,
    /// The guest cannot go on; what the processor looked like.
    Crashed(String),
}

/// Where an answer goes.
pub(crate) type Answer<T> = Sender<T>;

/// What a vCPU's thread can be told.
pub(crate) enum Command {
    Run(Answer<()>),
    Pause(Answer<Result<(), KvmError>>),
    /// Stop without an answer: another vCPU has ended the guest.
    Halt,
    /// Execute nothing for so long, or until the next command; without an answer.
    Nap(Duration),
    /// The table of CPUID, and the feature registers that go with it.
    Identity(Box<kvm_bindings::CpuId>, Cpu, Answer<Result<Cpu, KvmError>>),
    /// The entry; only the first processor has one, the others wait for its start-up interrupt.
    Boot(Option<Entry>, Answer<Result<(), KvmError>>),
    Save(Answer<Result<state::Vcpu, KvmError>>),
    Restore(Box<state::Vcpu>, Answer<Result<(), VmError>>),
    Quit,
}

/// What a vCPU's thread works with.
pub(crate) struct VcpuContext {
    pub(crate) id: u32,
    pub(crate) fd: VcpuFd,
    pub(crate) ram: GuestRam,
    pub(crate) bus: Arc<Bus>,
    pub(crate) msrs: Vec<u32>,
    pub(crate) xsave_bytes: usize,
    pub(crate) exits: Arc<AtomicU64>,
    /// Told when the vCPU stops by itself.
    pub(crate) on_stop: Box<dyn Fn(Stop) + Send>,
}

/// A way to a vCPU's thread that does not keep it alive.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    commands: Sender<Command>,
    thread: libc::pid_t,
}

impl Remote {
    /// Sends a command and makes the vCPU look at it.
    pub(crate) fn tell(&self, command: Command) -> Result<(), VmError> {
        self.commands.send(command).map_err(|_| VmError::VcpuGone)?;
        self.kick();
        Ok(())
    }

    /// Makes a vCPU leave the guest. May be repeated.
    pub(crate) fn kick(&self) {
        let process = rustix::process::getpid().as_raw_nonzero().get();
        // SAFETY: a system call on numbers. It reaches threads of this process only, and the signal's handler, which is
        // installed, does nothing in a thread that is no vCPU.
        unsafe { libc::syscall(libc::SYS_tgkill, process, self.thread, SIGRTMIN()) };
    }
}

/// A vCPU's thread; ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Vcpu {
    remote: Remote,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread; the vCPU is stopped.
    pub(crate) fn spawn(context: VcpuContext) -> Result<Self, KvmError> {
        install_signal_handler()?;
        let (commands, receiver) = channel();
        let (tell, started) = channel();
        let runner = Runner { context, commands: receiver, running: false, nap: None };
        let builder = Builder::new().name(format!("vcpu{}", runner.context.id)).stack_size(STACK_BYTES);
        let work = move || {
            let _ = tell.send(rustix::thread::gettid().as_raw_nonzero().get());
            runner.serve();
        };
        let thread = threads::spawn(Kind::Vcpu, builder, work).tried("starting a vCPU's thread")?;
        let number = started.recv().expect("the thread tells its number first");
        Ok(Self { remote: Remote { commands, thread: number }, thread: Some(thread) })
    }

    pub(crate) fn remote(&self) -> &Remote {
        &self.remote
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        drop(self.remote.tell(Command::Quit));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

thread_local! {
    /// The page that KVM shares with this thread's vCPU. Constant-initialised, so that a handler may read it at any time.
    static SHARED_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn leave_guest(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let _ = SHARED_PAGE.try_with(|page| {
        let page = page.get();
        if !page.is_null() {
            // SAFETY: set by this very thread to its vCPU's mapping, and cleared before the mapping goes.
            unsafe { ptr::addr_of_mut!((*page).immediate_exit).write_volatile(1) };
        }
    });
}

fn install_signal_handler() -> Result<(), KvmError> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    (*INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), leave_guest)))
        .tried("installing the signal handler of vCPUs")
}

struct Runner {
    context: VcpuContext,
    commands: Receiver<Command>,
    running: bool,
    /// What is to be slept before the guest goes on.
    nap: Option<Duration>,
}

impl Runner {
    fn serve(mut self) {
        SHARED_PAGE.set(ptr::from_mut(self.context.fd.get_kvm_run()));
        loop {
            let command = match (self.running, self.nap.take()) {
                (true, None) => self.commands.try_recv(),
                (true, Some(long)) => self.commands.recv_timeout(long).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                }),
                (false, _) => self.commands.recv().map_err(|_| TryRecvError::Disconnected),
            };
            match command {
                Ok(Command::Quit) | Err(TryRecvError::Disconnected) => break,
                Ok(command) => self.obey(command),
                Err(TryRecvError::Empty) => self.step(),
            }
        }
        SHARED_PAGE.set(ptr::null_mut());
    }

    /// Answers go to somebody who waits; one that has given up does not matter.
    fn obey(&mut self, command: Command) {
        let context = &mut self.context;
        match command {
            Command::Run(answer) => {
                processor::tell_clock_stopped(&context.fd);
                self.running = true;
                let _ = answer.send(());
            }
            Command::Pause(answer) => {
                self.running = false;
                drop(answer.send(self.complete_instruction()));
            }
            Command::Halt => {
                self.running = false;
                // What it left in is completed, so that its registers can be looked at. Nobody waits for that.
                drop(self.complete_instruction());
            }
            Command::Nap(long) => self.nap = Some(long),
            Command::Identity(table, cpu, answer) => {
                let set = processor::set_cpuid(&context.fd, &table).and_then(|kept| {
                    processor::set_feature_msrs(&context.fd, &cpu)?;
                    Ok(kept)
                });
                drop(answer.send(set));
            }
            Command::Boot(entry, answer) => {
                drop(answer.send(processor::boot(&context.fd, entry, crate::boot::GDT)));
            }
            Command::Save(answer) => {
                let saved = processor::save(&context.fd, context.id, &context.msrs, context.xsave_bytes);
                drop(answer.send(saved));
            }
            Command::Restore(saved, answer) => {
                drop(answer.send(processor::restore(&context.fd, &saved, context.xsave_bytes)));
            }
            Command::Quit => unreachable!("served by the caller"),
        }
    }

    /// A vCPU that left for a port or a register finishes that instruction at the next entry. Without this, its registers
    /// are those before the instruction, and a value that was read is lost (H5).
    fn complete_instruction(&mut self) -> Result<(), KvmError> {
        for _ in 0..PARTIAL_EXITS_MAX {
            self.context.fd.set_kvm_immediate_exit(1);
            let left = self.enter();
            self.context.fd.set_kvm_immediate_exit(0);
            match left {
                Left::Interrupted => return Ok(()),
                Left::Served => {}
                Left::Stopped(stop) => {
                    (self.context.on_stop)(stop);
                    return Ok(());
                }
            }
        }
        Err(KvmError { what: "completing an instruction".into(), cause: errno::Error::new(libc::EBUSY) })
    }

    fn step(&mut self) {
        match self.enter() {
            // Cleared before the next look at the commands, so a signal in between is seen.
            Left::Interrupted => self.context.fd.set_kvm_immediate_exit(0),
            Left::Served => {}
            Left::Stopped(stop) => {
                self.running = false;
                (self.context.on_stop)(stop);
            }
        }
    }

    fn enter(&mut self) -> Left {
        let VcpuContext { fd, bus, exits, .. } = &mut self.context;
        exits.fetch_add(1, Ordering::Relaxed);
        let crash = match fd.run() {
            Ok(VcpuExit::IoOut(port, bytes)) => return Left::after(bus.port_write(port, bytes)),
            Ok(VcpuExit::IoIn(port, into)) => {
                bus.port_read(port, into);
                return Left::Served;
            }
            Ok(VcpuExit::MmioWrite(address, bytes)) => {
                bus.mmio_write(address, bytes);
                return Left::Served;
            }
            Ok(VcpuExit::MmioRead(address, into)) => {
                bus.mmio_read(address, into);
                return Left::Served;
            }
            Ok(VcpuExit::Intr) => return Left::Interrupted,
            Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => return Left::Interrupted,
            Ok(VcpuExit::Shutdown) => "the guest shut down by a triple fault".into(),
            Ok(VcpuExit::InternalError) => "KVM cannot execute an instruction of the guest".into(),
            Ok(other) => format!("unexpected exit {other:?}"),
            Err(error) => format!("running the vCPU failed: {error}"),
        };
        Left::Stopped(Stop::Crashed(self.describe(crash)))
    }

    /// What is needed to see why a guest cannot go on: registers, and the bytes at the instruction pointer.
    fn describe(&mut self, what: String) -> String {
        let VcpuContext { id, fd, ram, .. } = &mut self.context;
        let suberror = processor::internal_error(fd);
        let Ok(r) = fd.get_regs() else { return what };
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let code = fd.translate_gva(r.rip).ok().filter(|found| found.valid != 0);
        let code = code.and_then(|found| ram.read(found.physical_address, &mut bytes).ok());
        let code = code.map_or("not readable".into(), |()| format!("{bytes:02x?}"));
        format!(
            "vCPU {id}: {what}{suberror}: rip={:#x} rflags={:#x} rsp={:#x} rax={:#x} rbx={:#x} rcx={:#x} rdx={:#x} rsi={:#x} \
             rdi={:#x} instruction bytes {code}",
            r.rip, r.rflags, r.rsp, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi
        )
    }
}

/// How an entry into the guest ended.
enum Left {
    /// By a signal, or immediately as asked.
    Interrupted,
    /// For a device, which has answered.
    Served,
    /// For good.
    Stopped(Stop),
}

impl Left {
    fn after(effect: Effect) -> Self {
        match effect {
            Effect::None => Self::Served,
            Effect::Reset => Self::Stopped(Stop::Reset),
            Effect::PowerOff => Self::Stopped(Stop::Ended("the guest switched itself off".into())),
            Effect::Exit(0) => Self::Stopped(Stop::Ended("the guest ended".into())),
            Effect::Exit(code) => Self::Stopped(Stop::Crashed(format!(
                "the guest reported failure {code}; its console says which"
            ))),
        }
    }
}
