//! Which requests this library makes of KVM, and from where: for those who forbid the others.
//!
//! **Invariant:** a request that is added to a file beside this one is added here, or a VM is ended when it makes it.

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_dirty_log, kvm_enable_cap,
    kvm_fpu, kvm_irqchip, kvm_irqfd, kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_translation, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// What a processor's thread asks of its processor. The first is the one that counts: it is made at each entry into the guest.
pub const VCPU: &[u32] = &[
    plain(0x80), // KVM_RUN
    read::<kvm_regs>(0x81),
    write::<kvm_regs>(0x82),
    read::<kvm_sregs>(0x83),
    write::<kvm_sregs>(0x84),
    both::<kvm_translation>(0x85),
    both::<kvm_msrs>(0x88),
    write::<kvm_msrs>(0x89),
    read::<kvm_fpu>(0x8c),
    write::<kvm_fpu>(0x8d),
    read::<kvm_lapic_state>(0x8e),
    write::<kvm_lapic_state>(0x8f),
    write::<kvm_cpuid2>(0x90),
    both::<kvm_cpuid2>(0x91),
    read::<kvm_mp_state>(0x98),
    write::<kvm_mp_state>(0x99),
    read::<kvm_vcpu_events>(0x9f),
    write::<kvm_vcpu_events>(0xa0),
    read::<kvm_debugregs>(0xa1),
    write::<kvm_debugregs>(0xa2),
    plain(0xa2), // KVM_SET_TSC_KHZ
    plain(0xa3), // KVM_GET_TSC_KHZ
    read::<kvm_xsave>(0xa4),
    write::<kvm_xsave>(0xa5),
    read::<kvm_xcrs>(0xa6),
    write::<kvm_xcrs>(0xa7),
    plain(0xad),             // KVM_KVMCLOCK_CTRL
    read::<kvm_xsave>(0xcf), // KVM_GET_XSAVE2
];

/// What is asked of a machine that is built, by whoever saves, restores or moves it.
pub const MACHINE: &[u32] = &[
    both::<kvm_msr_list>(0x02),
    plain(0x03), // KVM_CHECK_EXTENSION
    write::<kvm_dirty_log>(0x42),
    write::<kvm_userspace_memory_region>(0x46),
    both::<kvm_irqchip>(0x62),
    read::<kvm_irqchip>(0x63),
    write::<kvm_irqfd>(0x76),
    write::<kvm_clock_data>(0x7b),
    read::<kvm_clock_data>(0x7c),
    read::<kvm_pit_state2>(0x9f),
    write::<kvm_pit_state2>(0xa0),
    write::<kvm_enable_cap>(0xa3),
    both::<kvm_clear_dirty_log>(0xc0),
];

const fn plain(number: u32) -> u32 {
    KVMIO << 8 | number
}

/// The kernel fills a structure.
const fn read<T>(number: u32) -> u32 {
    2 << 30 | size_of_argument::<T>() << 16 | plain(number)
}

/// The kernel reads a structure.
const fn write<T>(number: u32) -> u32 {
    1 << 30 | size_of_argument::<T>() << 16 | plain(number)
}

const fn both<T>(number: u32) -> u32 {
    read::<T>(number) | write::<T>(number)
}

#[expect(clippy::cast_possible_truncation, reason = "a structure of at most 4 KiB; no conversion is const")]
const fn size_of_argument<T>() -> u32 {
    assert!(size_of::<T>() < 1 << 14, "the field has 14 bits");
    size_of::<T>() as u32
}
