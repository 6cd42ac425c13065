//! The cluster on which all is measured, and what the measurements do to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use cluster_tests::Cluster;
use rustix::process::{Pid, Signal, kill_process_group};

use crate::probe::Probe;

/// Longest wait for a node to come back; a bound, not a pause.
const WITHIN: Duration = Duration::from_secs(60);

/// Three nodes, one volume.
pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    pub(crate) rounds: usize,
    probe: Probe,
}

impl Stage {
    pub(crate) fn set(rounds: usize) -> Self {
        Self { cluster: Cluster::with_usual_times("4G"), rounds, probe: Probe::default() }
    }

    pub(crate) fn probe(&self) -> &Probe {
        &self.probe
    }

    /// Does something to the cluster while a node that it is not done to writes.
    pub(crate) fn around<T>(&self, fault: &'static str, writing: usize, work: impl FnOnce() -> T) -> T {
        self.probe.around(fault, &self.cluster.mount(writing), self.cluster.dir(), work)
    }

    /// The node that coordinates the volume.
    pub(crate) fn owner(&self) -> usize {
        let shown = self.cluster.ctl(1).must(&["volume", "show", "vol1"]);
        (1..=3).find(|node| shown["owner"] == self.cluster.name(*node)).expect("the owner is a node")
    }

    /// Signals all processes of a node, and tells when that was.
    pub(crate) fn signal(&self, node: usize, signal: Signal) -> Instant {
        let file = self.folder(node).join("csvd.pid");
        let text = std::fs::read_to_string(file).expect("a pid file");
        let pid = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
        let group = pid.and_then(Pid::from_raw).expect("a process id");
        let now = Instant::now();
        kill_process_group(group, signal).expect("signalled");
        now
    }

    /// Starts a node that was fenced; its fence may still be under way.
    pub(crate) fn bring_back(&self, node: usize) {
        let beside = self.cluster.ctl(node % 3 + 1);
        self.until("the fence", || {
            beside.must(&["node", "show", &self.cluster.name(node)])["state"] == "fenced"
        });
        self.cluster.start_node(node);
    }

    /// Waits until something is so.
    pub(crate) fn until(&self, what: &str, mut so: impl FnMut() -> bool) -> Instant {
        let began = Instant::now();
        while !so() {
            assert!(began.elapsed() < WITHIN, "not within {} s: {what}", WITHIN.as_secs());
        }
        Instant::now()
    }

    fn folder(&self, node: usize) -> PathBuf {
        self.cluster.dir().join(self.cluster.name(node))
    }
}

/// Milliseconds between two moments.
pub(crate) fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}
