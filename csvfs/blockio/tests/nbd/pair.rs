//! Our client and our server together.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::mpsc::channel;

use blockio::{
    AlignedBuf, BlockDevice, Change, FaultDevice, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, NbdAddress,
    NbdDevice, NbdExport, NbdOptions, OpKind, Record, Recorder,
};
use proptest::prelude::*;

use crate::support::{Served, pattern};

const SIZE: u64 = 1 << 20;

#[test]
fn a_device_behind_nbd_keeps_what_is_written_to_it() {
    let device = Arc::new(MemoryDevice::new(96 << 20));
    let served = Served::of(device.clone());
    let client = served.open();
    assert_eq!(client.geometry(), device.geometry());
    // Longer than one request may be, and not aligned in memory.
    let wanted = pattern(70 << 20, 1);
    client.write_at(512, &wanted).expect("write");
    let mut found = vec![0; wanted.len()];
    client.read_at(512, &mut found).expect("read");
    assert!(found == wanted);
    client.run(IoOp::WriteZeroes { offset: 1024, len: 4096, may_unmap: true }).expect("zero");
    client.run(IoOp::Discard { offset: 8192, len: 4096 }).expect("discard");
    client.flush().expect("flush");
    client.read_at(1024, &mut found[..4096]).expect("read");
    assert!(found[..4096].iter().all(|byte| *byte == 0));
}

#[test]
fn a_long_transfer_is_cut_into_pieces_of_the_wanted_length_and_is_one_request_for_its_submitter() {
    for (most, wanted) in [(100_000, 99_840), (1, 512)] {
        let recorder = Arc::new(Recorder::new(MemoryDevice::new(SIZE)));
        let served = Served::of(recorder.clone());
        let options = NbdOptions { piece_bytes_max: most, ..NbdOptions::default() };
        let client = NbdDevice::open(&served.address(), options).expect("the client connects");
        let content = pattern(3 * wanted + 512, most.into());
        client.write_at(512, &content).expect("write");
        let mut found = vec![0; content.len()];
        client.read_at(512, &mut found).expect("read");
        assert!(found == content);
        let mut lengths: Vec<usize> = recorder.log().iter().filter_map(length_of_write).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [512, wanted, wanted, wanted]);
    }
}

fn length_of_write(record: &Record) -> Option<usize> {
    match record {
        Record::Change(Change::Write { bytes, .. }) => Some(bytes.len()),
        _ => None,
    }
}

#[test]
fn many_requests_in_flight_over_several_connections_find_their_own_replies() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    for connections in [1, 4] {
        let options = NbdOptions { connections, ..NbdOptions::default() };
        let client = NbdDevice::open(&served.address(), options).expect("the client connects");
        for block in 0..256_u64 {
            let bytes = pattern(4096, block);
            let buf = AlignedBuf::copy_of(&bytes).into();
            client.run(IoOp::Write { offset: block * 4096, buf, fua: block % 7 == 0 }).expect("write");
        }
        let (tell, told) = channel();
        for round in 0..2000_u64 {
            let block = round * 37 % 256;
            let buf = IoBuf::zeroed(4096);
            let (tell, read) = (tell.clone(), buf.clone());
            let done = Box::new(move |outcome| drop(tell.send((block, read, outcome))));
            client.submit(IoRequest { op: IoOp::Read { offset: block * 4096, buf }, done });
        }
        for _ in 0..2000 {
            let (block, read, outcome) = told.recv().expect("each is completed");
            outcome.expect("read");
            assert!(read.to_vec() == pattern(4096, block), "block {block}");
        }
    }
}

#[test]
fn a_completion_may_submit_further_requests() {
    fn next(client: &Arc<NbdDevice>, left: u32, ended: std::sync::mpsc::Sender<()>) {
        if left == 0 {
            return ended.send(()).expect("the test listens");
        }
        let again = Arc::clone(client);
        let done = Box::new(move |outcome: Result<(), IoError>| {
            outcome.expect("read");
            next(&again, left - 1, ended);
        });
        client.submit(IoRequest { op: IoOp::Read { offset: 0, buf: IoBuf::zeroed(4096) }, done });
    }
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let client = Arc::new(served.open());
    let (tell, told) = channel();
    for _ in 0..32 {
        next(&client, 100, tell.clone());
    }
    for _ in 0..32 {
        told.recv().expect("each chain ends");
    }
}

#[test]
fn errors_of_the_device_arrive_as_what_they_are_and_the_connection_goes_on() {
    let faulty = Arc::new(FaultDevice::new(MemoryDevice::new(SIZE)));
    let served = Served::of(faulty.clone());
    let client = served.open();
    faulty.fail(OpKind::Read, 1, libc::EIO);
    let error = client.read_at(4096, &mut [0; 512]).expect_err("the device fails");
    assert!(matches!(error, IoError::Os { op: "read", offset: 4096, errno: libc::EIO }), "{error}");
    faulty.fail(OpKind::Write, 1, libc::ENOSPC);
    let error = client.write_at(0, &[1; 512]).expect_err("the device fails");
    assert!(matches!(error, IoError::NoSpace { .. }), "{error}");
    client.write_at(0, &[2; 512]).expect("it works again");
}

// Invariant D6.
#[test]
fn after_a_failed_flush_over_nbd_no_write_is_reported_as_done() {
    let faulty = Arc::new(FaultDevice::new(MemoryDevice::new(SIZE)));
    let served = Served::of(faulty.clone());
    let client = served.open();
    client.write_at(0, &[1; 512]).expect("write");
    faulty.fail(OpKind::Flush, 1, libc::EIO);
    client.flush().expect_err("the device fails");
    assert!(matches!(client.write_at(0, &[1; 512]), Err(IoError::Poisoned { .. })));
    assert!(matches!(client.flush(), Err(IoError::Poisoned { .. })));
    client.read_at(0, &mut [0; 512]).expect("reads go on");
}

// Invariant C5: what is reported as stable was made stable below, in this order.
#[test]
fn a_forced_write_and_a_flush_reach_the_device_as_such() {
    let recorder = Arc::new(Recorder::new(MemoryDevice::new(SIZE)));
    let served = Served::of(recorder.clone());
    let client = served.open();
    client.write_at(0, &[1; 512]).expect("write");
    client.flush().expect("flush");
    let forced = AlignedBuf::copy_of(&[2; 512]).into();
    client.run(IoOp::Write { offset: 512, buf: forced, fua: true }).expect("forced write");
    let log = recorder.log();
    let flushed = log.iter().filter_map(|record| match record {
        Record::Flush { covers } => Some(covers.clone()),
        Record::Change(_) => None,
    });
    let flushed: Vec<_> = flushed.collect();
    assert_eq!(flushed, [vec![0], vec![2]], "{log:?}");
}

#[test]
fn a_read_only_export_takes_no_changes() {
    let served = Served::new(NbdExport::new(Arc::new(MemoryDevice::new(SIZE)), true));
    let client = served.open();
    for op in [
        IoOp::Write { offset: 0, buf: IoBuf::zeroed(512), fua: false },
        IoOp::WriteZeroes { offset: 0, len: 512, may_unmap: true },
        IoOp::Discard { offset: 0, len: 512 },
    ] {
        let error = client.run(op).expect_err("read-only");
        assert_eq!(error.errno(), libc::EROFS, "{error}");
    }
    client.read_at(0, &mut [0; 512]).expect("reads are what it is for");
}

#[test]
fn only_the_owner_of_the_server_may_connect() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let mode = std::fs::metadata(served.socket()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_server_that_ends_leaves_no_socket_and_tells_its_clients() {
    let mut served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let client = served.open();
    client.read_at(0, &mut [0; 512]).expect("read");
    drop(served.server.take());
    assert!(!served.socket().exists());
    assert!(matches!(client.read_at(0, &mut [0; 512]), Err(IoError::Lost { .. })));
}

#[test]
fn what_is_no_server_is_refused_with_the_reason() {
    let missing = NbdAddress::unix("/nonexistent/socket", "");
    let error = NbdDevice::open(&missing, NbdOptions::default()).expect_err("nobody is there").to_string();
    assert!(error.contains("is the NBD server running?"), "{error}");
}

#[derive(Clone, Debug)]
enum Step {
    Write(u32, u32, u8, bool),
    Zero(u32, u32),
    Read(u32, u32),
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0_u32..200, 1_u32..56);
    let step = prop_oneof![
        (range(), any::<u8>(), any::<bool>())
            .prop_map(|((at, len), fill, fua)| Step::Write(at, len, fill, fua)),
        range().prop_map(|(at, len)| Step::Zero(at, len)),
        range().prop_map(|(at, len)| Step::Read(at, len)),
        Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn a_device_behind_nbd_behaves_like_an_array_of_bytes(steps in steps()) {
        let served = Served::of(Arc::new(MemoryDevice::new(256 * 512)));
        let client = served.open();
        let mut model = vec![0; 256 * 512];
        for step in steps {
            let at = |block: u32| u64::from(block) * 512;
            let bytes = |start: u32, len: u32| start as usize * 512..(start + len) as usize * 512;
            match step {
                Step::Write(start, len, fill, fua) => {
                    let buf = AlignedBuf::copy_of(&vec![fill; len as usize * 512]).into();
                    client.run(IoOp::Write { offset: at(start), buf, fua }).expect("write");
                    model[bytes(start, len)].fill(fill);
                }
                Step::Zero(start, len) => {
                    let zero = IoOp::WriteZeroes { offset: at(start), len: at(len), may_unmap: false };
                    client.run(zero).expect("zero");
                    model[bytes(start, len)].fill(0);
                }
                Step::Read(start, len) => {
                    let mut found = vec![1; len as usize * 512];
                    client.read_at(at(start), &mut found).expect("read");
                    prop_assert!(found == model[bytes(start, len)]);
                }
                Step::Flush => client.flush().expect("flush"),
            }
        }
    }
}

#[test]
fn whoever_is_told_of_the_end_of_a_read_is_the_only_owner_of_its_memory() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let client = served.open();
    let (tell, told) = channel();
    let buf = IoBuf::zeroed(64 << 10);
    let mine = buf.clone();
    let done = Box::new(move |_| tell.send(mine.try_into_aligned().is_ok()).expect("the test listens"));
    client.submit(IoRequest { op: IoOp::Read { offset: 0, buf }, done });
    assert!(told.recv().expect("told"));
}
