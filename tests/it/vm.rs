//! A VM's life: its disk I/O goes past FUSE to the LUN, it moves without its disk, it loses nothing.

use std::fs;
use std::time::Duration;

use cluster_tests::{Cluster, Ctl, run_tool};
use hv_guest::record;
use tempfile::TempDir;

use crate::{device_present, text};

const LIMIT: Duration = Duration::from_secs(90);
const RECORDS: u64 = 1024;

fn acknowledged(line: &str) -> Option<u64> {
    let rest = line.trim().strip_prefix("ack ")?;
    rest.split_whitespace().find_map(|word| word.strip_prefix("seq="))?.parse().ok()
}

/// Creates and starts a VM with a read-only-used first disk and a scratch disk.
fn start_vm(cluster: &Cluster, name: &str) {
    for disk in ["system.vhdx", "scratch.vhdx"] {
        Ctl::local().must(&[
            "vhdx",
            "create",
            text(&cluster.mount(1).join(format!("{name}-{disk}"))),
            "--size",
            "32M",
        ]);
    }
    let disk = |kind: &str| cluster.mount(1).join(format!("{name}-{kind}.vhdx"));
    let cmdline = format!("verify=0 write=1 range={RECORDS} batch=8 pages=64 seed=3");
    let ctl = cluster.ctl(1);
    ctl.must(&[
        "vm",
        "create",
        name,
        "--memory",
        "64M",
        "--cmdline",
        &cmdline,
        "--disk",
        text(&disk("system")),
        "--disk",
        text(&disk("scratch")),
    ]);
    ctl.must(&["vm", "start", name]);
}

fn progress(cluster: &Cluster, node: usize, name: &str, floor: u64) -> u64 {
    let line = cluster
        .console_line(node, name, LIMIT, |line| acknowledged(line).is_some_and(|sequence| sequence > floor));
    acknowledged(&line).expect("chosen for it")
}

fn verify(cluster: &Cluster, name: &str, acknowledged: u64) {
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("scratch.raw");
    let image = cluster.mount(3).join(format!("{name}-scratch.vhdx"));
    run_tool("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", text(&image), text(&raw)]);
    let report = record::verify_image(&fs::read(raw).unwrap(), RECORDS, acknowledged);
    assert!(report.problems.is_empty() && report.checked > 0, "{:?}", report.problems);
}

// Invariants H1, H3, H6, E5, E6.
#[test]
fn a_quick_migration_moves_the_vm_and_loses_no_acknowledged_sector() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    start_vm(&cluster, "mover");
    let before = progress(&cluster, 1, "mover", 0);
    let report =
        cluster.ctl(1).must(&["vm", "migrate", "mover", "--to", &cluster.name(2), "--type", "quick"]);
    for field in ["memory_bytes_sent", "disk_bytes_copied"] {
        assert_eq!(report[field], 0, "{field} in {report}");
    }
    assert!(report["blackout"]["handoff_ms"].is_number() && report["total_ms"].is_number(), "{report}");
    let shown = cluster.ctl(3).must(&["vm", "show", "mover"]);
    assert_eq!(shown["owner"], cluster.name(2).as_str(), "{shown}");
    let after = progress(&cluster, 2, "mover", before);
    cluster.ctl(3).must(&["vm", "stop", "mover"]);
    verify(&cluster, "mover", after);
}

#[test]
fn a_vm_writes_to_the_lun_itself_and_opens_nothing_under_the_mount() {
    if !device_present("/dev/fuse") || !device_present("/dev/kvm") {
        return;
    }
    let cluster = Cluster::start("1G");
    start_vm(&cluster, "direct");
    progress(&cluster, 1, "direct", 0);
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
    progress(&cluster, 1, "direct", 0);
    cluster.ctl(1).must(&["vm", "stop", "direct"]);
    cluster.ctl(1).must(&["vm", "delete", "direct"]);
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

#[test]
fn an_idle_csvd_uses_less_than_64_mib() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    for node in cluster.info()["nodes"].as_array().expect("nodes") {
        let pid = node["pid"].as_u64().expect("a pid");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(kib < 64 * 1024, "csvd {pid} uses {kib} KiB");
    }
}
