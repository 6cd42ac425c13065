//! The target's end of one memory stream.

use std::io::{self, Read, Write};

use hv::GuestRam;

use super::delta;
use super::record::{
    self, HEADER_BYTES, Kind, PACKED_HEADER_BYTES, PAGE, RUN_BYTES_MAX, Record, STATE_BYTES_MAX, StreamError,
    read_whole,
};

/// What came over one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Pages, with those that are zero, and those that came as differences.
    pub pages: u64,
    /// The state of processors and devices, on the stream that carries it.
    pub state: Option<Vec<u8>>,
}

/// Takes everything up to the end of the stream into RAM. The answer is still due. `marked` is called where the source waits for
/// a word that everything before has arrived.
///
/// # Errors
/// When the connection breaks, or what comes breaks the rules: nothing outside of RAM has been written then.
pub fn receive<S: Read>(
    stream: &mut S,
    ram: &GuestRam,
    mut marked: impl FnMut(&mut S) -> io::Result<()>,
) -> Result<Received, StreamError> {
    let mut received = Received::default();
    let mut buffer = vec![0; RUN_BYTES_MAX];
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let record = Record::parse(header)?;
        match record.kind {
            Kind::Pages => received.pages += take_pages(stream, ram, record, &mut buffer)?,
            Kind::Packed => received.pages += take_packed(stream, ram, record, &mut buffer)?,
            Kind::Deltas => received.pages += take_deltas(stream, ram, record, &mut buffer)?,
            Kind::Zeros => received.pages += take_zeros(ram, record)?,
            Kind::State => take_state(stream, record, &mut received)?,
            Kind::End if record.place == received.pages && record.length == 0 => return Ok(received),
            Kind::Mark if record.place == received.pages && record.length == 0 => marked(stream)?,
            Kind::End | Kind::Mark => return Err(StreamError::Invalid("pages are missing")),
        }
    }
}

fn take_pages(
    stream: &mut impl Read,
    ram: &GuestRam,
    record: Record,
    buffer: &mut [u8],
) -> Result<u64, StreamError> {
    let length = record.length as usize;
    if !(1..=RUN_BYTES_MAX).contains(&length) || !length.is_multiple_of(PAGE) || !aligned(record) {
        return Err(StreamError::Invalid("a run of pages"));
    }
    let payload = &mut buffer[..length];
    stream.read_exact(payload)?;
    ram.write_linear(record.place, payload)?;
    Ok((length / PAGE) as u64)
}

/// A frame is unpacked into as many bytes as it announces, which are bounded like those of plain pages.
fn take_packed(
    stream: &mut impl Read,
    ram: &GuestRam,
    record: Record,
    buffer: &mut [u8],
) -> Result<u64, StreamError> {
    let invalid = StreamError::Invalid("packed pages");
    let header = PACKED_HEADER_BYTES as usize;
    if !(header + 1..=RUN_BYTES_MAX).contains(&(record.length as usize)) || !aligned(record) {
        return Err(invalid);
    }
    let payload = read_whole(stream, record.length)?;
    let (length, frame) = payload.split_at(header);
    let length = u32::from_le_bytes(length.try_into().expect("four bytes")) as usize;
    if !(1..=RUN_BYTES_MAX).contains(&length) || !length.is_multiple_of(PAGE) {
        return Err(invalid);
    }
    let unpacked = zstd::bulk::decompress_to_buffer(frame, &mut buffer[..length]);
    if unpacked.ok() != Some(length) {
        return Err(invalid);
    }
    ram.write_linear(record.place, &buffer[..length])?;
    Ok((length / PAGE) as u64)
}

/// Each page is written when it is what the source has, and kept as it is otherwise.
fn take_deltas(
    stream: &mut impl Read,
    ram: &GuestRam,
    record: Record,
    buffer: &mut [u8],
) -> Result<u64, StreamError> {
    let length = record.length as usize;
    let invalid = StreamError::Invalid("pages as differences");
    if !(1..=RUN_BYTES_MAX).contains(&length) || !aligned(record) {
        return Err(invalid);
    }
    let payload = &mut buffer[..length];
    stream.read_exact(payload)?;
    let mut pages = 0;
    let mut page = [0; PAGE];
    for entry in delta::entries(payload) {
        let entry = entry?;
        let Some(place) = record.place.checked_add(entry.page * hv::PAGE_BYTES) else { return Err(invalid) };
        ram.read_linear(place, &mut page)?;
        entry.apply(&mut page)?;
        ram.write_linear(place, &page)?;
        pages += 1;
    }
    Ok(pages)
}

/// They take no memory here: a page that the guest has given back at the source is given back here too.
fn take_zeros(ram: &GuestRam, record: Record) -> Result<u64, StreamError> {
    let fits = (1..=RUN_BYTES_MAX / PAGE).contains(&(record.length as usize));
    if !aligned(record) || !fits {
        return Err(StreamError::Invalid("a run of zero pages"));
    }
    ram.discard_linear(record.place, u64::from(record.length) * hv::PAGE_BYTES)?;
    Ok(u64::from(record.length))
}

fn take_state(stream: &mut impl Read, record: Record, received: &mut Received) -> Result<(), StreamError> {
    if record.length > STATE_BYTES_MAX || record.place != 0 || received.state.is_some() {
        return Err(StreamError::Invalid("the state"));
    }
    received.state = Some(read_whole(stream, record.length)?);
    Ok(())
}

fn aligned(record: Record) -> bool {
    record.place.is_multiple_of(hv::PAGE_BYTES)
}

/// Answers at the end of the stream: ready, or why not.
///
/// # Errors
/// When the connection breaks.
pub fn answer(stream: &mut impl Write, answer: Result<(), &str>) -> io::Result<()> {
    record::write_answer(stream, answer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Pages, Sender};
    use super::*;

    const RAM_BYTES: u64 = 4 << 20;

    fn unmarked(_: &mut &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn ram() -> GuestRam {
        GuestRam::new(RAM_BYTES).expect("a little memory")
    }

    fn stamp(ram: &GuestRam, page: u64, with: u8) {
        ram.write_linear(page * hv::PAGE_BYTES, &[with; PAGE]).expect("in RAM");
    }

    /// All that a sender has sent.
    fn ended(mut sender: Sender<Vec<u8>>, state: Option<&[u8]>) -> Vec<u8> {
        sender.finish(state).unwrap();
        sender.into_stream()
    }

    fn content(ram: &GuestRam) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(RAM_BYTES).unwrap()];
        ram.read_linear(0, &mut all).expect("all of RAM");
        all
    }

    #[test]
    fn pages_that_go_packed_arrive_as_they_were() {
        let (source, target) = (ram(), ram());
        for page in 0..200 {
            stamp(&source, page, u8::try_from(page % 251).unwrap());
        }
        let mut sender = Sender::new(Vec::new(), source.clone());
        sender.always_pack();
        sender.send(&Pages { first: 0, bits: vec![u64::MAX; 4], fresh: true }).unwrap();
        let stream = ended(sender, Some(b"state"));
        assert!(stream.len() < 200 * PAGE / 10, "{} bytes", stream.len());
        receive(&mut &stream[..], &target, unmarked).unwrap();
        assert!(content(&source) == content(&target), "memory differs");
        // Hostile: a frame of more than it says, of less, and none.
        let frame = zstd::bulk::compress(&[7; 2 * PAGE], 1).unwrap();
        for (says, frame) in
            [(PAGE, &frame[..]), (3 * PAGE, &frame), (2 * PAGE, &frame[..frame.len() - 1]), (PAGE, b"no")]
        {
            let mut bad = vec![5, 0, 0, 0];
            bad.extend(u32::try_from(frame.len() + 4).unwrap().to_le_bytes());
            bad.extend(0u64.to_le_bytes());
            bad.extend(u32::try_from(says).unwrap().to_le_bytes());
            bad.extend(frame);
            assert!(receive(&mut &bad[..], &ram(), unmarked).is_err(), "{says}");
        }
    }

    #[test]
    fn what_was_sent_is_what_is_there_also_when_a_page_has_become_zero() {
        let (source, target) = (ram(), ram());
        for page in 0..200 {
            stamp(&source, page, 7);
        }
        let mut sender = Sender::new(Vec::new(), source.clone());
        sender.send(&Pages { first: 0, bits: vec![u64::MAX; 16], fresh: true }).unwrap();
        stamp(&source, 3, 0);
        stamp(&source, 5, 9);
        sender.send(&Pages { first: 0, bits: vec![0b10_1000], fresh: false }).unwrap();
        let stream = ended(sender, Some(b"state"));
        let received = receive(&mut &stream[..], &target, unmarked).unwrap();
        assert_eq!(received, Received { pages: 202, state: Some(b"state".to_vec()) });
        assert!(content(&source) == content(&target), "memory differs");
    }

    #[test]
    fn a_page_that_was_sent_and_then_given_back_takes_no_memory_at_the_target_either() {
        let (source, target) = (ram(), ram());
        for page in 0..8 {
            stamp(&source, page, 7);
        }
        let mut sender = Sender::new(Vec::new(), source.clone());
        sender.send(&Pages { first: 0, bits: vec![0xff], fresh: true }).unwrap();
        source.discard(2 * hv::PAGE_BYTES, 3 * hv::PAGE_BYTES).unwrap();
        sender.send(&Pages { first: 0, bits: vec![0b1_1100], fresh: false }).unwrap();
        let stream = ended(sender, None);
        receive(&mut &stream[..], &target, unmarked).unwrap();
        assert_eq!(target.used_bytes(), 5 * hv::PAGE_BYTES);
        assert!(content(&source) == content(&target), "memory differs");
    }

    /// Both sides after a first pass over some pages, and what was sent for it.
    fn compared(source: &GuestRam, bytes: u64) -> Sender<Vec<u8>> {
        let mut sender = Sender::new(Vec::new(), source.clone()).remembering(bytes);
        sender.always_compare();
        sender.send(&Pages { first: 0, bits: vec![u64::MAX; 16], fresh: true }).unwrap();
        sender
    }

    #[test]
    fn pages_of_which_little_has_changed_go_as_differences_and_arrive() {
        let (source, target) = (ram(), ram());
        for page in 0..200 {
            stamp(&source, page, u8::try_from(page % 250 + 1).unwrap());
        }
        let mut sender = compared(&source, 1 << 20);
        let first = sender.sent();
        assert_eq!((first.delta_pages, first.page_bytes), (0, 200 * hv::PAGE_BYTES));
        // One word each; one page becomes zeros, one is something else, one was not written after all, one was zeros before.
        for page in (0..200).filter(|page| page % 10 != 5) {
            source.write_linear(page * hv::PAGE_BYTES + page * 8, b"changed").unwrap();
        }
        source.discard_linear(15 * hv::PAGE_BYTES, hv::PAGE_BYTES).unwrap();
        stamp(&source, 25, 251);
        stamp(&source, 300, 1);
        sender.send(&Pages { first: 0, bits: vec![u64::MAX; 16], fresh: false }).unwrap();
        let second = sender.sent();
        assert_eq!(second.delta_pages, 198, "all but the zeros and those that go whole");
        assert!(second.bytes - first.bytes < 180 * 30 + 3 * hv::PAGE_BYTES, "{second:?}");
        assert!(second.delta_bytes_saved > 198 * (hv::PAGE_BYTES - 30), "{second:?}");
        assert_eq!(second.page_bytes - first.page_bytes, 200 * hv::PAGE_BYTES);
        // What was zeros, or whole, is compared with that the next time.
        stamp(&source, 15, 9);
        source.write_linear(25 * hv::PAGE_BYTES, b"again").unwrap();
        source.write_linear(300 * hv::PAGE_BYTES, b"again").unwrap();
        sender.send(&Pages { first: 0, bits: vec![u64::MAX; 16], fresh: false }).unwrap();
        let third = sender.sent();
        assert_eq!(third.delta_pages - second.delta_pages, 200, "{third:?}");
        let stream = ended(sender, None);
        receive(&mut &stream[..], &target, unmarked).unwrap();
        assert!(content(&source) == content(&target), "memory differs");
    }

    #[test]
    fn what_there_is_no_memory_for_goes_whole_and_arrives() {
        for pages in [0, 1, 7, 100] {
            let (source, target) = (ram(), ram());
            for page in 0..200 {
                stamp(&source, page, 7);
            }
            let mut sender = Sender::new(Vec::new(), source.clone()).remembering(pages * hv::PAGE_BYTES);
            if pages > 0 {
                sender.always_compare();
            }
            for round in 0_u64..4 {
                for page in (0..200).filter(|page| round > 0 && page % 3 != 1) {
                    source
                        .write_linear(page * hv::PAGE_BYTES + round * 800, &[u8::try_from(page).unwrap(); 9])
                        .unwrap();
                }
                sender.send(&Pages { first: 0, bits: vec![u64::MAX; 4], fresh: round == 0 }).unwrap();
            }
            assert_eq!(sender.sent().delta_pages > 0, pages > 0);
            let stream = ended(sender, None);
            receive(&mut &stream[..], &target, unmarked).unwrap();
            assert!(content(&source) == content(&target), "memory differs");
        }
    }

    // Invariant H4
    #[test]
    fn a_page_that_is_written_while_it_is_sent_arrives_as_it_was_read_last() {
        let (source, target) = (ram(), ram());
        for page in 0..64 {
            stamp(&source, page, 7);
        }
        let mut sender = compared(&source, 1 << 20);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut round = 0_u64;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    round += 1;
                    source
                        .write_linear(round * 264 % (64 * hv::PAGE_BYTES - 8), &round.to_le_bytes())
                        .unwrap();
                }
            });
            for _ in 0..200 {
                sender.send(&Pages { first: 0, bits: vec![u64::MAX], fresh: false }).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        // The guest stands still.
        sender.send(&Pages { first: 0, bits: vec![u64::MAX], fresh: false }).unwrap();
        assert!(sender.sent().delta_pages > 64, "{:?}", sender.sent());
        let stream = ended(sender, None);
        receive(&mut &stream[..], &target, unmarked).unwrap();
        assert!(content(&source) == content(&target), "memory differs");
    }

    // Invariant H7
    #[test]
    fn a_difference_to_something_else_than_the_target_has_is_refused_and_its_page_stays() {
        let (source, target) = (ram(), ram());
        stamp(&source, 3, 7);
        let mut sender = compared(&source, 1 << 20);
        let before = sender.sent().bytes;
        source.write_linear(3 * hv::PAGE_BYTES, b"new").unwrap();
        sender.send(&Pages { first: 0, bits: vec![0b1000], fresh: false }).unwrap();
        let stream = ended(sender, None);
        let second = &stream[usize::try_from(before).unwrap()..];
        stamp(&target, 3, 8);
        let refused = receive(&mut &second[..], &target, unmarked).expect_err("it is another page");
        assert!(refused.to_string().contains("does not lead to the page"), "{refused}");
        let mut page = [0; PAGE];
        target.read_linear(3 * hv::PAGE_BYTES, &mut page).unwrap();
        assert_eq!(page, [8; PAGE]);
    }

    #[test]
    fn who_waits_at_a_mark_hears_when_everything_before_it_has_arrived() {
        let (source, target) = (ram(), ram());
        stamp(&source, 1, 3);
        let (near, mut far) = std::os::unix::net::UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let marked = |stream: &mut std::os::unix::net::UnixStream| answer(stream, Ok(()));
                receive(&mut far, &target, marked).unwrap()
            });
            let mut sender = Sender::new(near, source.clone());
            sender.send(&Pages { first: 0, bits: vec![0b10], fresh: true }).unwrap();
            sender.settle().unwrap();
            assert!(content(&source) == content(&target), "memory differs");
            sender.finish(None).unwrap();
        });
    }

    // Invariant H7
    #[test]
    fn a_stream_that_breaks_the_rules_is_refused_and_writes_nothing_outside_of_ram() {
        let record = |kind, length, place| Record { kind, length, place }.to_bytes().to_vec();
        let with_page = |mut header: Vec<u8>| {
            header.extend([1; PAGE]);
            header
        };
        // Eight bytes of a page of zeros become ones.
        let mut changed = [0; PAGE];
        changed[..8].fill(1);
        let sum = crc32c::crc32c(&changed).to_le_bytes();
        let one_word = |page: u8| [&[page, 0, 12, 0], &sum[..], &[0, 0, 1, 0], &[1; 8]].concat();
        let bad = [
            with_page(record(Kind::Pages, 4096, RAM_BYTES)),
            with_page(record(Kind::Pages, 4096, 100)),
            with_page(record(Kind::Pages, 4095, 0)),
            with_page(record(Kind::Pages, 4096, u64::MAX - 4095)),
            record(Kind::Pages, 0, 0),
            record(Kind::Pages, u32::MAX, 0),
            record(Kind::Zeros, 1, RAM_BYTES),
            record(Kind::Zeros, u32::MAX, 0),
            record(Kind::State, u32::MAX, 0),
            record(Kind::State, 0, 1),
            [record(Kind::State, 0, 0), record(Kind::State, 0, 0)].concat(),
            record(Kind::Deltas, 0, 0),
            record(Kind::Deltas, u32::MAX, 0),
            [record(Kind::Deltas, 7, 0), vec![0; 7]].concat(),
            [record(Kind::Deltas, 20, 100), one_word(0)].concat(),
            [record(Kind::Deltas, 20, RAM_BYTES), one_word(0)].concat(),
            [record(Kind::Deltas, 20, RAM_BYTES - PAGE as u64), one_word(1)].concat(),
            [record(Kind::Deltas, 20, u64::MAX - 4095), one_word(1)].concat(),
            record(Kind::End, 0, 1),
            record(Kind::End, 1, 0),
            record(Kind::Mark, 0, 1),
            record(Kind::Mark, 1, 0),
            vec![9; HEADER_BYTES],
            vec![1, 1, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        for stream in bad {
            let target = ram();
            assert!(receive(&mut &stream[..], &target, unmarked).is_err(), "{:?}", &stream[..HEADER_BYTES]);
            assert!(content(&target).iter().all(|byte| *byte == 0));
        }
    }

    /// Entries of so many pages of zeros, a word of which becomes something else.
    fn entries_of(pages: u32) -> Vec<u8> {
        let mut entries = delta::Entries::default();
        let mut new = [0; PAGE];
        for page in 0..u64::from(pages) {
            new[0] = 1;
            let _length = entries.add(page, &[0; PAGE], &new);
        }
        entries.record().map(|(_, _, payload)| payload.to_vec()).unwrap_or_default()
    }

    /// A record with its payload, mostly one that is taken, and the pages that it has.
    fn any_record() -> impl Strategy<Value = (Vec<u8>, u64)> {
        let place = prop_oneof![
            8 => (0..RAM_BYTES / PAGE as u64).prop_map(|page| page * PAGE as u64),
            1 => any::<u64>(),
            1 => Just(u64::MAX - PAGE as u64 + 1),
            1 => Just(RAM_BYTES),
        ];
        (1_u8..=8, 0_u32..70, place, prop_oneof![6 => Just(0_u32), 1 => any::<u32>()]).prop_map(
            |(kind, pages, place, lie)| {
                let content = vec![pages.to_le_bytes()[0]; pages as usize * PAGE];
                let (payload, length) = match kind {
                    1 => (content.clone(), content.len()),
                    5 => {
                        let said = u32::try_from(content.len()).unwrap().wrapping_add(lie).to_le_bytes();
                        let packed = [&said[..], &zstd::bulk::compress(&content, 1).unwrap()].concat();
                        let length = packed.len();
                        (packed, length)
                    }
                    7 => (entries_of(pages), entries_of(pages).len()),
                    _ => (Vec::new(), pages as usize),
                };
                let mut record = vec![kind, 0, 0, 0];
                record.extend(u32::try_from(length).unwrap().wrapping_add(lie).to_le_bytes());
                record.extend(place.to_le_bytes());
                record.extend(payload);
                (record, if matches!(kind, 1 | 2 | 5 | 7) { u64::from(pages) } else { 0 })
            },
        )
    }

    proptest! {
        // Invariant H7
        #[test]
        fn any_bytes_are_a_stream_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _outcome = receive(&mut &bytes[..], &ram(), unmarked);
        }

        // Invariant H7
        #[test]
        fn a_good_stream_with_changed_bytes_is_taken_or_refused(
            at in 0usize..9000, with in any::<u8>(), cut in 0usize..9000, packed in any::<bool>(), again in any::<bool>()
        ) {
            let source = ram();
            stamp(&source, 1, 3);
            stamp(&source, 2, 4);
            let mut sender = Sender::new(Vec::new(), source.clone()).remembering(1 << 20);
            sender.always_compare();
            if packed {
                sender.always_pack();
            }
            sender.send(&Pages { first: 0, bits: vec![0b1111], fresh: false }).unwrap();
            if again {
                source.write_linear(hv::PAGE_BYTES, b"changed").unwrap();
                sender.send(&Pages { first: 0, bits: vec![0b1111], fresh: false }).unwrap();
            }
            let mut stream = ended(sender, Some(b"state"));
            let end = stream.len();
            stream[at % end] = with;
            stream.truncate(cut.max(1));
            let _outcome = receive(&mut &stream[..], &ram(), unmarked);
        }

        // Invariant H7
        #[test]
        fn records_of_any_length_and_place_are_taken_or_refused_and_counted_right(
            records in proptest::collection::vec(any_record(), 0..8)
        ) {
            let mut stream: Vec<u8> = records.iter().flat_map(|(record, _)| record.clone()).collect();
            let pages: u64 = records.iter().map(|(_, pages)| pages).sum();
            stream.extend(Record { kind: Kind::End, length: 0, place: pages }.to_bytes());
            if let Ok(received) = receive(&mut &stream[..], &ram(), unmarked) {
                prop_assert_eq!(received.pages, pages);
            }
        }

        // Invariant H7
        #[test]
        fn any_opening_and_any_answer_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _opening = super::super::Opening::read(&mut &bytes[..]);
            let _answer = record::read_answer(&mut &bytes[..]);
        }
    }
}
