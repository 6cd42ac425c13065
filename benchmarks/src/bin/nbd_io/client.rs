//! Our client under a load of its own making: as many requests in flight as fio keeps.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use blockio::{BlockDevice, IoBuf, IoOp, IoRequest, NbdAddress, NbdDevice, NbdOptions};

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
    let mut flow = Flow::new(&device, load);
    flow.run_for(RAMP)?;
    let start = Instant::now();
    let ended = flow.run_for(TURN)?;
    let rate = ended / start.elapsed().as_secs_f64();
    flow.drain()?;
    Ok(rate)
}

/// Requests in flight, each with its buffer.
struct Flow<'a> {
    device: &'a NbdDevice,
    load: &'a Load,
    buffers: Vec<IoBuf>,
    told: mpsc::Receiver<(usize, Result<(), blockio::IoError>)>,
    tell: mpsc::Sender<(usize, Result<(), blockio::IoError>)>,
    next: u64,
    in_flight: usize,
}

impl<'a> Flow<'a> {
    fn new(device: &'a NbdDevice, load: &'a Load) -> Self {
        let (tell, told) = mpsc::channel();
        let buffers = (0..load.depth).map(|_| IoBuf::zeroed(load.block_bytes)).collect();
        Self { device, load, buffers, told, tell, next: 0, in_flight: 0 }
    }

    /// Keeps the depth for a while; gives how many requests have ended.
    fn run_for(&mut self, length: Duration) -> Result<f64, Failure> {
        let start = Instant::now();
        while self.in_flight < self.load.depth {
            self.submit(self.in_flight);
            self.in_flight += 1;
        }
        let mut ended = 0.0;
        while start.elapsed() < length {
            let (slot, outcome) = self.told.recv()?;
            outcome?;
            ended += 1.0;
            self.submit(slot);
        }
        Ok(ended)
    }

    fn drain(&mut self) -> Result<(), Failure> {
        for _ in 0..std::mem::take(&mut self.in_flight) {
            self.told.recv()?.1?;
        }
        Ok(())
    }

    fn submit(&mut self, slot: usize) {
        let offset = self.place();
        let (tell, buf) = (self.tell.clone(), self.buffers[slot].clone());
        let op = if self.load.write {
            IoOp::Write { offset, buf, fua: false }
        } else {
            IoOp::Read { offset, buf }
        };
        let done = Box::new(move |outcome| drop(tell.send((slot, outcome))));
        self.device.submit(IoRequest { op, done });
    }

    /// Where the next request goes. Random places come from a multiplier that visits every block once in a round.
    fn place(&mut self) -> u64 {
        let blocks = FILE_BYTES / self.load.block_bytes as u64;
        self.next += 1;
        let block = if self.load.random { self.next.wrapping_mul(0x9e37_79b9_7f4a_7c15) } else { self.next };
        block % blocks * self.load.block_bytes as u64
    }
}
