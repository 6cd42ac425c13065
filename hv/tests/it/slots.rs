//! Disks that come, go, grow and are slowed down while the guest runs, as the guest sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockio::{BlockDevice, Geometry, IoRequest, MemoryDevice};
use hv::{DiskLimits, SlotError, Vm, VmError};

use crate::support::{Disks, empty_with, in_role, kvm_is_here, text, wait_console};

const RAM_BYTES: u64 = 8 << 20;

fn listener() -> Vm {
    let vm = in_role("role=listener", RAM_BYTES);
    wait_console(&vm, "all slots", |said| said.contains("listener disks=8 ready"));
    vm
}

/// A disk of so many sectors whose first bytes are known.
fn disk(sectors: u64, first: u64) -> Arc<MemoryDevice> {
    let disk = Arc::new(MemoryDevice::new(sectors * 512));
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(&first.to_le_bytes());
    disk.write_at(0, &sector).unwrap();
    disk
}

#[test]
fn a_disk_that_is_inserted_while_the_guest_runs_is_seen_and_read() {
    if !kvm_is_here() {
        return;
    }
    let vm = listener();
    vm.insert_disk(3, disk(100, 0xabc), false, "new").unwrap();
    wait_console(&vm, "the new disk", |said| {
        said.contains("changed index=3 from=0 sectors=100 first=0000000000000abc")
    });
    let again = vm.insert_disk(3, disk(100, 1), false, "other");
    assert!(matches!(again, Err(VmError::Slot(SlotError::Occupied(3)))));
    vm.eject_disk(3).unwrap();
    wait_console(&vm, "its end", |said| said.contains("changed index=3 from=100 sectors=0"));
    assert!(matches!(vm.eject_disk(3), Err(VmError::Slot(SlotError::Empty(3)))));
    assert!(matches!(vm.insert_disk(8, disk(8, 1), false, "none"), Err(VmError::NoDisk(8))));
    // The same slot, the same name, another disk.
    vm.insert_disk(3, disk(200, 0xdef), true, "new").unwrap();
    wait_console(&vm, "another disk", |said| {
        said.contains("changed index=3 from=0 sectors=200 first=0000000000000def")
    });
    assert_eq!(vm.disk_stats()[3].errors, 0);
}

/// Larger than it was when it was inserted.
struct Grows {
    disk: Arc<MemoryDevice>,
    size_bytes: AtomicU64,
}

impl BlockDevice for Grows {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size_bytes.load(Ordering::SeqCst), ..self.disk.geometry() }
    }
    fn submit(&self, request: IoRequest) {
        self.disk.submit(request);
    }
}

#[test]
fn a_disk_that_grows_is_seen_by_the_guest() {
    if !kvm_is_here() {
        return;
    }
    let vm = listener();
    let grows = Arc::new(Grows { disk: disk(400, 7), size_bytes: AtomicU64::new(100 * 512) });
    vm.insert_disk(0, grows.clone(), false, "grows").unwrap();
    wait_console(&vm, "the disk", |said| said.contains("index=0 from=0 sectors=100 first="));
    grows.size_bytes.store(400 * 512, Ordering::SeqCst);
    assert_eq!(vm.remeasure_disk(0).unwrap(), 400 * 512);
    wait_console(&vm, "the larger disk", |said| said.contains("index=0 from=100 sectors=400 first="));
    assert!(matches!(vm.remeasure_disk(1), Err(VmError::Slot(SlotError::Empty(1)))));
}

#[test]
fn an_inserted_disk_is_there_after_a_move_and_its_slot_can_be_used_again() {
    if !kvm_is_here() {
        return;
    }
    let vm = listener();
    let inserted = disk(100, 1);
    vm.insert_disk(2, inserted.clone(), false, "moved").unwrap();
    wait_console(&vm, "the disk", |said| said.contains("index=2 from=0 sectors=100 first="));
    vm.pause().unwrap();
    let state = vm.save_state().unwrap();
    assert!(empty_with(RAM_BYTES, 1, vec![]).restore_state(&state).is_err(), "a disk is missing");
    let config = |slot| hv::DiskConfig { slot, device: None, read_only: false, serial: "moved".into() };
    assert!(empty_with(RAM_BYTES, 1, vec![config(1)]).restore_state(&state).is_err(), "in another slot");
    let target = empty_with(RAM_BYTES, 1, vec![config(2)]);
    let mut chunk = vec![0; 1 << 20];
    for at in (0..RAM_BYTES).step_by(1 << 20) {
        vm.ram().read(at, &mut chunk).unwrap();
        target.ram().write(at, &chunk).unwrap();
    }
    target.restore_state(&state).unwrap();
    assert!(matches!(target.resume(), Err(VmError::NotAttached(2))));
    target.attach_disk(2, inserted).unwrap();
    target.resume().unwrap();
    target.eject_disk(2).unwrap();
    wait_console(&target, "its end", |said| said.contains("index=2 from=100 sectors=0"));
    target.insert_disk(2, disk(50, 2), false, "moved").unwrap();
    wait_console(&target, "a disk under the old name", |said| {
        said.contains("index=2 from=0 sectors=50 first=")
    });
}

#[test]
fn limits_hold_while_they_are_set_and_are_gone_when_they_are_lifted() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = crate::support::writer(disks.configs(true));
    vm.limit_disk(1, DiskLimits { iops: 40, bytes_per_second: 0 }).unwrap();
    vm.resume().unwrap();
    wait_console(&vm, "three seconds by the guest's clock", |said| said.contains("tick 3\n"));
    let requests = |vm: &Vm| {
        let stats = &vm.disk_stats()[1];
        stats.reads + stats.writes + stats.flushes
    };
    let limited = requests(&vm);
    // The guest's clock may be behind, never ahead: ten times the limit tells a limit from none on any machine.
    assert!(limited < 400, "{limited} requests in about 3 s with a limit of 40 a second");
    vm.limit_disk(1, DiskLimits::default()).unwrap();
    crate::support::wait_ack_beyond(&vm, 600);
    assert!(requests(&vm) > limited + 500, "{}", text(&vm));
}
