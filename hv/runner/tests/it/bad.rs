//! What cannot be started says why and what to do, and changes nothing.

use blockio::BlockDevice;

use crate::process::{Hv, kvm_is_here, refused};
use crate::world::World;

#[test]
fn disks_that_are_no_disks_are_refused_with_a_hint() {
    let world = World::new();
    world.make_disks();
    let text = world.create("notes.txt");
    text.set_len(8192).unwrap();
    text.write_at(0, &[b'x'; 8192]).unwrap();
    text.flush().unwrap();
    let short = world.create("short.vhdx");
    vhdx::create(&*short, &vhdx::Spec::dynamic(64 << 20)).unwrap();
    short.set_len(300 << 10).unwrap();
    short.flush().unwrap();
    let with_disk = |path: &str| {
        let mut config = world.config(10);
        config.disks[1].path = path.into();
        refused(&config)
    };
    for (path, said) in [
        ("missing.vhdx", "does not exist"),
        ("no/such/folder.vhdx", "does not exist"),
        ("notes.txt", "not a VHDX"),
        ("short.vhdx", "truncated"),
    ] {
        let (error, hint) = with_disk(path);
        assert!(error.contains(path) && error.contains(said) && !hint.is_empty(), "{path}: {error} ({hint})");
    }
}

#[test]
fn a_disk_outside_of_the_volumes_is_refused() {
    let world = World::new();
    let mut config = world.config(10);
    config.disks[0].volume = "elsewhere".into();
    let (error, hint) = refused(&config);
    assert!(error.contains("elsewhere") && hint.contains("cluster volume"), "{error} ({hint})");
}

#[test]
fn a_node_without_daemon_lease_or_lun_is_refused() {
    let world = World::new();
    let mut config = world.config(10);
    config.lease_page = world.dir.path().join("none");
    assert!(refused(&config).0.contains("lease page"));
    let mut config = world.config(10);
    config.volumes[0].lun_uri = "file:/none".into();
    assert!(refused(&config).0.contains("LUN"));
    let mut config = world.config(10);
    config.volumes[0].id = uuid::Uuid::from_u128(99);
    assert!(refused(&config).0.contains("holds volume"));
    world.close_socket();
    assert!(refused(&world.config(10)).0.contains("node daemon"));
}

#[test]
fn a_saved_state_that_does_not_fit_is_refused() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&world.config(10));
    hv.wait_ack_beyond(20);
    hv.save("web.hvs").unwrap();
    let mut other = world.incoming(11, "web.hvs");
    other.vm_id = uuid::Uuid::from_u128(8);
    assert!(refused(&other).0.contains("another VM"));
    let mut larger = world.incoming(11, "web.hvs");
    larger.memory_bytes *= 2;
    assert!(refused(&larger).0.contains("RAM"));
    let mut fewer = world.incoming(11, "web.hvs");
    fewer.disks.pop();
    assert!(refused(&fewer).0.contains("content of disk 1"));
    assert!(refused(&world.incoming(11, "scratch.vhdx")).0.contains("not a completely saved VM"));
    assert!(refused(&world.incoming(11, "missing.hvs")).0.contains("does not exist"));
    hv.abandon().unwrap();
    hv.wait_ack_beyond(100);
}
