//! A LUN that is damaged: what is wrong is found and named, and an administrator puts it right with the cluster running.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use blockio::{BlockDevice, FaultDevice, FileDevice, NbdExport, NbdServer};
use cluster_tests::{Cluster, until};
use serde_json::Value;
use tempfile::TempDir;

use crate::{device_present, text};

const BLOCK: u64 = 4096;
/// Where the intent logs lie (csvfs/FORMAT.md).
const LOGS: Range<u64> = 4 << 20..20 << 20;
const LANE: u64 = 64 << 10;
const RECORD_MAGIC: &[u8] = b"CSVFS\0IR";
/// More than the metadata of a small volume takes, from the beginning of the LUN.
const METADATA_ENDS: usize = 64 << 20;

fn problems(report: &Value) -> Vec<String> {
    let problems = report["problems"].as_array().expect("a list of problems");
    problems.iter().map(|problem| problem["what"].as_str().expect("a sentence").to_owned()).collect()
}

/// A table that has names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    /// Directory and name, and what has the name.
    Entries,
    /// Directory and place, and what has it, with its name.
    Order,
}

/// Changes a name wherever it stands on the LUN in one of the tables. Neither the first nor the last name of its directory.
fn change_name(lun: &Path, table: Table, (from, to): (&str, &str)) {
    let file = File::options().read(true).write(true).open(lun).expect("the LUN is a file");
    let mut bytes = vec![0; METADATA_ENDS];
    file.read_exact_at(&mut bytes, 0).expect("it is longer");
    // Before it stand its directory, and before that the end of another name; or a kind, and before that the number of an inode.
    let is_of = |at: &usize| match bytes[at - 9] {
        0..b' ' => table == Table::Order,
        _ => table == Table::Entries,
    };
    let ends = 9..bytes.len() - from.len();
    let found: Vec<_> = ends.filter(|at| bytes[*at..].starts_with(from.as_bytes())).filter(is_of).collect();
    assert!(!found.is_empty(), "{from} stands in {table:?}");
    for at in found {
        file.write_all_at(to.as_bytes(), at as u64).expect("written");
    }
}

// The order of names and the entries are made from each other again; no content is lost, whichever was damaged.
#[test]
fn bytes_of_the_metadata_that_were_changed_are_found_and_repaired_while_the_volume_is_used() {
    if !device_present("/dev/fuse") {
        return;
    }
    check_repair_of(Table::Entries);
    check_repair_of(Table::Order);
}

fn check_repair_of(table: Table) {
    let mut cluster = Cluster::start("256M");
    let (names, changed) = (["damaged-name-2", "damaged-name-4", "damaged-name-6"], "damaged-name-5");
    // Not the name itself: that is looked for on the LUN.
    let content = |name: &str| name.to_uppercase().repeat(1000);
    for name in names {
        fs::write(cluster.mount(1).join(name), content(name)).expect("written");
    }
    cluster.stop();
    change_name(&cluster.lun(), table, (names[1], changed));
    cluster.restart();
    let found = problems(&cluster.ctl(2).check("vol1", &[]));
    for name in [names[1], changed] {
        assert!(found.iter().any(|what| what.contains(name)), "{table:?}: {name} is named: {found:?}");
    }
    // A file that somebody uses meanwhile goes on.
    let mut used = File::create(cluster.mount(3).join("used")).expect("made");
    used.write_all(b"before ").expect("written");
    let report = cluster.ctl(2).check("vol1", &["--repair"]);
    used.write_all(b"after").expect("written");
    assert_eq!(problems(&report), Vec::<String>::new(), "{report}");
    let actions = report["actions"].as_array().expect("a list of actions");
    assert!(!actions.is_empty() && actions.iter().all(|action| action["done"] == true), "{report}");
    assert_eq!(problems(&cluster.ctl(1).check("vol1", &[])), Vec::<String>::new());
    assert_eq!(fs::read(cluster.mount(1).join("used")).expect("readable"), b"before after");
    for node in [1, 3] {
        for name in names.into_iter().chain([changed]) {
            let found = fs::read_to_string(cluster.mount(node).join(name)).expect("it is there");
            let wanted = content(if name == changed { names[1] } else { name });
            assert!(found == wanted, "{table:?}: {name} on node {node}");
        }
    }
}

/// A LUN behind an NBD server in this process, whose sectors may go bad.
struct Lun {
    device: Arc<FaultDevice<FileDevice>>,
    uri: String,
    /// Declared in the order in which they must go.
    _server: NbdServer,
    _folder: TempDir,
}

impl Lun {
    fn serve() -> Self {
        let folder = TempDir::with_prefix("lun-").expect("a temporary folder");
        let file = FileDevice::create(folder.path().join("image"), 256 << 20).expect("an image");
        let device = Arc::new(FaultDevice::new(file));
        let socket = folder.path().join("sock");
        let export = NbdExport::new(Arc::clone(&device) as Arc<dyn BlockDevice>, false);
        let server = NbdServer::listen(&socket, Arc::new(export)).expect("it listens");
        let uri = format!("nbd+unix:///lun?socket={}", text(&socket));
        Self { device, uri, _server: server, _folder: folder }
    }

    /// Breaks the lanes that have records of intent logs, also the places of the next ones: what was merged already is not read
    /// again. Gives how many.
    fn break_logs(&self) -> usize {
        let mut block = vec![0; 4096];
        let mut is_record = |at: &u64| {
            self.device.read_at(*at, &mut block).expect("readable");
            block.starts_with(RECORD_MAGIC)
        };
        let lanes = (LOGS.start..LOGS.end).step_by(4096).filter(|at| is_record(at)).map(|at| at / LANE);
        let lanes: BTreeSet<u64> = lanes.collect();
        for lane in &lanes {
            // The first block of a lane may be the header of its ring.
            self.device.break_range(lane * LANE + BLOCK..(lane + 1) * LANE);
        }
        lanes.len()
    }
}

/// A cluster in which node 1 coordinates and has written `other`, and node 2 has just been killed. What it had flushed of `held` is
/// in a log on bad sectors.
fn with_a_dead_node_whose_log_cannot_be_read(lun: &Lun) -> Cluster {
    let cluster = Cluster::on(&lun.uri);
    drop(cluster.ctl(1).run(&["volume", "move", "vol1", "--to", &cluster.name(1)]));
    fs::write(cluster.mount(1).join("other"), b"content").expect("written");
    let mut held = File::create(cluster.mount(2).join("held")).expect("made");
    for byte in 1..=4 {
        held.write_all(&[byte; 8192]).expect("written");
        held.sync_all().expect("the log says so");
    }
    assert!(lun.break_logs() > 0, "node 2 has a log");
    cluster.fault(2, "kill");
    drop(held);
    cluster
}

// Invariant D4, on a LUN with bad sectors.
#[test]
fn what_a_dead_node_held_stays_locked_while_its_log_cannot_be_read_until_the_log_is_given_up() {
    if !device_present("/dev/fuse") {
        return;
    }
    let lun = Lun::serve();
    let cluster = with_a_dead_node_whose_log_cannot_be_read(&lun);
    let ctl = cluster.ctl(1);
    // Asked while nobody knows yet that the node is dead: who asks waits no longer than until it is known.
    let path = cluster.mount(3).join("held");
    let locked = cluster.ctl(3).run(&["file", "grants", text(&path)]).expect_err("a dead client holds it");
    assert!(locked.to_string().contains("give-up-log --client 2."), "{locked}");
    let unreadable = |report: &Value| {
        problems(report).into_iter().find_map(|what| {
            let client = what.strip_prefix("client ")?.split(' ').next()?.to_owned();
            what.contains("give-up-log").then_some(client)
        })
    };
    let report = until("the log is named", || ctl.check("vol1", &[]), |report| unreadable(report).is_some());
    let client = unreadable(&report).expect("just found");
    // The others are served; nobody gets what the dead client held.
    let other = File::options().write(true).open(cluster.mount(3).join("other")).expect("it opens");
    other.write_all_at(b"CONTENT", 0).and_then(|()| other.sync_all()).expect("written");
    let mut writer = Command::new("dd")
        .args(["if=/dev/zero", "bs=4096", "count=1", "conv=notrunc,fsync", "status=none"])
        .arg(format!("of={}", text(&cluster.mount(3).join("held"))))
        .spawn()
        .expect("dd can be started");
    assert!(unreadable(&ctl.check("vol1", &[])).is_some(), "it has not been read meanwhile");
    assert!(writer.try_wait().expect("a child").is_none(), "it writes what is locked");
    let give_up = |client: &str| ctl.run(&["volume", "give-up-log", "vol1", "--client", client]);
    assert_eq!(give_up("9.9.9").expect_err("no such client").code, 3);
    assert_eq!(give_up(&client).expect("it is given up")["client"], client.as_str());
    assert!(writer.wait().expect("a child").success(), "nobody holds it any more");
    lun.device.heal();
    assert_eq!(problems(&ctl.check("vol1", &[])), Vec::<String>::new());
    let mut content = Vec::new();
    File::open(cluster.mount(1).join("held")).expect("there").read_to_end(&mut content).expect("readable");
    assert_eq!(content[..4096], [0; 4096]);
}

// Invariant D4: a fault of the LUN that passes needs nobody's hands. The daemon tells the coordinator again of who is over.
#[test]
fn what_a_dead_node_held_is_free_with_all_it_had_flushed_when_its_log_can_be_read_again() {
    if !device_present("/dev/fuse") {
        return;
    }
    let lun = Lun::serve();
    let cluster = with_a_dead_node_whose_log_cannot_be_read(&lun);
    let ctl = cluster.ctl(1);
    let is_locked = |report: &Value| problems(report).iter().any(|what| what.contains("give-up-log"));
    until("the log is named", || ctl.check("vol1", &[]), is_locked);
    lun.device.heal();
    until("nobody holds it", || ctl.check("vol1", &[]), |report| problems(report).is_empty());
    let content = fs::read(cluster.mount(3).join("held")).expect("readable");
    assert!(content == [[1; 8192], [2; 8192], [3; 8192], [4; 8192]].concat(), "the log was replayed");
}
