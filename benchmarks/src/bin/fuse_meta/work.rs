//! The same work on any mounts.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

/// Has `workers` in all, spread over the mounts, each make, look at, rename and remove files in a folder of its own (in one
/// folder the kernel lets a mount make one change after the other): `budget` files, or a few each. Gives operations per second,
/// by all workers together.
pub(crate) fn names(mounts: &[PathBuf], workers: usize, budget: usize) -> [(&'static str, f64); 4] {
    let folder = |worker: usize| mounts[worker % mounts.len()].join(format!("worker{worker}"));
    let folders: Vec<PathBuf> = (0..workers).map(folder).collect();
    folders.iter().for_each(|folder| fs::create_dir(folder).expect("mkdir"));
    let files = (budget / workers).max(8);
    let path = |worker: usize, file: usize| folders[worker].join(format!("file{file}"));
    let durable = |worker: usize| {
        File::open(&folders[worker]).expect("the folder").sync_all().expect("fsync");
    };
    let run = |step: &(dyn Fn(usize, usize) + Sync)| rate(workers, files, step);
    let create = run(&|worker, file| {
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).open(path(worker, file)).expect("create");
        file.sync_all().expect("fsync");
    });
    let stat = run(&|worker, file| assert!(fs::metadata(path(worker, file)).is_ok()));
    let rename = run(&|worker, file| {
        fs::rename(path(worker, file), path(worker, file).with_extension("new")).expect("rename");
        durable(worker);
    });
    let unlink = run(&|worker, file| {
        fs::remove_file(path(worker, file).with_extension("new")).expect("unlink");
        durable(worker);
    });
    folders.iter().for_each(|folder| fs::remove_dir(folder).expect("rmdir"));
    [("create", create), ("stat", stat), ("rename", rename), ("unlink", unlink)]
}

/// Runs `step` for each file of each worker, all workers at once: from when the first of them begins.
fn rate(workers: usize, files: usize, step: &(dyn Fn(usize, usize) + Sync)) -> f64 {
    let barrier = Barrier::new(workers);
    let run = |worker| {
        barrier.wait();
        let started = now();
        (0..files).for_each(|file| step(worker, file));
        started
    };
    let started = thread::scope(|scope| {
        let run = &run;
        let all: Vec<_> = (0..workers).map(|worker| scope.spawn(move || run(worker))).collect();
        all.into_iter().map(|worker| worker.join().expect("no panic")).min()
    });
    per_second(workers * files, started.expect("a worker"))
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures time")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn per_second(count: usize, started: Instant) -> f64 {
    count as f64 / started.elapsed().as_secs_f64()
}

/// Fills a directory through one mount and shows it through another.
pub(crate) fn with_directory<T>(
    filled: &Path,
    shown: &Path,
    entries: usize,
    work: impl FnOnce(&Path) -> T,
) -> T {
    let (filled, shown) = (filled.join("many"), shown.join("many"));
    fs::create_dir(&filled).expect("mkdir");
    on_threads(entries, |entry| drop(File::create(filled.join(format!("entry{entry}"))).expect("create")));
    let outcome = work(&shown);
    on_threads(entries, |entry| fs::remove_file(filled.join(format!("entry{entry}"))).expect("unlink"));
    fs::remove_dir(&filled).expect("rmdir");
    outcome
}

fn on_threads(entries: usize, step: impl Fn(usize) + Sync) {
    const THREADS: usize = 16;
    thread::scope(|scope| {
        for part in 0..THREADS {
            let step = &step;
            scope.spawn(move || (part..entries).step_by(THREADS).for_each(step));
        }
    });
}

/// Entries per second of `ls -l`.
pub(crate) fn list(folder: &Path, entries: usize) -> f64 {
    let started = now();
    let shown = Command::new("ls").arg("-l").arg(folder).output().expect("ls runs");
    let speed = per_second(entries, started);
    let lines = shown.stdout.iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(
        lines,
        entries + 1,
        "a line for each, and the sum: {}",
        String::from_utf8_lossy(&shown.stderr)
    );
    speed
}
