//! All vCPUs of a VM: told at once, then waited for.
//!
//! ```text
//!   Vm --pause--> Vcpus: command and signal to every thread first, answers afterwards: the slowest one counts, not the sum
//!   vcpu 1 ends the guest --on_stop--> Vcpus::halt: the others leave the guest, too
//! ```
//! **Invariant:** after [`Vcpus::pause`] none executes, and the registers of each are true (H5).

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::cpu::Cpu;
use crate::kvm::KvmError;
use crate::kvm::processor::Entry;
use crate::state;
use crate::vcpu::{Answer, Command, Remote, Stop, Vcpu, VcpuContext};
use crate::vm::VmError;

/// How long an answer may take before the signal is sent again.
const ANSWER_ROUND: Duration = Duration::from_secs(1);
/// Rounds before a vCPU counts as lost.
const ANSWER_ROUNDS_MAX: u32 = 30;

/// The vCPUs, by number. Their threads end when this is dropped.
#[derive(Debug)]
pub(crate) struct Vcpus(Vec<Vcpu>);

/// The ways to all of them. Set once all threads are started; none runs a guest before.
type Crew = OnceLock<Vec<Remote>>;

impl Vcpus {
    /// Starts a thread for each; `context` makes what it works with, `on_stop` hears of the guest's end.
    pub(crate) fn spawn(
        count: u32,
        context: impl Fn(u32, Box<dyn Fn(Stop) + Send>) -> Result<VcpuContext, KvmError>,
        on_stop: impl Fn(Stop) + Clone + Send + 'static,
    ) -> Result<Self, KvmError> {
        let crew = Arc::new(Crew::new());
        let spawn = |id| {
            let (crew, on_stop) = (Arc::clone(&crew), on_stop.clone());
            let stopped = move |stop| {
                on_stop(stop);
                halt(&crew);
            };
            Vcpu::spawn(context(id, Box::new(stopped))?)
        };
        let vcpus = (0..count).map(spawn).collect::<Result<Vec<_>, _>>()?;
        drop(crew.set(vcpus.iter().map(|vcpu| vcpu.remote().clone()).collect()));
        Ok(Self(vcpus))
    }

    /// The ways to all of them.
    pub(crate) fn remotes(&self) -> Vec<Remote> {
        self.0.iter().map(|vcpu| vcpu.remote().clone()).collect()
    }

    pub(crate) fn run(&self) -> Result<(), VmError> {
        self.ask_all(|_| Command::Run).map(drop)
    }

    pub(crate) fn pause(&self) -> Result<(), VmError> {
        self.ask_all(|_| Command::Pause)?.into_iter().collect::<Result<Vec<()>, _>>()?;
        Ok(())
    }

    /// Brings the first to the kernel's entry; the others wait until the guest starts them.
    pub(crate) fn boot(&self, entry: Entry) -> Result<(), VmError> {
        let booted = self.ask_all(|id| move |answer| Command::Boot((id == 0).then_some(entry), answer))?;
        Ok(booted.into_iter().collect::<Result<(), _>>()?)
    }

    /// Makes all of them this processor, before they have run; gives what KVM has made of it.
    pub(crate) fn identify(&self, cpu: &Cpu) -> Result<Cpu, VmError> {
        let count = u32::try_from(self.0.len()).expect("bounded when they were made");
        let mut tables =
            (0..count).map(|id| cpu.table(id, count)).collect::<Result<Vec<_>, _>>()?.into_iter();
        let told = self.ask_all(|_| {
            let (table, cpu) = (Box::new(tables.next().expect("one for each vCPU")), cpu.clone());
            move |answer| Command::Identity(table, cpu, answer)
        })?;
        let kept = told.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(kept.into_iter().next().unwrap_or_default())
    }

    pub(crate) fn save(&self) -> Result<Vec<state::Vcpu>, VmError> {
        Ok(self.ask_all(|_| Command::Save)?.into_iter().collect::<Result<_, _>>()?)
    }

    pub(crate) fn restore(&self, saved: &[state::Vcpu]) -> Result<(), VmError> {
        if saved.len() != self.0.len() {
            let what = "the number of vCPUs";
            return Err(state::StateError::mismatch(what, saved.len(), self.0.len()).into());
        }
        if (0..).zip(saved).any(|(id, vcpu)| vcpu.id != id) {
            return Err(state::StateError::Invalid("the vCPUs are not numbered in their order").into());
        }
        let mut each = saved.iter().cloned().map(Box::new);
        let restored = self.ask_all(|_| {
            let saved = each.next().expect("one for each vCPU");
            move |answer| Command::Restore(saved, answer)
        })?;
        restored.into_iter().collect()
    }

    /// Sends a command to every vCPU, then collects the answers in their order.
    fn ask_all<T, C: FnOnce(Answer<T>) -> Command>(
        &self,
        mut command: impl FnMut(u32) -> C,
    ) -> Result<Vec<T>, VmError> {
        let mut asked = Vec::with_capacity(self.0.len());
        for (id, vcpu) in (0..).zip(&self.0) {
            let (answer, answered) = channel();
            vcpu.remote().tell(command(id)(answer))?;
            asked.push((vcpu.remote(), answered));
        }
        asked.into_iter().map(|(vcpu, answered)| wait(vcpu, &answered)).collect()
    }
}

fn halt(crew: &Crew) {
    for vcpu in crew.get().into_iter().flatten() {
        // One that has ended needs no telling.
        drop(vcpu.tell(Command::Halt));
    }
}

fn wait<T>(vcpu: &Remote, answered: &Receiver<T>) -> Result<T, VmError> {
    for round in 0..ANSWER_ROUNDS_MAX {
        match answered.recv_timeout(ANSWER_ROUND) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => return Err(VmError::VcpuGone),
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!(round, "a vCPU does not answer; its signal is sent again");
                vcpu.kick();
            }
        }
    }
    Err(VmError::VcpuGone)
}
