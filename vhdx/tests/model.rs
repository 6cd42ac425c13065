//! Any sequence of requests gives what a byte array would, through reopening, from many threads, and with a failing file.

mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;

use blockio::{BlockDevice, FaultDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, OpKind};
use common::{MIB, Random, assert_sound, bytes_at, read_only};
use proptest::prelude::*;
use vhdx::{Builder, Disk, ErrorKind, ReadSegment, Spec, WriteSegment};

const SIZE: u64 = 9 * MIB + 512;

fn memory(spec: &Spec) -> Arc<dyn ImageFile> {
    let file = MemoryDevice::new(0);
    vhdx::create(&file, spec).expect("it is created");
    Arc::new(file)
}

fn open(file: &Arc<dyn ImageFile>) -> Disk {
    Builder::open(Arc::clone(file)).growth_bytes(2 * MIB).writable().expect("it opens for writing")
}

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: u64, value: u8, fua: bool },
    Zero { sector: u64, sectors: u64, may_unmap: bool },
    Discard { block: u64, blocks: u64 },
    Read { sector: u64, sectors: u64 },
    Flush,
    Reopen { clean: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let sector = 0..SIZE / 512;
    // Mostly small, now and then over several blocks.
    let sectors = prop_oneof![4 => 1_u64..64, 1 => 1_u64..6000];
    let range = (sector, sectors).prop_map(|(sector, sectors)| (sector, sectors.min(SIZE / 512 - sector)));
    prop_oneof![
        5 => (range.clone(), 1_u8.., any::<bool>())
            .prop_map(|((sector, sectors), value, fua)| Step::Write { sector, sectors, value, fua }),
        2 => (range.clone(), any::<bool>())
            .prop_map(|((sector, sectors), may_unmap)| Step::Zero { sector, sectors, may_unmap }),
        2 => (0..9_u64, 1..4_u64).prop_map(|(block, blocks)| Step::Discard { block, blocks }),
        3 => range.prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        2 => Just(Step::Flush),
        1 => any::<bool>().prop_map(|clean| Step::Reopen { clean }),
    ]
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("small")
}

fn play(steps: Vec<Step>, spec: &Spec) {
    let file = memory(spec);
    let mut model = vec![0; index(SIZE)];
    let mut disk = open(&file);
    for step in steps {
        match step {
            Step::Write { sector, sectors, value, fua } => {
                let buf = IoBuf::zeroed(index(sectors * 512));
                buf.copy_from(&vec![value; index(sectors * 512)]);
                disk.run(IoOp::Write { offset: sector * 512, buf, fua }).expect("it is writable");
                model[index(sector * 512)..index((sector + sectors) * 512)].fill(value);
            }
            Step::Zero { sector, sectors, may_unmap } => {
                let op = IoOp::WriteZeroes { offset: sector * 512, len: sectors * 512, may_unmap };
                disk.run(op).expect("it zeroes");
                model[index(sector * 512)..index((sector + sectors) * 512)].fill(0);
            }
            Step::Discard { block, blocks } => {
                let (start, end) = (block * MIB, ((block + blocks) * MIB).min(SIZE));
                disk.run(IoOp::Discard { offset: start, len: end - start }).expect("it discards");
                if !spec.fixed {
                    // A block that is only partly in the range keeps its content: here that is none but whole ones.
                    model[index(start)..index(end)].fill(0);
                }
            }
            Step::Read { sector, sectors } => {
                let range = index(sector * 512)..index((sector + sectors) * 512);
                assert!(bytes_at(&disk, sector * 512, range.len()) == model[range], "a read");
            }
            Step::Flush => disk.flush().expect("it flushes"),
            Step::Reopen { clean } => {
                // What was not flushed is lost to a kill's successor only as far as its place was not logged.
                if !clean {
                    disk.flush().expect("it flushes");
                } else {
                    disk.close().expect("it closes");
                }
                drop(disk);
                assert!(bytes_at(&read_only(&file), 0, model.len()) == model, "read-only");
                assert_sound(&file);
                disk = open(&file);
            }
        }
    }
    disk.close().expect("it closes");
    assert_sound(&file);
    assert!(bytes_at(&read_only(&file), 0, model.len()) == model, "at the end");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_dynamic_disk_behaves_as_a_byte_array(steps in prop::collection::vec(step(), 1..60)) {
        play(steps, &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) });
    }

    #[test]
    fn a_fixed_disk_behaves_as_a_byte_array(steps in prop::collection::vec(step(), 1..30)) {
        play(steps, &Spec { block_bytes: MIB, ..Spec::fixed(SIZE) });
    }
}

/// Each thread owns every fourth sector, so that all blocks are shared and no two write the same bytes.
#[test]
fn many_threads_share_blocks_without_losing_a_write() {
    let file = memory(&Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) });
    let disk = open(&file);
    let last: Vec<Vec<(u64, u8)>> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4_u64)
            .map(|owner| {
                scope.spawn({
                    let disk = &disk;
                    move || worker(disk, owner)
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("no worker fails")).collect()
    });
    disk.close().expect("it closes");
    assert_sound(&file);
    let image = read_only(&file);
    for (sector, value) in last.into_iter().flatten() {
        assert_eq!(bytes_at(&image, sector * 512, 512), [value; 512], "sector {sector}");
    }
}

/// Batches of 16 writes in flight, a flush now and then; what each sector holds at the end.
fn worker(disk: &Disk, owner: u64) -> Vec<(u64, u8)> {
    let mut random = Random(owner + 1);
    let mut content = std::collections::BTreeMap::new();
    for round in 0..40_u8 {
        let (tell, told) = channel();
        let mut batch = std::collections::BTreeSet::new();
        while batch.len() < 16 {
            batch.insert(random.below(64 * MIB / 512 / 4) * 4 + owner);
        }
        for sector in &batch {
            let buf = IoBuf::zeroed(512);
            buf.copy_from(&[round + 1; 512]);
            content.insert(*sector, round + 1);
            let tell = tell.clone();
            let done = Box::new(move |outcome| drop(tell.send(outcome)));
            disk.submit(IoRequest { op: IoOp::Write { offset: sector * 512, buf, fua: false }, done });
        }
        drop(tell);
        told.iter().for_each(|outcome: Result<(), IoError>| outcome.expect("it is writable"));
        if round % 4 == 0 {
            disk.flush().expect("it flushes");
        }
        for sector in batch {
            assert_eq!(bytes_at(disk, sector * 512, 512), [round + 1; 512]);
        }
    }
    content.into_iter().collect()
}

fn faulty() -> (Arc<FaultDevice<MemoryDevice>>, Arc<dyn ImageFile>) {
    let file = MemoryDevice::new(0);
    vhdx::create(&file, &Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) }).expect("it is created");
    let faulty = Arc::new(FaultDevice::new(file));
    (Arc::clone(&faulty), faulty)
}

// Invariant D6: after a failed flush everything since the last good one is lost, so nothing may go on.
#[test]
fn a_failed_flush_stops_the_disk_for_good() {
    let (fault, file) = faulty();
    let disk = open(&file);
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.flush().expect("it flushes");
    disk.write_at(MIB, &[2; 512]).expect("it is writable");
    fault.fail(OpKind::Flush, 1, 5);
    disk.flush().expect_err("the file failed");
    for outcome in [disk.flush(), disk.write_at(0, &[3; 512]), disk.read_at(0, &mut [0; 512])] {
        assert!(matches!(outcome, Err(IoError::Poisoned { .. })), "{outcome:?}");
    }
    assert_eq!(disk.close().expect_err("it cannot close").kind(), ErrorKind::Poisoned);
    drop(disk);
    let survivor: Arc<dyn ImageFile> = Arc::new(fault.inner().fork());
    assert_eq!(bytes_at(&open(&survivor), 0, 512), [1; 512]);
    assert_sound(&survivor);
}

// The flush thread grows the file along with a flush: whoever waits for that growth must hear of the failure.
#[test]
fn nobody_waits_for_ever_for_growth_that_a_failed_flush_ended() {
    let (fault, file) = faulty();
    let disk = Builder::open(file).growth_bytes(8 * MIB).writable().expect("it opens for writing");
    disk.write_at(0, &vec![1; index(5 * MIB)]).expect("it is writable");
    // Three of eight blocks are left: low enough for the next flush to bring more, which a request for four waits for.
    fault.hold(Some(OpKind::Flush));
    let (tell, told) = channel();
    let submit = |op| {
        let tell = tell.clone();
        disk.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send(outcome))) });
    };
    submit(IoOp::Flush);
    fault.wait_held(1);
    submit(IoOp::Write { offset: 5 * MIB, buf: IoBuf::zeroed(index(4 * MIB)), fua: false });
    fault.fail(OpKind::Flush, 1, 5);
    fault.release();
    for outcome in [told.recv(), told.recv()] {
        let outcome = outcome.expect("every request is answered");
        assert!(matches!(outcome, Err(IoError::Poisoned { .. })), "{outcome:?}");
    }
}

#[test]
fn a_failed_first_write_leaves_the_block_as_it_was() {
    let (fault, file) = faulty();
    let disk = open(&file);
    disk.write_at(0, &[1; 512]).expect("it is writable");
    fault.fail(OpKind::Write, 1, 28);
    disk.write_at(5 * MIB, &[2; 512]).expect_err("no space");
    assert_eq!(bytes_at(&disk, 5 * MIB, 512), [0; 512]);
    assert_eq!(disk.allocated_blocks(), 1);
    disk.write_at(5 * MIB + 512, &[3; 512]).expect("an error of one write stops nothing");
    disk.close().expect("it closes");
    assert_sound(&file);
    let image = read_only(&file);
    assert_eq!(bytes_at(&image, 5 * MIB, 1024), [[0; 512], [3; 512]].concat());
}

#[test]
fn reads_see_the_old_content_until_a_first_write_is_complete() {
    let (fault, file) = faulty();
    let disk = open(&file);
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.flush().expect("it flushes");
    fault.hold(Some(OpKind::Write));
    let (tell, told) = channel();
    for value in [7, 8] {
        let buf = IoBuf::zeroed(512);
        buf.copy_from(&[value; 512]);
        let tell = tell.clone();
        let op = IoOp::Write { offset: 3 * MIB + u64::from(value) * 512, buf, fua: false };
        disk.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send(outcome))) });
    }
    fault.wait_held(2);
    assert_eq!(bytes_at(&disk, 3 * MIB + 7 * 512, 1024), [0; 1024]);
    // A flush meanwhile neither waits for them nor makes their block visible.
    disk.flush().expect("it flushes");
    assert_eq!(disk.allocated_blocks(), 1);
    fault.release();
    drop(tell);
    assert!(told.iter().all(|outcome: Result<(), IoError>| outcome.is_ok()));
    assert_eq!(bytes_at(&disk, 3 * MIB + 7 * 512, 1024), [[7; 512], [8; 512]].concat());
    assert_eq!(disk.allocated_blocks(), 2, "both went into one block");
    disk.close().expect("it closes");
}

/// A file that cannot grow beyond a limit, until it is told otherwise.
struct Full {
    inner: MemoryDevice,
    limit: std::sync::atomic::AtomicU64,
}

impl BlockDevice for Full {
    fn geometry(&self) -> blockio::Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        self.inner.submit(request);
    }
}

impl ImageFile for Full {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        if size_bytes > self.limit.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(IoError::NoSpace { what: "the test's volume".to_owned() });
        }
        self.inner.set_len(size_bytes)
    }

    fn identity(&self) -> String {
        self.inner.identity()
    }
}

#[test]
fn a_full_volume_is_reported_and_nothing_is_damaged() {
    let inner = MemoryDevice::new(0);
    vhdx::create(&inner, &Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) }).expect("it is created");
    // Room for five blocks.
    let full = Arc::new(Full { inner, limit: (9 * MIB).into() });
    let file: Arc<dyn ImageFile> = Arc::clone(&full) as Arc<dyn ImageFile>;
    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens for writing");
    for block in 0..5 {
        disk.write_at(block * MIB, &[9; 4096]).expect("there is room");
    }
    for _ in 0..2 {
        let error = disk.write_at(7 * MIB, &[9; 4096]).expect_err("there is no room");
        assert!(matches!(error, IoError::NoSpace { .. }), "{error}");
    }
    disk.flush().expect("the disk goes on");
    disk.write_at(0, &[8; 4096]).expect("blocks with a place are writable");
    // Space that the guest gives up is used again, even though the file cannot grow.
    disk.run(IoOp::Discard { offset: MIB, len: MIB }).expect("it discards");
    disk.flush().expect("it flushes");
    disk.write_at(7 * MIB, &[7; 512]).expect("there is room again");
    assert_eq!(bytes_at(&disk, 7 * MIB, 8192), [&[7; 512][..], &[0; 7680]].concat(), "no leftovers");
    full.limit.store(u64::MAX, std::sync::atomic::Ordering::SeqCst);
    disk.write_at(9 * MIB, &[6; 4096]).expect("the volume grew");
    disk.close().expect("it closes");
    assert_sound(&file);
    assert_eq!(bytes_at(&read_only(&file), 0, 4096), [8; 4096]);
}

// Invariants E6, H2: the target writes nothing before it is activated, and then reads everything anew.
#[test]
fn a_standby_writes_nothing_and_sees_what_came_after_it() {
    let file = memory(&Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) });
    let source = open(&file);
    source.write_at(0, &[1; 512]).expect("it is writable");
    source.flush().expect("it flushes");
    let before = bytes_at(&file, 0, index(4 * MIB));
    let standby = || Builder::open(Arc::clone(&file)).inactive().expect("a live log does not matter");
    let (target, early) = (standby(), standby());
    assert!(bytes_at(&file, 0, index(4 * MIB)) == before, "a standby wrote");

    source.write_at(40 * MIB, &[2; 512]).expect("it is writable");
    let early = early.activate_handed_over(uuid::Uuid::nil()).expect_err("nothing was handed over");
    assert_eq!(early.kind(), ErrorKind::InvalidInput);
    let closed = source.close().expect("it closes");
    assert!(matches!(source.write_at(0, &[3; 512]), Err(IoError::Closed)));
    let disk = target.activate_handed_over(closed.file_write_id).expect("it was handed over");
    assert_eq!(bytes_at(&disk, 40 * MIB, 512), [2; 512]);
    disk.write_at(0, &[4; 512]).expect("it is writable");
    disk.close().expect("it closes");

    let late = standby().activate_handed_over(closed.file_write_id).expect_err("somebody wrote since");
    assert!(late.to_string().contains("other writer"), "{late}");
}

#[test]
fn a_caller_can_do_its_own_io() {
    let file = memory(&Spec { block_bytes: MIB, ..Spec::dynamic(64 * MIB) });
    let disk = open(&file);
    let guard = disk.resolve_write(MIB - 512, 1024).expect("there is room");
    let mut at = 0;
    for segment in guard.segments() {
        let WriteSegment::Data { file_offset, len } = *segment else {
            panic!("an unknown segment {segment:?}")
        };
        file.write_at(file_offset, &vec![5; index(len)]).expect("it is writable");
        at += len;
    }
    assert_eq!(at, 1024);
    guard.complete();
    let dropped = disk.resolve_write(5 * MIB, 512).expect("there is room");
    drop(dropped);
    let guard = disk.resolve_read(MIB - 512, 6 * MIB).expect("it is on the disk");
    let data: u64 = guard
        .segments()
        .iter()
        .filter(|segment| matches!(segment, ReadSegment::Data { .. }))
        .map(ReadSegment::len)
        .sum();
    assert_eq!(data, 512 + MIB, "the end of the first block, the whole second");
    guard.complete();
    disk.close().expect("it closes");
    assert_eq!(bytes_at(&read_only(&file), MIB - 512, 1024), [5; 1024]);
}

#[test]
fn an_image_opened_for_reading_refuses_changes() {
    let file = memory(&Spec::dynamic(64 * MIB));
    let image = read_only(&file);
    let error = image.write_at(0, &[1; 512]).expect_err("it is read-only");
    assert_eq!(error.errno(), 30);
    assert!(matches!(image.read_at(64 * MIB, &mut [0; 512]), Err(IoError::OutOfRange { .. })));
    assert!(matches!(image.read_at(1, &mut [0; 512]), Err(IoError::OutOfRange { .. })));
}
