//! The image library beside qemu and beside the raw file, on files of one folder, in one run.
//!
//! `vhdx_io [--dir DIR] [--rounds N]`: everything with O_DIRECT, qemu with `cache=none`. Turns are short and alternate, so
//! that whatever else the machine does meets both sides; the median counts.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

mod chain;
mod load;
mod opening;
mod qemu;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use benchmarks::{Row, median, print_table};
use blockio::{BlockDevice, FileDevice, ImageFile, IoOp, OpenOptions};
use load::{Flush, Shifted, drive_for, drive_through};
use vhdx::{Builder, Disk, Spec, from_raw, to_raw};

type Failure = Box<dyn std::error::Error>;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The disk that is written at random: nearly every write meets a block without a place.
const SPARSE_BYTES: u64 = 64 * GIB;
/// The disk whose blocks all have their place.
const DENSE_BYTES: u64 = GIB;

struct Arguments {
    dir: PathBuf,
    rounds: usize,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let mut parsed = Self { dir: std::env::temp_dir(), rounds: 5 };
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or(format!("{word} needs a value"));
            match word.as_str() {
                "--dir" => parsed.dir = value()?.into(),
                "--rounds" => parsed.rounds = value()?.parse()?,
                _ => return Err(format!("{word}: not known; use --dir DIR, --rounds N").into()),
            }
        }
        Ok(parsed)
    }
}

fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1).peekable();
    if words.next_if(|word| word == opening::CHILD).is_some() {
        return opening::child(words);
    }
    let arguments = Arguments::parse(words)?;
    let folder = tempfile::Builder::new().prefix("vhdx_io").tempdir_in(&arguments.dir)?;
    let (dir, rounds) = (folder.path(), arguments.rounds);
    print_table(
        "4 KiB random writes into unallocated space, queue depth 16 (IOPS)",
        "qemu-nbd",
        "vhdx",
        &[
            allocation("1 MiB blocks, one flush at the end", dir, MIB, Flush::AtEnd, rounds)?,
            allocation("32 MiB blocks, one flush at the end", dir, 32 * MIB, Flush::AtEnd, rounds)?,
            allocation("1 MiB blocks, flush after each", dir, MIB, Flush::AfterEach, rounds)?,
            allocation("32 MiB blocks, flush after each", dir, 32 * MIB, Flush::AfterEach, rounds)?,
        ],
    );
    print_table(
        "4 KiB at queue depth 32 where all blocks have their place (IOPS)",
        "raw file",
        "vhdx",
        &steady(dir, rounds * 3)?,
    );
    print_table("1 GiB of data converted (MiB/s)", "qemu-img", "vhdx", &conversion(dir, rounds)?);
    print_table("A chain of 16 images (IOPS)", "one image", "sixteen", &chain::reads(dir, rounds * 3)?);
    opening::report(dir, rounds)?;
    println!("reproduce: cargo xtask bench vhdx_io");
    Ok(())
}

fn new_file(path: &Path) -> Result<Arc<dyn ImageFile>, Failure> {
    std::fs::File::create(path)?;
    Ok(Arc::new(FileDevice::open(path, OpenOptions::default())?))
}

fn file(path: &Path) -> Result<Arc<dyn ImageFile>, Failure> {
    Ok(Arc::new(FileDevice::open(path, OpenOptions::default())?))
}

fn create(path: &Path, spec: &Spec) -> Result<Disk, Failure> {
    vhdx::create(&*new_file(path)?, spec)?;
    Ok(Builder::open(file(path)?).writable()?)
}

/// A new image for each turn; both sides get the same writes and flushes in the same order, as many at once.
fn allocation(name: &str, dir: &Path, block_bytes: u64, flush: Flush, rounds: usize) -> Result<Row, Failure> {
    let writes = 2000;
    let (mut base, mut ours) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let path = dir.join("theirs.vhdx");
        qemu::create(&path, SPARSE_BYTES, block_bytes)?;
        base.push(qemu::random_writes(&path, writes, flush, round as u64)?);
        std::fs::remove_file(&path)?;
        let path = dir.join("ours.vhdx");
        let disk = create(&path, &Spec { block_bytes, ..Spec::dynamic(SPARSE_BYTES) })?;
        ours.push(drive_through(&disk, 16, writes, flush, round as u64)?);
        disk.close()?;
        drop(disk);
        std::fs::remove_file(&path)?;
    }
    let goal = if matches!(flush, Flush::AtEnd) { 20.0 } else { 5.0 };
    Ok(Row { name: name.into(), base: median(&mut base), ours: median(&mut ours), goal })
}

/// Overwrites and reads through the library, and at the same bytes of the same file without it.
fn steady(dir: &Path, rounds: usize) -> Result<Vec<Row>, Failure> {
    let path = dir.join("dense.vhdx");
    let disk = create(&path, &Spec::dynamic(DENSE_BYTES))?;
    fill(&disk)?;
    disk.close()?;
    drop(disk);
    let disk = Builder::open(file(&path)?).writable()?;
    // Blocks were placed in order, one behind the other: where the first lies, the disk begins.
    let start = match disk.resolve_read(0, 4096)?.segments() {
        [vhdx::ReadSegment::Data { file_offset, .. }] => *file_offset,
        other => return Err(format!("the first block is {other:?}").into()),
    };
    let raw = Shifted { device: file(&path)?, start };
    let mut rows = Vec::new();
    for (name, write) in [("random overwrite", true), ("random read", false)] {
        let (mut base, mut ours) = (Vec::new(), Vec::new());
        drive_for(&raw, 32, write, DENSE_BYTES, Duration::from_millis(200))?;
        for round in 0..rounds {
            for side in [round % 2, 1 - round % 2] {
                let device: &dyn BlockDevice = if side == 0 { &raw } else { &disk };
                let figure = drive_for(device, 32, write, DENSE_BYTES, Duration::from_millis(400))?;
                if side == 0 { base.push(figure) } else { ours.push(figure) }
            }
        }
        rows.push(Row { name: name.into(), base: median(&mut base), ours: median(&mut ours), goal: 0.95 });
    }
    disk.close()?;
    drop(disk);
    std::fs::remove_file(&path)?;
    Ok(rows)
}

fn fill(disk: &Disk) -> Result<(), Failure> {
    let buf = load::noise(MIB);
    for at in (0..DENSE_BYTES).step_by(usize::try_from(MIB)?) {
        disk.run(IoOp::Write { offset: at, buf: buf.clone(), fua: false })?;
    }
    Ok(disk.flush()?)
}

fn conversion(dir: &Path, rounds: usize) -> Result<Vec<Row>, Failure> {
    let (raw, image, back) = (dir.join("source.raw"), dir.join("image.vhdx"), dir.join("back.raw"));
    let source = FileDevice::create(&raw, DENSE_BYTES)?;
    for (number, at) in (0..DENSE_BYTES).step_by(usize::try_from(MIB)?).enumerate() {
        source.run(IoOp::Write { offset: at, buf: load::noise_of(MIB, number as u64), fua: false })?;
    }
    source.flush()?;
    drop(source);
    let mut figures = [(); 4].map(|()| Vec::new());
    for _ in 0..rounds {
        figures[0].push(timed(|| qemu::convert(&raw, &image, true))?);
        figures[1].push(timed(|| qemu::convert(&image, &back, false))?);
        figures[2].push(timed(|| {
            let done =
                from_raw(&*file(&raw)?, None, &*new_file(&image)?, &Spec::dynamic(DENSE_BYTES), &mut |_| ())?;
            assert_eq!(done.data_bytes, DENSE_BYTES, "no zeros in it");
            Ok(())
        })?);
        figures[3].push(timed(|| {
            to_raw(&Builder::open(file(&image)?).read_only()?, &*new_file(&back)?, &mut |_| ())?;
            Ok(())
        })?);
    }
    let [to, from, ours_to, ours_from] = &mut figures;
    let row = |name: &str, base: &mut Vec<f64>, ours: &mut Vec<f64>| Row {
        name: name.into(),
        base: median(base),
        ours: median(ours),
        goal: 1.0,
    };
    let rows = vec![row("raw to dynamic", to, ours_to), row("dynamic to raw", from, ours_from)];
    for path in [raw, image, back] {
        std::fs::remove_file(path)?;
    }
    Ok(rows)
}

/// MiB per second of something that moves the dense disk once.
fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<f64, Failure> {
    let start = Instant::now();
    work()?;
    Ok(DENSE_BYTES as f64 / MIB as f64 / start.elapsed().as_secs_f64())
}
