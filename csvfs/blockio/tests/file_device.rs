//! Claims about devices on files of the host.
#![expect(clippy::cast_possible_truncation, reason = "the sizes in these tests are small")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use blockio::{
    AlignedBuf, BlockDevice, FileDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest, OpenOptions, Permission,
    WriteRight, open_uri,
};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A directory on the disk of the build folder: a temporary directory in memory may have no direct I/O.
fn folder() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder for the test")
}

fn device(size: u64) -> (TempDir, PathBuf, FileDevice) {
    let folder = folder();
    let path = folder.path().join("lun");
    let device = FileDevice::create(&path, size).expect("create");
    (folder, path, device)
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_mul(31).wrapping_add((at % 251) as u8)).collect()
}

#[test]
fn what_was_written_is_read_back_and_the_rest_of_a_sparse_file_is_zero() {
    let (_folder, path, device) = device(64 * MIB);
    device.write_at(MIB, &pattern(7, 8192)).expect("write");
    device.flush().expect("flush");
    let mut around = vec![1; 16384];
    device.read_at(MIB - 4096, &mut around).expect("read");
    assert!(around[..4096].iter().all(|byte| *byte == 0));
    assert_eq!(around[4096..12288], pattern(7, 8192));
    assert!(around[12288..].iter().all(|byte| *byte == 0));
    assert!(fs::metadata(path).expect("stat").blocks() * 512 < MIB, "the file stays sparse");
}

#[test]
fn memory_at_any_address_is_taken() {
    let (_folder, _path, device) = device(MIB);
    let block = device.geometry().block_bytes as usize;
    let memory = IoBuf::zeroed(4 * block + 8);
    let skewed = memory.slice(3..3 + 2 * block);
    skewed.copy_from(&pattern(9, 2 * block));
    device.run(IoOp::Write { offset: 0, buf: skewed, fua: false }).expect("write");
    let into = memory.slice(5..5 + 2 * block);
    into.fill_zero();
    device.run(IoOp::Read { offset: 0, buf: into.clone() }).expect("read");
    assert_eq!(into.to_vec(), pattern(9, 2 * block));
}

#[test]
fn requests_that_do_not_fit_are_refused_through_their_completion() {
    let (_folder, _path, device) = device(MIB);
    for (offset, len) in [(1, 4096), (0, 100), (MIB, 4096), (MIB - 4096, 8192), (u64::MAX - 4095, 4096)] {
        let op = IoOp::Write { offset, buf: IoBuf::zeroed(len), fua: false };
        assert!(matches!(device.run(op), Err(IoError::OutOfRange { .. })), "{offset}+{len}");
    }
}

#[test]
fn a_buffered_device_takes_any_bytes() {
    let folder = folder();
    let path = folder.path().join("image");
    fs::write(&path, pattern(1, 1001)).expect("write");
    let device = FileDevice::open(&path, OpenOptions::buffered()).expect("open");
    assert_eq!((device.geometry().size_bytes, device.geometry().block_bytes), (1001, 1));
    device.write_at(13, b"hello").expect("write");
    let mut tail = vec![0; 991];
    device.read_at(10, &mut tail).expect("read");
    assert_eq!(&tail[3..8], b"hello");
    assert_eq!(tail[8..], pattern(1, 1001)[18..]);
}

#[test]
fn a_read_only_device_refuses_every_change() {
    let (_folder, path, device) = device(MIB);
    drop(device);
    let device = FileDevice::open(&path, OpenOptions::read_only()).expect("open");
    let zero = IoOp::WriteZeroes { offset: 0, len: 4096, may_unmap: true };
    for op in [IoOp::Write { offset: 0, buf: IoBuf::zeroed(4096), fua: false }, zero] {
        assert!(matches!(device.run(op), Err(IoError::Os { errno: libc::EROFS, .. })));
    }
    device.read_at(0, &mut [0; 4096]).expect("read");
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeros_and_give_room_back() {
    let (_folder, path, device) = device(4 * MIB);
    device.write_at(0, &pattern(3, 4 * MIB as usize)).expect("write");
    device.flush().expect("flush");
    let before = fs::metadata(&path).expect("stat").blocks();
    device.run(IoOp::WriteZeroes { offset: 4096, len: 8192, may_unmap: false }).expect("zero");
    device.run(IoOp::WriteZeroes { offset: MIB, len: MIB, may_unmap: true }).expect("zero");
    device.run(IoOp::Discard { offset: 2 * MIB, len: MIB }).expect("discard");
    let mut all = vec![0; 4 * MIB as usize];
    device.read_at(0, &mut all).expect("read");
    let mut expected = pattern(3, 4 * MIB as usize);
    expected[4096..12288].fill(0);
    expected[MIB as usize..2 * MIB as usize].fill(0);
    assert_eq!(all[..2 * MIB as usize], expected[..2 * MIB as usize]);
    assert_eq!(all[3 * MIB as usize..], expected[3 * MIB as usize..]);
    if device.geometry().can_discard {
        assert!(fs::metadata(&path).expect("stat").blocks() < before, "blocks were freed");
    }
}

#[test]
fn a_forced_write_and_an_empty_one_complete() {
    let (_folder, _path, device) = device(MIB);
    let buf: IoBuf = AlignedBuf::copy_of(&pattern(4, 4096)).into();
    device.run(IoOp::Write { offset: 4096, buf, fua: true }).expect("forced write");
    device
        .run(IoOp::Write { offset: MIB, buf: IoBuf::zeroed(0), fua: false })
        .expect("empty write at the end");
}

#[test]
fn the_size_changes_and_other_handles_see_it() {
    let (_folder, path, device) = device(MIB);
    let other = FileDevice::open(&path, OpenOptions::default()).expect("open");
    device.set_len(2 * MIB).expect("grow");
    assert_eq!(device.geometry().size_bytes, 2 * MIB);
    other.read_at(2 * MIB - 4096, &mut [0; 4096]).expect("the other handle measures again");
    assert_eq!(device.identity(), other.identity());
    assert!(device.set_len(100).is_err());
}

#[test]
fn a_file_that_shrank_behind_the_device_gives_an_error_not_stale_bytes() {
    let (_folder, path, device) = device(MIB);
    fs::File::options().write(true).open(path).expect("open").set_len(0).expect("truncate");
    assert!(matches!(device.read_at(0, &mut [0; 4096]), Err(IoError::Os { errno: libc::EIO, .. })));
}

#[test]
fn many_threads_with_many_requests_in_flight_all_complete_once() {
    let (_folder, _path, device) = device(32 * MIB);
    let device = Arc::new(device);
    let completions = Arc::new(AtomicUsize::new(0));
    thread::scope(|scope| {
        for lane in 0..4_u64 {
            let (device, completions) = (Arc::clone(&device), Arc::clone(&completions));
            scope.spawn(move || write_then_verify(&device, lane * 8 * MIB, &completions));
        }
    });
    assert_eq!(completions.load(Ordering::SeqCst), 4 * 2 * 1500);
}

/// 1500 writes at once, more than ring and queue hold, then the same in reads.
fn write_then_verify(device: &FileDevice, start: u64, completions: &Arc<AtomicUsize>) {
    let bufs: Vec<IoBuf> =
        (0..1500_u64).map(|n| AlignedBuf::copy_of(&[(n % 255) as u8 + 1; 4096]).into()).collect();
    for round in 0..2 {
        let (tell, told) = mpsc::channel();
        for (n, buf) in bufs.iter().enumerate() {
            let (tell, completions) = (tell.clone(), Arc::clone(completions));
            let done = Box::new(move |outcome: Result<(), IoError>| {
                completions.fetch_add(1, Ordering::SeqCst);
                tell.send(outcome).expect("the test waits");
            });
            let (offset, buf) = (start + n as u64 * 4096, buf.clone());
            let op =
                if round == 0 { IoOp::Write { offset, buf, fua: false } } else { IoOp::Read { offset, buf } };
            device.submit(IoRequest { op, done });
        }
        drop(tell);
        assert!(told.iter().all(|outcome| outcome.is_ok()));
        if round == 0 {
            bufs.iter().for_each(IoBuf::fill_zero);
        }
    }
    for (n, buf) in bufs.iter().enumerate() {
        assert_eq!(buf.to_vec(), vec![(n % 255) as u8 + 1; 4096]);
    }
}

/// Each completion submits the next request on the I/O thread itself, more of them than the queue holds.
#[test]
fn completions_may_submit_and_the_last_of_them_may_drop_the_device() {
    let (_folder, _path, device) = device(MIB);
    let device = Arc::new(device);
    let (tell, told) = mpsc::channel();
    fan_out(device, 2000, &tell);
    drop(tell);
    assert_eq!(told.iter().count(), 2001);
}

fn fan_out(device: Arc<FileDevice>, width: usize, tell: &mpsc::Sender<()>) {
    let read = || IoOp::Read { offset: 0, buf: IoBuf::zeroed(4096) };
    let (first, again) = (Arc::clone(&device), tell.clone());
    let done = Box::new(move |outcome: Result<(), IoError>| {
        outcome.expect("read");
        for _ in 0..width {
            let (held, tell) = (Arc::clone(&device), again.clone());
            let done = Box::new(move |outcome: Result<(), IoError>| {
                outcome.expect("read");
                tell.send(()).expect("the test waits");
                drop(held);
            });
            device.submit(IoRequest { op: read(), done });
        }
        again.send(()).expect("the test waits");
    });
    first.submit(IoRequest { op: read(), done });
}

#[test]
fn a_uri_opens_the_file_it_names() {
    let (_folder, path, device) = device(MIB);
    device.write_at(0, &pattern(5, 4096)).expect("write");
    let uri = format!("file:{}", path.display());
    let mut back = [0; 4096];
    open_uri(&uri, OpenOptions::read_only()).expect("open").read_at(0, &mut back).expect("read");
    assert_eq!(back[..], pattern(5, 4096));
    let missing =
        open_uri("file:/nonexistent/lun", OpenOptions::default()).err().expect("refused").to_string();
    assert!(missing.contains("/nonexistent/lun") && missing.contains("check the path"), "{missing}");
}

/// Which thread ends a read of the first block.
fn served_by(device: &FileDevice, len: usize) -> thread::ThreadId {
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |outcome: Result<(), IoError>| {
        outcome.expect("read");
        let _ = tell.send(thread::current().id());
    });
    device.submit(IoRequest { op: IoOp::Read { offset: 0, buf: IoBuf::zeroed(len) }, done });
    told.recv().expect("an answer")
}

#[test]
fn a_thread_that_waits_anyway_is_not_switched_from() {
    let (_folder, _path, device) = device(MIB);
    device.write_at(0, &pattern(3, 8192)).expect("write");
    let me = thread::current().id();
    assert_ne!(served_by(&device, 4096), me);
    let here = blockio::here();
    assert_eq!(served_by(&device, 1 << 19), me);
    device.run(IoOp::Write { offset: 4096, buf: IoBuf::zeroed(4096), fua: true }).expect("a forced write");
    device.flush().expect("flush");
    drop(here);
    let mut back = vec![1; 8192];
    device.read_at(0, &mut back).expect("read");
    assert_eq!((&back[..4096], &back[4096..]), (&pattern(3, 8192)[..4096], &[0; 4096][..]));
}

#[test]
fn a_short_request_is_carried_out_at_once_where_one_comes_at_a_time() {
    let (_folder, _path, device) = device(MIB);
    let me = thread::current().id();
    let alone = blockio::here_if_alone();
    assert_ne!(served_by(&device, 4096), me, "more may follow at once");
    let settled = (0..100).map(|_| served_by(&device, 4096)).collect::<Vec<_>>();
    assert_eq!(settled.last(), Some(&me));
    assert_ne!(served_by(&device, 1 << 19), me, "it is long");
    let waits: Arc<dyn WriteRight> = Arc::new(Waits);
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |outcome: Result<(), IoError>| drop(tell.send(outcome)));
    device.submit_under(IoRequest { op: IoOp::Flush, done }, &waits);
    let beside = (0..100).map(|_| served_by(&device, 4096)).collect::<Vec<_>>();
    assert!(!beside.contains(&me), "another one is there");
    drop((alone, device));
    assert!(matches!(told.recv().expect("an answer"), Err(IoError::Closed)));
}

struct Waits;

impl WriteRight for Waits {
    fn check(&self) -> Permission {
        Permission::Wait
    }
}
