//! The steps of the demo, in order.

use std::fs;
use std::path::{Path, PathBuf};

use cluster_tests::{Cluster, Ctl, ExtImage, Guest, run_tool, sha256_of};
use hv_guest::Ack;
use serde_json::Value;
use tempfile::TempDir;

use crate::timeline::Timeline;

/// Sectors of the scratch disk that the guest walks over.
const SCRATCH_RECORDS: u64 = 2048;
/// Records that the guest writes between two events of the story.
const STRETCH: u64 = 300;
const VM: &str = "demo";
/// Runs the whole story. `keep` leaves the folder with images and logs behind.
pub(crate) fn tell(keep: bool) {
    let time = Timeline::start("Three nodes, one LUN, one VM that moves without its disk being copied");
    let work = TempDir::with_prefix("csv-demo-").expect("a temporary folder");
    let image = time.step("make an ext4 filesystem, then a VHDX of it", || make_image(work.path()));
    let cluster = time.step("start three nodes on one LUN", start_cluster);
    time.step("copy the image in through node 1", || copy_in(&cluster, &work.path().join("disk.vhdx")));
    if Path::new("/dev/kvm").exists() {
        run_vm(&time, &cluster, work.path());
    } else {
        println!("   /dev/kvm is missing: the VM part is left out");
        time.step("move the coordinator to node 2", || move_coordinator(&cluster, 2));
    }
    time.step("convert the disk back through node 3", || convert_back(&cluster, &image, work.path()));
    time.step("check the volume", || check_volume(&cluster));
    time.step("stop the cluster", || (drop(cluster), "no process, mount or file left".into()));
    time.finish("Everything that was acknowledged is there.");
    if keep {
        println!("kept: {}", work.keep().display());
    }
}

fn make_image(folder: &Path) -> (ExtImage, String) {
    let image = ExtImage::create(folder, 60, 64);
    let vhdx = folder.join("disk.vhdx");
    run_tool(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "vhdx", "-o", "subformat=dynamic", text(&image.raw), text(&vhdx)],
    );
    let size = fs::metadata(&vhdx).expect("the image").len();
    (image, format!("64 MiB filesystem, 60 files, {} MiB VHDX by mke2fs and qemu-img", size >> 20))
}

fn start_cluster() -> (Cluster, String) {
    let cluster = Cluster::with_usual_times("4G");
    let names: Vec<_> = (1..=3).map(|number| cluster.name(number)).collect();
    (cluster, format!("{} healthy, volume vol1 mounted on each", names.join(", ")))
}

fn copy_in(cluster: &Cluster, vhdx: &Path) -> ((), String) {
    fs::copy(vhdx, cluster.mount(1).join("disk.vhdx")).expect("copied into the mount");
    let expected = sha256_of(vhdx);
    for node in 1..=3 {
        assert_eq!(
            sha256_of(&cluster.mount(node).join("disk.vhdx")),
            expected,
            "node {node} reads other bytes"
        );
    }
    ((), format!("sha256 {}... on all three nodes", &expected[..16]))
}

/// Everything that needs a virtual machine.
fn run_vm(time: &Timeline, cluster: &Cluster, folder: &Path) {
    let guest = time.step("start the VM on node 1", || start_vm(cluster));
    time.step("the guest writes and flushes", || guest_progress(&guest, cluster, 1, 0));
    let before = time.step("move the coordinator while it writes", || move_under_load(&guest, cluster));
    time.step("quick-migrate the VM to node 2", || migrate(cluster, 1, 2));
    let before =
        time.step("the guest goes on where it was", || guest_progress(&guest, cluster, 2, before.sequence));
    time.step("quick-migrate the VM to node 3", || migrate(cluster, 2, 3));
    time.step("the guest goes on where it was", || guest_progress(&guest, cluster, 3, before.sequence));
    let acked = time.step("stop the VM", || stop_vm(&guest, cluster));
    time.step("check the scratch disk, sector by sector", || verify_scratch(&guest, cluster, folder, acked));
}

fn start_vm(cluster: &Cluster) -> (Guest, String) {
    let scratch = cluster.mount(1).join("scratch.vhdx");
    Ctl::local().must(&["vhdx", "create", text(&scratch), "--size", "64M"]);
    let guest = Guest::start(cluster, VM, "disk.vhdx", "scratch.vhdx", SCRATCH_RECORDS);
    (guest, "disks: disk.vhdx (made by qemu-img), scratch.vhdx (made by csvctl)".into())
}

/// Waits until the guest has acknowledged [`STRETCH`] records more than `before`.
fn guest_progress(guest: &Guest, cluster: &Cluster, node: usize, before: u64) -> (Ack, String) {
    let ack = guest.progress(cluster, node, before + STRETCH);
    (ack, format!("{} records acknowledged after a flush", ack.sequence))
}

fn move_under_load(guest: &Guest, cluster: &Cluster) -> (Ack, String) {
    let at_move = guest.progress(cluster, 1, 0);
    let ((), outcome) = move_coordinator(cluster, 2);
    let after = guest.progress(cluster, 1, at_move.sequence + STRETCH);
    (after, format!("{outcome}; the guest went on to record {}", after.sequence))
}

fn move_coordinator(cluster: &Cluster, to: usize) -> ((), String) {
    let moved = cluster.ctl(1).must(&["volume", "move", "vol1", "--to", &cluster.name(to)]);
    (
        (),
        format!(
            "{} -> {}, metadata paused {} ms",
            word(&moved["from"]),
            word(&moved["to"]),
            number(&moved["pause_ms"])
        ),
    )
}

fn migrate(cluster: &Cluster, from: usize, to: usize) -> ((), String) {
    let report = cluster.ctl(from).must(&["vm", "migrate", VM, "--to", &cluster.name(to), "--type", "quick"]);
    assert_eq!(report["memory_bytes_sent"], 0, "quick migration sends no memory over the network");
    assert_eq!(report["disk_bytes_copied"], 0, "no disk is ever copied");
    let split = &report["blackout"];
    let parts: Vec<_> =
        ["drain_ms", "memory_ms", "state_ms", "handoff_ms"].iter().map(|part| number(&split[part])).collect();
    (
        (),
        format!(
            "blackout {} ms (drain, memory, state, hand-off: {}), 0 disk bytes copied",
            number(&report["blackout_ms"]),
            parts.join(" + ")
        ),
    )
}

fn stop_vm(guest: &Guest, cluster: &Cluster) -> (Ack, String) {
    let acked = guest.progress(cluster, 3, 0);
    cluster.ctl(3).must(&["vm", "stop", VM]);
    (acked, format!("the last acknowledgement seen is of record {}", acked.sequence))
}

fn verify_scratch(guest: &Guest, cluster: &Cluster, folder: &Path, acked: Ack) -> ((), String) {
    let report = guest.verify(cluster, "scratch.vhdx", acked, folder);
    ((), format!("{} promised records are there, none lost, none torn", report.records_promised))
}

fn convert_back(cluster: &Cluster, image: &ExtImage, folder: &Path) -> ((), String) {
    let raw = to_raw(cluster, "disk.vhdx", folder);
    let compared = image.verify(&raw, &folder.join("extracted"));
    ((), format!("e2fsck clean, {compared} files identical"))
}

/// Converts an image on the volume with qemu-img, through node 3's mount.
fn to_raw(cluster: &Cluster, name: &str, folder: &Path) -> PathBuf {
    let source = cluster.mount(3).join(name);
    let raw = folder.join(name).with_extension("raw");
    run_tool("qemu-img", &["convert", "-f", "vhdx", "-O", "raw", text(&source), text(&raw)]);
    raw
}

fn check_volume(cluster: &Cluster) -> ((), String) {
    let report = cluster.ctl(2).must(&["volume", "check", "vol1"]);
    (
        (),
        format!(
            "{} inodes, {} problems",
            number(&report["inodes"]),
            report["problems"].as_array().map_or(0, Vec::len)
        ),
    )
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

/// A JSON string without its quotes.
fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

/// A JSON number as people read it.
fn number(value: &Value) -> String {
    value.as_f64().map_or_else(|| value.to_string(), |number| format!("{}", (number * 10.0).round() / 10.0))
}
