//! The balloon: the guest gives memory back and takes it again, also across moves. It checks by itself that a page that comes back is
//! empty and that one that it holds is as it was left.

use std::sync::Arc;

use blockio::MemoryDevice;
use hv::snapshot::{self, RamWriter, SavedBy};
use hv::{PAGE_BYTES, Userfault, Vm, VmError};

use crate::support::{empty_with, in_role, kvm_is_here, text, wait_console};

const RAM_BYTES: u64 = 16 << 20;
/// Of the guest's pool.
const PAGES: u64 = 512;
/// What a guest uses beside its pool may change a little meanwhile.
const SLACK_BYTES: u64 = 16 * PAGE_BYTES;

fn guest(options: &str) -> Option<Vm> {
    if !kvm_is_here() {
        return None;
    }
    let vm = in_role(&format!("role=balloon pages={PAGES} {options}"), RAM_BYTES);
    wait_console(&vm, "the balloon's driver", |said| said.contains(" ready"));
    Some(vm)
}

/// Asks for so many pages, and waits until the guest has done it.
fn give(vm: &Vm, pages: u64) {
    let from = text(vm).len();
    vm.set_balloon(pages * PAGE_BYTES).unwrap();
    let line = format!("balloon given={pages} held={}", PAGES - pages);
    wait_console(vm, &line, |said| said[from..].contains(&line));
}

/// Waits until the guest has looked at all that it holds once more.
fn look_again(vm: &Vm) {
    let from = text(vm).len();
    wait_console(vm, "two more rounds", |said| said[from..].matches("round ").count() >= 2);
}

fn used(vm: &Vm) -> u64 {
    vm.ram().used_bytes()
}

#[test]
fn a_guest_gives_memory_back_and_takes_it_again() {
    let Some(vm) = guest("") else { return };
    let before = used(&vm);
    give(&vm, 384);
    let given = before - used(&vm);
    assert!(given.abs_diff(384 * PAGE_BYTES) <= SLACK_BYTES, "{given} bytes are the node's again");
    let status = vm.balloon();
    let bytes = 384 * PAGE_BYTES;
    assert_eq!((status.target_bytes, status.actual_bytes, status.has_driver), (bytes, bytes, true));
    look_again(&vm);
    give(&vm, 128);
    give(&vm, 0);
    look_again(&vm);
    assert!(used(&vm) + SLACK_BYTES > before, "all of it is used again");
}

#[test]
fn a_guest_says_how_its_memory_is_used_when_it_is_asked() {
    let Some(vm) = guest("") else { return };
    give(&vm, 100);
    // The first answer may be older than the change.
    let free = Some((PAGES - 100) * PAGE_BYTES);
    wait_console(&vm, "newer figures", |_| vm.balloon().figures.free_bytes == free);
    let figures = vm.balloon().figures;
    assert!(figures.total_bytes.unwrap() < RAM_BYTES && figures.cached_bytes.is_none(), "{figures:?}");
}

#[test]
fn what_a_guest_reports_as_free_is_given_back_and_can_be_used_again() {
    let Some(vm) = guest("report=1") else { return };
    assert!(text(&vm).contains(&format!("reported pages={PAGES}")));
    look_again(&vm);
}

#[test]
fn a_balloon_that_would_leave_too_little_is_refused() {
    let Some(vm) = guest("") else { return };
    let refused = vm.set_balloon(RAM_BYTES).unwrap_err();
    assert!(matches!(refused, VmError::Balloon { bytes: RAM_BYTES, .. }), "{refused}");
    assert_eq!(vm.balloon().target_bytes, 0);
    vm.set_balloon(hv::balloon_bytes_max(RAM_BYTES)).unwrap();
}

/// Copies the pages of these bits, as a move does: what is zero takes no memory there.
fn send(vm: &Vm, to: &Vm, bits: &[u64]) {
    let mut page = [0; 4096];
    for number in (0..RAM_BYTES / PAGE_BYTES)
        .filter(|page| bits[usize::try_from(page / 64).unwrap()] >> (page % 64) & 1 == 1)
    {
        let at = number * PAGE_BYTES;
        vm.ram().read_linear(at, &mut page).unwrap();
        if page == [0; 4096] {
            to.ram().discard_linear(at, PAGE_BYTES).unwrap();
        } else {
            to.ram().write_linear(at, &page).unwrap();
        }
    }
}

// Invariant H4: a discard is a write of zeros, and one that comes after its page was sent is sent too.
#[test]
fn a_move_brings_along_what_was_given_back_before_and_after_it_was_sent() {
    let Some(vm) = guest("") else { return };
    give(&vm, 64);
    let other = empty_with(RAM_BYTES, 1, vec![]);
    vm.track_writes().unwrap();
    send(&vm, &other, &snapshot::touched_pages(vm.ram()).unwrap());
    // Sent, then given back; of these some are taken again, and all of it is the last pass of the move.
    give(&vm, 384);
    give(&vm, 256);
    vm.pause().unwrap();
    let state = vm.save_state().unwrap();
    send(&vm, &other, &vm.rest_of_written().unwrap());
    let (mut here, mut there) = ([0; 4096], [0; 4096]);
    for number in 0..RAM_BYTES / PAGE_BYTES {
        vm.ram().read_linear(number * PAGE_BYTES, &mut here).unwrap();
        other.ram().read_linear(number * PAGE_BYTES, &mut there).unwrap();
        assert!(here == there, "page {number} differs");
    }
    drop(vm);
    other.restore_state(&state).unwrap();
    assert_eq!(other.balloon().target_bytes, 256 * PAGE_BYTES);
    assert_eq!(other.balloon().actual_bytes, 256 * PAGE_BYTES);
    other.resume().unwrap();
    look_again(&other);
    give(&other, 0);
    look_again(&other);
}

#[test]
fn what_is_given_back_takes_no_memory_at_the_target_of_a_move() {
    let Some(vm) = guest("") else { return };
    let other = empty_with(RAM_BYTES, 1, vec![]);
    vm.track_writes().unwrap();
    send(&vm, &other, &snapshot::touched_pages(vm.ram()).unwrap());
    give(&vm, 448);
    vm.pause().unwrap();
    vm.save_state().unwrap();
    let before = used(&other);
    send(&vm, &other, &vm.rest_of_written().unwrap());
    let less = before - used(&other);
    assert!(less + SLACK_BYTES > 448 * PAGE_BYTES, "the target holds only {less} bytes less");
}

// Nothing may be given back while memory still comes: what was there would come back with it.
#[test]
fn a_balloon_waits_for_memory_that_comes_while_the_guest_runs() {
    if Userfault::open().is_err() {
        return;
    }
    let Some(vm) = guest("") else { return };
    give(&vm, 256);
    vm.pause().unwrap();
    let state = vm.save_state().unwrap();
    let file = Arc::new(MemoryDevice::new(0));
    let mut writer = RamWriter::begin(&*file, vm.ram().clone()).unwrap();
    writer.write_touched(&*file).unwrap();
    let most = used(&vm);
    assert!(writer.bytes_written() <= most, "{} of {most} bytes were saved", writer.bytes_written());
    let by = SavedBy { vm: vec![1; 16], epoch: 1 };
    snapshot::write_state(&*file, writer.finish(), state, &by).unwrap();
    drop(vm);

    let image = snapshot::read_contents(&*file).unwrap();
    let vm = empty_with(RAM_BYTES, 1, vec![]);
    vm.fill_lazily(Userfault::open().unwrap(), file, &image, |why| panic!("{why}")).unwrap();
    vm.restore_state(image.machine.as_ref().unwrap()).unwrap();
    vm.resume().unwrap();
    give(&vm, 400);
    vm.await_memory().unwrap();
    give(&vm, 0);
    look_again(&vm);
}
