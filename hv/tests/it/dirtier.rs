//! The dirtier: writes at its rate, and notices a page that is not as it left it.

use hv::{BootSource, DEVICES_VERSION, Firmware, RunState, Vm, VmConfig};

use crate::support::{empty_with, kvm_is_here, text, wait_console};

const RAM_BYTES: u64 = 16 << 20;

fn dirtier(cmdline: &str) -> Vm {
    let cmdline = format!("role=dirtier {cmdline}");
    let boot = BootSource {
        kernel: hv_guest::IMAGE,
        initrd: None,
        cmdline: &cmdline,
        firmware: Firmware::CommandLine,
    };
    Vm::build(VmConfig {
        memory_bytes: RAM_BYTES,
        cpus: 1,
        boot: Some(boot),
        disks: vec![],
        net: None,
        console_bytes: 1 << 16,
        devices: DEVICES_VERSION,
    })
    .unwrap()
}

#[test]
fn the_dirtier_goes_on_with_every_page_as_it_was_after_a_move() {
    if !kvm_is_here() {
        return;
    }
    let first = dirtier("set=2");
    first.resume().unwrap();
    wait_console(&first, "a pass", |said| said.contains("pass 1"));
    first.pause().unwrap();
    let state = first.save_state().unwrap();
    let second = empty_with(RAM_BYTES, 1, vec![]);
    let mut page = [0; 4096];
    for at in (0..RAM_BYTES).step_by(4096) {
        first.ram().read(at, &mut page).unwrap();
        second.ram().write(at, &page).unwrap();
    }
    second.restore_state(&state).unwrap();
    second.resume().unwrap();
    wait_console(&second, "two more passes", |said| said.contains("pass 4"));
}

#[test]
fn the_dirtier_notices_a_page_that_was_lost() {
    if !kvm_is_here() {
        return;
    }
    let vm = dirtier("set=2");
    vm.resume().unwrap();
    wait_console(&vm, "a pass", |said| said.contains("pass 1"));
    vm.pause().unwrap();
    // The set begins behind the image and ends at a page that is not the image's.
    let lost = (1 << 20..RAM_BYTES).step_by(4096).filter(|at| {
        let mut page = [0; 4096];
        vm.ram().read(*at, &mut page).unwrap();
        page.iter().filter(|byte| **byte != 0).count() > 8
    });
    let last = lost.last().unwrap();
    vm.ram().write(last, &[0; 4096]).unwrap();
    vm.resume().unwrap();
    assert!(matches!(vm.end().wait(), RunState::Crashed(_)));
    assert!(text(&vm).contains("FAIL memory: a page is not as it was left"), "{}", text(&vm));
}

#[test]
fn the_dirtier_keeps_its_rate() {
    if !kvm_is_here() {
        return;
    }
    let vm = dirtier("set=1 rate=1024");
    vm.resume().unwrap();
    wait_console(&vm, "two seconds", |said| said.matches("dirtied ").count() >= 2);
    let said = text(&vm);
    let line = said.lines().rfind(|line| line.starts_with("dirtied ") && line.contains("ms=")).unwrap();
    let field = |name: &str| -> u64 {
        line.split(' ').find_map(|word| word.strip_prefix(name)?.parse().ok()).unwrap()
    };
    // By the guest's own clock; a machine too slow for the rate writes less.
    assert!(field("KiB=") * 1000 <= field("ms=") * 1100, "{line}");
}
