//! virtio-net on a tap: one pair of queues, and a control queue for announcements.
//!
//! ```text
//!   guest TX queue --> check the guest's header (offload.rs) --> tap --> bridge of the host
//!   guest RX queue <-- one packet in one chain, or in several where the driver takes that <-- tap
//!   arrival elsewhere: RARP in the guest's name at once (switches learn), then the guest is asked to announce itself
//! ```
//! What the tap may leave to the guest is told to it by the card's thread, before it reads the next packet: the vCPU that accepts or resets may
//! not, and the tap of another node knows nothing of it.
//!
//! **Invariants:** a packet is held here only while the guest has posted no room for it; at most one is. It is seen whole or not at all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::offload::{self, FEATURE_MERGE, HEADER_BUFFERS, HEADER_BYTES};
use super::queue::{Chain, Popped, RequestQueue};
use super::worker::Wakeup;
use super::{DeviceInterrupt, FEATURE_EVENT_INDEX, FEATURES_OF_ALL, VirtioDevice};
use crate::board::NetConfig;
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
/// A stream that nobody has cut yet, with the header of its frame, and tags.
const PACKET_BYTES_MAX: usize = HEADER_BYTES + 65_536 + 64;
/// The tap has not been told yet.
const UNTOLD: u32 = u32::MAX;
/// Packets of one direction before the other has its turn.
const TURN: usize = 64;

/// The device.
#[derive(Debug)]
pub(crate) struct Net {
    mac: [u8; 6],
    tap: File,
    offload: Option<fn(&File, u32) -> io::Result<()>>,
    /// What the tap was told last.
    told: AtomicU32,
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

/// What has become of a packet.
enum Delivery {
    /// The guest has it, or nobody.
    Gone,
    /// There is no room for it yet.
    Waits,
    Broken,
}

impl Net {
    /// The tap does not block, and has packets with headers of [`HEADER_BYTES`].
    pub(crate) fn new(config: NetConfig, ram: GuestRam, line: Arc<dyn Interrupt>) -> io::Result<Self> {
        let NetConfig { tap, mac, offload } = config;
        let wakeup = Wakeup::new()?;
        wakeup.listen(tap.as_raw_fd())?;
        Ok(Self {
            mac,
            tap,
            offload,
            told: AtomicU32::new(UNTOLD),
            queues: std::array::from_fn(|_| RequestQueue::new()),
            interrupt: DeviceInterrupt::new(line),
            wakeup: Arc::new(wakeup),
            ram,
            features: AtomicU64::new(0),
            asked_to_announce: AtomicBool::new(false),
            waiting: Mutex::new(Packet { bytes: vec![0; PACKET_BYTES_MAX], len: 0 }),
        })
    }

    #[cfg(test)]
    pub(super) fn tap(&self) -> &File {
        &self.tap
    }

    pub(crate) fn wakeup(&self) -> Arc<Wakeup> {
        Arc::clone(&self.wakeup)
    }

    /// One turn for each direction. Body of the device's thread.
    pub(crate) fn serve(&self) -> Option<Duration> {
        self.tell_tap();
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

    fn has(&self, feature: u64) -> bool {
        self.features.load(Ordering::Relaxed) & feature != 0
    }

    fn tell_tap(&self) {
        let Some(offload) = self.offload else { return };
        let takes = offload::taken_by(self.features.load(Ordering::Relaxed));
        // A tap may still belong to another process while the card is held.
        if self.queues[0].is_held() || self.told.swap(takes, Ordering::Relaxed) == takes {
            return;
        }
        if let Err(error) = offload(&self.tap, takes) {
            tracing::warn!(takes, %error, "a tap does not take what its guest can do; packets may be lost");
        }
    }

    fn receive(&self) -> bool {
        if self.queues[0].is_held() {
            return false;
        }
        let mut packet = self.waiting();
        for _ in 0..TURN {
            if packet.len == 0 {
                let Ok(len) = (&self.tap).read(&mut packet.bytes) else { return false };
                packet.len = len.max(HEADER_BYTES);
            }
            match self.deliver(&mut packet) {
                Delivery::Gone => packet.len = 0,
                Delivery::Waits => return false,
                Delivery::Broken => {
                    self.interrupt.config_changed();
                    return false;
                }
            }
        }
        true
    }

    /// Gives a packet to the guest, all of it or nothing.
    fn deliver(&self, packet: &mut Packet) -> Delivery {
        let header = packet.bytes.first_chunk().expect("room for any packet");
        let Some(mut header) = offload::to_guest(header, self.features.load(Ordering::Relaxed)) else {
            return Delivery::Gone;
        };
        let chains = match self.take_room(packet.len) {
            Ok(chains) => chains,
            Err(delivery) => return delivery,
        };
        let buffers = u16::try_from(chains.len()).expect("no more than a queue has");
        header[HEADER_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
        // The tap's own header is needed no more.
        packet.bytes[..HEADER_BYTES].copy_from_slice(&header);
        let done = self.scatter_over(&chains, &packet.bytes[..packet.len]);
        self.queues[0].complete_all(&self.ram, &done, &self.interrupt);
        Delivery::Gone
    }

    /// Buffers for so many bytes: one, or as many as it takes where the driver puts them together. What does not fit into one is lost.
    fn take_room(&self, bytes: usize) -> Result<Vec<Chain>, Delivery> {
        let (queue, mut chains, mut room) = (&self.queues[0], Vec::new(), 0);
        while room < bytes {
            match queue.pop(&self.ram) {
                Popped::Chain(chain) => {
                    room += room_of(&chain);
                    chains.push(chain);
                }
                Popped::Empty => {
                    // All that the driver can ever post is not enough: waiting for more would be for ever.
                    let never = chains.len() >= queue.size();
                    queue.put_back(chains.len());
                    return Err(if never { Delivery::Gone } else { Delivery::Waits });
                }
                Popped::Broken => {
                    queue.put_back(chains.len());
                    return Err(Delivery::Broken);
                }
            }
            if !self.has(FEATURE_MERGE) {
                break;
            }
        }
        Ok(chains)
    }

    /// Writes the packet over its buffers; heads, and how much each of them has got.
    fn scatter_over(&self, chains: &[Chain], packet: &[u8]) -> Vec<(u16, u32)> {
        let whole = chains.iter().map(room_of).sum::<usize>() >= packet.len();
        let mut rest = if whole { packet } else { &[] };
        let mut done = Vec::with_capacity(chains.len());
        for chain in chains {
            let (now, later) = rest.split_at(rest.len().min(room_of(chain)));
            done.push((chain.head, self.scatter(chain, now)));
            rest = later;
        }
        done
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
        let features = self.features.load(Ordering::Relaxed);
        if let Some((header, frame)) = packet.split_first_chunk_mut::<HEADER_BYTES>()
            && !frame.is_empty()
            && let Some(checked) = offload::to_tap(header, frame.len(), features)
        {
            *header = checked;
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
        if room_of(chain) < bytes.len() {
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

fn room_of(chain: &Chain) -> usize {
    chain.parts.iter().filter(|part| part.writable).map(|part| part.len as usize).sum()
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
        let own = FEATURE_MAC | FEATURE_STATUS | FEATURE_CONTROL | FEATURE_ANNOUNCE;
        FEATURES_OF_ALL | own | if self.offload.is_some() { offload::FEATURES } else { 0 }
    }

    fn later_features(&self) -> u64 {
        FEATURE_EVENT_INDEX | offload::FEATURES
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

    fn release(&self) {
        // While the card was held, another process may have told the tap otherwise: the target of a move that came to nothing.
        self.told.store(UNTOLD, Ordering::Relaxed);
        self.queues.iter().for_each(RequestQueue::release);
        self.interrupt.raise_again();
        self.notify();
    }

    fn identity(&self) -> Vec<u8> {
        self.mac.to_vec()
    }
}
