//! What a network card leaves to others: checksums, and cutting a stream into packets. Pure.
//!
//! ```text
//!   guest: one packet of up to 64 KiB, header "cut it into pieces of 1448, here is the checksum's place" --> tap --> whoever must
//!   guest <-- the same, as far as its driver takes it <-- tap <-- whoever has not cut it yet
//! ```
//! The header before each packet says it [VIRTIO 1.2] 5.1.6. The guest's is checked here, and by the kernel once more; the tap's says only
//! what its driver has accepted. **Invariant:** a header that leaves here names places inside of its packet, and asks for nothing that
//! was not agreed.

/// Before each packet, on both sides.
pub(crate) const HEADER_BYTES: usize = 12;
/// Where a received packet says in how many buffers it lies.
pub(crate) const HEADER_BUFFERS: usize = 10;
pub(super) type Header = [u8; HEADER_BYTES];

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
/// A received packet may lie in several buffers.
pub(super) const FEATURE_MERGE: u64 = 1 << 15;
/// What the card leaves to the host.
const TO_HOST: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
/// What the host may leave to the guest.
const TO_GUEST: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;
/// All of it, where a tap takes part.
pub(super) const FEATURES: u64 = TO_HOST | TO_GUEST | FEATURE_MERGE;

/// Flags of `TUNSETOFFLOAD`: what whoever reads from a tap takes.
const TAP_CSUM: u32 = 1;
const TAP_TSO4: u32 = 2;
const TAP_TSO6: u32 = 4;
const TAP_ECN: u32 = 8;
/// Everything that a driver may take.
pub const OFFLOADS_ALL: u32 = TAP_CSUM | TAP_TSO4 | TAP_TSO6 | TAP_ECN;

/// The checksum is not done: it is to be put at the place that the header names.
const NEEDS_CHECKSUM: u8 = 1;
/// The checksum was found right.
const CHECKSUM_IS_RIGHT: u8 = 2;
const WHOLE: u8 = 0;
const TCP_4: u8 = 1;
const TCP_6: u8 = 4;
const WITH_ECN: u8 = 0x80;
/// Of an Ethernet frame.
const FRAME_HEADER_BYTES: usize = 14;

/// What a driver with these features takes from a tap. Of two that only make sense together one alone is none.
pub(super) fn taken_by(features: u64) -> u32 {
    let has = |feature: u64, flag: u32| if features & feature == 0 { 0 } else { flag };
    let tcp = has(GUEST_TSO4, TAP_TSO4) | has(GUEST_TSO6, TAP_TSO6);
    match (features & GUEST_CSUM != 0, tcp) {
        (false, _) => 0,
        (true, 0) => TAP_CSUM,
        (true, tcp) => TAP_CSUM | tcp | has(GUEST_ECN, TAP_ECN),
    }
}

/// The header for the tap of a packet from a guest, `frame_bytes` long without it; `None` when the packet makes no sense.
pub(super) fn to_tap(header: &Header, frame_bytes: usize, features: u64) -> Option<Header> {
    if features & CSUM == 0 {
        // Nothing was agreed that a header could ask for; whatever is there reaches nobody.
        return Some([0; HEADER_BYTES]);
    }
    let mut checked = kept(header, NEEDS_CHECKSUM);
    let (needs_checksum, kind) = (checked[0] & NEEDS_CHECKSUM != 0, checked[1]);
    let allowed = features & TO_HOST;
    if kind != WHOLE {
        // A piece has a length, and a checksum of its own that somebody must do.
        let sensible = needs_checksum && half(&checked, 4) > 0 && half(&checked, 2) <= frame_bytes;
        if !sensible || !is_agreed(kind, allowed, (HOST_TSO4, HOST_TSO6, HOST_ECN)) {
            return None;
        }
    }
    let (start, place) = (half(&checked, 6), half(&checked, 8));
    if needs_checksum && (start < FRAME_HEADER_BYTES || start + place + 2 > frame_bytes) {
        return None;
    }
    checked[HEADER_BUFFERS..].fill(0);
    Some(checked)
}

/// The header for the guest of a packet from the tap; `None` when its driver does not take such packets: it was another one, or had
/// accepted more, when the packet came.
pub(super) fn to_guest(header: &Header, features: u64) -> Option<Header> {
    let (needs_checksum, kind) = (header[0] & NEEDS_CHECKSUM != 0, header[1]);
    if features & GUEST_CSUM == 0 {
        return (!needs_checksum && kind == WHOLE).then_some([0; HEADER_BYTES]);
    }
    let agreed = kind == WHOLE || is_agreed(kind, features & TO_GUEST, (GUEST_TSO4, GUEST_TSO6, GUEST_ECN));
    agreed.then(|| kept(header, NEEDS_CHECKSUM | CHECKSUM_IS_RIGHT))
}

fn is_agreed(kind: u8, features: u64, (tcp4, tcp6, ecn): (u64, u64, u64)) -> bool {
    let wanted = match kind & !WITH_ECN {
        TCP_4 => tcp4,
        TCP_6 => tcp6,
        _ => return false,
    };
    features & wanted != 0 && (kind & WITH_ECN == 0 || features & ecn != 0)
}

/// The header with these flags of it alone, and without what they do not use.
fn kept(header: &Header, flags: u8) -> Header {
    let mut kept = *header;
    kept[0] &= flags;
    if kept[1] == WHOLE {
        kept[2..6].fill(0);
    }
    if kept[0] & NEEDS_CHECKSUM == 0 {
        kept[6..10].fill(0);
    }
    kept
}

fn half(header: &Header, at: usize) -> usize {
    u16::from_le_bytes([header[at], header[at + 1]]).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(flags: u8, kind: u8, halves: [u16; 5]) -> Header {
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (to, from) in header[2..].chunks_exact_mut(2).zip(halves) {
            to.copy_from_slice(&from.to_le_bytes());
        }
        header
    }

    #[test]
    fn a_stream_of_a_guest_goes_to_the_tap_uncut_where_that_was_agreed() {
        let stream = header(1, TCP_4, [54, 1448, 34, 16, 7]);
        let cleared = header(1, TCP_4, [54, 1448, 34, 16, 0]);
        assert_eq!(to_tap(&stream, 60_000, FEATURES), Some(cleared));
        assert_eq!(to_tap(&stream, 60_000, CSUM), None);
        assert_eq!(to_tap(&stream, 60_000, CSUM | HOST_TSO6), None);
        assert_eq!(to_tap(&stream, 60_000, 0), Some([0; 12]), "without any the header is empty, as ever");
        let congested = header(1, TCP_4 | WITH_ECN, [54, 1448, 34, 16, 0]);
        assert_eq!(to_tap(&congested, 60_000, CSUM | HOST_TSO4), None);
        assert_eq!(to_tap(&congested, 60_000, FEATURES), Some(congested));
    }

    #[test]
    fn places_outside_of_the_packet_and_streams_that_make_no_sense_are_refused() {
        for (flags, kind, halves, bytes) in [
            (1, WHOLE, [0, 0, 34, 16, 0], 51),
            (1, WHOLE, [0, 0, 13, 16, 0], 60),
            (1, WHOLE, [0, 0, u16::MAX, u16::MAX, 0], 65_550),
            (1, TCP_4, [54, 0, 34, 16, 0], 100),
            (1, TCP_4, [101, 1448, 34, 16, 0], 100),
            (0, TCP_4, [54, 1448, 34, 16, 0], 100),
            (1, 3, [54, 1448, 34, 8, 0], 100),
            (1, 5, [54, 1448, 34, 8, 0], 100),
            (1, WITH_ECN, [54, 1448, 34, 8, 0], 100),
        ] {
            assert_eq!(
                to_tap(&header(flags, kind, halves), bytes, FEATURES),
                None,
                "{flags} {kind} {halves:?}"
            );
        }
        assert!(to_tap(&header(1, WHOLE, [0, 0, 34, 16, 0]), 52, FEATURES).is_some(), "at the very end");
    }

    #[test]
    fn a_driver_gets_what_it_takes_and_the_tap_is_told_so() {
        let (plain, right) = (header(0, WHOLE, [0; 5]), header(2, WHOLE, [0; 5]));
        let (open, stream) = (header(1, WHOLE, [0, 0, 34, 16, 0]), header(1, TCP_6, [74, 1428, 54, 16, 0]));
        for (features, flags, takes) in [
            (0, 0, [true, true, false, false]),
            (GUEST_TSO4 | GUEST_TSO6, 0, [true, true, false, false]),
            (GUEST_CSUM, 1, [true, true, true, false]),
            (GUEST_CSUM | GUEST_ECN, 1, [true, true, true, false]),
            (GUEST_CSUM | GUEST_TSO4, 3, [true, true, true, false]),
            (GUEST_CSUM | GUEST_TSO6 | GUEST_ECN, 13, [true, true, true, true]),
            (FEATURES, OFFLOADS_ALL, [true, true, true, true]),
        ] {
            assert_eq!(taken_by(features), flags, "{features:#x}");
            let found = [plain, right, open, stream].map(|header| to_guest(&header, features).is_some());
            assert_eq!(found, takes, "{features:#x}");
        }
        assert_eq!(to_guest(&right, 0), Some(plain), "a flag that was not agreed is not shown");
    }

    proptest! {
        // Invariant H7
        #[test]
        fn no_header_of_a_guest_names_a_place_outside_of_its_packet(
            raw in any::<[u8; HEADER_BYTES]>(),
            frame_bytes in 0_usize..70_000,
            features in any::<u64>(),
        ) {
            let Some(checked) = to_tap(&raw, frame_bytes, features) else { return Ok(()) };
            let needs_checksum = checked[0] == NEEDS_CHECKSUM;
            prop_assert!(checked[0] & !NEEDS_CHECKSUM == 0 && (checked[1] == WHOLE || needs_checksum));
            prop_assert!(!needs_checksum || half(&checked, 6) + half(&checked, 8) + 2 <= frame_bytes);
            prop_assert!(half(&checked, 2) <= frame_bytes && checked[HEADER_BUFFERS..] == [0; 2]);
            prop_assert!(features & CSUM != 0 || checked == [0; HEADER_BYTES]);
        }
    }
}
