//! I/O at depth through a device, for comparison with fio on the same file.
//!
//! `depth FILE read|write BLOCK_BYTES DEPTH SECONDS`: keeps DEPTH requests in flight, each completion submits the next.
#![expect(clippy::disallowed_methods, reason = "a measurement reads the clock")]
#![expect(clippy::print_stdout, reason = "it reports to the terminal")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockio::{BlockDevice, FileDevice, IoBuf, IoOp, IoRequest, OpenOptions};

struct Load {
    device: FileDevice,
    write: bool,
    blocks: u64,
    block_bytes: u64,
    end: Instant,
    done: Arc<AtomicU64>,
    state: AtomicU64,
    /// Dropped with the last request.
    _finished: mpsc::Sender<()>,
}

fn next(load: &Arc<Load>, buf: IoBuf) {
    if Instant::now() >= load.end {
        return;
    }
    let random = load.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    let random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let offset = (random >> 20) % load.blocks * load.block_bytes;
    let op = match load.write {
        true => IoOp::Write { offset, buf: buf.clone(), fua: false },
        false => IoOp::Read { offset, buf: buf.clone() },
    };
    let again = Arc::clone(load);
    let done = Box::new(move |outcome: Result<(), _>| {
        outcome.expect("I/O");
        again.done.fetch_add(1, Ordering::Relaxed);
        next(&again, buf);
    });
    load.device.submit(IoRequest { op, done });
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [path, kind, block_bytes, depth, seconds] = args.as_slice() else {
        println!("depth FILE read|write BLOCK_BYTES DEPTH SECONDS");
        return;
    };
    let number = |text: &String| text.parse::<u64>().expect("a number");
    let (block_bytes, depth, seconds) = (number(block_bytes), number(depth), number(seconds));
    let device = FileDevice::open(path, OpenOptions::default()).expect("open");
    let blocks = device.geometry().size_bytes / block_bytes;
    let begin = Instant::now();
    let (finished, all) = mpsc::channel();
    let load = Arc::new(Load {
        device,
        write: kind == "write",
        blocks,
        block_bytes,
        end: begin + Duration::from_secs(seconds),
        done: Arc::default(),
        state: AtomicU64::new(1),
        _finished: finished,
    });

    for _ in 0..depth {
        let len = usize::try_from(block_bytes).expect("a buffer fits into memory");
        next(&load, IoBuf::zeroed(len));
    }
    let counted = Arc::clone(&load.done);
    drop(load);
    // The channel ends when the last request drops the load.
    all.iter().for_each(|()| ());
    let per_second = counted.load(Ordering::Relaxed) / seconds;
    println!(
        "{kind} {block_bytes} x {depth}: {per_second} IOPS, {} MB/s",
        per_second * block_bytes / 1_000_000
    );
}
