//! virtio-net on a tap: no offloads, one pair of queues, and a control queue for announcements.
//!
//! ```text
//!   guest TX queue --> drop the guest's header, put an empty one --> tap --> bridge of the host
//!   guest RX queue <-- one packet, one chain; what does not fit is dropped <-- tap
//!   arrival elsewhere: RARP in the guest's name at once (switches learn), then the guest is asked to announce itself
//! ```
//! **Invariant:** a packet is held here only while the guest has posted no buffer for it; at most one is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::queue::{Chain, Popped, RequestQueue};
use super::worker::Wakeup;
use super::{DeviceInterrupt, FEATURES_OF_ALL, VirtioDevice};
use crate::devices::Interrupt;
use crate::memory::GuestRam;

const KIND: u32 = 1;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_STATUS: u64 = 1 << 16;
const FEATURE_CONTROL: u64 = 1 << 17;
const FEATURE_ANNOUNCE: u64 = 1 << 21;
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;
const CLASS_ANNOUNCE: u8 = 3;
const CONTROL_OK: u8 = 0;
const CONTROL_ERROR: u8 = 1;
/// Before each packet, on both sides. Empty but for the number of buffers of a received one.
pub(crate) const HEADER_BYTES: usize = 12;
const HEADER_BUFFERS: usize = 10;
/// The longest packet without offloads is far shorter; a tap may be set to more.
const PACKET_BYTES_MAX: usize = HEADER_BYTES + 65_536;
/// Packets of one direction before the other has its turn.
const TURN: usize = 64;

/// The device.
#[derive(Debug)]
pub(crate) struct Net {
    mac: [u8; 6],
    tap: File,
    /// RX, TX, control.
    queues: [RequestQueue; 3],
    interrupt: DeviceInterrupt,
    wakeup: Arc<Wakeup>,
    ram: GuestRam,
    features: AtomicU64,
    asked_to_announce: AtomicBool,
    /// Protects the packet that waits for a buffer, and the room for the next one.
    waiting: Mutex<Packet>,
}

#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    len: usize,
}

impl Net {
    /// `tap` does not block, and has packets with headers of [`HEADER_BYTES`].
    pub(crate) fn new(tap: File, mac: [u8; 6], ram: GuestRam, line: Arc<dyn Interrupt>) -> io::Result<Self> {
        let wakeup = Wakeup::new()?;
        wakeup.listen(tap.as_raw_fd())?;
        Ok(Self {
            mac,
            tap,
            queues: std::array::from_fn(|_| RequestQueue::new()),
            interrupt: DeviceInterrupt::new(line),
            wakeup: Arc::new(wakeup),
            ram,
            features: AtomicU64::new(0),
            asked_to_announce: AtomicBool::new(false),
            waiting: Mutex::new(Packet { bytes: vec![0; PACKET_BYTES_MAX], len: 0 }),
        })
    }

    pub(crate) fn wakeup(&self) -> Arc<Wakeup> {
        Arc::clone(&self.wakeup)
    }

    /// One turn for each direction. Body of the device's thread.
    pub(crate) fn serve(&self) -> Option<Duration> {
        let received = self.receive();
        let sent = self.turn(1, |chain| self.send(chain));
        let controlled = self.turn(2, |chain| self.control(chain));
        (received || sent || controlled).then_some(Duration::ZERO)
    }

    /// After the guest has come from elsewhere: the network learns where it is now.
    pub(crate) fn announce(&self) {
        // Lost is lost: the guest's own announcement follows.
        let _ = (&self.tap).write(&announcement(self.mac));
        if self.features.load(Ordering::Relaxed) & FEATURE_ANNOUNCE != 0 {
            self.asked_to_announce.store(true, Ordering::SeqCst);
            self.interrupt.config_changed();
        }
    }

    fn receive(&self) -> bool {
        let mut packet = self.waiting();
        for _ in 0..TURN {
            if packet.len == 0 {
                let Ok(len) = (&self.tap).read(&mut packet.bytes) else { return false };
                packet.len = len;
            }
            match self.queues[0].pop(&self.ram) {
                Popped::Empty => return false,
                Popped::Broken => {
                    self.interrupt.config_changed();
                    return false;
                }
                Popped::Chain(chain) => {
                    let len = std::mem::take(&mut packet.len);
                    let header = packet.bytes.get_mut(..HEADER_BYTES).expect("room for any packet");
                    header.fill(0);
                    header[HEADER_BUFFERS] = 1;
                    let written = self.scatter(&chain, &packet.bytes[..len.max(HEADER_BYTES)]);
                    self.queues[0].complete(&self.ram, chain.head, written, &self.interrupt);
                }
            }
        }
        true
    }

    /// Takes up to a turn's chains from a queue; true when there may be more.
    fn turn(&self, queue: usize, work: impl Fn(&Chain) -> u32) -> bool {
        for _ in 0..TURN {
            match self.queues[queue].pop(&self.ram) {
                Popped::Empty => return false,
                Popped::Broken => {
                    self.interrupt.config_changed();
                    return false;
                }
                Popped::Chain(chain) => {
                    let written = work(&chain);
                    self.queues[queue].complete(&self.ram, chain.head, written, &self.interrupt);
                }
            }
        }
        true
    }

    fn send(&self, chain: &Chain) -> u32 {
        let Some(mut packet) = self.gather(chain, PACKET_BYTES_MAX) else { return 0 };
        if packet.len() > HEADER_BYTES {
            // The guest has no offload that a header could ask for; whatever it wrote there reaches nobody.
            packet[..HEADER_BYTES].fill(0);
            // A full tap loses packets, as a wire does.
            let _ = (&self.tap).write(&packet);
        }
        0
    }

    fn control(&self, chain: &Chain) -> u32 {
        let class = self.gather(chain, 64).and_then(|command| command.first().copied());
        let answer = if class == Some(CLASS_ANNOUNCE) {
            self.asked_to_announce.store(false, Ordering::SeqCst);
            CONTROL_OK
        } else {
            CONTROL_ERROR
        };
        self.scatter(chain, &[answer])
    }

    /// The readable parts as one; `None` when they are too long or not in RAM.
    fn gather(&self, chain: &Chain, bytes_max: usize) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for part in chain.parts.iter().filter(|part| !part.writable) {
            let (from, len) = (bytes.len(), part.len as usize);
            if len > bytes_max - from {
                return None;
            }
            bytes.resize(from + len, 0);
            self.ram.read(part.address, &mut bytes[from..]).ok()?;
        }
        Some(bytes)
    }

    /// Writes all or, where it does not fit, nothing; gives the number of bytes.
    fn scatter(&self, chain: &Chain, bytes: &[u8]) -> u32 {
        let room: usize = chain.parts.iter().filter(|part| part.writable).map(|part| part.len as usize).sum();
        if room < bytes.len() {
            return 0;
        }
        let mut rest = bytes;
        for part in chain.parts.iter().filter(|part| part.writable) {
            let (now, later) = rest.split_at(rest.len().min(part.len as usize));
            if self.ram.write(part.address, now).is_err() {
                return 0;
            }
            rest = later;
        }
        u32::try_from(bytes.len()).expect("a packet")
    }

    fn waiting(&self) -> MutexGuard<'_, Packet> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reverse address request in the guest's name: every switch on its way learns where the address is.
fn announcement(mac: [u8; 6]) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend([0xff; 6]);
    packet.extend(mac);
    packet.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    for part in [&mac[..], &[0; 4], &mac, &[0; 4]] {
        packet.extend(part);
    }
    packet.resize(HEADER_BYTES + 60, 0);
    packet
}

impl VirtioDevice for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        FEATURES_OF_ALL | FEATURE_MAC | FEATURE_STATUS | FEATURE_CONTROL | FEATURE_ANNOUNCE
    }

    fn queues(&self) -> &[RequestQueue] {
        &self.queues
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn interrupt(&self) -> &DeviceInterrupt {
        &self.interrupt
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        let status = LINK_UP | if self.asked_to_announce.load(Ordering::SeqCst) { ANNOUNCE } else { 0 };
        let mut config = self.mac.to_vec();
        config.extend(status.to_le_bytes());
        for (at, byte) in (offset..).zip(into) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn activate(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        self.wakeup.wake();
    }

    fn notify(&self) {
        self.wakeup.wake();
    }

    fn identity(&self) -> Vec<u8> {
        self.mac.to_vec()
    }
}
