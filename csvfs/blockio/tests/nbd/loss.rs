//! A server that goes away and comes back.

use std::sync::Arc;
use std::sync::mpsc::channel;

use blockio::{
    BlockDevice, CutDevice, FaultDevice, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, NbdDevice, NbdExport,
    NbdOptions, NbdServer, OpKind, Switch,
};

use crate::support::Served;

const SIZE: u64 = 1 << 20;

/// Waits, by asking, until the client is connected again.
fn until_back(client: &NbdDevice) {
    while let Err(error) = client.read_at(0, &mut [0; 512]) {
        assert!(matches!(error, IoError::Lost { .. }), "{error}");
        std::thread::yield_now();
    }
}

fn restart(served: &mut Served, device: Arc<dyn BlockDevice>) {
    drop(served.server.take());
    let export = Arc::new(NbdExport::new(device, false));
    served.server = Some(NbdServer::listen(&served.socket(), export).expect("it listens again"));
}

#[test]
fn requests_fail_as_lost_while_the_server_is_away_and_work_when_it_is_back() {
    let device = Arc::new(MemoryDevice::new(SIZE));
    let mut served = Served::of(device.clone());
    let client = served.open();
    client.write_at(0, &[7; 512]).expect("write");
    client.flush().expect("flush");
    drop(served.server.take());
    assert!(matches!(client.read_at(0, &mut [0; 512]), Err(IoError::Lost { .. })));
    restart(&mut served, device);
    until_back(&client);
    client.write_at(512, &[8; 512]).expect("nothing was in doubt");
    client.flush().expect("flush");
}

// Invariant D6: the server may have lost what no flush had covered.
#[test]
fn a_loss_with_unflushed_writes_is_treated_as_a_failed_flush() {
    let device = Arc::new(MemoryDevice::new(SIZE));
    let mut served = Served::of(device.clone());
    let client = served.open();
    client.write_at(0, &[7; 512]).expect("write");
    restart(&mut served, device);
    until_back(&client);
    assert!(matches!(client.flush(), Err(IoError::Poisoned { .. })));
    assert!(matches!(client.write_at(0, &[7; 512]), Err(IoError::Poisoned { .. })));
}

/// The server's own way to the device is cut and mended: its clients may have more than one way, and take no harm.
#[test]
fn a_server_whose_way_is_lost_says_so_and_its_flushes_work_again_afterwards() {
    let cut = Switch::default();
    let served = Served::of(Arc::new(CutDevice::new(MemoryDevice::new(SIZE), cut.clone())));
    let options = NbdOptions { writes_outlive_server: true, ..NbdOptions::default() };
    let client = NbdDevice::open(&served.address(), options).expect("the client connects");
    client.write_at(0, &[7; 512]).expect("write");
    cut.set(true);
    let lost = client.flush().expect_err("the way is cut");
    assert!(matches!(lost, IoError::Os { errno: libc::ESHUTDOWN, .. }), "no I/O error of the device: {lost}");
    cut.set(false);
    client.flush().expect("what was written is still there");
}

#[test]
fn a_peer_that_goes_away_with_unflushed_writes_has_lost_nothing() {
    let device = Arc::new(MemoryDevice::new(SIZE));
    let mut served = Served::of(device.clone());
    let options = NbdOptions { writes_outlive_server: true, ..NbdOptions::default() };
    let client = NbdDevice::open(&served.address(), options).expect("the client connects");
    client.write_at(0, &[7; 512]).expect("write");
    restart(&mut served, device);
    until_back(&client);
    client.flush().expect("the device behind the server has it");
}

#[test]
fn a_server_that_comes_back_with_another_export_is_not_taken() {
    let mut served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let client = served.open();
    restart(&mut served, Arc::new(MemoryDevice::new(SIZE * 2)));
    assert!(matches!(client.read_at(0, &mut [0; 512]), Err(IoError::Lost { .. })));
    drop(client);
}

#[test]
fn what_is_in_flight_when_the_client_aborts_fails_and_the_server_has_nothing_left_of_it() {
    let faulty = Arc::new(FaultDevice::new(MemoryDevice::new(SIZE)));
    let mut served = Served::of(faulty.clone());
    let client = served.open();
    faulty.hold(Some(OpKind::Write));
    let (tell, told) = channel();
    let done = Box::new(move |outcome| drop(tell.send(outcome)));
    client.submit(IoRequest { op: IoOp::Write { offset: 0, buf: IoBuf::zeroed(512), fua: false }, done });
    faulty.wait_held(1);
    client.abort();
    assert!(matches!(told.recv(), Ok(Err(IoError::Lost { .. }))));
    // The server ends only when the held write is done: whoever waits for its end may rely on that.
    let server = served.server.take();
    let (tell, ended) = channel();
    let ending = std::thread::spawn(move || {
        drop(server);
        tell.send(()).expect("the test listens");
    });
    assert!(ended.try_recv().is_err(), "the write is still held");
    faulty.release();
    ended.recv().expect("the server ends");
    ending.join().expect("no panic");
}

#[test]
fn a_device_that_is_dropped_completes_what_was_submitted() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let client = NbdDevice::open(&served.address(), NbdOptions::default()).expect("the client connects");
    let (tell, told) = channel();
    for _ in 0..100 {
        let tell = tell.clone();
        let done = Box::new(move |outcome| drop(tell.send(outcome)));
        client.submit(IoRequest { op: IoOp::Read { offset: 0, buf: IoBuf::zeroed(4096) }, done });
    }
    drop(client);
    for _ in 0..100 {
        told.recv().expect("completed").expect("read");
    }
}
