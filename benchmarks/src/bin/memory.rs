//! Resident memory: an idle `csvd` (goal: under 64 MiB), and `hv` beside the guest's RAM (goal: under 16 MiB).
#![expect(clippy::print_stdout, reason = "a program for people at a terminal")]

use std::fs;
use std::time::Duration;

use cluster_tests::{Cluster, Ctl};

fn main() {
    let cluster = Cluster::with_usual_times("2G");
    println!("resident memory");
    for node in cluster.info()["nodes"].as_array().expect("nodes") {
        let pid = node["pid"].as_u64().expect("a pid");
        println!(
            "  csvd {:8} {:6.1} MiB (goal: under 64)",
            node["name"].as_str().unwrap_or(""),
            resident_mib(pid, "")
        );
    }
    if fs::exists("/dev/kvm").unwrap_or(false) {
        let disk = cluster.mount(1).join("disk.vhdx");
        let disk = disk.to_str().expect("a UTF-8 path");
        Ctl::local().must(&["vhdx", "create", disk, "--size", "64M"]);
        let ctl = cluster.ctl(1);
        ctl.must(&[
            "vm",
            "create",
            "m",
            "--memory",
            "256M",
            "--disk",
            disk,
            "--cmdline",
            "verify=0 write=0 pages=1024",
        ]);
        ctl.must(&["vm", "start", "m"]);
        cluster.console(1, "m", Duration::from_secs(60), |console| console.contains("tick"));
        let pid = ctl.must(&["vm", "show", "m"])["pid"].as_u64().expect("a pid");
        println!(
            "  hv   {:8} {:6.1} MiB beside 256 MiB of guest RAM (goal: under 16)",
            "m",
            resident_mib(pid, "memfd:")
        );
        ctl.must(&["vm", "stop", "m"]);
    } else {
        println!("  hv: /dev/kvm is missing, not measured");
    }
    println!("reproduce: cargo xtask bench memory");
}

/// Resident memory of a process without the mappings whose name contains `without`.
fn resident_mib(pid: u64, without: &str) -> f64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process lives");
    let mut counted = true;
    let mut kib = 0.0;
    for line in maps.lines() {
        let first = line.split_whitespace().next().unwrap_or("");
        if first.contains('-') && !first.ends_with(':') {
            counted = without.is_empty() || !line.contains(without);
        } else if let Some(rest) = line.strip_prefix("Rss:")
            && counted
        {
            kib += rest.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0);
        }
    }
    kib / 1024.0
}
