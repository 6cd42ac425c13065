//! Model-specific registers: which of them make up a guest's state, and in which order they are set.
//!
//! **Rules:** only registers of the table below are saved; a register that cannot be read is left out with a log line; one
//! that cannot be written fails the restore, by its number. The TSC is set first and its deadline last, because a
//! deadline counts on a set TSC.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{KvmError, Machine, Tried};
use crate::state::{self, StateError};

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
pub(super) const MISC_ENABLE: u32 = 0x1a0;

/// First and last number of the registers that belong to a guest.
const SAVED: [(u32, u32); 23] = [
    (0x10, 0x12),               // TSC, old kvmclock
    (0x3a, 0x3b),               // feature control, TSC adjust
    (0x48, 0x48),               // speculation control
    (0x10a, 0x10a),             // weaknesses that the processor does not have
    (0x122, 0x122),             // TSX control
    (0x140, 0x140),             // CPUID faulting
    (0x174, 0x176),             // SYSENTER
    (0x17a, 0x17b),             // machine check status and control
    (0x1a0, 0x1a0),             // miscellaneous enable
    (0x1d9, 0x1d9),             // debug control
    (0x200, 0x20f),             // variable MTRRs
    (0x250, 0x250),             // fixed MTRRs
    (0x258, 0x259),             //
    (0x268, 0x26f),             //
    (0x277, 0x277),             // PAT
    (0x2ff, 0x2ff),             // MTRR default type
    (0x400, 0x47f),             // machine check banks
    (0x6e0, 0x6e0),             // TSC deadline
    (0xda0, 0xda0),             // supervisor extended state
    (0xc000_0081, 0xc000_0084), // SYSCALL
    (0xc000_0100, 0xc000_0103), // FS, GS and kernel GS base, TSC_AUX
    (0xc001_011f, 0xc001_011f), // virtual speculation control
    (0x4b56_4d00, 0x4b56_4d08), // KVM's paravirtual clock, steal time, async faults
];

impl Machine {
    /// The registers that this host knows and that are part of a guest's state.
    pub(crate) fn saved_msrs(&self) -> Result<Vec<u32>, KvmError> {
        let known = self.kvm.get_msr_index_list().tried("listing MSRs")?;
        let wanted = |index: &&u32| SAVED.iter().any(|(first, last)| (*first..=*last).contains(*index));
        Ok(known.as_slice().iter().filter(wanted).copied().collect())
    }
}

pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<state::Msr>, KvmError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let entries: Vec<_> =
            batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).expect("a batch is small enough");
        let read = vcpu.get_msrs(&mut msrs).tried("reading MSRs")?;
        let values = &msrs.as_slice()[..read];
        saved.extend(values.iter().map(|msr| state::Msr { index: msr.index, value: msr.data }));
        // A short count names the first register that cannot be read: go on behind it.
        let unreadable = batch.get(read);
        if let Some(index) = unreadable {
            tracing::debug!(msr = format_args!("{index:#x}"), "an MSR cannot be read and is left out");
        }
        rest = &rest[read + usize::from(unreadable.is_some())..];
    }
    arm_lost_deadline(&mut saved);
    Ok(saved)
}

/// A deadline of zero means that the timer has fired, or that it never was armed. If its interrupt was on the way, it is
/// lost, and with it the guest's clock: so let it fire once more.
fn arm_lost_deadline(saved: &mut [state::Msr]) {
    let Some(now) = saved.iter().find(|msr| msr.index == TSC).map(|msr| msr.value) else { return };
    for msr in saved.iter_mut().filter(|msr| msr.index == TSC_DEADLINE && msr.value == 0) {
        msr.value = now;
    }
}

pub(super) fn restore(vcpu: &VcpuFd, saved: &[state::Msr]) -> Result<(), KvmError> {
    let group = |wanted: fn(u32) -> bool| -> Vec<kvm_msr_entry> {
        let entry = |msr: &state::Msr| kvm_msr_entry { index: msr.index, data: msr.value, reserved: 0 };
        saved.iter().filter(|msr| wanted(msr.index)).map(entry).collect()
    };
    write(vcpu, &group(|index| index == TSC))?;
    write(vcpu, &group(|index| index != TSC && index != TSC_DEADLINE))?;
    write(vcpu, &group(|index| index == TSC_DEADLINE))
}

pub(super) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for batch in entries.chunks(KVM_MAX_MSR_ENTRIES) {
        let msrs = Msrs::from_entries(batch).expect("a batch is small enough");
        let written = vcpu.set_msrs(&msrs).tried("writing MSRs")?;
        if let Some(refused) = batch.get(written) {
            return Err(KvmError {
                what: format!("writing MSR {:#x}", refused.index),
                cause: vmm_sys_util::errno::Error::new(libc::EINVAL),
            });
        }
    }
    Ok(())
}

/// Refuses registers that this build would not have saved: a hostile state must not reach others.
pub(super) fn check(saved: &[state::Msr]) -> Result<(), StateError> {
    let allowed = |msr: &state::Msr| SAVED.iter().any(|(first, last)| (*first..=*last).contains(&msr.index));
    if saved.len() > 4 * KVM_MAX_MSR_ENTRIES || !saved.iter().all(allowed) {
        return Err(StateError::Invalid("an MSR is not part of a guest's state"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fired_deadline_fires_once_more() {
        let mut saved =
            vec![state::Msr { index: TSC, value: 77 }, state::Msr { index: TSC_DEADLINE, value: 0 }];
        arm_lost_deadline(&mut saved);
        assert_eq!(saved[1].value, 77);
    }

    #[test]
    fn a_register_outside_of_the_table_is_refused() {
        assert!(check(&[state::Msr { index: 0x1b, value: 0 }]).is_err());
        assert!(check(&[state::Msr { index: TSC, value: 0 }]).is_ok());
    }
}
