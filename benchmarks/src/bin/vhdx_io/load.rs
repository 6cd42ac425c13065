//! Loads of our side: so many requests in flight, by count or by time.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockio::{BlockDevice, Geometry, ImageFile, IoBuf, IoOp, IoRequest};

use crate::{Failure, SPARSE_BYTES};

const PAGE: usize = 4096;

/// When a flush is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Flush {
    /// Once, after the last write.
    AtEnd,
    /// After each write, before the next one of the same chain.
    AfterEach,
}

/// A part of a file as a device: what the library does, without it.
pub(crate) struct Shifted {
    pub(crate) device: Arc<dyn ImageFile>,
    pub(crate) start: u64,
}

impl BlockDevice for Shifted {
    fn geometry(&self) -> Geometry {
        self.device.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let op = match request.op {
            IoOp::Read { offset, buf } => IoOp::Read { offset: self.start + offset, buf },
            IoOp::Write { offset, buf, fua } => IoOp::Write { offset: self.start + offset, buf, fua },
            other => other,
        };
        self.device.submit(IoRequest { op, done: request.done });
    }
}

/// Pseudo-random numbers; the same for the same seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// Bytes without zeros worth looking for.
pub(crate) fn noise(len: u64) -> IoBuf {
    noise_of(len, 1)
}

/// The same, by seed.
pub(crate) fn noise_of(len: u64, seed: u64) -> IoBuf {
    let mut random = Random(seed);
    let bytes: Vec<u8> = (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    let buf = IoBuf::zeroed(bytes.len());
    buf.copy_from(&bytes);
    buf
}

/// Does `count` writes of 4 KiB at random places, `depth` at a time, then flushes. Writes per second, flushes included.
pub(crate) fn drive_through(
    device: &dyn BlockDevice,
    depth: usize,
    count: usize,
    flush: Flush,
    seed: u64,
) -> Result<f64, Failure> {
    let mut random = Random(seed);
    let (tell, told) = mpsc::channel();
    let buf = noise(PAGE as u64);
    let submit = |op: IoOp, is_flush: bool| {
        let tell = tell.clone();
        device.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send((is_flush, outcome)))) });
    };
    let mut write = || {
        let offset = random.next() % (SPARSE_BYTES / PAGE as u64) * PAGE as u64;
        submit(IoOp::Write { offset, buf: buf.clone(), fua: false }, false);
    };
    let start = Instant::now();
    (0..depth.min(count)).for_each(|_| write());
    let (mut started, mut ended) = (depth.min(count), 0);
    while ended < count {
        let (was_flush, outcome) = told.recv()?;
        outcome?;
        if matches!(flush, Flush::AfterEach) && !was_flush {
            submit(IoOp::Flush, true);
            continue;
        }
        ended += 1;
        if started < count {
            started += 1;
            write();
        }
    }
    device.flush()?;
    Ok(count as f64 / start.elapsed().as_secs_f64())
}

/// Keeps `depth` requests of 4 KiB in flight for a while. Requests per second.
pub(crate) fn drive_for(
    device: &dyn BlockDevice,
    depth: usize,
    write: bool,
    span: u64,
    length: Duration,
) -> Result<f64, Failure> {
    let mut random = Random(7);
    let (tell, told) = mpsc::channel();
    let bufs: Vec<IoBuf> = (0..depth).map(|_| noise(PAGE as u64)).collect();
    let mut submit = |slot: usize| {
        let offset = random.next() % (span / PAGE as u64) * PAGE as u64;
        let (tell, buf) = (tell.clone(), bufs[slot].clone());
        let op = if write { IoOp::Write { offset, buf, fua: false } } else { IoOp::Read { offset, buf } };
        device.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send((slot, outcome)))) });
    };
    let start = Instant::now();
    (0..depth).for_each(&mut submit);
    let (mut ended, mut in_flight) = (0_u32, depth);
    while in_flight > 0 {
        let (slot, outcome) = told.recv()?;
        outcome?;
        ended += 1;
        if start.elapsed() < length {
            submit(slot);
        } else {
            in_flight -= 1;
        }
    }
    Ok(f64::from(ended) / start.elapsed().as_secs_f64())
}
