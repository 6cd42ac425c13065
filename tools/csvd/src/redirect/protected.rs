//! NBD between two nodes: straight into a TLS stream and out of it, by the threads that make and serve the requests.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use blockio::{NbdStream, NbdTransport};
use wire::{Duplex, Stream};

/// A stream to a node that has proven who it is, for both of its users: NBD, and whoever ends it.
pub(super) fn protected(stream: Stream) -> (NbdStream, Arc<Duplex>) {
    let duplex = Arc::new(stream.into_duplex());
    (NbdStream::Protected(Box::new(Protected(Arc::clone(&duplex)))), duplex)
}

struct Protected(Arc<Duplex>);

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

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::thread::JoinHandle;

    use blockio::{
        BlockDevice, FaultDevice, IoBuf, IoError, IoOp, IoRequest, MemoryDevice, NbdDevice, NbdExport,
        NbdOptions, OpKind, serve_nbd,
    };
    use wire::authority;

    use super::*;
    use crate::redirect::Sessions;
    use crate::redirect::testing::{Nodes, endpoint};

    const SIZE: u64 = 8 << 20;

    /// A client at node 1 of a device at node 2, what ends its stream at node 2, and node 2's thread.
    fn through(nodes: &Nodes, device: &Arc<FaultDevice<MemoryDevice>>) -> (NbdDevice, Arc<Duplex>, Serving) {
        let near = nodes.connect(&endpoint(&nodes.ca, 1), 2).expect("connected");
        let (far, duplex) = protected(nodes.arrived.recv().expect("it arrives"));
        let export = NbdExport::new(Arc::clone(device) as Arc<dyn BlockDevice>, false);
        let serving = std::thread::spawn(move || serve_nbd(far, &export));
        let options = NbdOptions { writes_outlive_server: true, ..NbdOptions::default() };
        let client = NbdDevice::over(protected(near).0, "", "the device of node 2", options);
        (client.expect("the client is served"), duplex, serving)
    }

    type Serving = JoinHandle<Result<(), String>>;

    fn device() -> Arc<FaultDevice<MemoryDevice>> {
        Arc::new(FaultDevice::new(MemoryDevice::new(SIZE)))
    }

    fn submit(client: &NbdDevice, op: IoOp) -> Receiver<Result<(), IoError>> {
        let (tell, told) = channel();
        client.submit(IoRequest { op, done: Box::new(move |outcome| tell.send(outcome).expect("heard")) });
        told
    }

    fn bytes(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|at| (at * 7 + at / 251 + seed * 31).to_le_bytes()[0]).collect()
    }

    #[test]
    fn requests_of_any_size_pass_in_both_directions_at_once() {
        const LANES: usize = 4;
        const LENGTHS: [usize; 5] = [512, 4096, 16 << 10, (300 << 10) + 512, 1 << 20];
        let nodes = Nodes::start();
        let (client, _, serving) = through(&nodes, &device());
        std::thread::scope(|scope| {
            for lane in 0..LANES {
                let client = &client;
                scope.spawn(move || {
                    let start = lane as u64 * (SIZE / LANES as u64);
                    for (round, len) in (0..4).flat_map(|round| LENGTHS.map(|len| (round, len))) {
                        let written = bytes(len, lane + round);
                        client.write_at(start, &written).expect("written");
                        let mut found = vec![0; len];
                        client.read_at(start, &mut found).expect("read");
                        assert!(found == written, "lane {lane}, round {round}, {len} bytes");
                    }
                });
            }
        });
        client.flush().expect("flushed");
        drop(client);
        assert_eq!(serving.join().expect("no panic"), Ok(()), "the client has left in order");
    }

    // Invariants A1 and C9: whoever ends a session may rely on it that nothing of it lands afterwards.
    #[test]
    fn a_session_that_is_ended_is_over_when_what_it_has_begun_is_done() {
        let (nodes, device, sessions) = (Nodes::start(), device(), Arc::new(Sessions::<u8>::default()));
        let (client, duplex, serving) = through(&nodes, &device);
        let number = sessions.enter(&1, move || duplex.end());
        device.hold(Some(OpKind::Write));
        let buf = IoBuf::zeroed(1 << 20);
        let write = submit(&client, IoOp::Write { offset: 0, buf, fua: false });
        device.wait_held(1);
        let (tell, ended) = channel();
        let ending = Arc::clone(&sessions);
        let end = std::thread::spawn(move || {
            ending.end(|key| *key == 1);
            tell.send(()).expect("the test listens");
        });
        assert!(matches!(write.recv().expect("told"), Err(IoError::Lost { .. })));
        assert!(!serving.is_finished() && ended.try_recv().is_err(), "the write is still at the device");
        device.release();
        let _why = serving.join().expect("no panic");
        sessions.leave(&1, number);
        ended.recv().expect("now it has ended");
        end.join().expect("no panic");
        assert!(matches!(client.flush(), Err(IoError::Lost { .. })), "the client must take another way");
    }

    #[test]
    fn a_peer_that_dies_in_the_middle_of_a_request_leaves_nobody_waiting() {
        let (nodes, device) = (Nodes::start(), device());
        let (client, duplex, serving) = through(&nodes, &device);
        device.hold(None);
        let read = submit(&client, IoOp::Read { offset: 0, buf: IoBuf::zeroed(1 << 20) });
        let flush = submit(&client, IoOp::Flush);
        device.wait_held(2);
        duplex.end();
        for told in [read, flush] {
            assert!(matches!(told.recv().expect("told"), Err(IoError::Lost { .. })));
        }
        device.release();
        let _why = serving.join().expect("no panic");
    }

    #[test]
    fn only_a_member_of_the_cluster_opens_a_stream_and_only_to_the_node_that_it_means() {
        let nodes = Nodes::start();
        let stranger = authority::create_ca("another").expect("an authority");
        assert!(nodes.connect(&endpoint(&stranger, 1), 2).is_err(), "another authority");
        assert!(nodes.connect(&endpoint(&nodes.ca, 1), 3).is_err(), "another node");
        let near = nodes.connect(&endpoint(&nodes.ca, 1), 2).expect("a member");
        let far = nodes.arrived.recv().expect("it arrives");
        assert_eq!((near.peer().node, far.peer().node), (2, 1));
        assert!(nodes.arrived.try_recv().is_err(), "nothing has come of the others");
    }
}
