//! Written pages: whoever copies what is told, and nothing else, has all of RAM.

use hv::{CHUNK_ALIGNMENT_PAGES, GuestRam, PAGE_BYTES, RunState, Vm, VmError};

use crate::support::{Disks, RAM_BYTES, kvm_is_here, text, wait_console, writer};

const PAGES: u64 = RAM_BYTES / PAGE_BYTES;
/// Several parts of RAM, each taken right before it is copied.
const PART_PAGES: u64 = 4 * CHUNK_ALIGNMENT_PAGES;

/// Copies the written pages, or all of them, into `copy`; gives how many.
fn pass(vm: &Vm, copy: &GuestRam, all: bool) -> u64 {
    let mut copied = 0;
    for first in (0..PAGES).step_by(usize::try_from(PART_PAGES).unwrap()) {
        let mut bits = vm.take_written(first, PART_PAGES.min(PAGES - first)).unwrap();
        if all {
            bits.fill(u64::MAX);
        }
        copied += copy_pages(vm, copy, first, &bits);
    }
    copied
}

/// Copies the pages of these bits, the first of which is for page `first`.
fn copy_pages(vm: &Vm, copy: &GuestRam, first: u64, bits: &[u64]) -> u64 {
    let mut copied = 0;
    let mut page = [0; 4096];
    for number in first..(first + bits.len() as u64 * 64).min(PAGES) {
        let bit = number - first;
        if bits[usize::try_from(bit / 64).unwrap()] >> (bit % 64) & 1 == 1 {
            vm.ram().read_linear(number * PAGE_BYTES, &mut page).unwrap();
            copy.write_linear(number * PAGE_BYTES, &page).unwrap();
            copied += 1;
        }
    }
    copied
}

/// Follows a guest that writes and reads disks for some passes, halts it, and copies the rest.
fn follow(vm: &Vm, copy: &GuestRam) {
    vm.track_writes().unwrap();
    vm.fetch_written().unwrap();
    pass(vm, copy, true);
    let before = text(vm).matches("ack").count();
    for number in 1..6 {
        wait_console(vm, "more acknowledgements", |said| said.matches("ack").count() > before + number);
        vm.fetch_written().unwrap();
        let copied = pass(vm, copy, false);
        assert!((1..PAGES / 2).contains(&copied), "a pass over what was written copied {copied} pages");
    }
    // Something is left when it is halted.
    wait_console(vm, "more acknowledgements", |said| said.matches("ack").count() > before + 6);
    vm.pause().unwrap();
    vm.save_state().unwrap();
}

/// Copies what is left of a halted guest, part by part.
fn finish_in_parts(vm: &Vm, copy: &GuestRam) {
    vm.fetch_written().unwrap();
    pass(vm, copy, false);
}

/// The same at once. The pages are not taken by that: asked again, they are the same.
fn finish_at_once(vm: &Vm, copy: &GuestRam) {
    let rest = vm.rest_of_written().unwrap();
    let copied = copy_pages(vm, copy, 0, &rest);
    assert!((1..PAGES / 2).contains(&copied), "{copied} pages were left");
    assert_eq!(vm.rest_of_written().unwrap(), rest);
    assert_eq!(vm.fetch_written().unwrap(), copied);
}

fn assert_equal(vm: &Vm, copy: &GuestRam) {
    let (mut here, mut there) = ([0; 4096], [0; 4096]);
    for number in 0..PAGES {
        vm.ram().read_linear(number * PAGE_BYTES, &mut here).unwrap();
        copy.read_linear(number * PAGE_BYTES, &mut there).unwrap();
        assert!(here == there, "page {number} differs");
    }
}

// Invariants H3, H4
#[test]
fn what_is_written_after_a_part_was_taken_is_found_by_the_next_pass() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    let copy = GuestRam::new(RAM_BYTES).unwrap();
    follow(&vm, &copy);
    finish_at_once(&vm, &copy);
    assert_equal(&vm, &copy);
    // A move that came to nothing, and the next one, with a copy that is as empty as a new target.
    vm.resume().unwrap();
    vm.untrack_writes().unwrap();
    let copy = GuestRam::new(RAM_BYTES).unwrap();
    follow(&vm, &copy);
    finish_in_parts(&vm, &copy);
    assert_equal(&vm, &copy);
}

#[test]
fn a_part_that_is_not_of_this_ram_is_refused() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    assert!(matches!(vm.take_written(0, 64), Err(VmError::NotTracked)));
    assert!(matches!(vm.rest_of_written(), Err(VmError::NotTracked)));
    vm.track_writes().unwrap();
    for (first, pages) in [(0, 3), (1, 64), (PAGES, 64), (0, PAGES + 64), (u64::MAX, 64), (64, u64::MAX)] {
        let refused = vm.take_written(first, pages);
        assert!(matches!(refused, Err(VmError::Chunk { .. })), "{pages} pages from {first}: {refused:?}");
    }
}

#[test]
fn a_guest_that_is_held_back_still_answers_a_pause_at_once_and_runs_on() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_console(&vm, "its start", |said| said.contains("ready"));
    for percent in [20, 99, 255] {
        vm.hold_back(percent).unwrap();
        vm.pause().unwrap();
        assert_eq!(vm.run_state(), RunState::Paused);
        vm.resume().unwrap();
    }
    vm.hold_back(0).unwrap();
    let acks = |said: &str| said.matches("ack").count();
    let before = acks(&text(&vm));
    wait_console(&vm, "acknowledgements", |said| acks(said) > before + 3);
}
