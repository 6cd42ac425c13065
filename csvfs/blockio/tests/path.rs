//! A device with two ways: over which one requests go, and when they may change.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blockio::{
    AlignedBuf, BlockDevice, CutDevice, Detour, FaultDevice, Geometry, IoBuf, IoError, IoOp, IoRequest,
    MemoryDevice, OpKind, PathDevice, PathStatus, Route, Switch, Ways,
};

const SIZE: u64 = 1 << 20;
/// For what would otherwise never come.
const PATIENCE: Duration = Duration::from_secs(30);

/// A device that is reached directly, and through a peer that shares it.
struct World {
    lun: Arc<MemoryDevice>,
    near: Arc<FaultDevice<Arc<MemoryDevice>>>,
    far: Arc<FaultDevice<Arc<MemoryDevice>>>,
    /// Cuts the direct way, and the peer's.
    near_cut: Switch,
    far_cut: Switch,
    unsettled: AtomicBool,
    /// The node's right to use the LUN is over.
    ended: AtomicBool,
    detours: AtomicUsize,
    told: Mutex<Sender<PathStatus>>,
}

impl World {
    fn new() -> (Arc<Self>, Receiver<PathStatus>) {
        let lun = Arc::new(MemoryDevice::new(SIZE));
        let (tell, told) = channel();
        let world = Self {
            near: Arc::new(FaultDevice::new(Arc::clone(&lun))),
            far: Arc::new(FaultDevice::new(Arc::clone(&lun))),
            lun,
            near_cut: Switch::default(),
            far_cut: Switch::default(),
            unsettled: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            detours: AtomicUsize::new(0),
            told: Mutex::new(tell),
        };
        (Arc::new(world), told)
    }
}

fn proven(device: CutDevice<Arc<FaultDevice<Arc<MemoryDevice>>>>) -> Result<Arc<dyn BlockDevice>, IoError> {
    device.read_at(SIZE - 512, &mut [0; 512])?;
    Ok(Arc::new(device))
}

impl Ways for World {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        proven(CutDevice::new(Arc::clone(&self.near), self.near_cut.clone()))
    }

    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        let device = proven(CutDevice::new(Arc::clone(&self.far), self.far_cut.clone()))?;
        self.detours.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Through { device }))
    }

    fn ended(&self) -> Option<String> {
        self.ended.load(Ordering::Acquire).then(|| "this incarnation is over".to_owned())
    }

    fn changed(&self, status: &PathStatus) {
        // The test may have heard enough.
        let _ = self.told.lock().expect("no panic").send(status.clone());
    }
}

struct Through {
    device: Arc<dyn BlockDevice>,
}

impl Detour for Through {
    fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.device)
    }
    fn via(&self) -> String {
        "the peer".to_owned()
    }
    fn settle(&self) -> Result<(), IoError> {
        Ok(())
    }
}

/// The same, with a peer that does not say at once that it is done.
struct Slow(Arc<World>);

impl Ways for Slow {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        self.0.direct()
    }
    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        let inner = self.0.detour()?;
        Ok(Box::new(SlowThrough { inner, world: Arc::clone(&self.0) }))
    }
    fn ended(&self) -> Option<String> {
        self.0.ended()
    }
    fn changed(&self, status: &PathStatus) {
        self.0.changed(status);
    }
}

struct SlowThrough {
    inner: Box<dyn Detour>,
    world: Arc<World>,
}

impl Detour for SlowThrough {
    fn device(&self) -> Arc<dyn BlockDevice> {
        self.inner.device()
    }
    fn via(&self) -> String {
        self.inner.via()
    }
    fn settle(&self) -> Result<(), IoError> {
        if self.world.unsettled.load(Ordering::Acquire) {
            return Err(IoError::Lost { what: "the peer".to_owned(), why: "it does not answer".to_owned() });
        }
        self.inner.settle()
    }
}

fn until(told: &Receiver<PathStatus>, wanted: Route) -> PathStatus {
    loop {
        let status = told.recv().expect("the device lives");
        if status.route == wanted {
            return status;
        }
    }
}

fn write(device: &PathDevice, offset: u64, fill: u8) -> Receiver<Result<(), IoError>> {
    let (tell, told) = channel();
    let buf = AlignedBuf::copy_of(&[fill; 512]).into();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    device.submit(IoRequest { op: IoOp::Write { offset, buf, fua: false }, done });
    told
}

#[test]
fn a_lost_way_is_not_noticed_by_whoever_does_io_and_is_taken_back() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    assert_eq!(until(&told, Route::Direct).route, device.status().route);
    device.write_at(0, &[1; 512]).expect("write");
    world.near_cut.set(true);
    device.write_at(512, &[2; 512]).expect("the write goes through the peer");
    device.flush().expect("so does the flush");
    let status = until(&told, Route::Detour);
    assert!(status.reason.contains("the peer") && status.reason.contains("severed"), "{status:?}");
    assert_eq!(device.redirected_bytes(), 512);
    world.near_cut.set(false);
    until(&told, Route::Direct);
    device.write_at(1024, &[3; 512]).expect("write");
    assert_eq!(device.redirected_bytes(), 512, "that one went straight to the device");
    assert_eq!(world.lun.to_bytes()[512], 2, "what the flush covered is stable");
}

// Invariant C9.
#[test]
fn nothing_goes_over_the_detour_while_a_request_is_unfinished_on_the_direct_way() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    until(&told, Route::Direct);
    world.near.hold(Some(OpKind::Write));
    let slow = write(&device, 0, 1);
    world.near.wait_held(1);
    world.near_cut.set(true);
    let later = write(&device, 0, 2);
    until(&told, Route::Closed);
    assert!(later.try_recv().is_err(), "the second write waits for the first one");
    assert_eq!(world.detours.load(Ordering::Relaxed), 0, "no detour is even opened");
    world.near.release();
    slow.recv().expect("told").expect("it was done on the direct way");
    later.recv().expect("told").expect("it was done on the detour");
    let mut found = [0; 512];
    device.read_at(0, &mut found).expect("read");
    assert_eq!(found[0], 2, "the later write is the last one");
}

// Invariant C9: and back.
#[test]
fn nothing_goes_over_the_direct_way_while_a_request_is_unfinished_on_the_detour() {
    let (world, told) = World::new();
    world.near_cut.set(true);
    let device = PathDevice::open(world.clone()).expect("there is a detour");
    until(&told, Route::Detour);
    world.far.hold(Some(OpKind::Write));
    let slow = write(&device, 0, 1);
    world.far.wait_held(1);
    world.near_cut.set(false);
    until(&told, Route::Closed);
    let later = write(&device, 0, 2);
    assert!(later.try_recv().is_err() && device.held() == 1);
    world.far.release();
    slow.recv().expect("told").expect("done");
    later.recv().expect("told").expect("done");
    until(&told, Route::Direct);
    let mut found = [0; 512];
    device.read_at(0, &mut found).expect("read");
    assert_eq!(found[0], 2);
}

// Invariant C9: what a peer that is out of reach may still write comes before all else.
#[test]
fn a_detour_whose_end_is_unknown_holds_everything_until_it_is_settled() {
    let (world, told) = World::new();
    world.near_cut.set(true);
    let device = PathDevice::open(Arc::new(Slow(world.clone()))).expect("there is a detour");
    until(&told, Route::Detour);
    world.unsettled.store(true, Ordering::Release);
    world.far_cut.set(true);
    let held = write(&device, 0, 7);
    loop {
        let status = told.recv().expect("the device lives");
        if status.reason.contains("may still be written") {
            break;
        }
    }
    // Both ways work again, and still nothing may go.
    world.near_cut.set(false);
    world.far_cut.set(false);
    assert!(held.try_recv().is_err());
    world.unsettled.store(false, Ordering::Release);
    held.recv().expect("told").expect("done");
}

#[test]
fn without_any_way_requests_wait_and_go_on_when_there_is_one() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    until(&told, Route::Direct);
    world.near_cut.set(true);
    world.far_cut.set(true);
    let held = write(&device, 0, 7);
    loop {
        let status = told.recv().expect("the device lives");
        if status.reason.contains("no way through a peer") {
            break;
        }
    }
    assert!(held.try_recv().is_err());
    world.far_cut.set(false);
    until(&told, Route::Detour);
    held.recv().expect("told").expect("done");
}

// Invariant D6.
#[test]
fn a_flush_that_the_device_itself_fails_is_told_and_stays_failed() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    until(&told, Route::Direct);
    device.write_at(0, &[1; 512]).expect("write");
    world.near.fail(OpKind::Flush, 1, libc::EIO);
    assert!(matches!(device.flush(), Err(IoError::Os { errno: libc::EIO, .. })));
    assert!(matches!(device.write_at(0, &[1; 512]), Err(IoError::Poisoned { .. })));
    assert_eq!(world.detours.load(Ordering::Relaxed), 0, "no way was lost");
}

/// The same with a device that remembers nothing when it is opened anew, as those of the system do.
struct Anew {
    world: Arc<World>,
    opened: Mutex<Vec<Arc<FaultDevice<Arc<MemoryDevice>>>>>,
}

impl Ways for Anew {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        let device = Arc::new(FaultDevice::new(Arc::clone(&self.world.lun)));
        let way = proven(CutDevice::new(Arc::clone(&device), self.world.near_cut.clone()))?;
        self.opened.lock().expect("no panic").push(device);
        Ok(way)
    }
    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        self.world.detour()
    }
    fn changed(&self, status: &PathStatus) {
        self.world.changed(status);
    }
}

// All paths are lost at once, as when the array has no power: the system fails what was in flight, flushes too.
#[test]
fn a_flush_that_failed_with_the_way_is_done_again_when_the_way_is_back() {
    let (world, told) = World::new();
    let ways = Arc::new(Anew { world: world.clone(), opened: Mutex::default() });
    let device = Arc::new(PathDevice::open(ways.clone()).expect("the direct way works"));
    until(&told, Route::Direct);
    let first = ways.opened.lock().expect("no panic").remove(0);
    first.fail(OpKind::Flush, 1, libc::EIO);
    first.hold(Some(OpKind::Flush));
    let (tell, flushed) = channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    device.submit(IoRequest { op: IoOp::Flush, done });
    first.wait_held(1);
    world.near_cut.set(true);
    world.far_cut.set(true);
    first.release();
    loop {
        let status = told.recv().expect("the device lives");
        if status.reason.contains("no way through a peer") {
            break;
        }
    }
    assert!(flushed.try_recv().is_err(), "it waits for a way");
    world.near_cut.set(false);
    flushed.recv().expect("told").expect("done again");
    device.write_at(0, &[1; 512]).expect("nothing remembers the loss");
    device.flush().expect("a flush");
    assert_eq!(world.lun.to_bytes()[0], 1);
}

#[test]
fn a_bad_sector_is_told_in_the_end() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    until(&told, Route::Direct);
    // The looks at the way itself are reads too, and must succeed: only writes fail.
    world.near.fail_from(OpKind::Write, 1, libc::EIO);
    assert!(matches!(device.write_at(0, &[1; 512]), Err(IoError::Os { errno: libc::EIO, .. })));
    device.read_at(0, &mut [0; 512]).expect("the device goes on");
}

#[test]
fn the_detour_is_taken_by_hand_and_left_by_hand() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    until(&told, Route::Direct);
    let status = device.redirect_by_hand(true);
    assert!(status.route == Route::Detour && status.by_hand, "{status:?}");
    device.write_at(0, &[1; 4096]).expect("write");
    assert_eq!(device.redirected_bytes(), 4096);
    assert!(device.redirect_by_hand(true).by_hand, "asked again, it stays");
    let status = device.redirect_by_hand(false);
    assert!(status.route == Route::Direct && !status.by_hand, "{status:?}");
    world.far_cut.set(true);
    let refused = device.redirect_by_hand(true);
    assert!(refused.route == Route::Direct && refused.reason.contains("not redirected"), "{refused:?}");
}

#[test]
fn a_device_that_is_dropped_without_a_way_fails_what_waits() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    until(&told, Route::Direct);
    world.near_cut.set(true);
    world.far_cut.set(true);
    let held = write(&device, 0, 7);
    until(&told, Route::Closed);
    drop(device);
    assert!(held.recv().expect("told").is_err());
}

#[test]
fn many_requests_lose_nothing_while_the_way_changes_again_and_again() {
    let (world, told) = World::new();
    let device = Arc::new(PathDevice::open(world.clone()).expect("the direct way works"));
    let writers: Vec<_> = (0..4_u64)
        .map(|writer| {
            let device = Arc::clone(&device);
            std::thread::spawn(move || {
                for round in 0..500_u64 {
                    let buf = IoBuf::from(AlignedBuf::copy_of(&round.to_le_bytes().repeat(64)));
                    // Each way has a cache of its own here, unlike those of a LUN: forced writes go past it.
                    device.run(IoOp::Write { offset: writer * 512, buf, fua: true }).expect("write");
                }
            })
        })
        .collect();
    for round in 0..20 {
        until(&told, if round % 2 == 0 { Route::Direct } else { Route::Detour });
        let wanted = round % 2 == 0;
        assert_eq!(device.redirect_by_hand(wanted).route == Route::Detour, wanted);
    }
    writers.into_iter().for_each(|writer| writer.join().expect("no error"));
    for writer in 0..4_u64 {
        let mut found = [0; 512];
        device.read_at(writer * 512, &mut found).expect("read");
        assert_eq!(found[..8], 499_u64.to_le_bytes(), "the last write of each is the last");
    }
}

/// Both ways are lost when it ends, so nothing else ever ends what waits.
fn assert_told_of_the_end(device: &PathDevice, waiting: &Receiver<Result<(), IoError>>) {
    let told = waiting.recv_timeout(PATIENCE).expect("it is told").expect_err("the right is over");
    assert!(matches!(&told, IoError::NotPermitted { reason } if reason.contains("is over")), "{told}");
    let later = write(device, 0, 9).recv().expect("told").expect_err("for good");
    assert!(matches!(later, IoError::NotPermitted { .. }), "{later}");
    assert_eq!((device.held(), device.status().route), (0, Route::Closed));
}

// Invariant A2: a node that was cut off has no way left; its requests end, so that it can end, and begin anew.
#[test]
fn what_waits_for_a_way_is_told_when_there_will_be_none() {
    let (world, told) = World::new();
    let device = PathDevice::open(world.clone()).expect("the direct way works");
    world.near_cut.set(true);
    world.far_cut.set(true);
    let waiting = write(&device, 0, 1);
    until(&told, Route::Closed);
    world.ended.store(true, Ordering::Release);
    assert_told_of_the_end(&device, &waiting);
    world.near_cut.set(false);
    assert!(write(&device, 0, 1).recv().expect("told").is_err(), "a way that is back is not taken");
    assert_eq!(world.lun.to_bytes()[..512], [0; 512]);
}

// Invariant A2: nor does it wait for a peer to say that a detour has ended, which nobody tells a node of the past.
#[test]
fn a_detour_that_cannot_be_settled_holds_nobody_whose_right_is_over() {
    let (world, told) = World::new();
    world.near_cut.set(true);
    let device = PathDevice::open(Arc::new(Slow(world.clone()))).expect("the peer works");
    until(&told, Route::Detour);
    world.unsettled.store(true, Ordering::Release);
    world.far_cut.set(true);
    let waiting = write(&device, 0, 1);
    until(&told, Route::Closed);
    world.ended.store(true, Ordering::Release);
    assert_told_of_the_end(&device, &waiting);
}

/// A device that keeps nothing of what it has done, and the only way to it.
struct Forgetful;

impl BlockDevice for Forgetful {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: SIZE, block_bytes: 512, can_discard: false }
    }

    fn submit(&self, request: IoRequest) {
        let IoRequest { op, done } = request;
        drop(op);
        done(Ok(()));
    }
}

impl Ways for Forgetful {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        Ok(Arc::new(Self))
    }

    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        Err(IoError::Closed)
    }

    fn changed(&self, _status: &PathStatus) {}
}

// Otherwise each request of a mount takes fresh memory, and each answer to a read is copied.
#[test]
fn whoever_is_told_of_the_end_of_a_request_is_the_only_owner_of_its_memory() {
    let path = PathDevice::open(Arc::new(Forgetful)).expect("the way is open");
    let (tell, told) = channel();
    for write in [false, true] {
        let (buf, tell) = (IoBuf::zeroed(4096), tell.clone());
        let mine = buf.clone();
        let op =
            if write { IoOp::Write { offset: 0, buf, fua: false } } else { IoOp::Read { offset: 0, buf } };
        let done = Box::new(move |_| tell.send(mine.try_into_aligned().is_ok()).expect("the test listens"));
        path.submit(IoRequest { op, done });
        assert!(told.recv().expect("told"), "write: {write}");
    }
}

/// A device that opens at any time and is lost with the first requests, as many as are left.
struct Fragile(Arc<AtomicUsize>);

impl BlockDevice for Fragile {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: SIZE, block_bytes: 512, can_discard: false }
    }

    fn submit(&self, request: IoRequest) {
        let lost = || IoError::Lost { what: "the server".to_owned(), why: "it has hung up".to_owned() };
        let left = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1));
        (request.done)(left.map_or(Ok(()), |_| Err(lost())));
    }
}

impl Ways for Fragile {
    fn direct(&self) -> Result<Arc<dyn BlockDevice>, IoError> {
        Ok(Arc::new(Self(Arc::clone(&self.0))))
    }

    fn detour(&self) -> Result<Box<dyn Detour>, IoError> {
        Err(IoError::Closed)
    }

    fn changed(&self, _status: &PathStatus) {}
}

// A server that hangs up whenever a bad sector is read: opened anew each time without a pause, it took a processor, and told of
// a thousand changes of the way in a second.
#[test]
#[expect(clippy::disallowed_methods, reason = "a pause is what is tested")]
fn a_way_that_is_lost_again_and_again_by_one_request_is_not_opened_without_a_pause() {
    const TRIES_WITHOUT: usize = 4;
    const PAUSES: usize = 1 + 2 + 3;
    let left = Arc::new(AtomicUsize::new(TRIES_WITHOUT + 3));
    let path = PathDevice::open(Arc::new(Fragile(Arc::clone(&left)))).expect("the way is open");
    let begun = std::time::Instant::now();
    write(&path, 0, 1).recv().expect("told").expect("it has got through");
    assert!(begun.elapsed() >= Duration::from_millis(100) * u32::try_from(PAUSES).expect("few"));
    assert_eq!(left.load(Ordering::Acquire), 0);
}
