//! Claims about the devices that tests crash: the fault injector and the recorder.
use std::sync::{Arc, mpsc};

use blockio::{
    BlockDevice, Change, FaultDevice, ImageFile, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, OpKind,
    Record, Recorder, Timeline, Unflushed,
};
use proptest::prelude::*;

const EIO: i32 = 5;

fn faulty(size: u64) -> FaultDevice<MemoryDevice> {
    FaultDevice::new(MemoryDevice::new(size))
}

#[test]
fn the_nth_request_fails_and_only_that() {
    let device = faulty(4096);
    device.fail(OpKind::Write, 2, EIO);
    device.write_at(0, &[1; 512]).expect("first");
    assert!(matches!(device.write_at(512, &[2; 512]), Err(IoError::Os { errno: EIO, .. })));
    device.write_at(1024, &[3; 512]).expect("third");
    device.fail_from(OpKind::Read, 1, EIO);
    assert!(device.read_at(0, &mut [0; 512]).is_err());
    assert!(device.read_at(0, &mut [0; 512]).is_err());
    device.heal();
    let mut all = [9; 1536];
    device.read_at(0, &mut all).expect("read");
    assert_eq!((all[0], all[512], all[1024]), (1, 0, 3));
}

// Invariant D6: after a failed flush nothing later is reported as stable.
#[test]
fn a_failed_flush_poisons_the_device() {
    let device = faulty(4096);
    device.write_at(0, &[1; 512]).expect("write");
    device.fail(OpKind::Flush, 1, EIO);
    device.flush().expect_err("injected");
    for outcome in [device.flush(), device.write_at(0, &[2; 512])] {
        assert!(matches!(outcome, Err(IoError::Poisoned { .. })));
    }
    device.crash(Unflushed::None).expect("crash");
    assert_eq!(device.inner().resident_bytes(), 0, "the write was never stable");
}

#[test]
fn unflushed_writes_are_seen_by_readers_and_lost_in_a_crash() {
    let device = faulty(8192);
    device.write_at(0, &[1; 1024]).expect("write");
    device.flush().expect("flush");
    device.write_at(512, &[2; 1024]).expect("write");
    device.run(IoOp::WriteZeroes { offset: 0, len: 512, may_unmap: false }).expect("zero");
    let mut seen = [9; 1536];
    device.read_at(0, &mut seen).expect("read");
    assert_eq!((seen[0], seen[512], seen[1535]), (0, 2, 2));
    device.crash(Unflushed::None).expect("crash");
    assert!(matches!(device.read_at(0, &mut seen), Err(IoError::Closed)));
    let left = device.inner().to_bytes();
    assert!(left[..1024].iter().all(|byte| *byte == 1) && left[1024..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_torn_crash_keeps_whole_sectors_only() {
    let device = faulty(64 << 10);
    device.write_at(0, &[7; 64 << 10]).expect("write");
    device.crash(Unflushed::Torn { seed: 3 }).expect("crash");
    let left = device.inner().to_bytes();
    let kept = left.chunks(512).filter(|sector| sector.iter().all(|byte| *byte == 7)).count();
    let lost = left.chunks(512).filter(|sector| sector.iter().all(|byte| *byte == 0)).count();
    assert_eq!(kept + lost, 128);
    assert!(kept > 20 && lost > 20, "{kept} kept, {lost} lost");
}

#[test]
fn a_size_that_was_not_flushed_goes_with_the_crash() {
    let device = faulty(4096);
    device.set_len(8192).expect("grow");
    device.write_at(4096, &[1; 512]).expect("write");
    assert_eq!(device.geometry().size_bytes, 8192);
    device.crash(Unflushed::None).expect("crash");
    assert_eq!(device.inner().geometry().size_bytes, 4096);
}

#[test]
fn held_requests_wait_and_go_on_in_order() {
    let device = faulty(4096);
    device.hold(Some(OpKind::Write));
    let (tell, told) = mpsc::channel();
    for n in 1..=3_u8 {
        let (tell, buf) = (tell.clone(), IoBuf::zeroed(512));
        buf.copy_from(&[n; 512]);
        let done = Box::new(move |outcome: Result<(), IoError>| {
            tell.send((n, outcome.is_ok())).expect("the test waits");
        });
        device.submit(IoRequest { op: IoOp::Write { offset: 0, buf, fua: false }, done });
    }
    device.wait_held(3);
    device.read_at(0, &mut [0; 512]).expect("reads go on");
    assert!(told.try_recv().is_err());
    device.release();
    assert_eq!(told.iter().take(3).collect::<Vec<_>>(), [(1, true), (2, true), (3, true)]);
    let mut last = [0; 512];
    device.read_at(0, &mut last).expect("read");
    assert_eq!(last, [3; 512]);
}

#[test]
fn a_crash_answers_held_requests() {
    let device = faulty(4096);
    device.hold(None);
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    device.submit(IoRequest { op: IoOp::Flush, done });
    device.wait_held(1);
    device.crash(Unflushed::All).expect("crash");
    assert!(matches!(told.recv().expect("an answer"), Err(IoError::Closed)));
}

#[test]
fn recorders_on_one_clock_tell_what_came_first() {
    let timeline = Timeline::default();
    let recorder = || Recorder::new(MemoryDevice::new(4096)).on(&timeline);
    let (one, other) = (recorder(), recorder());
    one.write_at(0, &[1; 512]).expect("it is writable");
    other.write_at(0, &[2; 512]).expect("it is writable");
    let between = timeline.now();
    other.flush().expect("it flushes");
    one.flush().expect("it flushes");
    assert_eq!((one.moments(), other.moments()), (vec![1, 4], vec![2, 3]));
    assert_eq!((between, timeline.now()), (2, 4));
}

#[test]
fn the_recorder_replays_every_prefix() {
    let recorder = Recorder::new(MemoryDevice::new(4096));
    recorder.write_at(0, &[1; 512]).expect("write");
    recorder.flush().expect("flush");
    recorder.write_at(512, &[2; 512]).expect("write");
    let image = |prefix, choice| {
        let bytes = recorder.replay_prefix(prefix, choice).to_bytes();
        (bytes[0], bytes[512])
    };
    assert_eq!(image(0, Unflushed::All), (0, 0));
    assert_eq!(image(1, Unflushed::None), (0, 0));
    assert_eq!(image(1, Unflushed::All), (1, 0));
    assert_eq!(image(2, Unflushed::None), (1, 0));
    assert_eq!(image(3, Unflushed::None), (1, 0));
    assert_eq!(image(3, Unflushed::All), (1, 2));
    assert_eq!(recorder.replay_prefix(3, Unflushed::All).to_bytes(), recorder.inner().to_bytes());
}

#[test]
fn a_flush_covers_only_writes_that_completed_before_it_was_submitted() {
    let recorder = Recorder::new(Arc::new(faulty(4096)));
    recorder.write_at(0, &[1; 512]).expect("write");
    recorder.inner().hold(Some(OpKind::Flush));
    let (tell, told) = mpsc::channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    recorder.submit(IoRequest { op: IoOp::Flush, done });
    recorder.inner().wait_held(1);
    recorder.write_at(512, &[2; 512]).expect("write during the flush");
    recorder.inner().release();
    told.recv().expect("an answer").expect("flush");
    assert_eq!(recorder.log().last(), Some(&Record::Flush { covers: vec![0] }));
    let bytes = recorder.replay_prefix(3, Unflushed::None).to_bytes();
    assert_eq!((bytes[0], bytes[512]), (1, 0));
}

#[test]
fn a_forced_write_is_safe_alone() {
    let recorder = Recorder::new(MemoryDevice::new(4096));
    recorder.write_at(0, &[1; 512]).expect("write");
    let buf = IoBuf::zeroed(512);
    buf.copy_from(&[2; 512]);
    recorder.run(IoOp::Write { offset: 512, buf, fua: true }).expect("forced write");
    let bytes = recorder.replay_prefix(recorder.position(), Unflushed::None).to_bytes();
    assert_eq!((bytes[0], bytes[512]), (0, 2));
}

#[test]
fn a_forced_write_takes_only_what_lies_below_it_along() {
    let after = |first: u64, forced: u64| {
        let device = FaultDevice::new(MemoryDevice::new(4096));
        device.write_at(first, &[1; 1024]).expect("write");
        let buf = IoBuf::zeroed(512);
        buf.copy_from(&[2; 512]);
        device.run(IoOp::Write { offset: forced, buf, fua: true }).expect("forced write");
        device.crash(Unflushed::None).expect("power cut");
        device.inner().to_bytes()
    };
    let apart = after(0, 1024);
    assert_eq!((apart[0], apart[1024]), (0, 2));
    let above = after(0, 512);
    assert_eq!((above[0], above[512]), (1, 2), "what was written before must not come after");
}

#[test]
fn a_size_change_is_recorded_and_replayed() {
    let recorder = Recorder::new(MemoryDevice::new(4096));
    recorder.set_len(8192).expect("grow");
    recorder.write_at(4096, &[1; 512]).expect("write");
    assert_eq!(recorder.log()[0], Record::Change(Change::SetLen { size_bytes: 8192 }));
    assert_eq!(recorder.replay_prefix(2, Unflushed::None).to_bytes().len(), 4096);
    assert_eq!(recorder.replay_prefix(2, Unflushed::All).to_bytes()[4096], 1);
}

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u8, count: u8, with: u8 },
    Zero { sector: u8, count: u8 },
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..56_u8, 1..8_u8, 1..255_u8).prop_map(|(sector, count, with)| Step::Write { sector, count, with }),
        (0..56_u8, 1..8_u8).prop_map(|(sector, count)| Step::Zero { sector, count }),
        Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..40)
}

fn do_step(device: &impl BlockDevice, step: &Step) {
    match step {
        Step::Write { sector, count, with } => {
            device
                .write_at(u64::from(*sector) * 512, &vec![*with; usize::from(*count) * 512])
                .expect("write");
        }
        Step::Zero { sector, count } => {
            let (offset, len) = (u64::from(*sector) * 512, u64::from(*count) * 512);
            device.run(IoOp::WriteZeroes { offset, len, may_unmap: true }).expect("zero");
        }
        Step::Flush => device.flush().expect("flush"),
    }
}

proptest! {
    // Fault injector, recorder and plain memory agree about content, and each sector after a crash is one that was
    // there at the last flush or was written since.
    #[test]
    fn what_a_crash_leaves_was_written_and_what_was_flushed_stays(steps in steps(), seed in any::<u64>()) {
        let recorder = Recorder::new(faulty(32 << 10));
        let plain = MemoryDevice::new(32 << 10);
        let mut possible = vec![vec![0_u8]; 64];
        for step in &steps {
            do_step(&recorder, step);
            do_step(&plain, step);
            let now = plain.to_bytes();
            for (sector, values) in possible.iter_mut().enumerate() {
                if matches!(step, Step::Flush) {
                    values.clear();
                }
                values.push(now[sector * 512]);
            }
        }
        let end = recorder.position();
        prop_assert_eq!(recorder.replay_prefix(end, Unflushed::All).to_bytes(), plain.to_bytes());
        recorder.inner().crash(Unflushed::Torn { seed }).expect("crash");
        for left in [recorder.inner().inner().to_bytes(), recorder.replay_prefix(end, Unflushed::Torn { seed }).to_bytes()] {
            for (sector, values) in possible.iter().enumerate() {
                let bytes = &left[sector * 512..(sector + 1) * 512];
                prop_assert!(bytes.iter().all(|byte| *byte == bytes[0]));
                prop_assert!(values.contains(&bytes[0]), "sector {} holds {}, not one of {:?}", sector, bytes[0], values);
            }
        }
    }
}
