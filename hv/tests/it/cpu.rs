//! The processor that a guest is given, on hosts that have more, as much, and less.

use hv::cpu::Register;
use hv::{BootSource, Cpu, CpuProblem, DEVICES_VERSION, Firmware, Processor, Vm, VmConfig, VmError};

use crate::support::{kvm_is_here, wait_console};

const MODEL: (u32, u32) = (1, 0);
/// CMPXCHG16B: every host has it, and the test guests do without.
const FEATURE: u32 = 1 << 13;

fn build(processor: &Processor, boot: bool) -> Result<Vm, VmError> {
    let cmdline = "role=dirtier set=1 rate=64";
    let source =
        BootSource { kernel: hv_guest::IMAGE, initrd: None, cmdline, firmware: Firmware::CommandLine };
    let config = VmConfig {
        memory_bytes: 16 << 20,
        cpus: 2,
        boot: boot.then_some(source),
        disks: vec![],
        net: None,
        console_bytes: 1 << 16,
        devices: DEVICES_VERSION,
    };
    Vm::build_with(config, processor)
}

fn weaker() -> Cpu {
    Cpu::of_host().unwrap().without(MODEL, Register::Ecx, FEATURE)
}

fn lacks_feature(outcome: Result<impl std::fmt::Debug, VmError>) {
    let Err(VmError::Cpu(problems)) = outcome else { panic!("{outcome:?}") };
    let expected = CpuProblem::Features { leaf: 1, subleaf: 0, register: Register::Ecx, missing: FEATURE };
    assert_eq!(problems, [expected]);
}

#[test]
fn a_guest_is_given_the_baseline_and_nothing_that_its_host_has_beyond_it() {
    if !kvm_is_here() {
        return;
    }
    let vm = build(&Processor { baseline: Some(weaker()), limit: None }, true).unwrap();
    vm.resume().unwrap();
    wait_console(&vm, "the guest to run", |said| said.contains("ready"));
    vm.pause().unwrap();
    let saved = vm.save_state().unwrap();
    assert_eq!(saved.vcpus.len(), 2);
    for vcpu in &saved.vcpus {
        let model = vcpu.cpuid.iter().find(|leaf| leaf.function == 1).unwrap();
        assert_eq!(model.ecx & FEATURE, 0, "{model:?}");
        assert_eq!(model.ebx >> 24, vcpu.id, "its own number");
    }
    // What went by the baseline fits the host that is as weak.
    let host = Processor { baseline: Some(weaker()), limit: Some(weaker()) };
    build(&host, false).unwrap().restore_state(&saved).unwrap();
}

#[test]
fn a_host_that_lacks_what_a_guest_was_given_takes_neither_the_guest_nor_its_state() {
    if !kvm_is_here() {
        return;
    }
    let whole = Processor { baseline: Cpu::of_host().ok(), limit: Some(weaker()) };
    lacks_feature(build(&whole, true));
    lacks_feature(build(&whole, false));
    let source = build(&Processor { baseline: Cpu::of_host().ok(), limit: None }, true).unwrap();
    source.resume().unwrap();
    source.pause().unwrap();
    let saved = source.save_state().unwrap();
    let target = build(&Processor { baseline: Some(weaker()), limit: Some(weaker()) }, false).unwrap();
    lacks_feature(target.restore_state(&saved));
}
