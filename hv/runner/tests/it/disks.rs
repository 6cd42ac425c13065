//! Disks of a running VM: added, seen by the guest, grown, limited, removed; none is left open.

use crate::process::{Hv, kvm_is_here, refused};
use crate::world::World;
use hv_runner::config::RunnerConfig;

fn listener(world: &World) -> RunnerConfig {
    RunnerConfig { kernel: "builtin:listener".into(), disks: vec![], ..world.config(10) }
}

#[test]
fn a_disk_comes_grows_and_goes_while_the_guest_runs() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&listener(&world));
    hv.wait_console("listener disks=8 ready");
    hv.add_disk(1, "scratch.vhdx").unwrap();
    hv.wait_console("changed index=1 from=0 sectors=131072");
    assert!(hv.add_disk(1, "source.vhdx").unwrap_err().message.contains("slot 1"));
    assert!(hv.add_disk(2, "missing.vhdx").unwrap_err().message.contains("does not exist"));
    hv.resize_disk(1, 96 << 20).unwrap();
    // The guest reads the disk whenever it changes; it is taken away only after that.
    hv.wait_console("changed index=1 from=131072 sectors=196608 first=");
    hv.limit_disk(1, 500, 1 << 20).unwrap();
    let disk = hv.status().disks.remove(0);
    assert_eq!((disk.slot, disk.size_bytes, disk.iops_limit), (1, 96 << 20, 500));
    hv.remove_disk(1).unwrap();
    hv.wait_console("changed index=1 from=196608 sectors=0");
    assert!(hv.remove_disk(1).is_err());
    assert!(hv.status().disks.is_empty());
    // It was closed: somebody else may open it for writing.
    let disk = vhdx::Builder::open(world.open("scratch.vhdx")).writable().unwrap();
    assert_eq!(blockio::BlockDevice::geometry(&disk).size_bytes, 96 << 20);
    disk.close().unwrap();
    assert!(hv.stop(false).success());
}

#[test]
fn an_added_disk_moves_with_the_vm() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&listener(&world));
    hv.wait_console("listener disks=8 ready");
    hv.add_disk(5, "scratch.vhdx").unwrap();
    hv.wait_console("changed index=5 from=0 sectors=131072");
    hv.save("web.hvs").unwrap();
    let mut incoming = world.incoming(11, "web.hvs");
    let mut disk = incoming.disks.remove(1);
    disk.slot = Some(4);
    incoming.disks = vec![disk.clone()];
    assert!(refused(&incoming).0.contains("content of disk 4"), "in another slot it is another disk");
    disk.slot = Some(5);
    incoming.disks = vec![disk];
    let target = Hv::start(&incoming);
    assert!(hv.stop(true).success());
    world.process_gone(10);
    target.activate().unwrap();
    target.remove_disk(5).unwrap();
    target.wait_console("changed index=5 from=131072 sectors=0");
    assert!(target.stop(false).success());
}

#[test]
fn a_test_guest_or_tap_that_is_not_there_is_refused_by_name() {
    let world = World::new();
    let mut config = listener(&world);
    config.kernel = "builtin:nothing".into();
    assert!(refused(&config).0.contains("nothing"));
    let mut config = listener(&world);
    config.net = Some(hv_runner::config::NetSpec { tap: "no-such-tap".into() });
    assert!(refused(&config).0.contains("no-such-tap"));
}
