//! Operations of a whole cluster that goes on working meanwhile: balance, settings, certificates, commands over the network.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cluster_tests::{Cluster, Ctl, Host};
use serde_json::Value;
use tempfile::TempDir;

use crate::members::voters;
use crate::{device_present, text};

/// A loaded machine may take long; a bound, not a pause.
const LIMIT: Duration = Duration::from_secs(120);

fn until(what: &str, mut ask: impl FnMut() -> Value, wanted: impl Fn(&Value) -> bool) -> Value {
    let started = Instant::now();
    loop {
        let found = ask();
        if wanted(&found) {
            return found;
        }
        assert!(started.elapsed() < LIMIT, "{what} did not happen within {LIMIT:?}: {found}");
    }
}

/// A program that makes, renames and removes files, each of which asks the coordinator.
struct Load {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<u64>>,
}

impl Load {
    fn start(folder: PathBuf, name: &str) -> Self {
        let (stop, name) = (Arc::new(AtomicBool::new(false)), name.to_owned());
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !stopped.load(Ordering::Acquire) {
                let (first, second) = (folder.join(format!("{name}-1")), folder.join(format!("{name}-2")));
                fs::write(&first, b"x")?;
                fs::rename(&first, &second)?;
                fs::remove_file(&second)?;
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
    let loads = [Load::start(mount("vol1"), "a"), Load::start(mount("vol2"), "b")];
    until("the move", owners, |owners| owners[0] != owners[1]);
    loads.into_iter().for_each(Load::end);
    let events = ctl.must(&["events"]).to_string();
    assert!(events.contains("to balance the load") && events.contains("requests/s"), "{events}");
    for volume in ["vol1", "vol2"] {
        let report = ctl.must(&["volume", "check", volume]);
        assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
    }

    assert_eq!(ctl.must(&["cluster", "set", "balance.volumes", "off"])["value"], "off");
    let settings = cluster.ctl(3).must(&["cluster", "settings"]);
    assert_eq!(settings["settings"][0]["value"], "off", "{settings}");
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
