//! The target's end of one memory stream.

use std::io::{self, Read, Write};

use hv::GuestRam;

use super::record::{
    self, HEADER_BYTES, Kind, PACKED_HEADER_BYTES, PAGE, RUN_BYTES_MAX, Record, STATE_BYTES_MAX, StreamError,
    read_whole,
};

/// What came over one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Pages, with those that are zero.
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
        let stream = sender.finish(Some(b"state")).unwrap();
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
        let stream = sender.finish(Some(b"state")).unwrap();
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
        let stream = sender.finish(None).unwrap();
        receive(&mut &stream[..], &target, unmarked).unwrap();
        assert_eq!(target.used_bytes(), 5 * hv::PAGE_BYTES);
        assert!(content(&source) == content(&target), "memory differs");
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

    /// A record with its payload, mostly one that is taken, and the pages that it has.
    fn any_record() -> impl Strategy<Value = (Vec<u8>, u64)> {
        let place = prop_oneof![
            8 => (0..RAM_BYTES / PAGE as u64).prop_map(|page| page * PAGE as u64),
            1 => any::<u64>(),
            1 => Just(u64::MAX - PAGE as u64 + 1),
            1 => Just(RAM_BYTES),
        ];
        (1_u8..=7, 0_u32..70, place, prop_oneof![6 => Just(0_u32), 1 => any::<u32>()]).prop_map(
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
                    _ => (Vec::new(), pages as usize),
                };
                let mut record = vec![kind, 0, 0, 0];
                record.extend(u32::try_from(length).unwrap().wrapping_add(lie).to_le_bytes());
                record.extend(place.to_le_bytes());
                record.extend(payload);
                (record, if matches!(kind, 1 | 2 | 5) { u64::from(pages) } else { 0 })
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
            at in 0usize..9000, with in any::<u8>(), cut in 0usize..9000, packed in any::<bool>()
        ) {
            let source = ram();
            stamp(&source, 1, 3);
            stamp(&source, 2, 4);
            let mut sender = Sender::new(Vec::new(), source);
            if packed {
                sender.always_pack();
            }
            sender.send(&Pages { first: 0, bits: vec![0b1111], fresh: false }).unwrap();
            let mut stream = sender.finish(Some(b"state")).unwrap();
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
            let _answer = super::super::await_answer(&mut &bytes[..]);
        }
    }
}
