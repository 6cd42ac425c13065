//! What a guest is told about its processor: KVM's supported set, made independent of the host where hosts differ.
//!
//! The table is data of the VM: it is saved with the state and set before anything else on the target.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::processor::set_cpuid;
use super::{KvmError, Machine, Tried};
use crate::cpu::{ARCH_CAPABILITIES, Cpu, Registers};
use crate::state::{self, StateError};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const PDCM: u32 = 1 << 15;
const WAITPKG: u32 = 1 << 5;
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
const SHADOW_STACK: u32 = 1 << 7;
const INDIRECT_BRANCH_TRACKING: u32 = 1 << 20;
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
const MANY_CORES: u32 = 1 << 28;
const CACHE_KIND: u32 = 0x1f;
/// Kind, level and properties of a cache, without who shares it.
const CACHE_OWN_BITS: u32 = 0x3fff;
const LAST_CACHE_LEVEL: u32 = 3;
const LEVEL_SIBLING: u32 = 1;
const LEVEL_CORE: u32 = 2;
/// Same on every node; a host's own brand would change when a VM moves.
const BRAND: &[u8; 48] = b"csvfs virtual processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

impl Machine {
    /// What this host can give to a guest. Its time-stamp counter is not asked for: who restores a state looks at it.
    pub(crate) fn host_cpu(&self) -> Result<Cpu, KvmError> {
        host_cpu(&self.kvm, (0, true))
    }
}

impl Cpu {
    /// What this host can give to a guest.
    ///
    /// # Errors
    /// When `/dev/kvm` is missing or may not be opened.
    pub fn of_host() -> Result<Self, KvmError> {
        let kvm = super::open()?;
        let vm = kvm.create_vm().tried("creating a VM")?;
        let vcpu = vm.create_vcpu(0).tried("creating a vCPU")?;
        // A host without a stable TSC has no rate to tell.
        let khz = vcpu.get_tsc_khz().unwrap_or(0);
        let listed = host_cpu(&kvm, (khz, kvm.check_extension(Cap::TscControl)))?;
        let kept = set_cpuid(&vcpu, &listed.table(0, 1)?)?;
        Ok(listed.reduced_to(&kept))
    }

    /// The table for one of `cpus` vCPUs.
    pub(crate) fn table(&self, vcpu: u32, cpus: u32) -> Result<CpuId, KvmError> {
        let entry = |((function, index), it): ((u32, u32), Registers)| {
            let flags = if has_subleaves(function) { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            let Registers { eax, ebx, ecx, edx } = it;
            let mut leaf =
                kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() };
            place(&mut leaf, vcpu, cpus);
            leaf
        };
        let entries: Vec<_> = self.leaves().map(entry).collect();
        CpuId::from_entries(&entries)
            .map_err(|_| vmm_sys_util::errno::Error::new(libc::E2BIG))
            .tried("making a table of CPUID leaves")
    }

    /// The processor that a saved vCPU had.
    pub(crate) fn of_saved(leaves: &[state::CpuidLeaf]) -> Self {
        Self::from_leaves(leaves.iter().map(|it| {
            ((it.function, it.index), Registers { eax: it.eax, ebx: it.ebx, ecx: it.ecx, edx: it.edx })
        }))
    }

    pub(crate) fn of_table(table: &CpuId) -> Self {
        Self::of_saved(&to_state(table))
    }
}

fn host_cpu(kvm: &Kvm, tsc: (u32, bool)) -> Result<Cpu, KvmError> {
    let mut table =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).tried("asking for supported CPUID leaves")?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for leaf in table.as_mut_slice() {
        adjust(leaf, deadline);
        // KVM tells the place of the processor that it was asked on: that says nothing of the host.
        place(leaf, 0, 1);
    }
    let weaknesses = feature_msrs(kvm);
    let cpu = Cpu::new(Cpu::of_table(&table).leaves(), weaknesses, tsc);
    let told = cpu.is_intel() || weaknesses.is_some_and(|msr| takes(kvm, &table, msr));
    Ok(if told { cpu } else { cpu.without_weaknesses_told() })
}

/// A host that does not tell has none.
fn feature_msrs(kvm: &Kvm) -> Option<(u32, u64)> {
    let known = kvm.get_msr_feature_index_list().ok()?;
    let index = known.as_slice().iter().copied().find(|index| *index == ARCH_CAPABILITIES)?;
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let read = kvm.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| read == 1).map(|msr| (index, msr.data))
}

/// Whether a vCPU can be given the register. AMD has none: KVM lists one there all the same, and lately refuses to set it
/// (Linux 6.18).
fn takes(kvm: &Kvm, table: &CpuId, (index, data): (u32, u64)) -> bool {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    let given = kvm.create_vm().and_then(|vm| vm.create_vcpu(0)).and_then(|vcpu| {
        vcpu.set_cpuid2(table)?;
        vcpu.set_msrs(&Msrs::from_entries(&[entry]).expect("one is few"))
    });
    given == Ok(1)
}

fn has_subleaves(function: u32) -> bool {
    matches!(
        function,
        0x4 | 0x7 | 0xb | 0xd | 0xf | 0x10 | 0x12 | 0x14 | 0x17 | 0x18 | 0x1d
            ..=0x1f | 0x23 | 0x24 | 0x8000_001d | 0x8000_0026
    )
}

/// What is the same on all processors of a VM and on all hosts.
fn adjust(leaf: &mut kvm_cpuid_entry2, deadline: bool) {
    match leaf.function {
        0x1 => {
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
        0x8000_0002..=0x8000_0004 => *leaf = registers(leaf, brand(leaf.function)),
        _ => {}
    }
}

/// Where a processor is among the others: one socket of `cpus` cores without siblings, the last cache shared by all.
fn place(leaf: &mut kvm_cpuid_entry2, vcpu: u32, cpus: u32) {
    let bits = cpus.next_power_of_two().trailing_zeros();
    match leaf.function {
        0x1 => {
            leaf.ebx = leaf.ebx & 0x0000_ffff | vcpu << 24 | cpus.next_power_of_two() << 16;
            leaf.edx = leaf.edx & !MANY_CORES | if cpus > 1 { MANY_CORES } else { 0 };
        }
        0x4 | 0x8000_001d if leaf.eax & CACHE_KIND != 0 => {
            let shared = if leaf.eax >> 5 & 7 >= LAST_CACHE_LEVEL { cpus - 1 } else { 0 };
            leaf.eax = leaf.eax & CACHE_OWN_BITS | shared << 14;
            if leaf.function == 0x4 {
                leaf.eax |= (cpus - 1) << 26;
            }
        }
        0xb | 0x1f => {
            let [shift, count, kind] = match leaf.index {
                0 => [0, 1, LEVEL_SIBLING],
                1 => [bits, cpus, LEVEL_CORE],
                _ => [0; 3],
            };
            *leaf = registers(leaf, [shift, count, kind << 8 | leaf.index, vcpu]);
        }
        0x8000_0008 => leaf.ecx = bits << 12 | (cpus - 1),
        0x8000_001e => *leaf = registers(leaf, [vcpu, vcpu, 0, 0]),
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

/// The table that a vCPU has.
pub(super) fn read(vcpu: &VcpuFd) -> Result<CpuId, KvmError> {
    let mut table = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).tried("reading CPUID")?;
    drop_unfilled(&mut table);
    Ok(table)
}

/// Not every kernel says how many entries it has filled in (that of Debian 12 does not). What it leaves zero looks like leaf 0,
/// which is never zero itself: it names the maker.
fn drop_unfilled(table: &mut CpuId) {
    table.retain(|entry| *entry != kvm_cpuid_entry2::default());
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

    fn placed(function: u32, index: u32, eax: u32, vcpu: u32, cpus: u32) -> kvm_cpuid_entry2 {
        let mut leaf = kvm_cpuid_entry2 { function, index, eax, ..Default::default() };
        place(&mut leaf, vcpu, cpus);
        leaf
    }

    #[test]
    fn a_processor_is_told_its_number_and_how_many_there_are() {
        assert_eq!(placed(1, 0, 0, 2, 3).ebx, 2 << 24 | 4 << 16);
        assert_ne!(placed(1, 0, 0, 2, 3).edx & MANY_CORES, 0);
        assert_eq!(placed(1, 0, 0, 0, 1).edx & MANY_CORES, 0);
        let cores = placed(0xb, 1, 77, 2, 3);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, LEVEL_CORE << 8 | 1, 2));
        // A level 3 cache is everybody's, a level 1 cache its own.
        assert_eq!(placed(4, 3, 3 << 5 | 3, 0, 4).eax >> 14, 3 << 12 | 3);
        assert_eq!(placed(4, 0, 1 << 5 | 1, 0, 4).eax >> 14, 3 << 12);
    }

    // Seen with Linux 6.1: the guest's processor was of no maker, and no move of it succeeded.
    #[test]
    fn entries_that_the_kernel_has_not_filled_in_are_not_taken_for_the_first_leaf() {
        let leaf = |function, eax| kvm_cpuid_entry2 { function, eax, ebx: 0x6874_7541, ..Default::default() };
        let unfilled = kvm_cpuid_entry2::default();
        let mut table = CpuId::from_entries(&[leaf(0, 0x10), leaf(1, 7), unfilled, unfilled]).expect("four");
        drop_unfilled(&mut table);
        assert_eq!(table.as_slice(), [leaf(0, 0x10), leaf(1, 7)]);
        let mut whole = CpuId::from_entries(&[leaf(0, 0x10), leaf(1, 0)]).expect("two");
        drop_unfilled(&mut whole);
        assert_eq!(whole.as_slice().len(), 2);
    }

    #[test]
    fn the_brand_is_the_same_on_every_host() {
        let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004).flat_map(brand).flat_map(u32::to_le_bytes).collect();
        assert_eq!(bytes, BRAND);
    }
}
