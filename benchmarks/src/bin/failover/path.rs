//! A node loses its path to the LUN.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use crate::Figure;
use crate::stage::{Stage, ms};

/// From the loss of the path to the end of the first write that was begun after it.
pub(crate) fn lost(stage: &Stage) -> Figure {
    let node = stage.owner() % 3 + 1;
    let file = File::create(stage.cluster.mount(node).join("path")).expect("made");
    file.write_all_at(&[1; 4096], 0).expect("written");
    file.sync_all().expect("stable");
    let mut times = Vec::new();
    for _ in 0..stage.rounds {
        let began = Instant::now();
        stage.cluster.fault(node, "lun-fail");
        file.write_all_at(&[2; 4096], 0).expect("held, not failed");
        times.push(ms(began, Instant::now()));
        until_state(stage, node, "redirected_block");
        stage.cluster.fault(node, "lun-heal");
        until_state(stage, node, "direct");
    }
    Figure { name: "path lost: first write through a peer", ms: times, goals: (1000.0, 1000.0) }
}

fn until_state(stage: &Stage, node: usize, wanted: &str) {
    let name = stage.cluster.name(node);
    stage.until(wanted, || {
        let rows = stage.cluster.ctl(node).must(&["volume", "state", "vol1", "--node", &name]);
        rows["states"][0]["state"] == wanted
    });
}
