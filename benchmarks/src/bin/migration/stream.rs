//! Memory streams without a link in the way: what RAM to RAM costs beside plain TLS streams of the same kind.
//!
//! Connection, congestion control, cipher and size of blocks are the same for all. A plain stream between small buffers has its
//! bytes in the caches; RAM is in none, so that the goal is held against a plain stream that carries as much memory as ours.
#![expect(
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a harness: it measures time and talks to people"
)]

use std::io::Read;
use std::thread;
use std::time::Instant;

use benchmarks::{Streams, median};
use hv::GuestRam;
use migrator::stream::{self, Pages};

use crate::Failure;

const RAM_BYTES: u64 = 512 << 20;
const BLOCK_BYTES: usize = 256 << 10;
const ROUNDS: usize = 5;
const GOAL: f64 = 0.8;

/// Prints one stream beside a plain one, and several beside one.
pub(crate) fn measure() -> Result<(), Failure> {
    let nodes = Streams::start()?;
    let (source, target) = (noise()?, GuestRam::new(RAM_BYTES)?);
    let (from, mut into) = (copy_of(&source)?, vec![1; usize::try_from(RAM_BYTES)?]);
    let (mut cached, mut plain) = (Vec::new(), Vec::new());
    let (mut whole, mut one) = (Vec::new(), Vec::new());
    let mut several: Vec<(usize, Vec<f64>)> = [2, 4].map(|count| (count, Vec::new())).into();
    for _ in 0..ROUNDS {
        cached.push(nodes.mib_per_second(RAM_BYTES)?);
        plain.push(nodes.mib_per_second_between(&from, &mut into)?);
        whole.push(memory(&nodes, &source, &target, 1, 0)?);
        one.push(memory(&nodes, &source, &target, 1, stream::REMEMBERED_BYTES_MAX)?);
        for (count, values) in &mut several {
            values.push(memory(&nodes, &source, &target, *count, stream::REMEMBERED_BYTES_MAX)?);
        }
    }
    let (cached, plain, one) = (median(&mut cached), median(&mut plain), median(&mut one));
    let ratio = one / plain;
    let verdict = if ratio >= GOAL { "reached" } else { "missed" };
    println!("memory streams, {} MiB of noise, TLS on loopback, not shaped", RAM_BYTES >> 20);
    println!("  plain TLS stream of as much memory {plain:8.0} MiB/s, between small buffers {cached:8.0}");
    println!(
        "  one memory stream {one:7.0} MiB/s, ratio {ratio:.2}, goal {GOAL} {verdict}; {:.2}",
        one / cached
    );
    let whole = median(&mut whole);
    println!(
        "  without memory for differences {whole:7.0} MiB/s, ratio {:.2}; {:.2}",
        whole / plain,
        whole / cached
    );
    for (count, mut values) in several {
        let rate = median(&mut values);
        println!("  {count} memory streams {rate:8.0} MiB/s, {:.2} of one", rate / one);
    }
    Ok(())
}

fn noise() -> Result<GuestRam, Failure> {
    let ram = GuestRam::new(RAM_BYTES)?;
    let mut block = vec![0; BLOCK_BYTES];
    let mut random = std::fs::File::open("/dev/urandom")?;
    for at in (0..RAM_BYTES).step_by(BLOCK_BYTES) {
        random.read_exact(&mut block)?;
        ram.write_linear(at, &block)?;
    }
    Ok(ram)
}

/// Its content in memory that no guest has.
fn copy_of(ram: &GuestRam) -> Result<Vec<u8>, Failure> {
    let mut all = vec![0; usize::try_from(ram.bytes())?];
    ram.read_linear(0, &mut all)?;
    Ok(all)
}

/// MiB/s of RAM into RAM over so many streams, which remember so much of it.
fn memory(
    nodes: &Streams,
    source: &GuestRam,
    target: &GuestRam,
    count: usize,
    remembered_bytes: u64,
) -> Result<f64, Failure> {
    let streams = (0..count).map(|_| nodes.open()).collect::<Result<Vec<_>, _>>()?;
    let begun = Instant::now();
    let pages = RAM_BYTES / hv::PAGE_BYTES;
    thread::scope(|scope| -> Result<(), Failure> {
        let mut ends = Vec::new();
        for (number, (near, mut far)) in streams.into_iter().enumerate() {
            ends.push(scope.spawn(move || stream::receive(&mut far, target, |_| Ok(())).map(drop)));
            ends.push(scope.spawn(move || {
                let remembered = remembered_bytes / u64::try_from(count).expect("few");
                let mut sender = stream::Sender::new(near, source.clone()).remembering(remembered);
                for first in (0..pages).step_by(usize::try_from(stream::CHUNK_PAGES).expect("small")) {
                    let mine = stream::stream_of(first, u32::try_from(count).expect("few"));
                    if mine as usize == number {
                        let words = usize::try_from(stream::CHUNK_PAGES / 64).expect("small");
                        sender.send(&Pages { first, bits: vec![u64::MAX; words], fresh: true })?;
                    }
                }
                sender.finish(None)
            }));
        }
        for end in ends {
            end.join().expect("no panic")?;
        }
        Ok(())
    })?;
    Ok(mib_per_second(begun))
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn mib_per_second(begun: Instant) -> f64 {
    (RAM_BYTES >> 20) as f64 / begun.elapsed().as_secs_f64()
}
