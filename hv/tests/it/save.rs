//! A VM saved in one place goes on in another: nothing is lost, nothing runs twice.

use std::sync::Arc;

use crate::support::{Disks, RAM_BYTES, empty, kvm_is_here, text, wait_ack_beyond, wait_console, writer};
use blockio::{BlockDevice, ImageFile, MemoryDevice};
use hv::snapshot::{self, RamWriter, SavedBy, SnapshotError};
use hv::state::SavedMachine;
use hv::{RunState, Userfault, Vm, VmError};

fn by() -> SavedBy {
    SavedBy { vm: vec![1; 16], epoch: 4 }
}

/// What a quick migration does at the source.
fn save(vm: &Vm) -> MemoryDevice {
    vm.pause().unwrap();
    vm.drain().unwrap();
    let file = MemoryDevice::new(0);
    let ram = snapshot::write_ram(&file, vm.ram()).unwrap();
    let stats = snapshot::write_state(&file, ram, vm.save_state().unwrap(), &by()).unwrap();
    assert_eq!(stats.memory_bytes_total, RAM_BYTES);
    assert!(stats.memory_bytes_written < RAM_BYTES / 2, "zero pages are not written: {stats:?}");
    file
}

/// What it does at the target.
fn load(disks: &Disks, file: &MemoryDevice) -> Vm {
    let vm = empty(disks.configs(false));
    let image = snapshot::read_contents(file).unwrap();
    assert_eq!((&image.vm, image.vm_epoch), (&by().vm, by().epoch));
    snapshot::read_ram(file, &image, vm.ram()).unwrap();
    vm.restore_state(image.machine.as_ref().unwrap()).unwrap();
    vm
}

fn last_tick(said: &str) -> u64 {
    let ticks = said.lines().filter_map(|line| line.strip_prefix("tick ")?.parse().ok());
    ticks.max().unwrap_or(0)
}

// Invariant H3, H5: stopped at any instruction, with requests on their way, the guest goes on and misses nothing.
#[test]
fn a_guest_that_moves_again_and_again_loses_nothing() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let mut vm = writer(disks.configs(true));
    vm.resume().unwrap();
    let mut acked = wait_ack_beyond(&vm, 0);
    for _ in 0..12 {
        let file = save(&vm);
        let said = text(&vm);
        drop(vm);
        assert!(disks.verify(hv_guest::last_ack(said.as_bytes()).unwrap()).is_clean());
        vm = load(&disks, &file);
        assert_eq!(text(&vm), said, "the console goes on where it was");
        disks.attach_to(&vm);
        vm.resume().unwrap();
        acked = wait_ack_beyond(&vm, acked.sequence + 40);
    }
    // Every stamped page was checked and stamped again since the last move.
    wait_ack_beyond(&vm, acked.sequence + 64 * 8);
    let ticks = last_tick(&text(&vm));
    wait_console(&vm, "the clock of the guest", |said| last_tick(said) > ticks);
    vm.pause().unwrap();
    vm.drain().unwrap();
    let acked = hv_guest::last_ack(text(&vm).as_bytes()).unwrap();
    assert!(disks.verify(acked).is_clean());
}

#[test]
fn saving_changes_nothing_and_the_source_may_go_on() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    let acked = wait_ack_beyond(&vm, 0);
    drop(save(&vm));
    vm.detach_disks().unwrap();
    assert!(matches!(vm.resume(), Err(VmError::NotAttached(_))));
    disks.attach_to(&vm);
    vm.resume().unwrap();
    wait_ack_beyond(&vm, acked.sequence + 100);
}

#[test]
fn what_was_restored_saves_to_the_same_state() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 0);
    let file = save(&vm);
    let first = vm.save_state().unwrap();
    let second = load(&disks, &file);
    let third = snapshot::read_contents(&file).unwrap().machine.unwrap();
    let still = |machine: &SavedMachine| {
        let mut machine = machine.clone();
        machine.clock = None;
        machine.pit = None;
        for vcpu in &mut machine.vcpus {
            vcpu.msrs.retain(|msr| ![0x10, 0x3b, 0x6e0].contains(&msr.index));
            vcpu.local_apic.clear(); // the timer's count goes on
        }
        machine.pic_master.clear(); // the PIT goes on, too
        machine
    };
    assert_eq!(still(&first), still(&third));
    let again = second.save_state().unwrap();
    assert_eq!(still(&again), still(&third));
}

#[test]
fn a_state_that_does_not_fit_is_refused() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 0);
    vm.pause().unwrap();
    let good = vm.save_state().unwrap();
    type Damage = fn(&mut SavedMachine);
    // Invariant H7.
    let damages: [(&str, Damage); 14] = [
        ("version", |m| m.version = 99),
        ("RAM", |m| m.memory_bytes += 4096),
        ("no vCPU", |m| m.vcpus.clear()),
        ("registers", |m| m.vcpus[0].general.truncate(3)),
        ("extended state", |m| m.vcpus[0].xsave.truncate(100)),
        ("local APIC", |m| m.vcpus[0].local_apic.push(0)),
        ("CPUID", |m| m.vcpus[0].cpuid = vec![m.vcpus[0].cpuid[0]; 1000]),
        ("MSR", |m| m.vcpus[0].msrs[0].index = 0x1b),
        ("PIT", |m| m.pit = None),
        ("PIC", |m| m.pic_slave.clear()),
        ("IOAPIC", |m| m.io_apic.as_mut().unwrap().redirections.clear()),
        ("ring address", |m| m.disks[1].queue.as_mut().unwrap().descriptors = !15),
        ("features", |m| m.disks[1].transport.as_mut().unwrap().driver_features |= 1 << 60),
        ("slot", |m| m.disks[1].slot = 77),
    ];
    for (what, damage) in damages {
        let mut bad = good.clone();
        damage(&mut bad);
        let target = empty(disks.configs(false));
        assert!(target.restore_state(&bad).is_err(), "{what}");
        assert_eq!(target.run_state(), RunState::Created);
    }
    let target = empty(disks.configs(false));
    target.restore_state(&good).unwrap();
    let small = Arc::new(MemoryDevice::new(4096));
    assert!(target.attach_disk(1, small).is_err(), "a disk of another size");
}

#[test]
fn a_damaged_file_is_refused() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 0);
    let file = save(&vm);
    let size = file.geometry().size_bytes;
    let flip = |at: u64| {
        let mut sector = [0; 512];
        file.read_at(at / 512 * 512, &mut sector).unwrap();
        sector[usize::try_from(at % 512).unwrap()] ^= 0xff;
        file.write_at(at / 512 * 512, &sector).unwrap();
    };
    for at in [0, 9, 13, 20, 30, 33, 100, (1 << 20) + RAM_BYTES + 50] {
        flip(at);
        assert!(snapshot::read_contents(&file).is_err(), "byte {at}");
        flip(at);
    }
    let image = snapshot::read_contents(&file).unwrap();
    let first = (0..).find(|page| image.present[page / 8] >> (page % 8) & 1 == 1).unwrap();
    flip((1 << 20) + first as u64 * hv::PAGE_BYTES);
    let target = empty(disks.configs(false));
    let read = snapshot::read_ram(&file, &image, target.ram());
    assert!(matches!(read, Err(SnapshotError::Damaged(_))));
    for len in [0, 4096, 1 << 20, size - 8192] {
        file.set_len(len).unwrap();
        assert!(snapshot::read_contents(&file).is_err(), "cut to {len} bytes");
    }
}

// A save that was cut short leaves no file that looks whole.
#[test]
fn a_save_without_its_end_is_no_saved_vm() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 0);
    let file = save(&vm);
    snapshot::write_ram(&file, vm.ram()).unwrap(); // a second save over it that never gets to its state
    assert!(matches!(snapshot::read_contents(&file), Err(SnapshotError::NotSaved(_))));
}

/// Saves while the guest runs, as a quick move does: RAM first, again what is written meanwhile, the rest in the pause.
fn save_running(vm: &Vm, file: &MemoryDevice) {
    let pages = RAM_BYTES / hv::PAGE_BYTES;
    let take = || {
        vm.fetch_written().unwrap();
        vm.take_written(0, pages).unwrap()
    };
    vm.track_writes().unwrap();
    let mut writer = RamWriter::begin(file, vm.ram().clone()).unwrap();
    drop(take());
    writer.write_touched(file).unwrap();
    for _ in 0..3 {
        writer.write(file, 0, &take()).unwrap();
    }
    vm.pause().unwrap();
    vm.drain().unwrap();
    let machine = vm.save_state().unwrap();
    writer.write(file, 0, &take()).unwrap();
    snapshot::write_state(file, writer.finish(), machine, &by()).unwrap();
}

/// A guest whose RAM comes from the file while it runs.
fn load_lazily(disks: &Disks, file: &Arc<MemoryDevice>) -> Vm {
    let vm = empty(disks.configs(false));
    let image = snapshot::read_contents(&**file).unwrap();
    let fault = Userfault::open().unwrap();
    vm.fill_lazily(fault, file.clone(), &image, |why| panic!("{why}")).unwrap();
    vm.restore_state(image.machine.as_ref().unwrap()).unwrap();
    vm
}

// Invariant H4
#[test]
fn a_guest_that_is_saved_while_it_runs_goes_on_before_its_memory_is_there_and_misses_nothing() {
    if !kvm_is_here() || Userfault::open().is_err() {
        return;
    }
    let disks = Disks::new();
    let mut vm = writer(disks.configs(true));
    vm.resume().unwrap();
    let mut acked = wait_ack_beyond(&vm, 0);
    for _ in 0..3 {
        let file = Arc::new(MemoryDevice::new(0));
        save_running(&vm, &file);
        drop(vm);
        vm = load_lazily(&disks, &file);
        disks.attach_to(&vm);
        vm.resume().unwrap();
        acked = wait_ack_beyond(&vm, acked.sequence);
        vm.await_memory().unwrap();
        acked = wait_ack_beyond(&vm, acked.sequence);
    }
    vm.pause().unwrap();
    vm.detach_disks().unwrap();
    let report = disks.verify(acked);
    assert!(report.is_clean() && report.records_promised > 0, "{report:?}");
}

// Invariant H7
#[test]
fn a_page_that_is_damaged_in_the_file_never_appears_and_whoever_waits_is_told() {
    if !kvm_is_here() || Userfault::open().is_err() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 0);
    let file = Arc::new(MemoryDevice::new(0));
    save_running(&vm, &file);
    drop(vm);
    let image = snapshot::read_contents(&*file).unwrap();
    // The guest's image lies at 1 MiB of RAM, and RAM at 1 MiB of the file.
    file.write_at(2 << 20, &[0xaa; 4096]).unwrap();
    let vm = empty(disks.configs(false));
    let (tell, told) = std::sync::mpsc::channel();
    vm.fill_lazily(Userfault::open().unwrap(), file, &image, move |why| drop(tell.send(why))).unwrap();
    let error = vm.await_memory().unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
    assert!(told.recv().unwrap().contains("checksum"));
}
