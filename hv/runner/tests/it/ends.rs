//! The end of a guest: told at once to whoever waits for it, with all that the guest has said before.
#![expect(clippy::disallowed_methods, reason = "a harness tells an event from the end of a wait")]

use std::time::{Duration, Instant};

use hv::control::VmRunState;
use hv_runner::config::RunnerConfig;

use crate::process::{Hv, kvm_is_here};
use crate::world::World;

/// Longest wait for the end of a guest within one request.
const STATUS_LIMIT: Duration = Duration::from_secs(30);

fn listener(world: &World, cmdline: &str) -> RunnerConfig {
    let kernel = "builtin:listener".into();
    RunnerConfig { kernel, cmdline: cmdline.into(), disks: vec![], ..world.config(10) }
}

#[test]
fn a_status_that_waits_is_answered_by_the_end_of_the_guest_and_all_that_it_said_is_there() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    world.make_disks();
    let hv = Hv::start(&listener(&world, "off=131072 words=300"));
    hv.wait_console("ready");
    assert!(!hv.status().waited, "an ordinary status is answered at once");
    hv.add_disk(1, "scratch.vhdx").unwrap();
    let (status, took) = loop {
        let begun = Instant::now();
        let status = hv.status_within(u64::MAX);
        if status.state() != VmRunState::Running {
            break (status, begun.elapsed());
        }
    };
    assert_eq!((status.state(), status.waited), (VmRunState::Stopped, true), "{status:?}");
    assert!(took < STATUS_LIMIT, "it was told of at the end of the time: {took:?}");
    let said = hv.console_of(0, 0);
    assert!(said.data.ends_with(b"word number=300\n"), "{:?}", String::from_utf8_lossy(&said.data));
    assert!(said.last && said.boot == 1, "{said:?}");
    assert!(hv.stop(false).success());
}

#[test]
fn positions_of_another_boot_are_the_beginning_of_this_one() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    let hv = Hv::start(&RunnerConfig { vm_epoch: 7, ..listener(&world, "") });
    hv.wait_console("ready");
    let all = hv.console_of(0, 0);
    assert_eq!((all.boot, all.last), (7, false), "{all:?}");
    // The guest may say the rest of its line meanwhile.
    let since = hv.console_of(7, all.next).data;
    assert!(!since.starts_with(&all.data), "{since:?}");
    let anew = hv.console_of(5, all.next).data;
    assert!(anew.starts_with(&[all.data, since].concat()), "{anew:?}");
    assert!(hv.stop(false).success());
}

#[test]
fn a_process_does_not_wait_for_those_who_wait_for_its_guest() {
    if !kvm_is_here() {
        return;
    }
    let world = World::new();
    let config = listener(&world, "");
    let hv = Hv::start(&config);
    hv.wait_console("ready");
    let waiting = hv.begin_waiting(&config);
    let begun = Instant::now();
    assert!(hv.stop(false).success());
    assert!(begun.elapsed() < STATUS_LIMIT, "the process has waited: {:?}", begun.elapsed());
    waiting.join().unwrap();
}
