//! A program that overwrites mapped blocks one by one, and the longest time between two completions. Beside it another
//! one overwrites a plain file of the same disk, past every cache: what it waits for as well is the machine's.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use benchmarks::percentile;
use blockio::AlignedBuf;

const BLOCKS: u64 = 1024;
const BLOCK: usize = 4096;
/// `O_DIRECT`.
const DIRECT: i32 = rustix::fs::OFlags::DIRECT.bits().cast_signed();

/// The longest gaps of one round, in milliseconds: on the mount and beside it, during the fault and without one.
#[derive(Clone, Copy, Debug)]
struct Round {
    fault: &'static str,
    with_fault: [f64; 2],
    without: [f64; 2],
}

/// The longest gaps that were seen, with and without faults.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    rounds: Mutex<Vec<Round>>,
}

impl Probe {
    /// Runs `work` while the programs run on `mount` and on `disk`, then as long again without anything. What `work` gives
    /// counts.
    pub(crate) fn around<T>(
        &self,
        fault: &'static str,
        mount: &Path,
        disk: &Path,
        work: impl FnOnce() -> T,
    ) -> T {
        let writers = [Writer::start(&mount.join("probe")), Writer::start(&disk.join("probe"))];
        let longest = || [writers[0].longest_ms(), writers[1].longest_ms()];
        let _starting = longest();
        let began = Instant::now();
        let given = work();
        let lasted = began.elapsed();
        let with_fault = longest();
        let quiet = Instant::now();
        while let Some(left) = lasted.checked_sub(quiet.elapsed()) {
            std::thread::park_timeout(left);
        }
        let without = longest();
        let round = Round { fault, with_fault, without };
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner).push(round);
        writers.into_iter().for_each(Writer::end);
        given
    }

    pub(crate) fn print(&self) {
        let rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        println!(
            "longest gap between two writes of 4 KiB on another node and to a plain file beside it, per round, in ms"
        );
        let mut faults: Vec<_> = rounds.iter().map(|round| round.fault).collect();
        faults.dedup();
        for fault in faults {
            let of_it = |round: &&Round| round.fault == fault;
            print(fault, rounds.iter().filter(of_it));
        }
        print("all", rounds.iter());
    }
}

fn print<'a>(name: &str, rounds: impl Iterator<Item = &'a Round> + Clone) {
    let figures = |gap: fn(&Round) -> f64| {
        let mut gaps: Vec<_> = rounds.clone().map(gap).collect();
        [0.5, 0.99].map(|part| percentile(&mut gaps, part))
    };
    for (when, mount, beside) in [
        ("fault", figures(|round| round.with_fault[0]), figures(|round| round.with_fault[1])),
        ("none", figures(|round| round.without[0]), figures(|round| round.without[1])),
    ] {
        println!(
            "{name:28} {when:15} {:7} {:9.1} {:9.1}  beside {:9.1} {:9.1}",
            rounds.clone().count(),
            mount[0],
            mount[1],
            beside[0],
            beside[1]
        );
    }
}

struct Writer {
    stop: Arc<AtomicBool>,
    /// Microseconds.
    longest: Arc<AtomicU64>,
    thread: JoinHandle<std::io::Result<()>>,
}

impl Writer {
    fn start(path: &Path) -> Self {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).custom_flags(DIRECT);
        let file = options.open(path).expect("the probe's file");
        // Every block is mapped and committed before the first gap is measured.
        let blocks = AlignedBuf::copy_of(&vec![1; BLOCK * usize::try_from(BLOCKS).expect("small")]);
        file.write_all_at(&blocks, 0).expect("written");
        file.sync_all().expect("stable");
        let (stop, longest) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, measured) = (Arc::clone(&stop), Arc::clone(&longest));
        let thread = std::thread::spawn(move || {
            let block = AlignedBuf::copy_of(&[2; BLOCK]);
            let (mut at, mut last) = (0, Instant::now());
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
