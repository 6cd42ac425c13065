//! The built-in guest on KVM: it boots, its disk holds what it acknowledged, it can be stopped and go on.

use crate::support::{Disks, LAYOUT, kvm_is_here, text, wait_ack_beyond, wait_console, writer};
use hv::{DEVICES_VERSION, RunState, Vm, VmConfig, VmError};

#[test]
fn what_the_guest_acknowledged_is_on_its_disk() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_ack_beyond(&vm, 400); // more than once around the range
    wait_console(&vm, "a second look at the read-only disk", |said| said.contains("verify disk=0 pass=2"));
    vm.pause().unwrap();
    vm.drain().unwrap();
    let acked = hv_guest::last_ack(text(&vm).as_bytes()).unwrap();
    let report = disks.verify(acked);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.records_promised, LAYOUT.range);
    let stats = vm.disk_stats();
    assert!(
        stats[0].reads > 0 && stats[1].writes >= acked.sequence && stats[1].flushes >= acked.sequence / 8
    );
    assert!(stats.iter().all(|disk| disk.errors == 0), "{stats:?}");
}

#[test]
fn the_guest_reads_what_the_disk_holds() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    wait_console(&vm, "the sum of the read-only disk", |said| said.contains(" sum="));
    let mut span = vec![0; 64 << 10];
    blockio::BlockDevice::read_at(&*disks.source, 0, &mut span).unwrap();
    let wanted = format!("verify disk=0 pass=1 bytes=65536 sum={:016x}", hv_guest::span_sum(&span));
    wait_console(&vm, "the whole line", |said| said.contains(&wanted));
}

#[test]
fn a_paused_guest_stands_still_and_goes_on_where_it_was() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(true));
    vm.resume().unwrap();
    for round in 0..20 {
        let acked = wait_ack_beyond(&vm, round * 8);
        vm.pause().unwrap();
        vm.drain().unwrap();
        assert_eq!(vm.run_state(), RunState::Paused);
        let (said, exits) = (text(&vm), vm.exits());
        assert!(disks.verify(acked).is_clean());
        assert_eq!((text(&vm), vm.exits()), (said, exits));
        vm.resume().unwrap();
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_state() {
    if !kvm_is_here() {
        return;
    }
    let disks = Disks::new();
    let vm = writer(disks.configs(false));
    assert!(matches!(vm.resume(), Err(VmError::NotAttached(0))));
    assert!(matches!(vm.pause(), Err(VmError::WrongState { .. })));
    assert!(matches!(vm.save_state(), Err(VmError::WrongState { .. })));
    disks.attach_to(&vm);
    vm.resume().unwrap();
    assert!(matches!(vm.resume(), Err(VmError::WrongState { .. })));
    let small = VmConfig {
        memory_bytes: 5,
        cpus: 1,
        boot: None,
        disks: vec![],
        net: None,
        console_bytes: 1,
        devices: DEVICES_VERSION,
    };
    assert!(matches!(Vm::build(small), Err(VmError::Memory(_))));
}
