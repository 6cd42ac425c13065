//! The balloon driven as a guest drives it, without KVM.
//!
//! RAM holds a pattern but for the rings. Promises: of it changes what the guest has named and nothing else, whatever it names, and
//! after a reset the device works.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::prelude::*;

use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::mmio::Transport;
use crate::memory::{GuestRam, PAGE_BYTES};

use super::driver::{Descriptor, Line, NEXT, RAM_BYTES, VERSION_1, WRITE};

const QUEUE_SIZE: u16 = 16;
/// Each queue has three pages of its own from here on.
const RINGS: u64 = 0x1000;
/// Lists of page numbers and figures.
const LISTS: u64 = 0x2_0000;
/// The pattern begins here.
const PATTERN_PAGE: u64 = 128;
const PAGES: u64 = RAM_BYTES / PAGE_BYTES;
const STATISTICS: u64 = 1 << 1;
const REPORTING: u64 = 1 << 5;

struct Guest {
    ram: GuestRam,
    balloon: Arc<Balloon>,
    transport: Transport,
    posted: [u16; 5],
}

impl Guest {
    fn new() -> Self {
        let ram = GuestRam::new(RAM_BYTES).unwrap();
        for page in PATTERN_PAGE..PAGES {
            ram.write(page * PAGE_BYTES, &pattern(page)).unwrap();
        }
        let balloon = Arc::new(Balloon::new(ram.clone(), Arc::new(Line::default())).unwrap());
        balloon.release();
        let transport = Transport::new(balloon.clone() as Arc<dyn VirtioDevice>, ram.clone(), 0);
        Self { ram, balloon, transport, posted: [0; 5] }
    }

    fn started(features: u64) -> Self {
        let mut guest = Self::new();
        guest.start(VERSION_1 | features);
        assert_eq!(guest.register(0x70), 15);
        guest
    }

    fn start(&mut self, features: u64) {
        self.set(0x70, 0);
        self.posted = [0; 5];
        self.set(0x70, 3);
        for (half, value) in (0..).zip([features & 0xffff_ffff, features >> 32]) {
            self.set(0x24, half);
            self.set(0x20, u32::try_from(value).unwrap());
        }
        self.set(0x70, 11);
        for queue in 0..5 {
            self.set(0x30, queue);
            self.set(0x38, QUEUE_SIZE.into());
            let rings = rings_of(queue.into());
            self.ram.write(rings + PAGE_BYTES, &[0; 4]).unwrap();
            self.ram.write(rings + 2 * PAGE_BYTES, &[0; 4]).unwrap();
            for (register, at) in [(0x80, 0), (0x90, PAGE_BYTES), (0xa0, 2 * PAGE_BYTES)] {
                self.set(register, u32::try_from(rings + at).unwrap());
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    fn set(&self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    fn register(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Makes a chain available in a queue, and lets the device work until nothing is left to do.
    fn post(&mut self, queue: usize, descriptors: &[Descriptor]) {
        let rings = rings_of(queue as u64);
        for (at, (address, len, flags, next)) in (0..).zip(descriptors) {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.ram.write(rings + at * 16, &bytes).unwrap();
        }
        self.posted[queue] = self.posted[queue].wrapping_add(1);
        // Every entry of the ring names descriptor 0.
        self.ram.write(rings + PAGE_BYTES + 2, &self.posted[queue].to_le_bytes()).unwrap();
        self.serve();
    }

    fn serve(&self) {
        while self.balloon.serve().is_some() {}
    }

    fn list(&self, numbers: &[u32]) -> Descriptor {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.ram.write(LISTS, &bytes).unwrap();
        (LISTS, u32::try_from(bytes.len()).unwrap(), 0, 0)
    }

    fn inflate(&mut self, numbers: &[u32]) {
        let list = self.list(numbers);
        self.post(0, &[list]);
    }

    fn figures(&mut self, figures: &[(u16, u64)]) {
        let mut bytes = Vec::new();
        for (tag, value) in figures {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        self.ram.write(LISTS + PAGE_BYTES, &bytes).unwrap();
        self.post(2, &[(LISTS + PAGE_BYTES, u32::try_from(bytes.len()).unwrap(), 0, 0)]);
    }

    fn used_index(&self, queue: u64) -> u16 {
        let mut bytes = [0; 2];
        self.ram.read(rings_of(queue) + 2 * PAGE_BYTES + 2, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// The pages of the pattern that are zero; all others must be as they were.
    fn gone(&self) -> BTreeSet<u64> {
        let mut gone = BTreeSet::new();
        for page in PATTERN_PAGE..PAGES {
            let mut bytes = [0; 4096];
            self.ram.read(page * PAGE_BYTES, &mut bytes).unwrap();
            if bytes == [0; 4096] {
                gone.insert(page);
            } else {
                assert!(bytes == pattern(page), "page {page} is neither gone nor as it was");
            }
        }
        gone
    }
}

fn rings_of(queue: u64) -> u64 {
    RINGS + queue * 3 * PAGE_BYTES
}

fn pattern(page: u64) -> [u8; 4096] {
    [u8::try_from(page % 251 + 1).unwrap(); 4096]
}

#[test]
fn pages_are_taken_by_number_and_bytes_of_half_a_number_are_nothing() {
    let mut guest = Guest::started(0);
    guest.inflate(&[200, 202, 201, 200, 300]);
    assert_eq!(guest.gone(), BTreeSet::from([200, 201, 202, 300]));
    assert_eq!(guest.used_index(0), 1);
    let (at, len, ..) = guest.list(&[400, 401]);
    guest.post(0, &[(at, len - 1, 0, 0)]);
    assert_eq!(guest.gone(), BTreeSet::from([200, 201, 202, 300, 400]));
    guest.ram.write(200 * PAGE_BYTES, &pattern(200)).unwrap();
    let list = guest.list(&[200]);
    guest.post(1, &[list]);
    assert!(!guest.gone().contains(&200), "what is taken again keeps what is put there");
}

#[test]
fn a_list_in_parts_is_one_list_and_a_list_too_long_ends_at_a_part() {
    let mut guest = Guest::started(0);
    let (at, ..) = guest.list(&[200, 201, 202]);
    guest.post(0, &[(at, 6, NEXT, 1), (at + 6, 6, NEXT, 2), (at, 4, WRITE, 0)]);
    assert_eq!(guest.gone(), BTreeSet::from([200, 201, 202]));
    guest.list(&[210, 211]);
    guest.post(0, &[(at, 4, NEXT, 1), (at + 4, 1 << 20, NEXT, 2), (at + 4, 4, 0, 0)]);
    assert_eq!(guest.gone(), BTreeSet::from([200, 201, 202, 210]));
    guest.post(0, &[(at, 4, NEXT, 1), (RAM_BYTES - 2, 4, 0, 0)]);
    assert_eq!(guest.used_index(0), 3, "all came back");
}

#[test]
fn free_ranges_are_given_back_page_by_page_and_only_where_that_was_agreed() {
    // With statistics the queue has the standard's number or the one that Linux counts; without, a lower one.
    for (features, queue, takes) in [
        (REPORTING | STATISTICS, 4, true),
        (REPORTING | STATISTICS, 3, true),
        (REPORTING, 2, true),
        (STATISTICS, 4, false),
        (0, 2, false),
    ] {
        let mut guest = Guest::started(features);
        let start = 200 * PAGE_BYTES;
        guest
            .post(queue, &[(start - 1, 2 * 4096 + 1, NEXT | WRITE, 1), (start + 5 * PAGE_BYTES, 4096, 0, 0)]);
        let expected = if takes { BTreeSet::from([200, 201]) } else { BTreeSet::new() };
        assert_eq!(guest.gone(), expected, "{features:#x}, queue {queue}");
        let bad = [
            (RAM_BYTES - PAGE_BYTES, 8192),
            (u64::MAX - 4095, 8192),
            (u64::MAX, u32::MAX),
            (start + 1, 4096),
        ];
        for (address, len) in bad {
            guest.post(queue, &[(address, len, WRITE, 0)]);
        }
        assert_eq!(guest.gone(), expected, "{features:#x}, queue {queue}");
    }
}

#[test]
fn the_buffer_of_figures_stays_with_the_device_until_newer_ones_are_asked_for() {
    let mut guest = Guest::started(STATISTICS);
    guest.figures(&[(5, 1000), (4, 300), (99, 1)]);
    assert_eq!(guest.used_index(2), 0);
    guest.balloon.hold_and_drain().expect("it is not in flight");
    guest.balloon.release();
    let figures = guest.balloon.status().figures;
    assert_eq!(
        (figures.total_bytes, figures.free_bytes, figures.cached_bytes),
        (Some(1000), Some(300), None)
    );
    guest.serve();
    assert_eq!(guest.used_index(2), 1, "it was asked for");
    guest.serve();
    guest.figures(&[(4, 200)]);
    assert_eq!((guest.used_index(2), guest.balloon.status().figures.free_bytes), (1, Some(200)));
}

#[test]
fn a_target_is_told_by_an_interrupt_and_what_the_driver_says_is_shown_within_bounds() {
    let guest = Guest::started(0);
    let generation = guest.register(0xfc);
    guest.balloon.set_target(77);
    assert_eq!((guest.register(0x100), guest.register(0x60) & 2), (77, 2));
    assert_ne!(guest.register(0xfc), generation);
    guest.set(0x64, 2);
    guest.balloon.set_target(77);
    assert_eq!(guest.register(0x60), 0, "nothing has changed");
    guest.set(0x104, 70);
    assert_eq!(guest.balloon.status().actual_bytes, 70 * PAGE_BYTES);
    guest.set(0x104, u32::MAX);
    assert_eq!(guest.balloon.status().actual_bytes, RAM_BYTES);
    guest.set(0x100, 5);
    assert_eq!(guest.register(0x100), 77, "the target is not the driver's to set");
    guest.set(0x70, 0);
    let status = guest.balloon.status();
    assert_eq!((status.target_bytes, status.actual_bytes), (77 * PAGE_BYTES, 0), "a reset takes all back");
}

#[test]
fn nothing_is_given_back_while_memory_is_still_coming() {
    let mut guest = Guest::started(0);
    guest.balloon.memory_comes();
    guest.inflate(&[200]);
    assert_eq!((guest.gone().len(), guest.used_index(0)), (0, 0));
    guest.balloon.hold_and_drain().expect("nothing was taken from the queue");
    guest.balloon.release();
    guest.balloon.memory_is_there();
    guest.serve();
    assert_eq!((guest.gone().len(), guest.used_index(0)), (1, 1));
}

#[test]
fn what_was_asked_and_given_is_saved_and_a_damaged_state_is_refused() {
    use crate::state;
    let guest = Guest::started(0);
    guest.balloon.set_target(9);
    guest.set(0x104, 8);
    let mut saved = state::Device::default();
    VirtioDevice::save(&*guest.balloon, &mut saved);
    let other = Guest::new();
    VirtioDevice::restore(&*other.balloon, &saved).unwrap();
    let status = other.balloon.status();
    assert_eq!((status.target_bytes, status.actual_bytes), (9 * PAGE_BYTES, 8 * PAGE_BYTES));
    for target_pages in [u32::try_from(PAGES).unwrap(), u32::MAX] {
        saved.balloon = Some(state::Balloon { target_pages, actual_pages: 0 });
        VirtioDevice::restore(&*other.balloon, &saved).unwrap_err();
    }
}

/// A page number: mostly one of the pattern, sometimes at an edge or far outside.
fn number() -> impl Strategy<Value = u32> {
    let inside = u32::try_from(PATTERN_PAGE).unwrap()..u32::try_from(PAGES).unwrap();
    prop_oneof![
        8 => inside,
        1 => (u32::try_from(PAGES).unwrap() - 2)..(u32::try_from(PAGES).unwrap() + 2),
        1 => any::<u32>(),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    // Invariant H7
    #[test]
    fn exactly_the_listed_pages_of_ram_are_given_back(
        lists in proptest::collection::vec(proptest::collection::vec(number(), 0..300), 1..4),
    ) {
        let mut guest = Guest::started(0);
        let named = lists.iter().flatten().map(|number| u64::from(*number));
        // Lists and rings are the driver's own business.
        let named: BTreeSet<u64> = named.filter(|page| (PATTERN_PAGE..PAGES).contains(page)).collect();
        for list in &lists {
            let harmless: Vec<u32> =
                list.iter().copied().filter(|number| u64::from(*number) >= PATTERN_PAGE).collect();
            guest.inflate(&harmless);
        }
        prop_assert_eq!(guest.gone(), named);
        prop_assert_eq!(guest.ram.file().metadata().unwrap().len(), RAM_BYTES);
    }

    // Invariant H7
    #[test]
    fn whatever_a_guest_posts_its_balloon_works_after_a_reset(
        steps in proptest::collection::vec(
            (0_usize..5, proptest::collection::vec((any::<u64>(), any::<u32>(), 0_u16..8, 0_u16..20), 1..5), any::<bool>()),
            0..20,
        ),
        registers in proptest::collection::vec((0_u64..0x110, any::<u32>()), 0..20),
    ) {
        let mut guest = Guest::started(STATISTICS | REPORTING);
        for (queue, mut chain, near) in steps {
            if near {
                chain.iter_mut().for_each(|part| (part.0, part.1) = (part.0 % (RAM_BYTES + 8192), part.1 % (1 << 17)));
            }
            guest.post(queue, &chain);
            guest.balloon.status();
            guest.balloon.hold_and_drain().expect("nothing is ever under way for long");
            guest.balloon.release();
        }
        for (register, value) in registers {
            guest.set(register & !3, value);
            guest.serve();
        }
        guest.start(VERSION_1);
        guest.ram.write(500 * PAGE_BYTES, &pattern(500)).unwrap();
        let mut byte = [0; 1];
        guest.inflate(&[500]);
        guest.ram.read(500 * PAGE_BYTES, &mut byte).unwrap();
        prop_assert_eq!((byte, guest.used_index(0)), ([0], 1));
    }
}
