//! Claims about the gate between a node and its LUN.
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use blockio::{
    BlockDevice, FileDevice, GatedDevice, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, Permission,
    WriteRight,
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

/// A device whose I/O thread stands still until it is let go: in the completion of a request.
fn stopped_thread(device: &impl BlockDevice) -> mpsc::SyncSender<()> {
    let (let_go, told_to) = mpsc::sync_channel(1);
    let (tell, stopped) = mpsc::channel();
    let done = Box::new(move |_| {
        let _ = tell.send(());
        let _ = told_to.recv();
    });
    device.submit(IoRequest { op: IoOp::Flush, done });
    stopped.recv().expect("the thread has come to the completion");
    let_go
}

fn file_device(folder: &tempfile::TempDir) -> FileDevice {
    FileDevice::create(folder.path().join("lun"), 1 << 20).expect("a file")
}

fn first_byte(device: &impl BlockDevice) -> u8 {
    let mut block = vec![0; 4096];
    device.read_at(0, &mut block).expect("a read");
    block[0]
}

fn block() -> IoOp {
    let buf = IoBuf::zeroed(4096);
    buf.copy_from(&[7; 4096]);
    IoOp::Write { offset: 0, buf, fua: false }
}

// Invariant B3: what was granted and queued is asked again when it is submitted, however long that took.
#[test]
fn a_right_that_ends_between_queueing_and_submit_stops_the_request() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let right = Right::new(Permission::Granted);
    let device = GatedDevice::new(file_device(&folder), Arc::clone(&right) as Arc<dyn WriteRight>);
    let let_go = stopped_thread(&device);
    let queued = submit(&device, block());
    assert_eq!(device.held(), 0, "the gate has let it through");
    right.becomes(Permission::Revoked("the lease ran out while the thread stood still".to_owned()));
    let_go.send(()).expect("the thread waits");
    let error = queued.recv().expect("an answer").expect_err("it is over");
    assert!(matches!(error, IoError::NotPermitted { .. }), "{error}");
    right.becomes(Permission::Granted);
    assert_eq!(first_byte(&device), 0, "nothing was written");
}

// Invariant B3: and one that must wait for the renewal of a lease is written after it, not before.
#[test]
fn a_right_that_waits_between_queueing_and_submit_holds_the_request() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let right = Right::new(Permission::Granted);
    let device = GatedDevice::new(file_device(&folder), Arc::clone(&right) as Arc<dyn WriteRight>);
    let let_go = stopped_thread(&device);
    let queued = submit(&device, block());
    right.becomes(Permission::Wait);
    let_go.send(()).expect("the thread waits");
    // Without the gate: shows that the thread has looked at what waits, and what is on the device.
    assert_eq!(first_byte(device.inner()), 0);
    assert!(queued.try_recv().is_err());
    right.becomes(Permission::Granted);
    device.reconsider();
    queued.recv().expect("an answer").expect("a write");
    assert_eq!(first_byte(&device), 7);
}

#[test]
fn a_device_that_is_closed_answers_what_waits_for_a_right() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let right = Right::new(Permission::Granted);
    let device = GatedDevice::new(file_device(&folder), Arc::clone(&right) as Arc<dyn WriteRight>);
    let let_go = stopped_thread(&device);
    let queued = submit(&device, block());
    right.becomes(Permission::Wait);
    let_go.send(()).expect("the thread waits");
    assert_eq!(first_byte(device.inner()), 0);
    drop(device);
    assert!(matches!(queued.recv().expect("an answer"), Err(IoError::Closed)));
}

/// Answers in turn what it was given, and the last for ever.
struct InTurn(Mutex<Vec<Permission>>);

impl InTurn {
    fn new(answers: &[Permission]) -> Arc<Self> {
        Arc::new(Self(Mutex::new(answers.to_vec())))
    }
}

impl WriteRight for InTurn {
    fn check(&self) -> Permission {
        let mut answers = self.0.lock().expect("no panic in a test right");
        if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() }
    }
}

// Invariant B3, for a thread that carries its requests out by itself.
#[test]
fn who_carries_a_request_out_asks_for_the_right_just_before() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let ended = Permission::Revoked("fenced".to_owned());
    let right = InTurn::new(&[Permission::Granted, ended, Permission::Granted]);
    let device = GatedDevice::new(file_device(&folder), right as Arc<dyn WriteRight>);
    let here = blockio::here();
    let error = submit(&device, block()).try_recv().expect("at once").expect_err("the gate let it through");
    assert!(matches!(error, IoError::NotPermitted { .. }), "{error}");
    assert_eq!(first_byte(&device), 0, "nothing was written");
    drop(here);
}

#[test]
fn who_carries_a_request_out_does_not_block_for_the_right() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let (granted, wait) = (Permission::Granted, Permission::Wait);
    let right = InTurn::new(&[granted.clone(), wait.clone(), wait, granted]);
    let device = GatedDevice::new(file_device(&folder), right as Arc<dyn WriteRight>);
    let here = blockio::here();
    let waits = submit(&device, block());
    assert!(waits.try_recv().is_err(), "it is kept");
    drop(here);
    device.reconsider();
    waits.recv().expect("an answer").expect("a write");
    assert_eq!(first_byte(&device), 7);
}
