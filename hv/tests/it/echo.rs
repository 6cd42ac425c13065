//! What is typed at the serial console reaches the guest by interrupts, whole and in order, also over a move.

use std::time::Duration;

use hv::Vm;

use crate::support::{empty_with, in_role, kvm_is_here, text, wait_console};

const RAM_BYTES: u64 = 8 << 20;
/// Of the port.
const FIFO_BYTES: usize = 64;
/// Only a hang reaches it.
const LONG: Duration = Duration::from_secs(60);

fn echo(options: &str) -> Option<Vm> {
    if !kvm_is_here() {
        return None;
    }
    let vm = in_role(&format!("role=echo {options}"), RAM_BYTES);
    wait_console(&vm, "its driver", |said| said.contains("echo ready"));
    Some(vm)
}

fn type_all(vm: &Vm, mut bytes: &[u8]) -> usize {
    let mut calls = 0;
    while !bytes.is_empty() {
        let taken = vm.type_in(bytes, LONG);
        assert!(taken > 0, "the guest reads nothing");
        bytes = &bytes[taken..];
        calls += 1;
    }
    calls
}

fn heard(said: &str) -> Vec<&str> {
    // The last line may not be whole yet.
    let said = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
    said.lines()
        .filter_map(|line| line.strip_prefix("heard ")?.split_once(' '))
        .map(|(_, text)| text)
        .collect()
}

#[test]
fn more_than_the_port_holds_is_heard_whole_and_in_order() {
    let Some(vm) = echo("") else { return };
    let lines: Vec<_> = (0..300).map(|number| format!("line {number}")).collect();
    let calls = type_all(&vm, (lines.join("\r") + "\r").as_bytes());
    assert!(calls > 1, "it did not fit at once");
    wait_console(&vm, "all lines", |said| heard(said).len() == lines.len());
    assert_eq!(heard(&text(&vm)), lines);
}

#[test]
fn a_guest_that_does_not_listen_yet_hears_what_its_port_has_kept() {
    let Some(vm) = echo("deaf=50") else { return };
    let long = [b'x'; 100];
    assert_eq!(vm.type_in(&long, Duration::ZERO), FIFO_BYTES);
    assert_eq!(vm.type_in(&long, Duration::ZERO), 0, "it is full");
    type_all(&vm, b"\r");
    wait_console(&vm, "the line", |said| heard(said) == ["x".repeat(FIFO_BYTES)]);
}

#[test]
fn what_was_typed_before_a_move_is_heard_after_it() {
    let Some(vm) = echo("deaf=100") else { return };
    assert_eq!(vm.type_in(b"half a ", Duration::ZERO), 7);
    vm.pause().unwrap();
    let state = vm.save_state().unwrap();
    let other = empty_with(RAM_BYTES, 1, vec![]);
    let mut page = [0; 4096];
    for at in (0..RAM_BYTES).step_by(4096) {
        vm.ram().read(at, &mut page).unwrap();
        other.ram().write(at, &page).unwrap();
    }
    drop(vm);
    other.restore_state(&state).unwrap();
    other.resume().unwrap();
    type_all(&other, b"line\r");
    wait_console(&other, "the line", |said| heard(said) == ["half a line"]);
}
