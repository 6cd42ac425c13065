//! What a guest is told about its processor: KVM's supported set, made independent of the host where hosts differ.
//!
//! The table is data of the VM: it is saved with the state and set before anything else on the target.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use super::{KvmError, Machine, Tried};
use crate::state::{self, StateError};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const PDCM: u32 = 1 << 15;
const WAITPKG: u32 = 1 << 5;
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const SHADOW_STACK: u32 = 1 << 7;
const INDIRECT_BRANCH_TRACKING: u32 = 1 << 20;
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
/// Same on every node; a host's own brand would change when a VM moves.
const BRAND: &[u8; 48] = b"csvfs virtual processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

impl Machine {
    /// The table for a new vCPU.
    pub(crate) fn cpuid(&self, vcpu: u32) -> Result<CpuId, KvmError> {
        let mut table =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).tried("asking for supported CPUID leaves")?;
        let deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        for leaf in table.as_mut_slice() {
            adjust(leaf, vcpu, deadline);
        }
        Ok(table)
    }
}

fn adjust(leaf: &mut kvm_cpuid_entry2, vcpu: u32, deadline: bool) {
    match leaf.function {
        0x1 => {
            leaf.ebx = leaf.ebx & 0x00ff_ffff | vcpu << 24;
            leaf.ecx = (leaf.ecx | HYPERVISOR) & !PDCM;
            if deadline {
                leaf.ecx |= TSC_DEADLINE;
            }
        }
        // Power states are the host's business; only that the APIC timer never stops matters.
        0x6 => *leaf = registers(leaf, [ALWAYS_RUNNING_TIMER, 0, 0, 0]),
        0x7 if leaf.index == 0 => {
            leaf.ecx &= !(WAITPKG | SHADOW_STACK);
            leaf.edx &= !(AMX | INDIRECT_BRANCH_TRACKING);
        }
        // No performance counters: they cannot be moved.
        0xa => *leaf = registers(leaf, [0; 4]),
        0xb | 0x1f => leaf.edx = vcpu,
        0x8000_0002..=0x8000_0004 => *leaf = registers(leaf, brand(leaf.function)),
        0x8000_001e => leaf.eax = vcpu,
        _ => {}
    }
}

fn registers(leaf: &kvm_cpuid_entry2, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { eax, ebx, ecx, edx, ..*leaf }
}

fn brand(function: u32) -> [u32; 4] {
    let start = (function - 0x8000_0002) as usize * 16;
    std::array::from_fn(|i| {
        u32::from_le_bytes(BRAND[start + i * 4..start + i * 4 + 4].try_into().expect("four bytes"))
    })
}

pub(super) fn to_state(table: &CpuId) -> Vec<state::CpuidLeaf> {
    let leaf = |entry: &kvm_cpuid_entry2| state::CpuidLeaf {
        function: entry.function,
        index: entry.index,
        flags: entry.flags,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    };
    table.as_slice().iter().map(leaf).collect()
}

pub(super) fn from_state(leaves: &[state::CpuidLeaf]) -> Result<CpuId, StateError> {
    if leaves.is_empty() || leaves.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(StateError::Invalid("the number of CPUID leaves is impossible"));
    }
    let entry = |leaf: &state::CpuidLeaf| kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        flags: leaf.flags,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    };
    let entries: Vec<_> = leaves.iter().map(entry).collect();
    CpuId::from_entries(&entries).map_err(|_| StateError::Invalid("the number of CPUID leaves is impossible"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_brand_is_the_same_on_every_host() {
        let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004).flat_map(brand).flat_map(u32::to_le_bytes).collect();
        assert_eq!(bytes, BRAND);
    }
}
