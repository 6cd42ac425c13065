//! Opening the largest disk that there can be: time, and memory of a process of its own.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use vhdx::{Builder, Spec};

use benchmarks::median;

use crate::{Failure, MIB, create, file};

/// First word of the command line of a process that only opens.
pub(crate) const CHILD: &str = "--open";

const DISK_BYTES: u64 = 64 << 40;
const GOAL_MILLIS: f64 = 100.0;
const GOAL_MIB: f64 = 80.0;

/// Opens an image for writing, prints milliseconds and KiB of memory.
pub(crate) fn child(mut words: impl Iterator<Item = String>) -> Result<(), Failure> {
    let path = words.next().ok_or("the path of an image is missing")?;
    let file = file(Path::new(&path))?;
    let start = Instant::now();
    let disk = Builder::open(file).writable()?;
    let millis = start.elapsed().as_secs_f64() * 1000.0;
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("a peak")?;
    println!("{millis} {}", peak.trim().trim_end_matches(" kB"));
    drop(disk);
    Ok(())
}

/// Opens disks of 64 TiB of small and of large blocks.
pub(crate) fn report(dir: &Path, rounds: usize) -> Result<(), Failure> {
    println!("opening a dynamic disk of 64 TiB (goal: {GOAL_MILLIS} ms, {GOAL_MIB} MiB)");
    for block_bytes in [MIB, 32 * MIB] {
        let path = dir.join("large.vhdx");
        let disk = create(&path, &Spec { block_bytes, ..Spec::dynamic(DISK_BYTES) })?;
        // Not the empty disk: a table that is all zeros might be skipped.
        for place in 0..64 {
            disk.resolve_write(place * (DISK_BYTES / 64), 4096)?.complete();
        }
        disk.close()?;
        drop(disk);
        let (mut millis, mut memory) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let output = Command::new(std::env::current_exe()?).arg(CHILD).arg(&path).output()?;
            let text = String::from_utf8(output.stdout)?;
            let (time, peak) = text.trim().split_once(' ').ok_or("two figures")?;
            millis.push(time.parse()?);
            memory.push(peak.parse::<f64>()? / 1024.0);
        }
        let (millis, memory) = (median(&mut millis), median(&mut memory));
        let verdict = if millis < GOAL_MILLIS && memory < GOAL_MIB { "reached" } else { "missed" };
        println!("  {:3} MiB blocks {millis:10.1} ms {memory:10.1} MiB {verdict}", block_bytes / MIB);
        std::fs::remove_file(&path)?;
    }
    Ok(())
}
