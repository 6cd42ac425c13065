//! What this node can give to guests as a processor, and the baseline that all nodes of its maker can give.
//!
//! ```text
//!   joined:  host --publish--> record of the node;  records of all --meet--> baseline --freeze--> version n, for ever
//!   a VM boots:  gets the newest baseline of its node's maker, and keeps its number as long as it runs
//! ```
//! **Invariant:** a baseline that was frozen is never changed: a weaker node makes a new one, and the guests of the old one
//! cannot go there, which is told when it joins and refused when somebody tries.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use api::Error;
use hv::Cpu;
use hv::cpu::Register;
use lockmgr::cluster::{ClusterState, Command, ProposeError};

use crate::core::Core;

/// A bit that this node is held to lack, for rehearsals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Without {
    leaf: u32,
    subleaf: u32,
    register: Register,
    bit: u32,
}

impl std::str::FromStr for Without {
    type Err = String;

    /// Such as `0x1.0.edx.25`.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split('.').collect();
        let [leaf, subleaf, register, bit] = parts[..] else {
            return Err(format!(
                "{text} names no feature: use LEAF.SUBLEAF.REGISTER.BIT, such as 0x1.0.edx.25"
            ));
        };
        let number = |text: &str| match text.strip_prefix("0x") {
            Some(hex) => u32::from_str_radix(hex, 16).map_err(|error| format!("{text}: {error}")),
            None => text.parse().map_err(|error| format!("{text}: {error}")),
        };
        let bit = number(bit)?;
        if bit > 31 {
            return Err(format!("a register has no bit {bit}"));
        }
        Ok(Self { leaf: number(leaf)?, subleaf: number(subleaf)?, register: register.parse()?, bit })
    }
}

/// This node's processor.
#[derive(Debug, Default)]
pub(crate) struct Processors {
    /// What the host can give; it stays the same. Asking KVM takes a VM.
    host: OnceLock<Cpu>,
    /// What the node is held to lack. Rank: a leaf.
    without: Mutex<Option<Without>>,
}

impl Processors {
    /// Holds the node to lack a feature from now on, or nothing.
    pub(crate) fn rehearse(&self, without: Option<Without>) {
        *self.without.lock().unwrap_or_else(PoisonError::into_inner) = without;
    }

    fn without(&self) -> Option<Without> {
        *self.without.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What this node can give to a guest, nothing without KVM.
    pub(super) fn here(&self) -> Option<Cpu> {
        let host = self.host()?.clone();
        Some(match self.without() {
            Some(it) => host.without((it.leaf, it.subleaf), it.register, 1 << it.bit),
            None => host,
        })
    }

    fn host(&self) -> Option<&Cpu> {
        if self.host.get().is_none() {
            let asked = Cpu::of_host().inspect_err(|error| tracing::debug!(%error, "no processor to give"));
            // Whoever was faster has asked the same host.
            let _ = self.host.set(asked.ok()?);
        }
        self.host.get()
    }

    /// What a VM's process shall hold its host to be, in a rehearsal.
    pub(super) fn limit(&self) -> Option<Cpu> {
        self.without().and_then(|_| self.here())
    }
}

/// Tells the cluster what this node can give, and sees that there is a baseline which it can give too.
pub(crate) async fn publish(core: &Arc<Core>) -> Result<(), Error> {
    let (Some(cpu), Some(epoch)) = (core.vms.processors.here(), core.epoch()) else { return Ok(()) };
    let record = cpu.encode();
    let state = core.state();
    if state.processors.get(&core.me).is_none_or(|(_, known)| known[..] != record[..]) {
        core.propose(Command::PublishProcessor { node: core.me, epoch, record: record.into() }).await?;
        tell_who_cannot_come(core, &core.state(), &cpu);
    }
    freeze(core, &cpu.vendor()).await
}

/// Adds a baseline if the newest one is not what the nodes of this maker can all give.
async fn freeze(core: &Arc<Core>, vendor: &str) -> Result<(), Error> {
    loop {
        let state = core.cluster.read().await.map_err(|error| crate::core::refused(&error))?;
        let Some(met) = common(&state, vendor) else { return Ok(()) };
        let record = met.encode();
        if state.newest_baseline(vendor).is_some_and(|(_, newest)| newest.record[..] == record[..]) {
            return Ok(());
        }
        let version = state.baselines.last_key_value().map_or(0, |(version, _)| *version) + 1;
        let command = Command::FreezeBaseline { version, vendor: vendor.to_owned(), record: record.into() };
        match core.cluster.propose(command).await {
            Ok(_) => return Ok(()),
            // Another node was faster: what it froze may be the same.
            Err(ProposeError::Conflict { .. } | ProposeError::OutcomeUnknown { .. }) => {}
            Err(error) => return Err(crate::core::refused(&error)),
        }
    }
}

/// What all nodes of a maker can give, in the order of their numbers: the same whoever asks.
fn common(state: &ClusterState, vendor: &str) -> Option<Cpu> {
    let known = state.processors.values().filter_map(|(_, record)| Cpu::decode(record).ok());
    let mut alike = known.filter(|cpu| cpu.vendor() == vendor);
    let first = alike.next()?;
    alike.try_fold(first, |met, next| met.meet(&next))
}

fn tell_who_cannot_come(core: &Arc<Core>, state: &ClusterState, here: &Cpu) {
    for (version, baseline) in &state.baselines {
        let Ok(cpu) = Cpu::decode(&baseline.record) else { continue };
        if let Some(problem) = cpu.problems_on(here).first() {
            let text = format!("node {} cannot host VMs of baseline {version}: {problem}", core.config.name);
            core.note("node.baseline", &core.config.name, text);
        }
    }
}

/// Number of the baseline that a VM gets when it boots here now; 0 when there is none.
pub(super) fn newest(core: &Core) -> u32 {
    let state = core.state();
    let vendor = core.vms.processors.here().map(|cpu| cpu.vendor()).unwrap_or_default();
    state.newest_baseline(&vendor).map_or(0, |(version, _)| version)
}

/// The processor that a VM was given when it booted; nothing when there was no baseline.
pub(super) fn baseline(state: &ClusterState, version: u32) -> Result<Option<Cpu>, Error> {
    if version == 0 {
        return Ok(None);
    }
    let frozen = state.baselines.get(&version).ok_or_else(|| {
        Error::failed(format!("processor baseline {version} is not in the cluster's records"))
            .hint("is this node up to date with the others?")
    })?;
    Cpu::decode(&frozen.record).map(Some).map_err(Error::failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_named_by_its_place() {
        let wanted = Without { leaf: 1, subleaf: 0, register: Register::Edx, bit: 25 };
        assert_eq!("0x1.0.edx.25".parse(), Ok(wanted));
        for bad in ["", "1.0.edx", "1.0.xmm.1", "1.0.edx.32", "one.0.edx.1"] {
            assert!(bad.parse::<Without>().is_err(), "{bad}");
        }
    }
}
