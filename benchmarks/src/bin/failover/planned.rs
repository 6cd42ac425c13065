//! The coordinator moves while an application makes files on a third node.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::Figure;
use crate::stage::{Stage, ms};

/// The longest time that a metadata call took while the coordinator moved.
pub(crate) fn pause(stage: &Stage) -> Figure {
    let mut longest = Vec::new();
    for round in 0..stage.rounds {
        let (from, to) = (stage.owner(), stage.owner() % 3 + 1);
        let beside = to % 3 + 1;
        let mount = stage.cluster.mount(beside);
        let moved = AtomicBool::new(false);
        let worst = std::thread::scope(|scope| {
            let calls = scope.spawn(|| {
                let (mut worst, mut number) = (0.0_f64, 0);
                while !moved.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    std::fs::create_dir(mount.join(format!("planned-{round}-{number}"))).expect("made");
                    worst = worst.max(ms(began, Instant::now()));
                    number += 1;
                }
                worst
            });
            let name = stage.cluster.name(to);
            stage.around("planned move", beside, || {
                stage.cluster.ctl(from).must(&["volume", "move", "vol1", "--to", &name]);
            });
            moved.store(true, Ordering::Relaxed);
            calls.join().expect("no call failed")
        });
        longest.push(worst);
    }
    Figure { name: "planned move: longest metadata call", ms: longest, goals: (50.0, 50.0) }
}
