//! A network card driven as a guest drives it, without KVM: a socket that keeps packets whole is its tap.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::board::NetConfig;
use crate::devices::virtio::mmio::Transport;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::{DEVICES_VERSION, VirtioDevice};
use crate::memory::GuestRam;

use super::driver::{Descriptor, EVENT_INDEX, Line, NEXT, RAM_BYTES, VERSION_1, WRITE};

const QUEUE_SIZE: u16 = 16;
const RX: usize = 0;
const TX: usize = 1;
/// Each queue has three pages of its own from here on.
const RINGS: u64 = 0x1000;
const BUFFERS: u64 = 0x2_0000;
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MERGE: u64 = 1 << 15;
const ALL: u64 = VERSION_1 | EVENT_INDEX | CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MERGE;
/// A stream of pieces of 1448 bytes, TCP on IPv4.
const STREAM: [u8; 12] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// What taps were told, by descriptor.
static TOLD: Mutex<Vec<(i32, u32)>> = Mutex::new(Vec::new());

fn tell(tap: &File, flags: u32) -> io::Result<()> {
    TOLD.lock().unwrap().push((tap.as_raw_fd(), flags));
    Ok(())
}

struct Guest {
    ram: GuestRam,
    net: Arc<Net>,
    transport: Transport,
    line: Arc<Line>,
    /// The other end of the tap.
    wire: File,
    tap: i32,
    posted: [u16; 3],
}

impl Guest {
    fn on_devices(version: u32) -> Self {
        let (tap, wire) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
        let (ram, line) = (GuestRam::new(RAM_BYTES).unwrap(), Arc::new(Line::default()));
        let number = tap.as_raw_fd();
        let config = NetConfig { tap: tap.into(), mac: [2, 0, 0, 0, 0, 1], offload: Some(tell) };
        let net = Arc::new(Net::new(config, ram.clone(), line.clone()).unwrap());
        let transport = Transport::new(net.clone() as Arc<dyn VirtioDevice>, ram.clone(), version);
        Self { ram, net, transport, line, wire: wire.into(), tap: number, posted: [0; 3] }
    }

    fn started(features: u64) -> Self {
        let mut guest = Self::on_devices(DEVICES_VERSION);
        guest.net.release();
        guest.start(features);
        guest
    }

    fn start(&mut self, features: u64) {
        self.set(0x70, 0);
        self.posted = [0; 3];
        self.set(0x70, 3);
        for (half, value) in (0..).zip([features & 0xffff_ffff, features >> 32]) {
            self.set(0x24, half);
            self.set(0x20, u32::try_from(value).unwrap());
        }
        self.set(0x70, 11);
        for queue in 0..3 {
            self.set(0x30, queue);
            self.set(0x38, QUEUE_SIZE.into());
            let rings = rings_of(u64::from(queue));
            self.ram.write(rings + 4096, &[0; 8192]).unwrap();
            for (register, at) in [(0x80, 0), (0x90, 4096), (0xa0, 8192)] {
                self.set(register, u32::try_from(rings + at).unwrap());
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
        self.serve();
    }

    fn set(&self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn status(&self) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(0x70, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn serve(&self) {
        while self.net.serve().is_some() {}
    }

    /// Makes a chain of new descriptors available, from `head` on.
    fn post(&mut self, queue: usize, head: u16, chain: &[Descriptor]) {
        let rings = rings_of(queue as u64);
        for (at, (address, len, flags, next)) in (u64::from(head)..).zip(chain) {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.ram.write(rings + at * 16, &bytes).unwrap();
        }
        let place = u64::from(self.posted[queue] % QUEUE_SIZE);
        self.ram.write(rings + 4096 + 4 + place * 2, &head.to_le_bytes()).unwrap();
        self.posted[queue] = self.posted[queue].wrapping_add(1);
        self.ram.write(rings + 4096 + 2, &self.posted[queue].to_le_bytes()).unwrap();
        self.serve();
    }

    /// Posts a buffer of so many bytes for what comes, at a place of its own.
    fn receive_into(&mut self, head: u16, bytes: u32) {
        self.post(RX, head, &[(buffer(head), bytes, WRITE, 0)]);
    }

    /// Sends a frame with this header.
    fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        self.ram.write(BUFFERS, &header).unwrap();
        self.ram.write(BUFFERS + 4096, frame).unwrap();
        let len = u32::try_from(frame.len()).unwrap();
        self.post(TX, 0, &[(BUFFERS, 12, NEXT, 1), (BUFFERS + 4096, len, 0, 0)]);
    }

    /// The next packet on the wire, if there is one.
    fn sent(&mut self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 80_000];
        let len = self.wire.read(&mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    /// A packet comes over the wire.
    fn comes(&mut self, header: [u8; 12], frame: &[u8]) {
        self.wire.write_all(&[&header[..], frame].concat()).unwrap();
        self.serve();
    }

    fn used_index(&self, queue: usize) -> u16 {
        u16::from_le_bytes(self.bytes(rings_of(queue as u64) + 8192 + 2))
    }

    /// Head and length of the used ring's entry.
    fn used(&self, queue: usize, place: u64) -> (u32, u32) {
        let entry: [u8; 8] = self.bytes(rings_of(queue as u64) + 8192 + 4 + place * 8);
        let (head, len) = entry.split_at(4);
        (u32::from_le_bytes(head.try_into().unwrap()), u32::from_le_bytes(len.try_into().unwrap()))
    }

    fn bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read(at, &mut bytes).unwrap();
        bytes
    }

    /// What this guest's tap was told.
    fn told(&self) -> Vec<u32> {
        let told = TOLD.lock().unwrap();
        told.iter().filter(|(tap, _)| *tap == self.tap).map(|(_, flags)| *flags).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        TOLD.lock().unwrap().retain(|(tap, _)| *tap != self.tap);
    }
}

fn rings_of(queue: u64) -> u64 {
    RINGS + queue * 3 * 4096
}

fn buffer(head: u16) -> u64 {
    BUFFERS + (1 << 20) + u64::from(head) * 0x1_1000
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

#[test]
fn a_stream_leaves_as_one_packet_and_one_that_makes_no_sense_leaves_not_at_all() {
    let mut guest = Guest::started(ALL);
    let frame = pattern(60_000);
    guest.send(STREAM, &frame);
    assert!(guest.sent().expect("it is on the wire") == [&STREAM[..], &frame].concat());
    for (place, value) in [(0, 0), (1, 4), (1, 3), (4, 0), (6, 255), (8, 255)] {
        let mut header = STREAM;
        header[place] = value;
        header[5] = if place == 4 { 0 } else { header[5] };
        guest.send(header, &frame[..100]);
        assert_eq!(guest.sent(), None, "byte {place} is {value}");
    }
    assert_eq!((guest.used_index(TX), guest.status()), (7, 15), "all came back");
    let mut without = Guest::started(VERSION_1);
    without.send(STREAM, &frame[..100]);
    assert_eq!(without.sent().expect("sent")[..12], [0; 12], "nothing was agreed");
}

#[test]
fn a_packet_comes_in_as_many_buffers_as_it_takes_and_never_in_part() {
    let mut guest = Guest::started(ALL);
    let frame = pattern(10_000);
    guest.receive_into(0, 4096);
    guest.receive_into(1, 4096);
    guest.comes(STREAM, &frame);
    assert_eq!((guest.used_index(RX), guest.line.count()), (0, 0), "there is no room yet");
    guest.net.hold_and_drain().expect("nothing is in flight");
    guest.net.release();
    guest.receive_into(2, 4096);
    assert_eq!((guest.used_index(RX), guest.line.count()), (3, 1), "all at once, told of once");
    let header: [u8; 12] = guest.bytes(buffer(0));
    assert_eq!((&header[..10], &header[10..]), (&STREAM[..10], &[3, 0][..]));
    assert_eq!([0, 1, 2].map(|place| guest.used(RX, place)), [(0, 4096), (1, 4096), (2, 1820)]);
    let pieces = [
        &guest.bytes::<4096>(buffer(0))[12..],
        &guest.bytes::<4096>(buffer(1)),
        &guest.bytes::<1820>(buffer(2)),
    ];
    assert!(pieces.concat() == frame);
    guest.receive_into(3, 4096);
    guest.comes([0; 12], &frame[..60]);
    assert_eq!(guest.used(RX, 3), (3, 72), "the next one");
}

#[test]
fn a_packet_that_no_driver_could_make_room_for_is_lost_and_the_next_one_comes() {
    let mut guest = Guest::started(ALL);
    for head in 0..QUEUE_SIZE {
        guest.receive_into(head, 100);
    }
    guest.comes(STREAM, &pattern(60_000));
    guest.comes([0; 12], &pattern(60));
    assert_eq!((guest.used_index(RX), guest.used(RX, 0)), (1, (0, 72)));

    let mut alone = Guest::started(VERSION_1 | GUEST_CSUM | GUEST_TSO4);
    alone.receive_into(0, 100);
    alone.receive_into(1, 70_000 - 16);
    alone.comes(STREAM, &pattern(10_000));
    alone.comes(STREAM, &pattern(60_000));
    let used = [0, 1].map(|place| alone.used(RX, place));
    assert_eq!(used, [(0, 0), (1, 60_012)], "one buffer for each, and what does not fit is lost");
    assert_eq!(alone.bytes::<2>(buffer(1) + 10), [1, 0]);
}

#[test]
fn a_packet_that_the_driver_does_not_take_is_lost() {
    let mut guest = Guest::started(VERSION_1 | GUEST_CSUM | MERGE);
    guest.receive_into(0, 4096);
    guest.comes(STREAM, &pattern(1000));
    assert_eq!(guest.used_index(RX), 0, "it was not cut");
    guest.comes([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &pattern(1000));
    assert_eq!(guest.used_index(RX), 1);
    guest.start(VERSION_1);
    guest.receive_into(0, 4096);
    guest.comes([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &pattern(1000));
    assert_eq!(guest.used_index(RX), 0, "its checksum is not done");
    guest.comes([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &pattern(1000));
    assert_eq!(
        (guest.used_index(RX), guest.bytes::<12>(buffer(0))),
        (1, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    );
}

// The tap of another node knows nothing of what the guest has accepted, and may still be the source's before the card is released.
#[test]
fn a_tap_is_told_what_its_guest_takes_at_a_start_a_reset_and_after_a_move() {
    let guest = Guest::started(ALL);
    assert_eq!(guest.told(), [3]);
    guest.net.hold_and_drain().unwrap();
    let queues: Vec<_> = guest.net.queues().iter().map(|queue| queue.save()).collect();
    let other = Guest::on_devices(DEVICES_VERSION);
    for page in (0..RAM_BYTES).step_by(4096) {
        other.ram.write(page, &guest.bytes::<4096>(page)).unwrap();
    }
    for (queue, saved) in other.net.queues().iter().zip(&queues) {
        queue.restore(saved, &other.ram).unwrap();
    }
    other.transport.restore(&guest.transport.save()).unwrap();
    other.serve();
    assert_eq!(other.told(), [0_u32; 0], "it is held");
    other.net.release();
    other.serve();
    assert_eq!(other.told(), [3]);
    other.set(0x70, 0);
    other.serve();
    assert_eq!(other.told(), [3, 0]);
    guest.net.release();
    guest.serve();
    assert_eq!(guest.told(), [3, 3], "of a move that came to nothing");
}

#[test]
fn a_card_reads_no_packet_before_it_is_released() {
    let mut guest = Guest::on_devices(DEVICES_VERSION);
    guest.comes([0; 12], &pattern(60));
    let mut bytes = [0; 100];
    let peek = rustix::net::RecvFlags::PEEK;
    assert!(guest.net.queues()[RX].is_held());
    let left = rustix::net::recv(guest.net.tap(), &mut bytes[..], peek).expect("it is still there");
    assert_eq!(left.0, 72);
}

#[test]
fn older_devices_leave_nothing_to_anybody_and_a_tap_that_cannot_be_told_too() {
    let offered = |guest: &Guest| {
        let mut bytes = [0; 4];
        guest.set(0x14, 0);
        guest.transport.read(0x10, &mut bytes);
        u64::from(u32::from_le_bytes(bytes))
    };
    assert_eq!(offered(&Guest::on_devices(0)) & (ALL & 0xffff_ffff), 0);
    assert_eq!(offered(&Guest::on_devices(DEVICES_VERSION)) & ALL, ALL & 0xffff_ffff);
    let mut refused = Guest::on_devices(0);
    refused.start(ALL);
    assert_eq!(refused.status() & 8, 0);
}
