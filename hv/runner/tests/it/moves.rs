//! A VM on a volume: runs, stops, is saved and goes on in another process, and nothing that it acknowledged is lost.

use hv::control::VmRunState;

use crate::process::{Hv, kvm_is_here};
use crate::world::World;

/// What an hv process may use beside the guest's RAM.
const PROCESS_KIB_MAX: u64 = 16 << 10;

#[test]
fn what_the_guest_acknowledged_is_in_its_image_after_a_stop() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    hv.wait_ack_beyond(700);
    let status = hv.status();
    assert_eq!(status.state(), VmRunState::Running);
    assert_eq!(status.disks[1].size_bytes, 64 << 20);
    assert!(
        status.disks[0].reads > 0 && status.disks[1].writes > 700 && status.disks[1].flushes > 80,
        "{status:?}"
    );
    hv.pause().unwrap();
    assert_eq!(hv.status().state(), VmRunState::Paused);
    assert!(hv.pause().is_err());
    hv.resume().unwrap();
    hv.wait_ack_beyond(800);
    let used = hv.private_memory_kib();
    assert!(used < PROCESS_KIB_MAX, "{used} KiB beside guest RAM");
    hv.pause().unwrap();
    let acked = hv.acked();
    assert!(hv.stop(false).success());
    let report = world.verify(acked);
    assert!(report.is_clean(), "{report:?}");
    assert!(!world.dir.path().join("hv10.sock").exists());
}

// Invariants H1, H2, H3, H5.
#[test]
fn a_vm_that_moves_between_processes_goes_on_and_loses_nothing() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let mut hv = Hv::start(&world.config(10));
    let mut acked = hv.wait_ack_beyond(50);
    for serial in 11..15 {
        let save = hv.save("states/web.hvs").unwrap();
        assert_eq!(save.memory_bytes_total, 16 << 20);
        assert!(save.memory_bytes_written > 64 * 4096 && save.memory_bytes_written < save.memory_bytes_total);
        assert_eq!(hv.status().state(), VmRunState::Saved);
        assert!(hv.resume().is_err(), "its disks are closed");
        acked = hv.acked().max(acked);
        assert!(world.verify(acked).is_clean(), "the image is whole while the VM is nowhere");
        let target = Hv::start(&world.incoming(serial, "states/web.hvs"));
        assert_eq!(target.status().state(), VmRunState::Incoming);
        assert_eq!(target.console(), hv.console());
        assert!(target.save("other").is_err(), "it does not run here yet");
        // The commit of the move happens here.
        assert!(hv.stop(true).success());
        world.process_gone(serial - 1);
        target.activate().unwrap();
        acked = target.wait_ack_beyond(acked.sequence + 60);
        hv = target;
    }
    hv.pause().unwrap();
    acked = hv.acked();
    assert!(hv.stop(false).success());
    let report = world.verify(acked);
    assert!(report.is_clean(), "{report:?}");
}

// Invariant H1: before the commit the source may always go on.
#[test]
fn a_save_that_is_abandoned_goes_on_at_the_source() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    let acked = hv.wait_ack_beyond(50);
    assert!(hv.abandon().is_err(), "nothing was saved");
    hv.save("web.hvs").unwrap();
    let target = Hv::start(&world.incoming(11, "web.hvs"));
    // The target is given up; it has written nothing.
    target.kill();
    world.process_gone(11);
    hv.abandon().unwrap();
    let acked = hv.wait_ack_beyond(acked.sequence + 100);
    hv.pause().unwrap();
    let acked = hv.acked().max(acked);
    assert!(hv.stop(false).success());
    assert!(world.verify(acked).is_clean());
}

#[test]
fn a_vm_that_was_killed_finds_every_acknowledged_record_again() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    let acked = hv.wait_ack_beyond(700);
    hv.kill();
    world.process_gone(10);
    let mut again = world.config(11);
    again.cmdline = again.cmdline.replace("write=1", "write=9");
    let hv = Hv::start(&again); // replays the image's log, writes nothing
    assert!(hv.stop(false).success());
    let report = world.verify(acked);
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn the_daemon_may_restart_while_a_vm_writes() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    let acked = hv.wait_ack_beyond(700); // all blocks of the range are mapped
    world.close_socket();
    let acked = hv.wait_ack_beyond(acked.sequence + 200);
    world.open_socket();
    let acked = hv.wait_ack_beyond(acked.sequence + 200);
    hv.save("web.hvs").unwrap(); // needs the coordinator
    assert!(!world.grants("web.hvs").iter().any(|grant| grant.recalled));
    assert!(world.verify(acked).is_clean(), "recalls reach the process again");
    assert!(hv.stop(false).success());
}

// Invariant A8: without the right to do I/O the process ends.
#[test]
fn a_vm_ends_with_its_nodes_lease() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    hv.wait_ack_beyond(50);
    world.revoke_lease();
    assert_eq!(hv.wait_end().code(), Some(3));
    world.process_gone(10);
}

#[test]
fn no_thread_of_a_vm_has_a_capability() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    hv.wait_ack_beyond(10);
    let (effective, permitted) = (hv.thread_status("CapEff:"), hv.thread_status("CapPrm:"));
    assert!(effective.len() > 4, "{effective:?}");
    for set in effective.iter().chain(&permitted) {
        assert!(set.chars().all(|digit| digit == '0'), "{effective:?} {permitted:?}");
    }
    assert!(hv.thread_status("NoNewPrivs:").iter().all(|flag| flag == "1"));
    assert!(hv.stop(false).success());
}
