//! Claims about the gate between a node and its LUN.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use blockio::{
    BlockDevice, GatedDevice, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, Permission, WriteRight,
};

struct Right {
    now: Mutex<Permission>,
    asked: AtomicUsize,
}

impl Right {
    fn new(now: Permission) -> Arc<Self> {
        Arc::new(Self { now: Mutex::new(now), asked: AtomicUsize::new(0) })
    }

    fn becomes(&self, now: Permission) {
        *self.now.lock().expect("no panic in a test right") = now;
    }
}

impl WriteRight for Right {
    fn check(&self) -> Permission {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.now.lock().expect("no panic in a test right").clone()
    }
}

type Outcome = mpsc::Receiver<Result<(), IoError>>;

fn submit(device: &impl BlockDevice, op: IoOp) -> Outcome {
    let (tell, told) = mpsc::channel();
    device.submit(IoRequest { op, done: Box::new(move |outcome| drop(tell.send(outcome))) });
    told
}

fn write() -> IoOp {
    let buf = IoBuf::zeroed(512);
    buf.copy_from(&[7; 512]);
    IoOp::Write { offset: 0, buf, fua: false }
}

// Invariant B3: the right is asked for immediately before each submit.
#[test]
fn every_request_asks_for_the_right() {
    let right = Right::new(Permission::Granted);
    let device = GatedDevice::new(MemoryDevice::new(4096), Arc::clone(&right) as Arc<dyn WriteRight>);
    for expected in 1..=3 {
        device.run(write()).expect("write");
        assert_eq!(right.asked.load(Ordering::SeqCst), expected);
    }
    device.run(IoOp::Read { offset: 0, buf: IoBuf::zeroed(512) }).expect("read");
    device.flush().expect("flush");
    assert_eq!(right.asked.load(Ordering::SeqCst), 5);
}

// Invariant B3: a lease that waits for its renewal holds the request, it does not let it through.
#[test]
fn a_waiting_right_holds_requests_until_it_is_renewed() {
    let right = Right::new(Permission::Wait);
    let device = GatedDevice::new(MemoryDevice::new(4096), Arc::clone(&right) as Arc<dyn WriteRight>);
    let told = submit(&device, write());
    device.reconsider();
    assert_eq!(device.held(), 1);
    assert!(device.inner().to_bytes().iter().all(|byte| *byte == 0), "nothing reached the device");
    right.becomes(Permission::Granted);
    device.reconsider();
    told.recv().expect("an answer").expect("write");
    assert_eq!(device.inner().to_bytes()[..512], [7; 512]);
}

// Invariant B3, A2: a revoked right stops reads and writes alike, held ones included.
#[test]
fn a_revoked_right_fails_every_request_and_nothing_is_written() {
    let right = Right::new(Permission::Wait);
    let device = GatedDevice::new(MemoryDevice::new(4096), Arc::clone(&right) as Arc<dyn WriteRight>);
    let held = submit(&device, write());
    right.becomes(Permission::Revoked("fenced as node 2 epoch 5".to_owned()));
    device.reconsider();
    for told in [held, submit(&device, write()), submit(&device, IoOp::Flush)] {
        let error = told.recv().expect("an answer").expect_err("revoked");
        assert!(matches!(&error, IoError::NotPermitted { reason } if reason.contains("epoch 5")), "{error}");
    }
    let read = submit(&device, IoOp::Read { offset: 0, buf: IoBuf::zeroed(512) });
    assert!(read.recv().expect("an answer").is_err());
    assert!(device.inner().to_bytes().iter().all(|byte| *byte == 0));
}

#[test]
fn closing_the_gate_answers_what_it_holds() {
    let device =
        GatedDevice::new(MemoryDevice::new(4096), Right::new(Permission::Wait) as Arc<dyn WriteRight>);
    let told = submit(&device, write());
    drop(device);
    assert!(matches!(told.recv().expect("an answer"), Err(IoError::Closed)));
}

#[test]
fn renewals_that_race_with_submissions_lose_no_request() {
    let right = Right::new(Permission::Wait);
    let device = GatedDevice::new(MemoryDevice::new(4096), Arc::clone(&right) as Arc<dyn WriteRight>);
    let device = &device;
    std::thread::scope(|scope| {
        let submitters: Vec<_> = (0..4)
            .map(|_| scope.spawn(move || (0..200).map(|_| submit(device, write())).collect::<Vec<_>>()))
            .collect();
        for round in 0..200 {
            right.becomes(if round % 2 == 0 { Permission::Granted } else { Permission::Wait });
            device.reconsider();
        }
        let answers: Vec<Outcome> =
            submitters.into_iter().flat_map(|lane| lane.join().expect("lane")).collect();
        right.becomes(Permission::Granted);
        device.reconsider();
        assert!(answers.iter().all(|told| told.recv().expect("an answer").is_ok()));
    });
}
