//! NBD in a TLS stream, from a client to a device that does nothing: what the detour costs without disk and mount.
#![expect(clippy::disallowed_methods, reason = "measures time")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use benchmarks::Streams;
use blockio::{
    BlockDevice, Geometry, IoBuf, IoOp, IoRequest, NbdDevice, NbdExport, NbdOptions, NbdStream, NbdTransport,
    serve_nbd,
};
use wire::{Duplex, Stream};

const MIB: usize = 1 << 20;
const SIZE_BYTES: u64 = 1 << 30;

/// Both ends.
pub(crate) struct Transport {
    client: Option<Arc<NbdDevice>>,
    serving: Option<JoinHandle<Result<(), String>>>,
}

impl Transport {
    pub(crate) fn open(streams: &Streams) -> Self {
        let (near, far) = streams.open().expect("a TLS stream");
        let export = NbdExport::new(Arc::new(Nothing), false);
        let serving = std::thread::spawn(move || serve_nbd(protected(far), &export));
        let client = NbdDevice::over(protected(near), "", "nothing", NbdOptions::default());
        Self { client: Some(Arc::new(client.expect("the client is served"))), serving: Some(serving) }
    }

    /// So many requests of 1 MiB, of which `depth` are under way at once. A completion submits the next one.
    pub(crate) fn mib_per_second(&self, write: bool, count: u64, depth: usize) -> f64 {
        let client = Arc::clone(self.client.as_ref().expect("open"));
        let (tell, told) = channel();
        let flow = Arc::new(Flow { client, write, left: Mutex::new(count) });
        let began = Instant::now();
        for _ in 0..depth {
            Flow::next(&flow, IoBuf::zeroed(MIB), tell.clone());
        }
        drop(tell);
        assert_eq!(told.recv().ok(), None, "no request fails");
        count as f64 / began.elapsed().as_secs_f64()
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        drop(self.client.take());
        if let Some(serving) = self.serving.take() {
            drop(serving.join());
        }
    }
}

struct Flow {
    client: Arc<NbdDevice>,
    write: bool,
    /// Lock rank: a leaf.
    left: Mutex<u64>,
}

impl Flow {
    fn next(flow: &Arc<Self>, buf: IoBuf, tell: Sender<String>) {
        let number = {
            let mut left = flow.left.lock().expect("no panic");
            if *left == 0 {
                return;
            }
            *left -= 1;
            *left
        };
        let offset = number * MIB as u64 % SIZE_BYTES;
        let op = if flow.write {
            IoOp::Write { offset, buf: buf.clone(), fua: false }
        } else {
            IoOp::Read { offset, buf: buf.clone() }
        };
        let own = Arc::clone(flow);
        let done = Box::new(move |outcome| match outcome {
            Ok(()) => Self::next(&own, buf, tell),
            Err(error) => drop(tell.send(format!("{error}"))),
        });
        flow.client.submit(IoRequest { op, done });
    }
}

/// Answers at once.
struct Nothing;

impl BlockDevice for Nothing {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: SIZE_BYTES, block_bytes: 4096, can_discard: false }
    }

    fn submit(&self, request: IoRequest) {
        let IoRequest { op, done } = request;
        drop(op);
        done(Ok(()));
    }
}

fn protected(stream: Stream) -> NbdStream {
    NbdStream::Protected(Box::new(Protected(stream.into_duplex())))
}

/// As between two nodes.
struct Protected(Duplex);

impl AsFd for Protected {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl NbdTransport for Protected {
    fn send(&self, fill: &mut dyn FnMut(&mut [u8]) -> usize) -> io::Result<Option<usize>> {
        self.0.send(fill)
    }

    fn receive(&self, wait: bool, take: &mut dyn FnMut(&[u8]) -> usize) -> io::Result<Option<usize>> {
        self.0.receive(wait, take)
    }

    fn holds_bytes(&self) -> bool {
        self.0.holds_bytes()
    }

    fn end(&self) {
        self.0.end();
    }
}
