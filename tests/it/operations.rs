//! Operations of a whole cluster that goes on working meanwhile: balance, settings, certificates, commands over the network.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use cluster_tests::{Cluster, Ctl, Host, run_tool, until};
use serde_json::Value;
use tempfile::TempDir;

use crate::members::{three, voters, with_volume};
use crate::{device_present, text};

/// A program that makes, renames and removes files, each of which asks the coordinator.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<u64>>,
}

impl Load {
    fn start(folder: PathBuf, name: &str) -> Self {
        Self::in_turn(vec![folder], name)
    }

    /// The same work in each of the folders, so that all have the same load.
    fn in_turn(folders: Vec<PathBuf>, name: &str) -> Self {
        let (stop, name) = (Arc::new(AtomicBool::new(false)), name.to_owned());
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Acquire) {
                for folder in &folders {
                    let (first, second) =
                        (folder.join(format!("{name}-1")), folder.join(format!("{name}-2")));
                    fs::write(&first, b"x")?;
                    fs::rename(&first, &second)?;
                    fs::remove_file(&second)?;
                }
                rounds += 1;
            }
            Ok(rounds)
        });
        Self { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, Ordering::Release);
        assert!(self.thread.join().expect("no panic").expect("the application met no error") > 0);
    }
}

#[test]
fn of_two_busy_coordinators_on_one_node_one_moves_away_with_its_reason() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let ctl = cluster.ctl(1);
    let second = cluster.dir().join("second.img");
    fs::File::create(&second).and_then(|file| file.set_len(1 << 30)).expect("a sparse file");
    ctl.must(&["volume", "create", "vol2", "--lun", &format!("file:{}", text(&second))]);
    let n1 = cluster.name(1);
    ctl.run(&["volume", "move", "vol1", "--to", &n1]).ok();
    let owners = || -> Value {
        let volumes = ctl.must(&["volume", "list"]);
        let of = |volume: &Value| volume["owner"].clone();
        volumes["volumes"].as_array().expect("volumes").iter().map(of).collect::<Vec<_>>().into()
    };
    assert_eq!(owners(), Value::from(vec![n1.as_str(), n1.as_str()]));
    cluster.ctl(2).must(&["cluster", "wait", "--volume", "vol2"]);
    let mount = |volume: &str| cluster.dir().join(cluster.name(2)).join("mnt").join(volume);
    let load = Load::in_turn(vec![mount("vol1"), mount("vol2")], "a");
    until("the move", owners, |owners| owners[0] != owners[1]);
    load.end();
    let events = ctl.must(&["events"]).to_string();
    assert!(events.contains("to balance the load") && events.contains("requests/s"), "{events}");
    for volume in ["vol1", "vol2"] {
        let report = ctl.must(&["volume", "check", volume]);
        assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
    }

    // What one node has acknowledged, the others know when they are asked next.
    for round in 0..30 {
        let value = if round % 2 == 0 { "off" } else { "on" };
        let set = cluster.ctl(round % 3 + 1).must(&["cluster", "set", "balance.volumes", value]);
        assert_eq!(set["value"], value);
        let settings = cluster.ctl((round + 1) % 3 + 1).must(&["cluster", "settings"]);
        assert_eq!(settings["settings"][0]["value"], value, "round {round}: {settings}");
    }
    assert_eq!(ctl.run(&["cluster", "set", "balance.volumes", "perhaps"]).expect_err("no value").code, 2);
    assert_eq!(ctl.run(&["cluster", "set", "no.such", "on"]).expect_err("no setting").code, 3);
    assert_eq!(ctl.must(&["cluster", "set", "balance.volumes", "--default"])["value"], "on");
}

fn remote(address: &str, identity: &std::path::Path) -> Result<Value, cluster_tests::CtlError> {
    Ctl::to(address).run(&["--identity", text(identity), "cluster", "show"])
}

// The certificate proves who asks, whichever member answers; strangers learn nothing.
#[test]
fn a_member_is_administered_over_the_network_by_whoever_has_a_certificate() {
    let (a, stranger) = (Host::found("house", "a", &[]), Host::found("other", "x", &[]));
    let b = Host::join("b", &a.token());
    voters(&a, &["a", "b"]);
    let shown = remote(b.address(), a.dir()).expect("a member asks another");
    assert_eq!(shown["name"], "house", "{shown}");
    let here = shown["nodes"].as_array().expect("nodes").iter().find(|node| node["this_node"] == true);
    assert_eq!(here.expect("one answers")["name"], "b");
    let refused = remote(b.address(), stranger.dir()).expect_err("of another cluster");
    assert_eq!(refused.code, 4, "{refused}");
    let nobody = remote("127.0.0.1:1", a.dir()).expect_err("nobody listens");
    assert_eq!(nobody.code, 5, "{nobody}");
    let nameless = remote(b.address(), TempDir::new().expect("a folder").path()).expect_err("no identity");
    assert_eq!(nameless.code, 3, "{nameless}");
}

// Old certificates are refused, and nothing stands still for it.
#[test]
fn certificates_are_renewed_under_load_and_old_ones_refused_after_the_grace() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (hosts, lun) = (three(), TempDir::new().expect("a folder"));
    with_volume(&hosts, &lun);
    let [a, b, c] = &hosts;
    let stolen = TempDir::new().expect("a folder");
    for file in ["csvd.toml", "node.crt", "node.key", "ca.crt"] {
        fs::copy(b.dir().join(file), stolen.path().join(file)).expect("copied");
    }
    let config = fs::read_to_string(stolen.path().join("csvd.toml")).expect("read");
    let moved = config.replace(text(b.dir()), text(stolen.path()));
    fs::write(stolen.path().join("csvd.toml"), moved).expect("written");
    remote(a.address(), stolen.path()).expect("it is still good");
    let loads: Vec<_> = hosts.iter().map(|host| Load::start(host.mount("vol1"), host.name())).collect();

    a.ctl().must(&["cluster", "rotate-certificates", "--grace", "5s"]);
    let certificate = |host: &Host| fs::read(host.dir().join("node.crt")).expect("read");
    let old = fs::read(stolen.path().join("node.crt")).expect("read");
    until("the renewal", || (certificate(b) != old).into(), |renewed| *renewed == true);
    until(
        "the refusal of the old one",
        || remote(a.address(), stolen.path()).is_err().into(),
        |refused| *refused == true,
    );
    let refused = remote(a.address(), stolen.path()).expect_err("refused for good");
    assert!(refused.message().contains("renewed"), "{refused}");
    remote(a.address(), b.dir()).expect("the new one is good");
    // All three still are one cluster, and nobody was cut off.
    c.ctl().must(&["volume", "move", "vol1", "--to", "b"]);
    loads.into_iter().for_each(Load::end);
    let events = a.ctl().must(&["events"]).to_string();
    assert!(!events.contains("fencing") && events.contains("cluster.certificates"), "{events}");
    assert_eq!(a.ctl().must(&["health"])["status"], "ok");
}

// Its nodes hold the key of their authority like those of any other cluster; its fence reaches this machine alone (A1).
#[test]
fn an_embedded_cluster_renews_its_certificates_and_lets_nobody_join_from_elsewhere() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let certificates =
        || (1..=3).map(|n| fs::read(cluster.dir().join(cluster.name(n)).join("node.crt")).expect("read"));
    let old: Vec<_> = certificates().collect();
    cluster.ctl(2).must(&["cluster", "rotate-certificates", "--grace", "2s"]);
    until(
        "the renewal on every node",
        || certificates().zip(&old).all(|(new, old)| new != *old).into(),
        |renewed| *renewed == true,
    );
    cluster.ctl(1).must(&["volume", "move", "vol1", "--to", &cluster.name(3)]);
    assert_eq!(cluster.ctl(1).must(&["health"])["status"], "ok");
    let refused =
        cluster.ctl(1).run(&["cluster", "token"]).expect_err("its fence would not reach the new node");
    assert!(refused.code == 4 && refused.message().contains("embedded"), "{refused}");
}

const WRITER: &str = "writer";

/// A guest that changes a word of each of its pages all the time, and says FAIL when one is not as it left it.
fn start_writer(host: &Host) {
    let of_guest = ["--kernel", "builtin:dirtier", "--cmdline", "role=dirtier set=4 rate=0"];
    let create = [&["vm", "create", WRITER, "--memory", "64M"][..], &of_guest].concat();
    host.ctl().must(&create);
    host.ctl().must(&["vm", "start", WRITER]);
    await_pass(host, 1);
}

/// A guest that boots now finds devices that a node of the release before does not have.
fn newer_devices_stay_with_newer_nodes(hosts: &mut [Host]) {
    let (a, c) = (hosts[0].name().to_owned(), hosts[2].name().to_owned());
    hosts[2].ctl().must(&["vm", "start", WRITER]);
    hosts[2].ctl().must(&["vm", "migrate", WRITER, "--to", &a]);
    hosts[2].stop();
    hosts[2].set_env("CSVD_PROTOCOL_MAX", "1");
    hosts[2].start();
    hosts[0].ctl().must(&["cluster", "wait", "--nodes", "3", "--volume", "vol1"]);
    let refused = hosts[0].ctl().run(&["vm", "migrate", WRITER, "--to", &c]);
    let refused = refused.expect_err("it would not understand the guest's drivers");
    assert!(refused.code == 4 && refused.to_string().contains("virtual devices of version 1"), "{refused}");
    a_checkpoint_with_newer_devices_stays_with_newer_nodes(hosts);
    hosts[0].ctl().must(&["vm", "stop", "--force", WRITER]);
    hosts[2].stop();
    hosts[2].set_env("CSVD_PROTOCOL_MAX", "2");
    hosts[2].start();
    hosts[0].ctl().must(&["cluster", "wait", "--nodes", "3", "--volume", "vol1"]);
}

/// The same of a guest that comes from a checkpoint, after its VM was booted with older devices.
fn a_checkpoint_with_newer_devices_stays_with_newer_nodes(hosts: &[Host]) {
    let (ctl, a, c) = (hosts[0].ctl(), hosts[0].name(), hosts[2].name());
    let devices = || ctl.must(&["vm", "show", WRITER])["spec"]["devices"].as_u64();
    ctl.must(&["vm", "checkpoint", "create", WRITER, "newer"]);
    ctl.must(&["vm", "stop", "--force", WRITER]);
    ctl.must(&["vm", "start", WRITER]);
    assert_eq!(devices(), Some(0), "what all nodes have");
    ctl.must(&["vm", "migrate", WRITER, "--to", c]);
    let restore = ["vm", "checkpoint", "restore", WRITER, "newer"];
    let refused = ctl.run(&restore).expect_err("it does not have that guest's devices");
    assert!(refused.code == 4 && refused.message().contains("virtual devices of version 1"), "{refused}");
    ctl.must(&["vm", "migrate", WRITER, "--to", a]);
    ctl.must(&restore);
    assert_eq!(devices(), Some(1), "what its drivers have found");
    let refused = ctl.run(&["vm", "migrate", WRITER, "--to", c]).expect_err("as before the checkpoint");
    assert!(refused.code == 4 && refused.to_string().contains("virtual devices of version 1"), "{refused}");
    await_pass(&hosts[0], 1);
    ctl.must(&["vm", "checkpoint", "delete", WRITER, "newer"]);
}

/// Waits until the guest has gone over its pages so often; gives how often that is.
fn await_pass(host: &Host, least: u64) -> u64 {
    let last = |console: &Value| {
        let said = console["text"].as_str().unwrap_or("");
        assert!(!said.contains("FAIL"), "memory was lost: {said}");
        let mut passes =
            said.lines().filter_map(|line| line.strip_prefix("pass ")?.split(' ').next()?.parse().ok());
        passes.next_back().unwrap_or(0)
    };
    let console = || host.ctl().must(&["vm", "console", WRITER]);
    last(&until("the guest's next pass over its memory", console, |console| last(console) >= least))
}

/// Moves the guest and sees it find all pages as it left them; gives how many of them went as differences.
fn delta_pages(from: &Host, to: &Host) -> u64 {
    let before = await_pass(from, 1);
    let report = from.ctl().must(&["vm", "migrate", WRITER, "--to", to.name()]);
    await_pass(to, before + 2);
    report["delta_pages"].as_u64().expect("a figure")
}

// Invariant G4: nodes of two releases are one cluster; what the older one does not know waits until it is upgraded.
#[test]
fn a_node_of_the_release_before_takes_part_and_what_it_does_not_know_waits_for_its_upgrade() {
    if !device_present("/dev/fuse") {
        return;
    }
    let (mut hosts, lun) = (three(), TempDir::new().expect("a folder"));
    hosts[2].stop();
    hosts[2].set_env("CSVD_PROTOCOL_MAX", "1");
    hosts[2].start();
    voters(&hosts[0], &["a", "b", "c"]);
    with_volume(&hosts, &lun);
    let spoken = |host: &Host| {
        let nodes = host.ctl().must(&["node", "list"]);
        let found = nodes["nodes"].as_array().expect("nodes").iter().find(|node| node["name"] == "c");
        found.cloned().unwrap_or(Value::Null)["protocol"].clone()
    };
    until("a connection to it", || spoken(&hosts[0]), |version| *version == 1);
    // It writes, reads, coordinates and hands over like the others.
    fs::write(hosts[2].mount("vol1").join("old"), b"by the old one").expect("written");
    assert_eq!(fs::read(hosts[0].mount("vol1").join("old")).expect("read"), b"by the old one");
    hosts[0].ctl().must(&["volume", "move", "vol1", "--to", "c"]);
    fs::write(hosts[1].mount("vol1").join("new"), b"through the old one").expect("written");
    for command in [&["node", "drain", "b"][..], &["cluster", "set", "balance.volumes", "off"]] {
        let refused = hosts[0].ctl().run(command).expect_err("it would not understand");
        assert!(refused.code == 4 && refused.message().contains("node c"), "{refused}");
    }
    let stranger = remote(hosts[2].address(), hosts[0].dir()).expect_err("it knows no such connection");
    assert_ne!(stranger.code, 0, "{stranger}");
    hosts[0].ctl().must(&["volume", "move", "vol1", "--to", "a"]);
    let guest = device_present("/dev/kvm");
    if guest {
        start_writer(&hosts[0]);
        assert_eq!(delta_pages(&hosts[0], &hosts[2]), 0, "the older one takes whole pages");
        assert_eq!(delta_pages(&hosts[2], &hosts[0]), 0, "and sends them");
    }

    hosts[2].stop();
    hosts[2].set_env("CSVD_PROTOCOL_MAX", "2");
    hosts[2].start();
    until("a connection to it", || spoken(&hosts[0]), |version| *version == 2);
    hosts[0].ctl().must(&["cluster", "wait", "--nodes", "3", "--volume", "vol1"]);
    if guest {
        assert!(delta_pages(&hosts[0], &hosts[2]) > 0, "both have differences");
        hosts[0].ctl().must(&["vm", "stop", "--force", WRITER]);
        newer_devices_stay_with_newer_nodes(&mut hosts);
    }
    hosts[0].ctl().must(&["node", "drain", "b"]);
    hosts[0].ctl().must(&["node", "resume", "b"]);
    assert_eq!(fs::read(hosts[2].mount("vol1").join("new")).expect("read"), b"through the old one");
}

#[test]
fn logs_and_state_of_all_nodes_are_gathered_and_a_dead_node_is_named() {
    if !device_present("/dev/fuse") {
        return;
    }
    let cluster = Cluster::start("1G");
    let (ctl, folder) = (cluster.ctl(1), TempDir::new().expect("a folder"));
    let collected = ctl.must(&["log", "collect", text(&folder.path().join("logs"))]);
    assert_eq!(collected["missing"].as_array().map(Vec::len), Some(0), "{collected}");
    for node in 1..=3 {
        let copy = fs::read(folder.path().join("logs").join(cluster.name(node)).join("csvd.log"));
        let copy = copy.expect("copied");
        let own = fs::read(cluster.dir().join(cluster.name(node)).join("log/csvd.log")).expect("read");
        assert!(!copy.is_empty() && own.starts_with(&copy), "node {node}: the log, as far as it had come");
    }
    cluster.fault(3, "kill");
    let bundle = folder.path().join("bundle.tar");
    let bundled = ctl.must(&["support", "bundle", text(&bundle)]);
    let missing = bundled["missing"][0].as_str().expect("one is missing");
    assert!(missing.starts_with(&cluster.name(3)), "{missing}");
    let names = run_tool("tar", &["-tf", text(&bundle)]);
    let log = format!("{}/csvd.log", cluster.name(2));
    for name in ["cluster.json", "events.json", "health.json", "volume-state.json", "vms.json", &log] {
        assert!(names.lines().any(|line| line == name), "{name} is in the bundle: {names}");
    }
    assert!(!fs::read(&bundle).expect("read").windows(11).any(|part| part == b"PRIVATE KEY"), "no secret");

    let top = ctl.must(&["top", "--count", "1", "--interval", "1s"]);
    assert_eq!(top["nodes"].as_array().map(Vec::len), Some(3), "{top}");
    assert!(top["volumes"][0]["per_second"]["requests"].is_number(), "{top}");
}
