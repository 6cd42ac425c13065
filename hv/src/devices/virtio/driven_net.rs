//! A virtio network card with its driver's side, both in memory, on a real tap: the path of packets, without a machine.
//!
//! ```text
//!   send:    frames in the available ring --notify--> card's thread: check, write --> tap
//!   receive: frames counted, buffers posted anew <--interrupt-- card's thread: read, scatter <-- tap
//! ```
//! The driver is the caller's thread. Both sides say by the ring event index when they want to hear of the other.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::VirtioDevice;
use super::driven::DriveError;
use super::net::Net;
use super::offload::{self, HEADER_BYTES};
use super::queue::QUEUE_SIZE_MAX;
use super::worker::{Wakeup, Worker};
use crate::board::NetConfig;
use crate::devices::Interrupt;
use crate::memory::{GuestRam, PAGE_BYTES};
use crate::state;

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const USED_EVENT: u64 = AVAILABLE + 4 + QUEUE_SIZE_MAX as u64 * 2;
const AVAILABLE_EVENT: u64 = USED + 4 + QUEUE_SIZE_MAX as u64 * 8;
/// What is sent: the header, and the frame behind it; what comes.
const DATA: u64 = 1 << 16;
const RAM_BYTES: u64 = 4 << 20;
const DEVICE_WRITES: u16 = 2;
/// As long as pages, so that a stream takes many.
const BUFFER_BYTES: u32 = 4096;

/// What a driver does with its card.
#[derive(Clone, Debug)]
pub enum NetTask {
    /// Sends the same frame again and again.
    Send {
        /// What is asked of the host for it.
        header: [u8; 12],
        /// The frame, up to 64 KiB.
        frame: Vec<u8>,
        /// How often.
        packets: u64,
    },
    /// Receives until so many bytes have come.
    Receive {
        /// With their headers.
        bytes: u64,
    },
}

/// What that came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetCounts {
    /// Buffers that came back.
    pub buffers: u64,
    /// Bytes in those that were received.
    pub bytes: u64,
    /// How often the driver was told.
    pub interrupts: u64,
    /// How often the card was told.
    pub notifications: u64,
}

/// Drives a card on its tap, whose driver takes `offloads` or none, until the task is done.
///
/// # Errors
/// When there is no card, memory or thread for it.
pub fn drive_net(config: NetConfig, offloads: bool, task: &NetTask) -> Result<NetCounts, DriveError> {
    let (ram, told) = (GuestRam::new(RAM_BYTES)?, Arc::new(Told::default()));
    let net = Arc::new(Net::new(config, ram.clone(), Arc::clone(&told) as Arc<dyn Interrupt>)?);
    let withheld = if offloads { 0 } else { offload::FEATURES };
    net.activate(net.features() & !withheld);
    let queue = &net.queues()[usize::from(matches!(task, NetTask::Send { .. }))];
    queue.restore(&rings(), &ram)?;
    queue.use_event_index(true);
    net.release();
    let (wakeup, served) = (net.wakeup(), Arc::clone(&net));
    let _worker = Worker::spawn("driven-net".into(), Arc::clone(&wakeup), move || served.serve())?;
    let mut driver = Driver { ram, told, wakeup, posted: 0, seen: 0, counts: NetCounts::default() };
    match task {
        NetTask::Send { header, frame, packets } => driver.send(header, frame, *packets)?,
        NetTask::Receive { bytes } => driver.receive(*bytes)?,
    }
    Ok(NetCounts { interrupts: driver.told.count.load(Ordering::SeqCst), ..driver.counts })
}

fn rings() -> state::Queue {
    state::Queue {
        size: QUEUE_SIZE_MAX.into(),
        ready: true,
        descriptors: DESCRIPTORS,
        avail: AVAILABLE,
        used: USED,
        next_avail: 0,
        next_used: 0,
    }
}

/// The driver's interrupt.
#[derive(Debug, Default)]
struct Told {
    count: AtomicU64,
    /// Protects whether one came that was not waited for yet.
    came: Mutex<bool>,
    changed: Condvar,
}

impl Told {
    fn wait(&self) {
        let came = self.came.lock().unwrap_or_else(PoisonError::into_inner);
        let mut came = self.changed.wait_while(came, |came| !*came).unwrap_or_else(PoisonError::into_inner);
        *came = false;
    }
}

impl Interrupt for Told {
    fn trigger(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        *self.came.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_one();
    }
}

struct Driver {
    ram: GuestRam,
    told: Arc<Told>,
    wakeup: Arc<Wakeup>,
    posted: u16,
    seen: u16,
    counts: NetCounts,
}

impl Driver {
    fn send(&mut self, header: &[u8; HEADER_BYTES], frame: &[u8], packets: u64) -> Result<(), DriveError> {
        let packet = [&header[..], frame].concat();
        self.ram.write(DATA, &packet)?;
        for head in 0..QUEUE_SIZE_MAX {
            self.describe(head, DATA, packet.len(), 0)?;
        }
        let mut left = packets;
        while self.counts.buffers < packets {
            let room = QUEUE_SIZE_MAX - self.posted.wrapping_sub(self.seen);
            let now = room.min(u16::try_from(left).unwrap_or(u16::MAX));
            left -= u64::from(now);
            self.post(now)?;
            // When half of what is under way is done there is enough room again.
            self.take_back(self.posted.wrapping_sub(self.seen) / 2)?;
        }
        Ok(())
    }

    fn receive(&mut self, bytes: u64) -> Result<(), DriveError> {
        for head in 0..QUEUE_SIZE_MAX {
            let at = DATA + u64::from(head) * PAGE_BYTES;
            self.describe(head, at, BUFFER_BYTES as usize, DEVICE_WRITES)?;
        }
        while self.counts.bytes < bytes {
            // A ring's buffers come back in the order in which they were posted.
            self.post(QUEUE_SIZE_MAX - self.posted.wrapping_sub(self.seen))?;
            self.take_back(0)?;
        }
        Ok(())
    }

    /// Makes the next descriptors of the table available, as a ring.
    fn post(&mut self, count: u16) -> Result<(), DriveError> {
        let before = self.posted;
        for _ in 0..count {
            let place = self.posted % QUEUE_SIZE_MAX;
            self.ram.write(AVAILABLE + 4 + u64::from(place) * 2, &place.to_le_bytes())?;
            self.posted = self.posted.wrapping_add(1);
        }
        fence(Ordering::SeqCst);
        self.ram.write(AVAILABLE + 2, &self.posted.to_le_bytes())?;
        fence(Ordering::SeqCst);
        let wanted_at = self.half(AVAILABLE_EVENT)?;
        if self.posted.wrapping_sub(wanted_at).wrapping_sub(1) < self.posted.wrapping_sub(before) {
            self.counts.notifications += 1;
            self.wakeup.wake();
        }
        Ok(())
    }

    /// Takes back what is done, and waits until more than `ahead` are.
    fn take_back(&mut self, ahead: u16) -> Result<(), DriveError> {
        let begun = self.seen;
        loop {
            while self.half(USED + 2)? != self.seen {
                fence(Ordering::SeqCst);
                let mut entry = [0; 4];
                self.ram.read(USED + 8 + u64::from(self.seen % QUEUE_SIZE_MAX) * 8, &mut entry)?;
                self.seen = self.seen.wrapping_add(1);
                self.counts.buffers += 1;
                self.counts.bytes += u64::from(u32::from_le_bytes(entry));
            }
            if self.seen.wrapping_sub(begun) > ahead || self.posted == self.seen {
                return Ok(());
            }
            self.ram.write(USED_EVENT, &begun.wrapping_add(ahead).to_le_bytes())?;
            fence(Ordering::SeqCst);
            if self.half(USED + 2)? == self.seen {
                self.told.wait();
            }
        }
    }

    fn half(&self, at: u64) -> Result<u16, DriveError> {
        let mut bytes = [0; 2];
        self.ram.read(at, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn describe(&self, number: u16, address: u64, len: usize, flags: u16) -> Result<(), DriveError> {
        let mut fields = address.to_le_bytes().to_vec();
        fields.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        fields.extend(flags.to_le_bytes());
        fields.extend([0; 2]);
        Ok(self.ram.write(DESCRIPTORS + u64::from(number) * 16, &fields)?)
    }
}
