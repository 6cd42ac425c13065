//! What cuts a silent node off, chosen at the creation of a volume, and what becomes of one that wakes up too late.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use cluster_tests::Host;
use tempfile::TempDir;

use crate::members::{await_node, three, with_fence};
use crate::{device_present, text};

const BLOCK: usize = 4096;
const BLOCKS: usize = 64;
/// Of the node that is stopped, and of the one that takes over.
const SLEEPER: &[u8; 16] = b"sleeper's block.";
const HEIR: &[u8; 16] = b"block of an heir";

fn blocks(mark: &[u8; 16]) -> Vec<u8> {
    mark.repeat(BLOCK / mark.len() * BLOCKS)
}

/// Blocks on the LUN itself that begin with `mark`.
fn on_lun(lun: &Path, mark: &[u8; 16]) -> usize {
    let mut file = fs::File::open(lun).expect("the LUN");
    let (mut found, mut part) = (0, vec![0; 256 * BLOCK]);
    loop {
        let len = file.read(&mut part).expect("read");
        if len == 0 {
            return found;
        }
        found += part[..len].chunks(BLOCK).filter(|block| block.starts_with(mark)).count();
    }
}

/// Writes its blocks again and again until it is refused.
struct Load(Child);

impl Load {
    fn start(source: &Path, to: &Path) -> Self {
        let script =
            "while dd if=\"$0\" of=\"$1\" bs=4096 conv=notrunc,nocreat oflag=direct 2>/dev/null; do :; done";
        let mut command = Command::new("sh");
        command.args(["-c", script, text(source), text(to)]).process_group(0);
        Self(command.spawn().expect("a shell"))
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().expect("asked").is_none()
    }

    fn await_end(&mut self) {
        self.0.wait().expect("waited");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let group = format!("-{}", self.0.id());
        drop(Command::new("kill").args(["-s", "KILL", "--", &group]).stderr(Stdio::null()).status());
        drop(self.0.wait());
    }
}

// Invariants A1, A3, B1, B2 and B3: a node that was stopped for longer than its lease lets not one write through when it goes
// on, others take over only after its lease, its last I/O and the drift of clocks, and it comes back as the next incarnation.
#[test]
fn a_node_that_slept_past_its_lease_writes_nothing_when_it_wakes_up_and_comes_back() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (hosts, folder) = (three(), TempDir::new().expect("a folder"));
    let lun = folder.path().join("lun");
    fs::File::create(&lun).and_then(|file| file.set_len(512 << 20)).expect("a sparse file");
    let uri = format!("file:{}", text(&lun));
    let refused = hosts[0].ctl().run(&["volume", "create", "vol1", "--lun", &uri, "--fence", "reservation"]);
    let refused = refused.expect_err("a file has no reservations");
    assert_eq!((refused.code, refused.message().contains("persistent reservations")), (4, true), "{refused}");
    let made = hosts[0].ctl().must(&["volume", "create", "vol1", "--lun", &uri]);
    assert_eq!(made["fence"], "lease", "nothing else can cut a node off: {made}");
    let wait = Duration::from_millis(made["fence_wait_ms"].as_u64().expect("how long others wait"));
    assert!(wait > Duration::from_secs(8), "longer than the longest I/O: {made}");
    for host in &hosts {
        host.ctl().must(&["cluster", "wait", "--volume", "vol1"]);
    }
    hosts[0].ctl().must(&["volume", "move", "vol1", "--to", "c"]);
    let [a, b, c] = &hosts;
    let path = c.mount("vol1").join("contested");
    fs::write(&path, blocks(SLEEPER)).expect("written");

    // A process of its own: one with open files on the mount of a node that is stopped can start no other.
    let source = folder.path().join("blocks");
    fs::write(&source, blocks(SLEEPER)).expect("written");
    let mut load = Load::start(&source, &path);
    let epoch = a.ctl().must(&["node", "show", "c"])["epoch"].as_u64();
    c.freeze();
    let frozen = Instant::now();
    await_node(a, "c", |node| node["state"] == "fenced");
    assert!(frozen.elapsed() >= wait, "taken over {:?} after the last sign of life", frozen.elapsed());
    // Not truncated: the heir's blocks take the place of the sleeper's on the LUN.
    let file = fs::OpenOptions::new().write(true).open(b.mount("vol1").join("contested"));
    let file = file.expect("the heirs serve it");
    file.write_all_at(&blocks(HEIR), 0).and_then(|()| file.sync_all()).expect("written by an heir");
    drop(file);
    assert_eq!((on_lun(&lun, SLEEPER), on_lun(&lun, HEIR)), (0, BLOCKS), "nothing else is left of it");

    assert!(load.runs(), "the program on the sleeper waits");
    c.thaw();
    load.await_end();
    await_node(a, "c", |node| node["state"] == "up" && node["epoch"].as_u64() > epoch);
    assert_eq!(on_lun(&lun, SLEEPER), 0, "not one write of the sleeper got through");
    assert_eq!(fs::read(a.mount("vol1").join("contested")).expect("read"), blocks(HEIR));
    let events = a.ctl().must(&["events"]).to_string();
    assert!(
        events.contains("node.fence-confirmed") && events.contains("its lease has not been renewed"),
        "{events}"
    );
    // By itself, with the next epoch and nothing of what it held.
    c.ctl().must(&["cluster", "wait", "--nodes", "3", "--volume", "vol1"]);
    assert_eq!(fs::read(c.mount("vol1").join("contested")).expect("read"), blocks(HEIR));
}

/// Shown by its name in `volume show`, for people too.
#[test]
fn the_kind_of_fence_is_shown_with_what_it_means() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (host, folder) = (Host::found("house", "a", &[]), TempDir::new().expect("a folder"));
    let lun = folder.path().join("lun");
    fs::File::create(&lun).and_then(|file| file.set_len(512 << 20)).expect("a sparse file");
    let uri = format!("file:{}", text(&lun));
    let made = host.ctl().must(&["volume", "create", "vol1", "--lun", &uri, "--fence", "agent"]);
    assert_eq!((&made["fence"], &made["fence_wait_ms"]), (&"agent".into(), &0.into()));
    assert!(made["fence_how"].as_str().is_some_and(|how| how.contains("operator")), "{made}");
}

/// What the cluster promises is tried out while it is in use, and what does not hold is named, with exit code 4.
#[test]
fn validation_names_what_does_not_hold() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (mut hosts, folder) = (three(), TempDir::new().expect("a folder"));
    with_fence(&hosts, &folder, "lease");
    let report = hosts[0].ctl().must(&["cluster", "validate"]);
    let checks = report["checks"].as_array().expect("checks");
    let found = |what: &str| checks.iter().filter(|check| check["what"] == what).count();
    assert_eq!(
        (found("quorum"), found("voters"), found("clock"), found("flush"), found("fence")),
        (1, 1, 3, 3, 3)
    );
    assert!(checks.iter().all(|check| check["result"] != "failed"), "{report}");
    hosts[1].kill();
    let refused = hosts[0].ctl().run(&["cluster", "validate"]).expect_err("a node is gone");
    assert_eq!(refused.code, 4, "{refused}");
    assert!(refused.message().contains('b'), "{refused}");
}
