//! The coordinator is killed, or hangs; the first call that another node makes afterwards.

use std::fs;
use std::time::Instant;

use rustix::process::Signal;

use crate::Figure;
use crate::stage::{Stage, ms};

pub(crate) fn killed(stage: &Stage) -> Figure {
    measure(stage, "coordinator killed", "coordinator killed: first call elsewhere", Signal::KILL)
}

pub(crate) fn hung(stage: &Stage) -> Figure {
    measure(stage, "coordinator hung", "coordinator hung: first call elsewhere", Signal::STOP)
}

fn measure(stage: &Stage, fault: &'static str, name: &'static str, signal: Signal) -> Figure {
    let mut times = Vec::new();
    for round in 0..stage.rounds {
        let owner = stage.owner();
        // One of the others makes the call, the other one writes to mapped blocks.
        let (calling, writing) = (owner % 3 + 1, (owner + 1) % 3 + 1);
        let path = stage.cluster.mount(calling).join(format!("lost-{}-{round}", signal.as_raw()));
        let took = stage.around(fault, writing, || {
            let began = stage.signal(owner, signal);
            fs::create_dir(&path).expect("held, not failed");
            ms(began, Instant::now())
        });
        times.push(took);
        stage.bring_back(owner);
    }
    Figure { name, ms: times, goals: (1000.0, 2000.0) }
}
