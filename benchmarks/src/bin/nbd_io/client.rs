//! Our client under a load of its own making: as many requests in flight as fio keeps. A completion submits the next
//! request, as a VM's disk does.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use blockio::{BlockDevice, IoBuf, IoError, IoOp, IoRequest, NbdAddress, NbdDevice, NbdOptions};

use crate::{FILE_BYTES, Failure, Load, MIB};

const TURN: Duration = Duration::from_secs(1);
const RAMP: Duration = Duration::from_millis(200);

/// Makes the file, with all its blocks in place.
pub(crate) fn fill(path: &Path, size_bytes: u64) -> Result<(), Failure> {
    let mut file = File::create(path)?;
    let block: Vec<u8> = (0..MIB).map(|at| (at * 31 % 251 + 1).to_le_bytes()[0]).collect();
    for _ in 0..size_bytes / MIB as u64 {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Requests per second of one turn.
pub(crate) fn drive(socket: &Path, load: &Load) -> Result<f64, Failure> {
    let device = NbdDevice::open(&NbdAddress::unix(socket, ""), NbdOptions::default())?;
    let (tell, told) = mpsc::channel();
    let flow = Arc::new(Flow { device, load: *load, ended: AtomicU64::new(0), over: AtomicBool::new(false) });
    for _ in 0..load.depth {
        Flow::submit(&flow, IoBuf::zeroed(load.block_bytes), tell.clone());
    }
    drop(tell);
    let failed = told.recv_timeout(RAMP);
    let (start, before) = (Instant::now(), flow.ended.load(Relaxed));
    let failed = failed.or_else(|_| told.recv_timeout(TURN));
    let rate = (flow.ended.load(Relaxed) - before) as f64 / start.elapsed().as_secs_f64();
    flow.over.store(true, Relaxed);
    // The channel ends with the last request.
    match failed.ok().or_else(|| told.iter().next()) {
        Some(error) => Err(error.into()),
        None => Ok(rate),
    }
}

/// Requests that follow one another.
struct Flow {
    device: NbdDevice,
    load: Load,
    ended: AtomicU64,
    over: AtomicBool,
}

impl Flow {
    fn submit(flow: &Arc<Self>, buf: IoBuf, tell: mpsc::Sender<IoError>) {
        let number = flow.ended.load(Relaxed);
        let offset = flow.place(number);
        let op = if flow.load.write {
            IoOp::Write { offset, buf: buf.clone(), fua: false }
        } else {
            IoOp::Read { offset, buf: buf.clone() }
        };
        let own = Arc::clone(flow);
        let done = Box::new(move |outcome| match outcome {
            Ok(()) => {
                own.ended.fetch_add(1, Relaxed);
                if !own.over.load(Relaxed) {
                    Self::submit(&own, buf, tell);
                }
            }
            Err(error) => drop(tell.send(error)),
        });
        flow.device.submit(IoRequest { op, done });
    }

    /// Where the next request goes; a multiplier scatters the random ones.
    fn place(&self, number: u64) -> u64 {
        let blocks = FILE_BYTES / self.load.block_bytes as u64;
        let block = if self.load.random { number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20 } else { number };
        block % blocks * self.load.block_bytes as u64
    }
}
