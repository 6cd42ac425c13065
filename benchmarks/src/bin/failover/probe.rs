//! A program that overwrites mapped blocks one by one, and the longest time between two completions.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use benchmarks::percentile;

const BLOCKS: u64 = 1024;
const BLOCK: usize = 4096;

/// The longest gaps that were seen, with and without faults.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    /// Milliseconds: the longest gap of each round.
    with_fault: Mutex<Vec<f64>>,
    without: Mutex<Vec<f64>>,
}

impl Probe {
    /// Runs `work` while the program runs on `mount`, then as long again without anything. What `work` gives counts.
    pub(crate) fn around<T>(&self, mount: &Path, work: impl FnOnce() -> T) -> T {
        let writer = Writer::start(&mount.join("probe"));
        let began = Instant::now();
        let given = work();
        let lasted = began.elapsed();
        keep(&self.with_fault, writer.longest_ms());
        let quiet = Instant::now();
        while let Some(left) = lasted.checked_sub(quiet.elapsed()) {
            std::thread::park_timeout(left);
        }
        keep(&self.without, writer.longest_ms());
        writer.end();
        given
    }

    pub(crate) fn print(&self) {
        println!(
            "longest gap between two writes to mapped blocks on another node, per round, in milliseconds"
        );
        for (name, gaps) in [("during a fault", &self.with_fault), ("without one, as long", &self.without)] {
            let mut gaps = gaps.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let [middle, worst, longest] = [0.5, 0.99, 1.0].map(|part| percentile(&mut gaps, part));
            println!("{name:44} {:7} {middle:9.1} {worst:9.1} {longest:9.1}", gaps.len());
        }
    }
}

fn keep(gaps: &Mutex<Vec<f64>>, ms: f64) {
    gaps.lock().unwrap_or_else(PoisonError::into_inner).push(ms);
}

struct Writer {
    stop: Arc<AtomicBool>,
    /// Microseconds.
    longest: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Writer {
    fn start(path: &Path) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.expect("the probe's file");
        // Every block is mapped and committed before the first gap is measured.
        file.write_all_at(&vec![1; BLOCK * usize::try_from(BLOCKS).expect("small")], 0).expect("written");
        file.sync_all().expect("stable");
        let (stop, longest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, measured) = (Arc::clone(&stop), Arc::clone(&longest));
        let thread = std::thread::spawn(move || {
            let (block, mut at, mut last) = (vec![2; BLOCK], 0, Instant::now());
            while !stopped.load(Ordering::Relaxed) {
                file.write_all_at(&block, at % BLOCKS * BLOCK as u64)?;
                at += 1;
                let gap = u64::try_from(last.elapsed().as_micros()).unwrap_or(u64::MAX);
                measured.fetch_max(gap, Ordering::Relaxed);
                last = Instant::now();
            }
            Ok(())
        });
        Self { stop, longest, thread }
    }

    /// The longest gap since this was asked last.
    fn longest_ms(&self) -> f64 {
        Duration::from_micros(self.longest.swap(0, Ordering::Relaxed)).as_secs_f64() * 1e3
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("no panic").expect("the program met no error");
    }
}
