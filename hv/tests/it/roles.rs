//! Each role of the test guest, stopped at any instruction, saved, and gone on with in another VM: none notices.

use hv::{BootSource, DEVICES_VERSION, Firmware, Vm, VmConfig};

use crate::support::{Disks, empty_with, kvm_is_here, text, wait_console};

const RAM_BYTES: u64 = 8 << 20;

fn boot(cpus: u32, cmdline: &str, disks: &Disks) -> Vm {
    let boot = BootSource { kernel: hv_guest::IMAGE, initrd: None, cmdline, firmware: Firmware::CommandLine };
    let disks = disks.configs(true);
    Vm::build(VmConfig {
        memory_bytes: RAM_BYTES,
        cpus,
        boot: Some(boot),
        disks,
        net: None,
        console_bytes: 1 << 18,
        devices: DEVICES_VERSION,
    })
    .unwrap()
}

/// The VM goes on in another one, as after a move.
fn moved(vm: &Vm, cpus: u32, disks: &Disks) -> Vm {
    vm.pause().unwrap();
    let state = vm.save_state().unwrap();
    let other = empty_with(RAM_BYTES, cpus, disks.configs(false));
    let mut chunk = vec![0; 1 << 20];
    for at in (0..RAM_BYTES).step_by(1 << 20) {
        vm.ram().read(at, &mut chunk).unwrap();
        other.ram().write(at, &chunk).unwrap();
    }
    other.restore_state(&state).unwrap();
    disks.attach_to(&other);
    other.resume().unwrap();
    other
}

fn count(vm: &Vm, word: &str) -> u64 {
    let said = text(vm);
    said.lines().filter_map(|line| line.strip_prefix(word)?.trim().parse().ok()).max().unwrap_or(0)
}

/// Moves a guest again and again; it must go on counting after each move.
fn goes_on(role: &str, cpus: u32, word: &str, moves: u32) {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let mut vm = boot(cpus, &format!("role={role}"), &disks);
    vm.resume().unwrap();
    wait_console(&vm, "the first count", |_| count(&vm, word) > 0);
    for _ in 0..moves {
        let before = count(&vm, word);
        vm = moved(&vm, cpus, &disks);
        wait_console(&vm, "a count after the move", |_| count(&vm, word) > before);
    }
}

// Invariant H5.
#[test]
fn a_pause_in_the_middle_of_a_device_access_loses_no_value() {
    goes_on("reader", 1, "reads ", 24);
}

#[test]
fn two_processors_that_move_in_the_middle_of_their_turns_lose_no_interrupt() {
    goes_on("ping-pong", 2, "balls ", 16);
}

#[test]
fn every_register_holds_its_value_over_a_move() {
    goes_on("registers", 1, "held ", 8);
}

#[test]
fn no_clock_goes_back_over_a_move() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let mut vm = boot(1, "role=clock", &disks);
    vm.resume().unwrap();
    for _ in 0..3 {
        let before = text(&vm).matches("clock tsc=").count();
        wait_console(&vm, "another second", |said| said.matches("clock tsc=").count() > before);
        vm = moved(&vm, 1, &disks);
    }
    let before = text(&vm).matches("clock tsc=").count();
    wait_console(&vm, "a second after the move", |said| said.matches("clock tsc=").count() > before);
}

#[test]
fn a_pause_stops_all_processors_and_a_crash_of_one_ends_the_others() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = boot(2, "role=ping-pong", &disks);
    vm.resume().unwrap();
    wait_console(&vm, "the first balls", |_| count(&vm, "balls ") > 0);
    for _ in 0..20 {
        vm.pause().unwrap();
        let (said, exits) = (text(&vm), vm.exits());
        let state = vm.save_state().unwrap();
        assert_eq!(state.vcpus.len(), 2);
        assert_eq!((text(&vm), vm.exits()), (said, exits));
        vm.resume().unwrap();
    }
    // The first processor finds the page of its counters gone, or loses its way: either ends the VM.
    vm.pause().unwrap();
    for at in ((1 << 20)..(2 << 20)).step_by(4096) {
        vm.ram().write(at, &[0x0b; 4096]).unwrap();
    }
    vm.resume().unwrap();
    assert!(matches!(vm.end().wait(), hv::RunState::Crashed(why) if why.contains("vCPU")));
}
