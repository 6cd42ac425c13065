//! A VM's life: its disk I/O goes past FUSE to the LUN, it moves without its disk, it loses nothing.

use std::fs;
use std::io::Write;

use cluster_tests::{Cluster, Ctl, Follower, Guest, PATIENCE, until};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

/// Creates two images through node 1's mount and starts a VM on them.
fn start_vm(cluster: &Cluster, name: &str) -> Guest {
    let image = |kind: &str| format!("{name}-{kind}.vhdx");
    for kind in ["system", "scratch"] {
        Ctl::local().must(&["vhdx", "create", text(&cluster.mount(1).join(image(kind))), "--size", "32M"]);
    }
    Guest::start(cluster, name, &image("system"), &image("scratch"), 1024)
}

// Invariants H1, H3, H6, E5, E6.
#[test]
fn a_quick_migration_moves_the_vm_and_loses_no_acknowledged_sector() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "mover");
    let before = guest.progress(&cluster, 1, 0);
    let report =
        cluster.ctl(1).must(&["vm", "migrate", "mover", "--to", &cluster.name(2), "--type", "quick"]);
    for field in ["memory_bytes_sent", "disk_bytes_copied"] {
        assert_eq!(report[field], 0, "{field} in {report}");
    }
    assert!(report["blackout"]["handoff_ms"].is_number() && report["total_ms"].is_number(), "{report}");
    let shown = cluster.ctl(3).must(&["vm", "show", "mover"]);
    assert_eq!(shown["owner"], cluster.name(2).as_str(), "{shown}");
    let after = guest.progress(&cluster, 2, before.sequence);
    cluster.ctl(3).must(&["vm", "stop", "mover"]);
    let folder = TempDir::new().unwrap();
    guest.verify(&cluster, "mover-scratch.vhdx", after, folder.path());
}

#[test]
fn a_vm_writes_to_the_lun_itself_and_opens_nothing_under_the_mount() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "direct");
    let before = guest.progress(&cluster, 1, 0);
    let pid = cluster.ctl(1).must(&["vm", "show", "direct"])["pid"].as_u64().expect("the pid of hv");
    let open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    let lun = cluster.lun().canonicalize().unwrap();
    assert!(open.iter().any(|target| target == text(&lun)), "hv holds the LUN: {open:?}");
    assert!(
        !open.iter().any(|target| target.contains("/mnt/")),
        "hv opened something under a mount: {open:?}"
    );
    // Guest RAM is a memfd; what is beside it is the VMM's own.
    let own_kib = private_kib_beside_guest_ram(pid);
    assert!(own_kib < 16 * 1024, "hv uses {own_kib} KiB beside guest RAM");
    let state = |verb: &str, expected: &str| {
        cluster.ctl(1).must(&["vm", verb, "direct"]);
        assert_eq!(cluster.ctl(2).must(&["vm", "show", "direct"])["state"], expected);
    };
    state("pause", "paused");
    state("resume", "running");
    let _ = guest.progress(&cluster, 1, before.sequence);
    cluster.ctl(1).must(&["vm", "stop", "direct"]);
    cluster.ctl(1).must(&["vm", "delete", "direct"]);
}

/// Whether node 1 could not give VMs a user of their own here; says so.
fn leaves_root_to_vms(cluster: &Cluster) -> bool {
    let log = fs::read_to_string(cluster.dir().join("n1/log/csvd.log")).unwrap();
    let why = log.lines().find(|line| line.contains("VM processes run as the daemon's user"));
    why.inspect(|why| eprintln!("skipped: {why}")).is_some()
}

fn uid_of(process: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("each has a user").trim().to_owned()
}

#[test]
fn a_vms_process_is_a_user_that_nobody_else_is_and_finds_no_file_but_the_daemons_sockets() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let guest = start_vm(&cluster, "alone");
    let _ = guest.progress(&cluster, 1, 0);
    let pid = cluster.ctl(1).must(&["vm", "show", "alone"])["pid"].as_u64().expect("the pid of hv");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| {
        let found = status.lines().find_map(|line| line.strip_prefix(name));
        found.unwrap_or_else(|| panic!("{name} in {status}")).split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(line("CapEff:"), ["0000000000000000"]);
    assert_eq!(line("NoNewPrivs:"), ["1"]);
    if !leaves_root_to_vms(&cluster) {
        let own = (0x7000_0000 + pid).to_string();
        assert_eq!(line("Uid:"), [own.as_str(); 4]);
        assert_eq!(line("Groups:"), [""; 0]);
        let found = fs::read_dir(format!("/proc/{pid}/root/")).unwrap();
        let mut found: Vec<_> =
            found.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        found.sort();
        assert_eq!(found, ["blocks.sock", "luns.sock", "node.sock"]);
        for kind in ["net", "ipc", "uts"] {
            let namespace = |of: &str| fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap();
            assert_ne!(namespace(&pid.to_string()), namespace("self"), "{kind}");
        }
    }
    cluster.ctl(1).must(&["vm", "stop", "alone"]);
}

#[test]
fn a_node_that_is_told_so_leaves_vms_the_daemons_user_and_a_vm_moves_between_both_kinds() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    cluster.fault(2, "kill");
    let config = cluster.dir().join("n2/csvd.toml");
    let told = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("vm_user = \"daemon\"\n{told}")).unwrap();
    cluster.start_node(2);
    let guest = start_vm(&cluster, "both");
    let mut acked = guest.progress(&cluster, 1, 0);
    for (to, kind) in [(2, "live"), (1, "live"), (2, "quick"), (1, "quick")] {
        cluster.ctl(3).must(&["vm", "migrate", "both", "--to", &cluster.name(to), "--type", kind]);
        acked = guest.progress(&cluster, to, acked.sequence);
        let pid = cluster.ctl(to).must(&["vm", "show", "both"])["pid"].as_u64().expect("the pid of hv");
        let own = uid_of(&pid.to_string()) != uid_of("self");
        assert_eq!(own, to == 1 && !leaves_root_to_vms(&cluster), "on node {to}");
    }
    cluster.ctl(3).must(&["vm", "stop", "both"]);
    let folder = TempDir::new().unwrap();
    guest.verify(&cluster, "both-scratch.vhdx", acked, folder.path());
}

/// Resident memory of a process without the mapping of the guest's RAM.
fn private_kib_beside_guest_ram(pid: u64) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut guest = false;
    let mut sum = 0;
    for line in maps.lines() {
        if line.split_whitespace().next().is_some_and(|word| word.contains('-') && !word.ends_with(':')) {
            guest = line.contains("memfd:");
        } else if let Some(rest) = line.strip_prefix("Rss:")
            && !guest
        {
            sum += rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    sum
}

/// The nodes' daemons: number of the process, and what `/proc` says of its status.
fn daemons(cluster: &Cluster) -> Vec<(u64, String)> {
    let nodes = cluster.info()["nodes"].as_array().expect("nodes").iter();
    let pids = nodes.map(|node| node["pid"].as_u64().expect("a pid"));
    pids.map(|pid| (pid, fs::read_to_string(format!("/proc/{pid}/status")).unwrap())).collect()
}

/// What follows a word at the start of a line.
fn word_of<'a>(status: &'a str, what: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(what)).expect(what);
    line.split_whitespace().nth(1).expect("a value")
}

// Invariant F8.
#[test]
fn a_daemon_is_not_swapped_out_and_waits_for_no_write_to_its_own_mount() {
    // Of include/linux/sched.h: memory for this thread waits for no I/O, and is not throttled for what others have to write.
    const MEMALLOC_NOIO: u64 = 0x0008_0000;
    const LOCAL_THROTTLE: u64 = 0x0010_0000;
    const SYS_RESOURCE: u64 = 1 << 24;
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    for (pid, status) in daemons(&cluster) {
        let number = |what, radix| u64::from_str_radix(word_of(&status, what), radix).unwrap();
        assert!(number("VmLck:", 10) >= number("VmRSS:", 10), "{status}");
        if number("CapEff:", 16) & SYS_RESOURCE == 0 {
            // In a container, say. Its log says that the flags could not be set.
            continue;
        }
        for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            // One may end meanwhile.
            let Ok(stat) = fs::read_to_string(thread.unwrap().path().join("stat")) else { continue };
            let after_name = stat.rsplit_once(')').expect("a name in brackets").1;
            let flags: u64 = after_name.split_whitespace().nth(6).unwrap().parse().unwrap();
            assert_eq!(flags & (MEMALLOC_NOIO | LOCAL_THROTTLE), MEMALLOC_NOIO | LOCAL_THROTTLE, "{stat}");
        }
    }
}

#[test]
fn an_idle_csvd_uses_less_than_64_mib() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    for (pid, status) in daemons(&cluster) {
        let kib: u64 = word_of(&status, "VmRSS:").parse().unwrap();
        assert!(kib < 64 * 1024, "csvd {pid} uses {kib} KiB");
    }
}

#[test]
fn a_disk_is_added_and_removed_while_the_vm_runs_and_belongs_to_it_meanwhile() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(1);
    let image = cluster.mount(1).join("extra.vhdx");
    let extra = text(&image);
    Ctl::local().must(&["vhdx", "create", extra, "--size", "32M"]);
    for name in ["one", "two"] {
        ctl.must(&["vm", "create", name, "--memory", "16M", "--cpus", "2", "--kernel", "builtin:listener"]);
    }
    ctl.must(&["vm", "start", "one"]);
    cluster.console(1, "one", PATIENCE, |said| said.contains("listener disks=8 ready"));
    let added = ctl.must(&["vm", "disk", "add", "one", extra]);
    assert_eq!(added["spec"]["disks"][0]["slot"], 0, "{added}");
    cluster.console(1, "one", PATIENCE, |said| said.contains("changed index=0 from=0 sectors=65536 first="));
    let refused = ctl.run(&["vm", "disk", "add", "two", extra]).unwrap_err();
    assert!(refused.code == 4 && refused.message().contains("used by VM one"), "{refused}");
    ctl.must(&["vm", "disk", "resize", "one", extra, "--size", "64M"]);
    cluster.console(1, "one", PATIENCE, |said| {
        said.contains("changed index=0 from=65536 sectors=131072 first=")
    });
    ctl.must(&["vm", "disk", "limit", "one", extra, "--iops", "100"]);
    assert_eq!(ctl.must(&["vm", "show", "one"])["disks"][0]["iops_limit"], 100);
    ctl.must(&["vm", "disk", "remove", "one", extra]);
    cluster.console(1, "one", PATIENCE, |said| said.contains("changed index=0 from=131072 sectors=0"));
    ctl.must(&["vm", "disk", "add", "two", extra]);
    ctl.must(&["vm", "stop", "one"]);
}

// Invariant H4
#[test]
fn a_saved_vm_goes_on_where_it_was_on_any_node() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    for kind in ["system", "scratch"] {
        let image = cluster.mount(1).join(format!("{kind}.vhdx"));
        Ctl::local().must(&["vhdx", "create", text(&image), "--size", "32M"]);
    }
    let guest = Guest::start(&cluster, "kept", "system.vhdx", "scratch.vhdx", 1024);
    let mut acked = guest.progress(&cluster, 1, 0);
    for (runs_on, node) in [(1, 2), (2, 1), (1, 1), (1, 3)] {
        let saved = cluster.ctl(runs_on).must(&["vm", "save", "kept"]);
        assert_eq!(saved["state"], "saved", "{saved}");
        let again = cluster.ctl(runs_on).run(&["vm", "save", "kept"]).expect_err("it runs nowhere");
        assert_eq!(again.code, 4, "{again}");
        let shown = cluster.ctl(node).must(&["vm", "start", "kept"]);
        assert_eq!(
            (&shown["owner"], &shown["state"]),
            (&cluster.name(node).into(), &"running".into()),
            "{shown}"
        );
        // The same boot: its records go on, and it checks the memory that it comes back to.
        acked = guest.progress(&cluster, node, acked.sequence);
    }
    cluster.ctl(3).must(&["vm", "stop", "kept"]);
    let folder = TempDir::new().unwrap();
    guest.verify(&cluster, "scratch.vhdx", acked, folder.path());
}

#[test]
fn a_memory_that_nobody_reads_any_more_goes_with_the_next_start_or_with_its_vm() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(1);
    ctl.must(&["vm", "create", "left", "--memory", "64M", "--kernel", "builtin:dirtier"]);
    let epoch = ctl.must(&["vm", "start", "left"])["epoch"].as_u64().expect("it is in an epoch");
    let memory = |vm: &str, epoch: u64| cluster.mount(1).join(format!(".{vm}-{epoch}.vmstate"));
    // As a daemon leaves them that ends while its guest still reads; the second could have a reader in the next epoch.
    let (old, young, strange) = (memory("left", epoch - 1), memory("left", epoch), memory("left-over", 0));
    for file in [&old, &young, &strange] {
        fs::write(file, "a memory").expect("the volume takes it");
    }
    ctl.must(&["vm", "stop", "--force", "left"]);
    ctl.must(&["vm", "start", "left"]);
    until("the old memory goes", || old.exists().into(), |there| *there == false);
    assert!(young.exists() && strange.exists(), "others stay");
    ctl.must(&["vm", "stop", "--force", "left"]);
    ctl.must(&["vm", "delete", "left"]);
    until("the memory of a VM that is gone goes", || young.exists().into(), |there| *there == false);
    assert!(strange.exists(), "that of another one stays");
}

#[test]
fn a_guest_that_resets_its_machine_boots_again_and_one_that_was_stopped_stays_so() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(1);
    let image = cluster.mount(1).join("grows.vhdx");
    Ctl::local().must(&["vhdx", "create", text(&image), "--size", "32M"]);
    let create = ["vm", "create", "again", "--memory", "16M", "--kernel", "builtin:listener", "--cmdline"];
    ctl.must(&[&create[..], &["reset=131072", "--disk", text(&image)]].concat());
    let first = ctl.must(&["vm", "start", "again"])["epoch"].as_u64();
    cluster.console(1, "again", PATIENCE, |said| said.contains("ready"));
    // It resets the machine when it sees the new size, and not when it finds it at its start.
    ctl.must(&["vm", "disk", "resize", "again", text(&image), "--size", "64M"]);
    let show = || cluster.ctl(2).must(&["vm", "show", "again"]);
    let boots_again = |shown: &Value| shown["state"] == "running" && shown["epoch"].as_u64() > first;
    let shown = until("the second boot", show, boots_again);
    assert_eq!(shown["owner"], cluster.name(1).as_str(), "{shown}");
    let console = cluster.console(1, "again", PATIENCE, |said| said.contains("ready"));
    assert!(!console.contains("changed"), "it has booted and not gone on: {console}");
    let events = cluster.ctl(3).must(&["events"]).to_string();
    assert!(events.contains("the guest has reset its machine"), "people are told why: {events}");
    ctl.must(&["vm", "stop", "again"]);
    let shown = show();
    assert_eq!((&shown["state"], &shown["reason"]), (&"stopped".into(), &"".into()), "{shown}");
}

/// A listener on node 1 whose disk of 32 MiB ends it, by `how`, when it has got 64 MiB. It says 300 words before.
fn start_listener(cluster: &Cluster, name: &str, how: &str) -> String {
    let image = cluster.mount(1).join(format!("{name}.vhdx"));
    Ctl::local().must(&["vhdx", "create", text(&image), "--size", "32M"]);
    let cmdline = format!("{how}=131072 words=300");
    let create = ["vm", "create", name, "--memory", "16M", "--kernel", "builtin:listener", "--cmdline"];
    cluster.ctl(1).must(&[&create[..], &[&cmdline, "--disk", text(&image)]].concat());
    cluster.ctl(1).must(&["vm", "start", name]);
    text(&image).to_owned()
}

#[test]
fn what_a_guest_said_last_is_there_after_it_has_switched_itself_off() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let image = start_listener(&cluster, "quits", "off");
    let follower = Follower::start(&cluster.ctl(2), "quits");
    follower.until("the guest waits", |said| said.contains("ready"));
    cluster.ctl(1).must(&["vm", "disk", "resize", "quits", &image, "--size", "64M"]);
    let (said, beside) = follower.end();
    assert!(said.ends_with("word number=300\n"), "{said}");
    assert!(beside.contains("it has stopped"), "{beside}");
    let shown = cluster.ctl(3).must(&["vm", "console", "quits"]);
    assert_eq!(shown["text"], said.as_str(), "what it said is still there");
    let late = Follower::start(&cluster.ctl(3), "quits");
    assert_eq!(late.end().0, said, "also for who follows when it is over");
    let shown = cluster.ctl(3).must(&["vm", "show", "quits"]);
    assert_eq!((&shown["state"], &shown["reason"]), (&"stopped".into(), &"".into()), "{shown}");
    cluster.ctl(1).must(&["vm", "start", "quits"]);
    let again = cluster.console(3, "quits", PATIENCE, |said| said.contains("ready"));
    assert!(!again.contains("word"), "another boot is another console: {again}");
    cluster.ctl(1).must(&["vm", "stop", "quits"]);
    cluster.ctl(1).must(&["vm", "delete", "quits"]);
}

#[test]
fn who_follows_a_vm_goes_on_after_its_move_and_after_its_next_boot() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let image = start_listener(&cluster, "watched", "reset");
    let follower = Follower::start(&cluster.ctl(3), "watched");
    follower.until("the guest waits", |said| said.contains("ready"));
    cluster.ctl(1).must(&["vm", "migrate", "watched", "--to", &cluster.name(2)]);
    let resize = |size| cluster.ctl(1).must(&["vm", "disk", "resize", "watched", &image, "--size", size]);
    resize("48M");
    follower.until("the guest works after its move", |said| said.contains("from=65536 sectors=98304"));
    resize("64M");
    follower.until("the next boot", |said| said.matches("ready").count() == 2);
    cluster.ctl(1).must(&["vm", "stop", "watched"]);
    let (said, beside) = follower.end();
    let lines: Vec<_> = said.lines().collect();
    let words: Vec<_> = (1..=300).map(|number| format!("word number={number}")).collect();
    let at = lines.iter().position(|line| line.starts_with("word")).expect("it has said words");
    assert_eq!(lines[at..at + 300], words, "all that it said before the reset, once: {said}");
    assert_eq!(said.matches("changed index=0").count(), 2, "{said}");
    assert!(said.ends_with("listener disks=8 ready\n"), "{said}");
    assert!(beside.contains("it boots again") && beside.ends_with("it has stopped\n"), "{beside}");
}

/// What the echo has heard, in order.
fn heard(console: &str) -> Vec<&str> {
    // The last line may not be whole yet.
    let console = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
    console
        .lines()
        .filter_map(|line| line.strip_prefix("heard ")?.split_once(' '))
        .map(|(_, text)| text)
        .collect()
}

#[test]
fn what_is_typed_reaches_the_guest_in_order_wherever_it_runs() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (ctl, other) = (cluster.ctl(1), cluster.ctl(3));
    ctl.must(&["vm", "create", "e", "--memory", "16M", "--kernel", "builtin:echo"]);
    let send = ["vm", "console", "e", "--send"];
    let refused = ctl.run_with_input(&send, b"nobody\n").expect_err("it does not run");
    assert_eq!(refused.code, 4, "{refused}");
    ctl.must(&["vm", "start", "e"]);
    // Before that it clears its port.
    cluster.console(1, "e", PATIENCE, |console| console.contains("echo ready"));
    let mut expected = Vec::new();
    for to in [2, 3] {
        // Far more than the port holds at once.
        let lines: Vec<_> = (0..200).map(|number| format!("line {number} before node {to}")).collect();
        let input = lines.join("\n") + "\n";
        let typed = other.run_with_input(&send, input.as_bytes()).expect("it runs");
        assert_eq!(typed["typed_bytes"], input.len(), "{typed}");
        expected.extend(lines);
        other.must(&["vm", "migrate", "e", "--to", &cluster.name(to)]);
        let console = cluster.console(to, "e", PATIENCE, |console| heard(console).len() == expected.len());
        assert_eq!(heard(&console), expected);
    }
    other.must(&["vm", "pause", "e"]);
    let refused = other.run_with_input(&send, b"nobody\n").expect_err("it is paused");
    assert!(refused.message().contains("paused"), "{refused}");
    other.must(&["vm", "stop", "--force", "e"]);
}

#[test]
fn keys_of_a_terminal_go_to_the_guest_until_one_leaves_it() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(1);
    ctl.must(&["vm", "create", "e", "--memory", "16M", "--kernel", "builtin:echo"]);
    ctl.must(&["vm", "start", "e"]);
    let (terminal, mut keys) = Follower::at_terminal(&cluster.ctl(2), "e");
    terminal.until("what it said before", |said| said.contains("echo ready"));
    // Nothing of these means anything to the terminal itself, and it shows no key by itself.
    keys.write_all(b"a\x03b\x04c\r").expect("it is open");
    terminal.until("the keys", |said| said.contains("heard 5 a\x03b\x04c"));
    keys.write_all(b"last\r\x1dnot typed\r").expect("it is open");
    let (said, beside) = terminal.end();
    assert!(beside.contains("Ctrl-] leaves"), "{beside}");
    assert_eq!(said.matches("b\x04c").count(), 1, "keys are shown by the guest alone: {said}");
    let console = cluster.console(1, "e", PATIENCE, |console| heard(console).len() == 2);
    assert_eq!(heard(&console), ["a\x03b\x04c", "last"]);
    ctl.must(&["vm", "stop", "--force", "e"]);
}
