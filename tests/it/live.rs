//! Live migration on real processes: what users are promised of it, and what becomes of the VM when something fails.

use std::thread;

use cluster_tests::{Cluster, Ctl, Guest, PATIENCE};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

/// Whether everything is here that these scenarios need.
fn can_run() -> bool {
    device_present("/dev/fuse") && device_present("/dev/kvm")
}

/// A VM that is not started again elsewhere: what is looked at is what a fault has left.
fn start_vm(cluster: &Cluster, name: &str) -> Guest {
    let image = |kind: &str| format!("{name}-{kind}.vhdx");
    for kind in ["system", "scratch"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image(kind))), "--size", "32M"]);
    }
    let stays = ["--on-node-loss", "stay"];
    Guest::start_with(cluster, name, &image("system"), &image("scratch"), 1024, &stays)
}

fn migrate(cluster: &Cluster, asked: usize, vm: &str, to: usize) -> Value {
    cluster.ctl(asked).must(&["vm", "migrate", vm, "--to", &cluster.name(to)])
}

/// Moves the VM and sees it work there; gives what it has acknowledged.
fn move_and_look(cluster: &Cluster, guest: &Guest, vm: &str, to: usize, floor: u64) -> hv_guest::Ack {
    let report = migrate(cluster, 3, vm, to);
    assert_eq!((&report["type"], &report["disk_bytes_copied"]), (&"live".into(), &0.into()), "{report}");
    assert!(
        report["memory_bytes_sent"].as_u64() > Some(0) && report["rounds"].as_u64() > Some(0),
        "{report}"
    );
    let parts = ["drain_ms", "memory_ms", "state_ms", "handoff_ms"];
    let sum: f64 = parts.iter().map(|part| report["blackout"][part].as_f64().expect("a part")).sum();
    assert!((sum - report["blackout_ms"].as_f64().expect("its sum")).abs() < 0.1, "{report}");
    let shown = cluster.ctl(3).must(&["vm", "show", vm]);
    assert_eq!((&shown["owner"], &shown["state"]), (&cluster.name(to).into(), &"running".into()), "{shown}");
    guest.progress(cluster, to, floor)
}

// Invariants H1, H3, H4, E5, E6.
#[test]
fn a_vm_that_moves_live_goes_on_and_loses_no_acknowledged_sector() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "mover");
    let mut acked = guest.progress(&cluster, 1, 0);
    for to in [2, 3, 1, 2] {
        acked = move_and_look(&cluster, &guest, "mover", to, acked.sequence);
    }
    cluster.ctl(3).must(&["vm", "stop", "mover"]);
    let folder = TempDir::new().unwrap();
    guest.verify(&cluster, "mover-scratch.vhdx", acked, folder.path());
}

/// A VM whose memory changes all the time; it says FAIL when a page is not as it left it.
fn start_dirtier(cluster: &Cluster, name: &str, options: &str) {
    start_dirtier_with(cluster, name, "64M", options);
}

fn start_dirtier_with(cluster: &Cluster, name: &str, memory: &str, options: &str) {
    let cmdline = format!("role=dirtier {options}");
    let ctl = cluster.ctl(1);
    let vm = ["vm", "create", name, "--memory", memory, "--kernel", "builtin:dirtier", "--cmdline", &cmdline];
    ctl.must(&vm);
    ctl.must(&["vm", "start", name]);
}

/// Waits until the dirtier has gone over its set `more` times, and gives the number of its last pass.
fn passes(cluster: &Cluster, node: usize, vm: &str, floor: u64) -> u64 {
    let last = |console: &str| {
        let lines = console.lines().filter_map(|line| line.strip_prefix("pass ")?.split_whitespace().next());
        lines.filter_map(|number| number.parse().ok()).next_back().unwrap_or(0)
    };
    let console = cluster.console(node, vm, PATIENCE, |console| {
        assert!(!console.contains("FAIL"), "memory was lost: {console}");
        last(console) > floor
    });
    last(&console)
}

// Invariant H4
#[test]
fn memory_that_is_written_all_the_time_arrives_whole() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    start_dirtier(&cluster, "dirty", "set=4 rate=0");
    let mut seen = passes(&cluster, 1, "dirty", 0);
    for to in [2, 1, 3] {
        let report = migrate(&cluster, 2, "dirty", to);
        let deltas =
            ["delta_pages", "delta_bytes_saved"].map(|name| report[name].as_u64().expect("a figure"));
        assert!(
            deltas[0] > 0 && deltas[1] > deltas[0] * 2048,
            "it writes a word of each page, and some are compared on any link: {report}"
        );
        // Every page of the set is looked at once more after the move.
        seen = passes(&cluster, to, "dirty", seen + 1);
    }
    cluster.ctl(3).must(&["vm", "stop", "--force", "dirty"]);
}

// Invariant H4
#[test]
fn memory_on_both_sides_of_the_hole_for_devices_is_followed() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    // Two pieces of RAM, each with a log of its own.
    start_dirtier_with(&cluster, "wide", "4G", "set=4 rate=0");
    let mut seen = passes(&cluster, 1, "wide", 0);
    for to in [2, 1] {
        migrate(&cluster, 3, "wide", to);
        seen = passes(&cluster, to, "wide", seen + 1);
    }
    cluster.ctl(3).must(&["vm", "stop", "--force", "wide"]);
}

/// Asks, by node 3, for `given` MiB of the guest's memory, and waits for it. The guest checks all that it holds and gets back.
fn give_back(cluster: &Cluster, node: usize, vm: &str, given_mib: u64) -> Value {
    cluster.ctl(3).must(&["vm", "balloon", vm, &format!("{given_mib}M")]);
    has_given(cluster, node, vm, given_mib)
}

fn has_given(cluster: &Cluster, node: usize, vm: &str, given_mib: u64) -> Value {
    let pages = given_mib * 256;
    let said = format!("balloon given={pages} held={}", POOL_PAGES - pages);
    looked_after(cluster, node, vm, "balloon given=", &said);
    cluster.ctl(1).must(&["vm", "show", vm])
}

/// Waits until the guest has looked at all of its pages twice since the last line with `kind` in it, which goes on as `said`.
fn looked_after(cluster: &Cluster, node: usize, vm: &str, kind: &str, said: &str) {
    cluster.console(node, vm, PATIENCE, |console| {
        assert!(!console.contains("FAIL"), "memory was lost: {console}");
        let last = console.rfind(kind).map_or("", |at| &console[at..]);
        last.starts_with(said) && last.matches("round ").count() >= 2
    });
}

const POOL_PAGES: u64 = 1024;
const MIB: u64 = 1 << 20;

// Invariant H4
#[test]
fn memory_that_a_guest_gives_back_is_the_nodes_wherever_the_guest_goes() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(1);
    let pool = format!("pages={POOL_PAGES}");
    let vm =
        ["vm", "create", "b", "--memory", "64M", "--kernel", "builtin:balloon", "--cmdline", pool.as_str()];
    ctl.must(&vm);
    ctl.must(&["vm", "start", "b"]);
    looked_after(&cluster, 1, "b", " ready", " ready");
    let used = |shown: &Value| shown["memory_used_bytes"].as_u64().expect("a figure");
    let before = used(&ctl.must(&["vm", "show", "b"]));
    let shown = give_back(&cluster, 1, "b", 3);
    let balloon = &shown["balloon"];
    assert_eq!((&balloon["target_bytes"], &balloon["actual_bytes"]), (&(3 * MIB).into(), &(3 * MIB).into()));
    let given = before - used(&shown);
    assert!(given.abs_diff(3 * MIB) < MIB / 4, "{given} of {before} bytes are the node's again");

    for (to, kind) in [(2, "live"), (3, "quick"), (1, "live")] {
        cluster.ctl(3).must(&["vm", "migrate", "b", "--to", &cluster.name(to), "--type", kind]);
        let shown = cluster.ctl(2).must(&["vm", "show", "b"]);
        assert_eq!(shown["balloon"]["target_bytes"], 3 * MIB, "{shown}");
        assert!(used(&shown) < before - 2 * MIB, "{kind}: it brought memory along: {shown}");
        // What is taken again is empty, there too.
        give_back(&cluster, to, "b", 1);
        give_back(&cluster, to, "b", 3);
    }
    let refused = ctl.run(&["vm", "balloon", "b", "64M"]).expect_err("nothing would be left");
    assert_eq!(refused.code, 2, "{refused}");
    ctl.must(&["vm", "stop", "--force", "b"]);
    ctl.must(&["vm", "balloon", "b", "2M"]);
    ctl.must(&["vm", "start", "b"]);
    let shown = has_given(&cluster, 1, "b", 2);
    assert_eq!(shown["balloon"]["actual_bytes"], 2 * MIB, "{shown}");
    ctl.must(&["vm", "stop", "--force", "b"]);
}

// Invariant H6
#[test]
fn what_cannot_be_done_within_the_blackout_is_refused_and_the_vm_runs_on() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    start_dirtier(&cluster, "fast", "set=8 rate=0");
    let seen = passes(&cluster, 1, "fast", 0);
    let refused = cluster
        .ctl(2)
        .run(&["vm", "migrate", "fast", "--to", &cluster.name(2), "--max-blackout", "1ms"])
        .expect_err("a millisecond is not enough for what it writes");
    assert!(refused.to_string().contains("1 ms are allowed"), "says which blackout it would take: {refused}");
    let shown = cluster.ctl(1).must(&["vm", "show", "fast"]);
    assert_eq!((&shown["owner"], &shown["state"]), (&cluster.name(1).into(), &"running".into()), "{shown}");
    let _ = passes(&cluster, 1, "fast", seen);
    // Held back no longer, and followed anew from the first page on.
    migrate(&cluster, 1, "fast", 2);
    let _ = passes(&cluster, 2, "fast", seen + 2);
    cluster.ctl(3).must(&["vm", "stop", "--force", "fast"]);
}

// Invariant H6
#[test]
fn a_move_is_given_up_on_request_and_meanwhile_nothing_else_is_done_to_the_vm() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    start_dirtier(&cluster, "kept", "set=4 rate=0");
    let mut seen = passes(&cluster, 1, "kept", 0);
    for step in ["prepare", "copy"] {
        cluster.hold(1, step);
        let outcome = thread::scope(|scope| {
            let moving =
                scope.spawn(|| cluster.ctl(1).run(&["vm", "migrate", "kept", "--to", &cluster.name(2)]));
            cluster.fault(1, "held");
            for action in [&["vm", "pause", "kept"][..], &["vm", "stop", "kept"], &["vm", "start", "kept"]] {
                let refused = cluster.ctl(2).run(action).expect_err("it is on its way");
                assert_eq!(refused.code, 4, "{action:?}: {refused}");
            }
            cluster.ctl(3).must(&["vm", "migrate", "kept", "--cancel"]);
            cluster.fault(1, "release");
            moving.join().expect("the move ends")
        });
        let error = outcome.expect_err("it was given up").to_string();
        assert!(error.contains("it was cancelled") && error.contains("runs on where it was"), "{error}");
        is_on(&cluster, "kept", 1);
        seen = passes(&cluster, 1, "kept", seen + 1);
    }
    let none = cluster.ctl(3).run(&["vm", "migrate", "kept", "--cancel"]).expect_err("nothing to give up");
    assert_eq!(none.code, 4, "{none}");
    migrate(&cluster, 3, "kept", 2);
    let _ = passes(&cluster, 2, "kept", seen + 1);
    cluster.ctl(3).must(&["vm", "stop", "--force", "kept"]);
}

fn is_on(cluster: &Cluster, vm: &str, node: usize) {
    let shown = cluster.ctl(node).must(&["vm", "show", vm]);
    assert_eq!(
        (&shown["owner"], &shown["state"]),
        (&cluster.name(node).into(), &"running".into()),
        "{shown}"
    );
}

/// Begins a move from node 1 to node 2, holds it at `step` on node `at`, does something, lets it go on, and gives its
/// outcome.
fn with_move_held(
    cluster: &Cluster,
    vm: &str,
    (at, step): (usize, &str),
    act: impl FnOnce(),
) -> Result<Value, cluster_tests::CtlError> {
    cluster.hold(at, step);
    thread::scope(|scope| {
        let moving = scope.spawn(|| cluster.ctl(1).run(&["vm", "migrate", vm, "--to", &cluster.name(2)]));
        cluster.fault(at, "held");
        act();
        // A node that was killed holds nothing any more.
        let dir = cluster.dir().to_str().expect("a UTF-8 path");
        drop(Ctl::local().run(&["dev", "fault", &cluster.name(at), "release", "--dir", dir]));
        moving.join().expect("the move ends")
    })
}

// Invariants H1, H6
#[test]
fn a_target_that_is_killed_before_the_commit_leaves_the_vm_where_it_is() {
    if !can_run() {
        return;
    }
    for step in ["prepare", "copy", "save"] {
        let cluster = Cluster::start("1G");
        let guest = start_vm(&cluster, "left");
        let before = guest.progress(&cluster, 1, 0);
        let outcome = with_move_held(&cluster, "left", (1, step), || cluster.fault(2, "kill"));
        let error = outcome.expect_err("nobody is there to take it").to_string();
        assert!(error.contains("runs on where it was"), "killed at {step}: {error}");
        is_on(&cluster, "left", 1);
        let after = guest.progress(&cluster, 1, before.sequence);
        cluster.ctl(1).must(&["vm", "stop", "left"]);
        let folder = TempDir::new().unwrap();
        guest.verify(&cluster, "left-scratch.vhdx", after, folder.path());
    }
}

// Invariants H1, H6
#[test]
fn a_target_that_is_killed_around_the_commit_leaves_one_vm_or_a_reason_and_nothing_acknowledged_is_lost() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "late");
    let before = guest.progress(&cluster, 1, 0);
    let outcome = with_move_held(&cluster, "late", (1, "commit"), || cluster.fault(2, "kill"));
    assert!(outcome.is_err(), "nobody is there to run it: {outcome:?}");
    // Whether the cluster knew of the death before the commit decides which; never both.
    let shown = settled(&cluster, "late");
    if shown["state"] == "running" {
        let _ = guest.progress(&cluster, 1, before.sequence);
        cluster.ctl(1).must(&["vm", "stop", "late"]);
    } else {
        assert!(!shown["reason"].as_str().unwrap_or("").is_empty(), "{shown}");
    }
    let folder = TempDir::new().unwrap();
    guest.verify_crashed(&cluster, "late-scratch.vhdx", before, folder.path());
    cluster.ctl(3).must(&["vm", "start", "late"]);
    let _ = guest.progress(&cluster, 3, 0);
    cluster.ctl(3).must(&["vm", "stop", "late"]);
}

// Invariants H1, H6
#[test]
fn a_source_that_is_killed_at_any_step_leaves_one_vm_or_none_and_nothing_acknowledged_is_lost() {
    if !can_run() {
        return;
    }
    for step in ["prepare", "copy", "save", "commit", "activate"] {
        let cluster = Cluster::start("1G");
        let guest = start_vm(&cluster, "orphan");
        let before = guest.progress(&cluster, 1, 0);
        let outcome = with_move_held(&cluster, "orphan", (1, step), || cluster.fault(1, "kill"));
        assert!(outcome.is_err(), "the source is gone at {step}: {outcome:?}");
        let settled = settled(&cluster, "orphan");
        let acked = match settled["state"].as_str() {
            // The commit stood: the target looked at the record by itself.
            Some("running") => {
                assert_eq!((step, &settled["owner"]), ("activate", &cluster.name(2).into()), "{settled}");
                let acked = guest.progress(&cluster, 2, before.sequence);
                cluster.ctl(2).must(&["vm", "stop", "orphan"]);
                acked
            }
            _ => {
                assert!(!settled["reason"].as_str().unwrap_or("").is_empty(), "{step}: {settled}");
                before
            }
        };
        let folder = TempDir::new().unwrap();
        guest.verify_crashed(&cluster, "orphan-scratch.vhdx", acked, folder.path());
    }
}

/// Waits until a VM is on no node's way any more, as node 3 sees it.
fn settled(cluster: &Cluster, vm: &str) -> Value {
    let started = std::time::Instant::now();
    loop {
        let shown = cluster.ctl(3).must(&["vm", "show", vm]);
        if matches!(shown["state"].as_str(), Some("running" | "failed" | "stopped")) {
            return shown;
        }
        assert!(started.elapsed() < PATIENCE, "it does not come to rest: {shown}");
    }
}

// Invariant H6
#[test]
fn a_move_whose_network_is_cut_leaves_the_vm_where_it_is() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    start_dirtier(&cluster, "cut", "set=4 rate=0");
    let seen = passes(&cluster, 1, "cut", 0);
    let outcome = with_move_held(&cluster, "cut", (1, "copy"), || cluster.fault(2, "partition"));
    let error = outcome.expect_err("nothing arrives").to_string();
    assert!(error.contains("runs on where it was"), "{error}");
    is_on(&cluster, "cut", 1);
    let _ = passes(&cluster, 1, "cut", seen + 1);
    cluster.ctl(1).must(&["vm", "stop", "--force", "cut"]);
}

// Invariant H6
#[test]
fn a_target_whose_process_is_killed_after_the_commit_says_so_and_the_vm_starts_from_its_disks() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "lost");
    let before = guest.progress(&cluster, 1, 0);
    let outcome = with_move_held(&cluster, "lost", (2, "start"), || {
        let config = cluster.dir().join(cluster.name(2)).join("vm/lost.json");
        let mine = |entry: &std::path::Path| {
            let line = std::fs::read(entry.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(text(&config))
        };
        let processes = std::fs::read_dir("/proc").expect("proc").flatten().map(|entry| entry.path());
        let hv = processes.into_iter().find(|entry| mine(entry)).expect("the process that waits");
        cluster_tests::run_tool("kill", &["-9", hv.file_name().and_then(|pid| pid.to_str()).expect("a pid")]);
    });
    let error = outcome.expect_err("its memory is gone").to_string();
    assert!(error.contains("belongs to node 2"), "{error}");
    let shown = settled(&cluster, "lost");
    assert_eq!(shown["state"], "failed", "{shown}");
    assert!(!shown["reason"].as_str().unwrap_or("").is_empty(), "{shown}");
    let folder = TempDir::new().unwrap();
    guest.verify_crashed(&cluster, "lost-scratch.vhdx", before, folder.path());
    cluster.ctl(3).must(&["vm", "start", "lost"]);
    let _ = guest.progress(&cluster, 3, 0);
    cluster.ctl(3).must(&["vm", "stop", "lost"]);
}

#[test]
fn check_migrate_tells_the_same_as_a_move_would() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    start_dirtier(&cluster, "asked", "set=1 rate=64");
    let good = cluster.ctl(2).must(&["vm", "check-migrate", "asked", "--to", &cluster.name(3)]);
    assert_eq!(good["problems"].as_array().map(Vec::len), Some(0), "{good}");
    let same = cluster.ctl(2).run(&["vm", "check-migrate", "asked", "--to", &cluster.name(1)]);
    assert_eq!(same.expect_err("it is there already").code, 4);
    cluster.ctl(3).must(&["vm", "stop", "--force", "asked"]);
}

// Invariants H1, H6
#[test]
fn each_message_of_a_move_may_be_lost_and_the_vm_runs_in_one_place() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "deaf");
    let mut acked = guest.progress(&cluster, 1, 0);
    for message in ["inquire", "prepare", "activate", "commit"] {
        for lost in [message.to_owned(), format!("{message}-answer")] {
            cluster.lose(1, &lost);
            let outcome = cluster.ctl(1).run(&["vm", "migrate", "deaf", "--to", &cluster.name(2)]);
            let shown = settled(&cluster, "deaf");
            assert_eq!(shown["state"], "running", "{lost}: {shown}");
            // Before the commit the move is off, from it on it is not.
            let moved = ["activate", "commit"].contains(&message);
            assert_eq!(outcome.is_ok(), moved, "{lost}: {outcome:?}");
            let at = if moved { 2 } else { 1 };
            assert_eq!(shown["owner"], cluster.name(at).as_str(), "{lost}: {shown}");
            acked = guest.progress(&cluster, at, acked.sequence);
            if moved {
                migrate(&cluster, 2, "deaf", 1);
                acked = guest.progress(&cluster, 1, acked.sequence);
            }
        }
    }
    cluster.ctl(3).must(&["vm", "stop", "deaf"]);
    let folder = TempDir::new().unwrap();
    guest.verify(&cluster, "deaf-scratch.vhdx", acked, folder.path());
}

// Invariant H6
#[test]
fn a_quick_move_without_room_for_the_state_leaves_the_vm_where_it_is() {
    if !can_run() {
        return;
    }
    let cluster = Cluster::start("64M");
    start_dirtier(&cluster, "big", "set=16 rate=1024 noise=1");
    let seen = passes(&cluster, 1, "big", 0);
    let filler = cluster.mount(1).join("filler");
    let piece = vec![7; 1 << 20];
    let mut file = std::fs::File::create(&filler).expect("a file on the volume");
    while std::io::Write::write_all(&mut file, &piece).is_ok() {}
    drop(file);
    let quick = ["vm", "migrate", "big", "--type", "quick", "--to", &cluster.name(2)];
    let error = cluster.ctl(1).run(&quick).expect_err("there is no room").to_string();
    assert!(error.contains("runs on where it was"), "{error}");
    is_on(&cluster, "big", 1);
    let _ = passes(&cluster, 1, "big", seen + 1);
    // A live move needs no room; a quick one has it again.
    migrate(&cluster, 1, "big", 3);
    std::fs::remove_file(&filler).expect("room again");
    cluster.ctl(1).must(&quick);
    let _ = passes(&cluster, 2, "big", seen + 2);
    cluster.ctl(3).must(&["vm", "stop", "--force", "big"]);
}

#[test]
fn guests_under_load_move_again_and_again_and_find_nothing_wrong() {
    if !can_run() {
        return;
    }
    let outcome = cluster_tests::move_under_load(8, |_| ());
    assert_eq!(outcome.moves, 16, "{outcome:?}");
}
