//! State of one vCPU: at boot, and saved and restored in the one order that works.
//!
//! | step | save | restore | why |
//! |---|---|---|---|
//! | 1 | activity | CPUID | reading the activity may change the APIC; CPUID comes before all |
//! | 2 | registers | activity | |
//! | 3 | system registers | registers | setting them wipes pending exceptions |
//! | 4 | extended state | system registers | they carry the APIC's base |
//! | 5 | XCRs | extended state | |
//! | 6 | debug registers | XCRs | |
//! | 7 | local APIC | debug registers | |
//! | 8 | TSC rate | local APIC | before MSRs: a deadline needs the timer's mode |
//! | 9 | CPUID | TSC rate, MSRs | |
//! | 10 | MSRs | events | last: other calls disturb them |
//! | 11 | events | | |

use kvm_bindings::{
    CpuId, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::{KvmError, Tried, XSAVE_BYTES_MIN, cpuid, msr};
use crate::cpu::Cpu;
use crate::state::{self, StateError, byte, exactly, half, part};
use crate::vm::VmError;

const LOCAL_APIC_BYTES: usize = 1024;
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 7 << 8;
const DELIVER_NMI: u32 = 4 << 8;
const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8 | 1 << 10;
/// Rates that differ by less than this need no scaling.
const TSC_TOLERANCE_PPM: u64 = 250;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit flat protected mode, EBX = start info.
    Pvh { entry: u64, start_info: u64 },
    /// 64-bit mode on identity tables, RSI = zero page.
    Linux64 { entry: u64, zero_page: u64, page_tables: u64, stack: u64 },
}

/// Brings a fresh vCPU to a kernel's entry, or to where it waits for the guest's start-up interrupt. `gdt` is where boot
/// code has put the flat descriptors.
pub(crate) fn boot(vcpu: &VcpuFd, entry: Option<Entry>, gdt: u64) -> Result<(), KvmError> {
    let fast_strings = kvm_msr_entry { index: msr::MISC_ENABLE, data: 1, ..Default::default() };
    msr::write(vcpu, &[fast_strings])?;
    vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }).tried("setting the FPU")?;
    entry.map_or(Ok(()), |entry| enter(vcpu, entry, gdt))
}

/// Gives a vCPU that has never run its table. Returns what the guest will see: KVM may drop from it, and add to it.
pub(crate) fn set_cpuid(vcpu: &VcpuFd, table: &CpuId) -> Result<Cpu, KvmError> {
    vcpu.set_cpuid2(table).tried("setting CPUID")?;
    let kept = cpuid::read(vcpu)?;
    Ok(Cpu::of_table(&kept))
}

/// Tells a vCPU which weaknesses its processor does not have.
pub(crate) fn set_feature_msrs(vcpu: &VcpuFd, cpu: &Cpu) -> Result<(), KvmError> {
    let entries: Vec<_> =
        cpu.msrs().map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    msr::write(vcpu, &entries)
}

fn enter(vcpu: &VcpuFd, entry: Entry, gdt: u64) -> Result<(), KvmError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let mut system = vcpu.get_sregs().tried("reading system registers")?;
    let data = segment(16, 3, 1, 0);
    system.cs = segment(8, 11, u8::from(!long), u8::from(long));
    (system.ds, system.es, system.fs, system.gs, system.ss) = (data, data, data, data, data);
    system.tr = kvm_segment { s: 0, g: 0, db: 0, limit: 0x67, selector: 24, type_: 11, ..data };
    system.gdt = kvm_dtable { base: gdt, limit: 31, ..Default::default() };
    system.cr0 |= CR0_PROTECTED;
    if let Entry::Linux64 { page_tables, .. } = entry {
        system.cr3 = page_tables;
        system.cr4 |= CR4_PAE;
        system.cr0 |= CR0_PAGING;
        system.efer |= EFER_LONG;
    }
    vcpu.set_sregs(&system).tried("setting system registers")?;
    let registers = match entry {
        Entry::Pvh { entry, start_info } => kvm_regs { rip: entry, rbx: start_info, ..Default::default() },
        Entry::Linux64 { entry, zero_page, stack, .. } => {
            kvm_regs { rip: entry, rsi: zero_page, rsp: stack, rbp: stack, ..Default::default() }
        }
    };
    vcpu.set_regs(&kvm_regs { rflags: 2, ..registers }).tried("setting registers")?;
    wire_legacy_interrupts(vcpu)
}

/// Virtual-wire mode: the 8259 reach the processor through LINT0.
fn wire_legacy_interrupts(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut bytes = apic_bytes(&vcpu.get_lapic().tried("reading the local APIC")?);
    for (register, mode) in [(LINT0, DELIVER_EXTINT), (LINT1, DELIVER_NMI)] {
        bytes[register..register + 4].copy_from_slice(&mode.to_le_bytes());
    }
    vcpu.set_lapic(&apic_from_bytes(&bytes)).tried("setting the local APIC")
}

fn segment(selector: u16, type_: u8, db: u8, l: u8) -> kvm_segment {
    kvm_segment { selector, type_, db, l, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() }
}

/// Reads everything, in order.
pub(crate) fn save(
    vcpu: &VcpuFd,
    id: u32,
    msrs: &[u32],
    xsave_bytes: usize,
) -> Result<state::Vcpu, KvmError> {
    let activity = vcpu.get_mp_state().tried("reading the activity")?.mp_state;
    let general = general_to_state(&vcpu.get_regs().tried("reading registers")?);
    let system = system_to_state(&vcpu.get_sregs().tried("reading system registers")?);
    let xsave = read_xsave(vcpu, xsave_bytes)?;
    let xcrs = xcrs_to_state(&vcpu.get_xcrs().tried("reading XCRs")?);
    let debug = debug_to_state(&vcpu.get_debug_regs().tried("reading debug registers")?);
    let local_apic = apic_bytes(&vcpu.get_lapic().tried("reading the local APIC")?).to_vec();
    // A host without a stable TSC has no rate to tell.
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = cpuid::to_state(&cpuid::read(vcpu)?);
    let msrs = msr::save(vcpu, msrs)?;
    let events = events_to_state(&vcpu.get_vcpu_events().tried("reading pending events")?);
    Ok(state::Vcpu {
        id,
        activity,
        general,
        system: Some(system),
        xsave,
        xcrs,
        debug: Some(debug),
        local_apic,
        tsc_khz,
        cpuid,
        msrs,
        events: Some(events),
    })
}

/// Sets everything on a vCPU that has never run, in order. All of it is checked before the first call.
pub(crate) fn restore(vcpu: &VcpuFd, saved: &state::Vcpu, xsave_bytes: usize) -> Result<(), VmError> {
    let cpuid = cpuid::from_state(&saved.cpuid)?;
    let general = general_from_state(&saved.general)?;
    let system = system_from_state(part(saved.system.as_ref(), "system registers")?)?;
    let xcrs = xcrs_from_state(&saved.xcrs)?;
    let debug = debug_from_state(part(saved.debug.as_ref(), "debug registers")?)?;
    let local_apic: [u8; LOCAL_APIC_BYTES] = exactly(&saved.local_apic, "a local APIC has 1024 bytes")?;
    let events = events_from_state(part(saved.events.as_ref(), "pending events")?)?;
    msr::check(&saved.msrs)?;
    if saved.xsave.len() < XSAVE_BYTES_MIN || saved.xsave.len() > xsave_bytes {
        return Err(
            StateError::mismatch("the extended processor state", saved.xsave.len(), xsave_bytes).into()
        );
    }
    let dropped = Cpu::of_table(&cpuid).dropped_in(&set_cpuid(vcpu, &cpuid)?);
    if !dropped.is_empty() {
        return Err(VmError::Cpu(dropped));
    }
    vcpu.set_mp_state(kvm_mp_state { mp_state: saved.activity }).tried("setting the activity")?;
    vcpu.set_regs(&general).tried("setting registers")?;
    vcpu.set_sregs(&system).tried("setting system registers")?;
    write_xsave(vcpu, &saved.xsave, xsave_bytes)?;
    vcpu.set_xcrs(&xcrs).tried("setting XCRs")?;
    vcpu.set_debug_regs(&debug).tried("setting debug registers")?;
    vcpu.set_lapic(&apic_from_bytes(&local_apic)).tried("setting the local APIC")?;
    match_tsc_rate(vcpu, saved.tsc_khz)?;
    msr::restore(vcpu, &saved.msrs)?;
    vcpu.set_vcpu_events(&events).tried("setting pending events")?;
    Ok(())
}

fn match_tsc_rate(vcpu: &VcpuFd, saved_khz: u32) -> Result<(), VmError> {
    let Ok(here_khz) = vcpu.get_tsc_khz() else { return Ok(()) };
    let difference = u64::from(saved_khz.abs_diff(here_khz));
    if saved_khz == 0 || difference * 1_000_000 <= u64::from(saved_khz) * TSC_TOLERANCE_PPM {
        return Ok(());
    }
    vcpu.set_tsc_khz(saved_khz).map_err(|_| {
        StateError::mismatch("the TSC rate in kHz, which this host cannot scale,", saved_khz, here_khz).into()
    })
}

/// Tells the guest's clock that it was stopped. A guest without that clock has nothing to be told.
pub(crate) fn tell_clock_stopped(vcpu: &VcpuFd) {
    let _ = vcpu.kvmclock_ctrl();
}

fn general_to_state(r: &kvm_regs) -> Vec<u64> {
    vec![
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15, r.rip, r.rflags,
    ]
}

fn general_from_state(saved: &[u64]) -> Result<kvm_regs, StateError> {
    let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags] =
        exactly(saved, "a vCPU has 18 registers")?;
    Ok(kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags })
}

fn segment_to_state(s: &kvm_segment) -> state::Segment {
    let bits = [
        (s.type_, 0),
        (s.s, 4),
        (s.dpl, 5),
        (s.present, 7),
        (s.avl, 12),
        (s.l, 13),
        (s.db, 14),
        (s.g, 15),
        (s.unusable, 16),
    ];
    let access = bits.iter().fold(0, |access, (value, at)| access | u32::from(*value) << at);
    state::Segment { base: s.base, limit: s.limit, selector: s.selector.into(), access }
}

fn segment_from_state(saved: &state::Segment) -> Result<kvm_segment, StateError> {
    let bits = |at: u32, mask: u32| byte(saved.access >> at & mask);
    Ok(kvm_segment {
        base: saved.base,
        limit: saved.limit,
        selector: half(saved.selector)?,
        type_: bits(0, 15)?,
        s: bits(4, 1)?,
        dpl: bits(5, 3)?,
        present: bits(7, 1)?,
        avl: bits(12, 1)?,
        l: bits(13, 1)?,
        db: bits(14, 1)?,
        g: bits(15, 1)?,
        unusable: bits(16, 1)?,
        padding: 0,
    })
}

fn table_from_state(saved: Option<&state::Table>) -> Result<kvm_dtable, StateError> {
    let table = part(saved, "descriptor tables")?;
    Ok(kvm_dtable { base: table.base, limit: half(table.limit)?, ..Default::default() })
}

fn system_to_state(s: &kvm_sregs) -> state::System {
    let table = |t: &kvm_dtable| Some(state::Table { base: t.base, limit: t.limit.into() });
    state::System {
        segments: [s.cs, s.ds, s.es, s.fs, s.gs, s.ss, s.tr, s.ldt].iter().map(segment_to_state).collect(),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        control: vec![s.cr0, s.cr2, s.cr3, s.cr4, s.cr8],
        efer: s.efer,
        apic_base: s.apic_base,
        interrupts: s.interrupt_bitmap.to_vec(),
    }
}

fn system_from_state(saved: &state::System) -> Result<kvm_sregs, StateError> {
    let segments = saved.segments.iter().map(segment_from_state).collect::<Result<Vec<_>, _>>()?;
    let [cs, ds, es, fs, gs, ss, tr, ldt] = exactly(&segments, "a vCPU has 8 segments")?;
    let [cr0, cr2, cr3, cr4, cr8] = exactly(&saved.control, "a vCPU has 5 control registers")?;
    Ok(kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt: table_from_state(saved.gdt.as_ref())?,
        idt: table_from_state(saved.idt.as_ref())?,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer: saved.efer,
        apic_base: saved.apic_base,
        interrupt_bitmap: exactly(&saved.interrupts, "the interrupt bitmap has 4 words")?,
    })
}

fn read_xsave(vcpu: &VcpuFd, bytes: usize) -> Result<Vec<u8>, KvmError> {
    if bytes <= XSAVE_BYTES_MIN {
        let xsave = vcpu.get_xsave().tried("reading extended state")?;
        return Ok(xsave.region.iter().flat_map(|word| word.to_le_bytes()).collect());
    }
    let extra = (bytes - XSAVE_BYTES_MIN).div_ceil(4);
    let mut xsave = kvm_bindings::Xsave::new(extra).expect("the host's own size is allocatable");
    // SAFETY: the buffer has room for the size that the host's capability names.
    unsafe { vcpu.get_xsave2(&mut xsave) }.tried("reading extended state")?;
    let base = xsave.as_fam_struct_ref().xsave.region;
    let words = base.iter().chain(xsave.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).collect())
}

fn write_xsave(vcpu: &VcpuFd, saved: &[u8], bytes: usize) -> Result<(), KvmError> {
    let mut words = saved.chunks(4).map(|word| {
        let mut bytes = [0; 4];
        bytes[..word.len()].copy_from_slice(word);
        u32::from_le_bytes(bytes)
    });
    let mut base = kvm_xsave::default();
    for (to, word) in base.region.iter_mut().zip(words.by_ref()) {
        *to = word;
    }
    if bytes <= XSAVE_BYTES_MIN {
        // SAFETY: the host's state has exactly the size of the structure.
        return unsafe { vcpu.set_xsave(&base) }.tried("setting extended state");
    }
    let extra = (bytes - XSAVE_BYTES_MIN).div_ceil(4);
    let mut xsave = kvm_bindings::Xsave::new(extra).expect("the host's own size is allocatable");
    for (to, word) in xsave.as_mut_slice().iter_mut().zip(words) {
        *to = word;
    }
    // SAFETY: only the fixed part is replaced; the length of the flexible part stays as allocated.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = base.region;
    // SAFETY: the buffer has the size that the host's capability names.
    unsafe { vcpu.set_xsave2(&xsave) }.tried("setting extended state")
}

fn xcrs_to_state(xcrs: &kvm_xcrs) -> Vec<state::Xcr> {
    let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    xcrs.xcrs[..count].iter().map(|xcr| state::Xcr { index: xcr.xcr, value: xcr.value }).collect()
}

fn xcrs_from_state(saved: &[state::Xcr]) -> Result<kvm_xcrs, StateError> {
    let mut xcrs = kvm_xcrs::default();
    if saved.len() > xcrs.xcrs.len() {
        return Err(StateError::Invalid("there are more XCRs than a processor has"));
    }
    xcrs.nr_xcrs = u32::try_from(saved.len()).expect("at most 16");
    for (to, from) in xcrs.xcrs.iter_mut().zip(saved) {
        (to.xcr, to.value) = (from.index, from.value);
    }
    Ok(xcrs)
}

fn debug_to_state(d: &kvm_debugregs) -> state::Debug {
    state::Debug { addresses: d.db.to_vec(), dr6: d.dr6, dr7: d.dr7 }
}

fn debug_from_state(saved: &state::Debug) -> Result<kvm_debugregs, StateError> {
    let db = exactly(&saved.addresses, "there are 4 debug addresses")?;
    Ok(kvm_debugregs { db, dr6: saved.dr6, dr7: saved.dr7, ..Default::default() })
}

fn apic_bytes(apic: &kvm_lapic_state) -> [u8; LOCAL_APIC_BYTES] {
    apic.regs.map(i8::cast_unsigned)
}

fn apic_from_bytes(bytes: &[u8; LOCAL_APIC_BYTES]) -> kvm_lapic_state {
    kvm_lapic_state { regs: bytes.map(u8::cast_signed) }
}

fn events_to_state(e: &kvm_vcpu_events) -> state::Events {
    state::Events {
        exception_injected: e.exception.injected != 0,
        exception_pending: e.exception.pending != 0,
        exception_vector: e.exception.nr.into(),
        exception_has_code: e.exception.has_error_code != 0,
        exception_code: e.exception.error_code,
        exception_has_payload: e.exception_has_payload != 0,
        exception_payload: e.exception_payload,
        interrupt_injected: e.interrupt.injected != 0,
        interrupt_vector: e.interrupt.nr.into(),
        interrupt_soft: e.interrupt.soft != 0,
        interrupt_shadow: e.interrupt.shadow.into(),
        nmi_injected: e.nmi.injected != 0,
        nmi_pending: e.nmi.pending != 0,
        nmi_masked: e.nmi.masked != 0,
        sipi_vector: e.sipi_vector,
        smm: e.smi.smm != 0,
        smi_pending: e.smi.pending != 0,
        smm_inside_nmi: e.smi.smm_inside_nmi != 0,
        latched_init: e.smi.latched_init != 0,
        triple_fault_pending: e.triple_fault.pending != 0,
        valid: e.flags,
    }
}

fn events_from_state(saved: &state::Events) -> Result<kvm_vcpu_events, StateError> {
    let mut e = kvm_vcpu_events::default();
    e.exception.injected = saved.exception_injected.into();
    e.exception.pending = saved.exception_pending.into();
    e.exception.nr = byte(saved.exception_vector)?;
    e.exception.has_error_code = saved.exception_has_code.into();
    e.exception.error_code = saved.exception_code;
    e.exception_has_payload = saved.exception_has_payload.into();
    e.exception_payload = saved.exception_payload;
    e.interrupt.injected = saved.interrupt_injected.into();
    e.interrupt.nr = byte(saved.interrupt_vector)?;
    e.interrupt.soft = saved.interrupt_soft.into();
    e.interrupt.shadow = byte(saved.interrupt_shadow)?;
    e.nmi.injected = saved.nmi_injected.into();
    e.nmi.pending = saved.nmi_pending.into();
    e.nmi.masked = saved.nmi_masked.into();
    e.sipi_vector = saved.sipi_vector;
    e.smi.smm = saved.smm.into();
    e.smi.pending = saved.smi_pending.into();
    e.smi.smm_inside_nmi = saved.smm_inside_nmi.into();
    e.smi.latched_init = saved.latched_init.into();
    e.triple_fault.pending = saved.triple_fault_pending.into();
    e.flags = saved.valid;
    Ok(e)
}

/// Why KVM gave up, if that was the last exit.
pub(crate) fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return String::new();
    }
    // SAFETY: the exit reason says that this part of the union was filled; it is plain numbers.
    let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
    format!(" (internal error {suberror})")
}
