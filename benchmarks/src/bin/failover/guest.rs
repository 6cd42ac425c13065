//! A VM's node dies; the VM runs again on another one.

use cluster_tests::{Ctl, Guest};
use rustix::process::Signal;

use crate::Figure;
use crate::stage::{Stage, ms};

const VM: &str = "wanderer";

pub(crate) fn restarted(stage: &Stage) -> Figure {
    let cluster = &stage.cluster;
    for image in ["system.vhdx", "scratch.vhdx"] {
        let path = cluster.mount(1).join(image);
        Ctl::local().must(&["vhdx", "create", path.to_str().expect("a UTF-8 path"), "--size", "32M"]);
    }
    let _guest = Guest::start(cluster, VM, "system.vhdx", "scratch.vhdx", 1024);
    let mut times = Vec::new();
    for _ in 0..stage.rounds {
        let shown = cluster.ctl(1).must(&["vm", "show", VM]);
        let node = (1..=3).find(|node| shown["owner"] == cluster.name(*node)).expect("it runs on a node");
        let beside = cluster.ctl(node % 3 + 1);
        let began = stage.signal(node, Signal::KILL);
        let ran = stage.until("the VM runs elsewhere", || {
            beside
                .run(&["vm", "show", VM])
                .is_ok_and(|shown| shown["state"] == "running" && shown["owner"] != cluster.name(node))
        });
        times.push(ms(began, ran));
        stage.bring_back(node);
    }
    Figure { name: "node dead: its VM runs elsewhere", ms: times, goals: (5000.0, 5000.0) }
}
