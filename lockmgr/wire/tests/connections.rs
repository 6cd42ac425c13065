//! Connections between nodes over real TLS on loopback: what works, and what each kind of bad input ends in.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::future::join_all;
use support::{ASK_BACK, ECHO, Echo, HELD, Pki, TOO_MUCH, serve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wire::{Class, FRAME_BYTES_MAX, HEADER_BYTES, Mesh, RefusalCode, RefuseAll, WireError, connect_tls};

async fn connect(pki: &Pki, address: &str) -> wire::Connection {
    connect_tls(address, &pki.endpoint(1), 2, Class::Control, Arc::new(RefuseAll)).await.expect("connects")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_calls_in_flight_each_get_their_own_reply() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    assert_eq!((connection.peer().node, &*connection.peer().name), (2, "n2"));
    let calls =
        (0..3000u32).map(|i| {
            let connection = connection.clone();
            async move {
                (i, connection.call(ECHO, Bytes::copy_from_slice(&i.to_le_bytes())).await.expect("reply"))
            }
        });
    for (i, reply) in join_all(calls).await {
        assert_eq!(reply[..], i.to_le_bytes());
    }
    connection.close();
    connection.closed().await;
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_can_ask_its_caller_back_on_the_same_connection() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let (mine, _received) = Echo::new();
    let connection =
        connect_tls(&address, &pki.endpoint(1), 2, Class::Control, mine).await.expect("connects");
    let reply = connection.call(ASK_BACK, Bytes::from_static(b"there and back")).await.expect("reply");
    assert_eq!(&reply[..], b"there and back");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_arrive_in_their_order() {
    let pki = Pki::new();
    let (server, address, _echo, mut received) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    for i in 0..500u32 {
        connection.push(7, Bytes::copy_from_slice(&i.to_le_bytes())).expect("queued");
    }
    for i in 0..500u32 {
        let (service, body) = received.pushed.recv().await.expect("open");
        assert_eq!((service, &body[..]), (7, &i.to_le_bytes()[..]));
    }
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_longest_frame_passes_and_a_longer_one_is_refused_before_it_is_sent() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    let longest = Bytes::from(vec![5; FRAME_BYTES_MAX - HEADER_BYTES]);
    assert_eq!(connection.call(ECHO, longest.clone()).await.expect("fits"), longest);
    let error = connection.call(ECHO, Bytes::from(vec![5; FRAME_BYTES_MAX])).await.expect_err("too long");
    assert!(matches!(error, WireError::TooLong { .. }), "{error}");
    let error = connection.call(TOO_MUCH, Bytes::new()).await.expect_err("reply too long");
    assert!(matches!(&error, WireError::Refused(refusal) if refusal.code == RefusalCode::Failed), "{error}");
    assert!(connection.call(ECHO, Bytes::new()).await.is_ok(), "the connection lives on");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_service_is_refused_as_unsupported_and_the_connection_lives_on() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    let error = connection.call(9999, Bytes::new()).await.expect_err("unknown");
    assert!(
        matches!(&error, WireError::Refused(refusal) if refusal.code == RefusalCode::Unsupported),
        "{error}"
    );
    assert!(error.hint().is_some());
    assert!(connection.call(ECHO, Bytes::new()).await.is_ok());
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_another_authority_is_refused_on_both_sides() {
    let (pki, mut foreign) = (Pki::new(), Pki::new());
    foreign.cluster = pki.cluster;
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let connect = |endpoint| {
        let address = address.clone();
        async move { connect_tls(&address, &endpoint, 2, Class::Control, Arc::new(RefuseAll)).await }
    };
    // The foreign node does not trust the server.
    let error = connect(foreign.endpoint(1)).await.expect_err("foreign authority");
    assert!(matches!(error, WireError::ForeignCertificate { .. }), "{error}");
    // A node that trusts the server but shows a foreign certificate is refused by the server, and learns why.
    let mixed = authority_trusting(&pki, &foreign);
    let error = connect(mixed).await.expect_err("foreign certificate");
    assert!(matches!(error, WireError::ForeignCertificate { .. }), "{error}");
    assert!(error.hint().is_some());
    server.shutdown().await;
}

/// A certificate of `foreign`, with the authority of `pki` as the one to trust.
fn authority_trusting(pki: &Pki, foreign: &Pki) -> wire::Endpoint {
    let issued = wire::authority::issue(&foreign.ca, 1).expect("certificate");
    let identity =
        wire::Identity::from_pem(&issued.cert_pem, &issued.key_pem, &pki.ca.cert_pem).expect("identity");
    wire::Endpoint::new(pki.local(1), identity).expect("endpoint")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_node_than_the_expected_one_is_refused() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let outcome = connect_tls(&address, &pki.endpoint(1), 3, Class::Control, Arc::new(RefuseAll)).await;
    assert!(matches!(outcome, Err(WireError::WrongNode { .. })), "{outcome:?}");
    let mismatch = wire::Endpoint::new(pki.local(1), pki.identity(2));
    assert!(matches!(mismatch, Err(WireError::BadIdentity { .. })), "{mismatch:?}");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_is_refused_and_told_why() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let mut local = pki.local(1);
    local.cluster = uuid::Uuid::new_v4();
    let stranger = wire::Endpoint::new(local, pki.identity(1)).expect("endpoint");
    let outcome = connect_tls(&address, &stranger, 2, Class::Control, Arc::new(RefuseAll)).await;
    assert!(matches!(outcome, Err(WireError::WrongCluster { .. } | WireError::Refused(_))), "{outcome:?}");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_the_port_closes_only_that_connection() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    let mut garbage = TcpStream::connect(&address).await.expect("connects");
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("sent");
    garbage.shutdown().await.expect("half closed");
    let mut answer = Vec::new();
    garbage.read_to_end(&mut answer).await.expect("closed in order");
    assert!(connection.call(ECHO, Bytes::new()).await.is_ok());
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_in_flight_end_with_an_error_when_the_peer_goes() {
    let pki = Pki::new();
    let (server, address, echo, _received) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    let held = tokio::spawn({
        let connection = connection.clone();
        async move { connection.call(HELD, Bytes::new()).await }
    });
    while echo.held.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    echo.connections.lock().expect("lock").iter().for_each(wire::Connection::close);
    let error = held.await.expect("task").expect_err("lost");
    assert!(matches!(error, WireError::Closed { .. }), "{error}");
    echo.gate.add_permits(1);
    server.shutdown().await;
    assert_eq!(Arc::strong_count(&echo), 1, "nothing holds the handler any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_calls_than_a_connection_takes_wait_their_turn() {
    let pki = Pki::new();
    let (server, address, echo, _received) = serve(pki.endpoint(2)).await;
    let connection = connect(&pki, &address).await;
    let calls: Vec<_> = (0..1500)
        .map(|_| {
            let connection = connection.clone();
            tokio::spawn(async move { connection.call(HELD, Bytes::new()).await })
        })
        .collect();
    while echo.held.load(Ordering::SeqCst) < 1024 {
        tokio::task::yield_now().await;
    }
    echo.gate.add_permits(1500);
    for call in calls {
        call.await.expect("task").expect("reply");
    }
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_reconnects_by_itself_when_its_peer_comes_back() {
    let pki = Pki::new();
    let (server, address, ..) = serve(pki.endpoint(2)).await;
    let mesh = Mesh::new(pki.endpoint(1), Arc::new(RefuseAll));
    assert!(matches!(mesh.call(2, ECHO, Bytes::new()).await, Err(WireError::NotConnected { node: 2, .. })));
    mesh.set_peer(2, &address);
    let first = mesh.connect(2, Class::Control).await.expect("known");
    assert!(mesh.call(2, ECHO, Bytes::new()).await.is_ok());
    server.shutdown().await;
    first.closed().await;

    let listener = tokio::net::TcpListener::bind(&address).await.expect("same port");
    let (echo, _received) = Echo::new();
    let server = wire::Server::serve_tls(listener, pki.endpoint(2), echo);
    let second = mesh.connect(2, Class::Control).await.expect("known");
    assert!(!second.same_as(&first));
    assert!(mesh.call(2, ECHO, Bytes::new()).await.is_ok());
    assert!(mesh.call_bulk(2, ECHO, Bytes::from(vec![1; 1 << 20])).await.is_ok());
    mesh.shutdown().await;
    assert!(mesh.call(2, ECHO, Bytes::new()).await.is_err());
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_node_is_silent_until_it_is_connected_again() {
    let pki = Pki::new();
    let (server, address, echo, mut received) = serve(pki.endpoint(2)).await;
    let mesh = Mesh::new(pki.endpoint(1), Arc::new(RefuseAll));
    mesh.set_peer(2, &address);
    mesh.connect(2, Class::Control).await.expect("known");
    mesh.set_partitioned(true);
    let call = tokio::spawn({
        let mesh = Arc::clone(&mesh);
        async move { mesh.call(2, ECHO, Bytes::from_static(b"late")).await }
    });
    mesh.push(2, 7, Bytes::from_static(b"held")).expect("queued");
    // What the peer sends does not pass either.
    let back = echo.first_connection().await;
    let back = tokio::spawn(async move { back.call(ECHO, Bytes::new()).await });
    assert!(received.pushed.try_recv().is_err() && !call.is_finished() && !back.is_finished());
    mesh.set_partitioned(false);
    assert_eq!(call.await.expect("task").expect("reply"), Bytes::from_static(b"late"));
    assert_eq!(received.pushed.recv().await.expect("open").1, Bytes::from_static(b"held"));
    assert!(matches!(back.await.expect("task"), Err(WireError::Refused(_))), "mesh side serves nothing");
    mesh.shutdown().await;
    server.shutdown().await;
}

/// Gives the streams that arrive.
struct Taking(std::sync::mpsc::Sender<wire::Stream>);

impl wire::Handler for Taking {
    fn handle(
        &self,
        _from: wire::Peer,
        _conn: wire::Connection,
        service: u16,
        _body: Bytes,
    ) -> futures::future::BoxFuture<'static, Result<Bytes, wire::Refusal>> {
        Box::pin(async move { Err(wire::Refusal::unsupported(service)) })
    }

    fn bare_stream(&self, stream: wire::Stream) {
        let _ = self.0.send(stream);
    }

    fn blocks(&self, stream: wire::Stream) {
        let _ = self.0.send(stream);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bare_stream_carries_bytes_both_ways_between_nodes_that_have_proved_who_they_are() {
    use std::io::{Read, Write};
    let pki = Pki::new();
    let (streams, arrived) = std::sync::mpsc::channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    // A machine that is set up for something else than nodes want.
    rustix::net::sockopt::set_tcp_congestion(&listener, "reno").expect("every kernel has it");
    let address = listener.local_addr().expect("bound").to_string();
    let server = wire::Server::serve_tls(listener, pki.endpoint(2), Arc::new(Taking(streams)));
    let stranger = Pki::new();
    assert!(wire::connect_bare(&address, &stranger.endpoint(1), 2).await.is_err(), "another authority");
    assert!(wire::connect_bare(&address, &pki.endpoint(1), 3).await.is_err(), "another node");
    let mut near = wire::connect_bare(&address, &pki.endpoint(1), 2).await.expect("opens");
    let sent: Vec<u8> = (0..3_000_000_u32).map(|i| i.to_le_bytes()[1]).collect();
    let expected = sent.clone();
    let sending = std::thread::spawn(move || {
        near.write_all(&sent).expect("written");
        near.flush().expect("sent");
        let mut answer = [0; 4];
        near.read_exact(&mut answer).expect("answered");
        answer
    });
    let mut far = arrived.recv().expect("arrives");
    assert_eq!(far.peer().node, 1);
    let mut found = vec![0; expected.len()];
    far.read_exact(&mut found).expect("read");
    assert!(found == expected, "bytes differ");
    far.write_all(b"done").and_then(|()| far.flush()).expect("answers");
    assert_eq!(&sending.join().expect("no panic"), b"done");
    // Ended from another thread, a stream does not wait any more.
    let end = far.ender().expect("a handle");
    let reading = std::thread::spawn(move || far.read(&mut [0]));
    end.end();
    assert!(reading.join().expect("no panic").is_err());
    server.shutdown().await;
}

// What paces a socket is set before it is connected, so that no timer of the machine's own setting has begun on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn masses_of_data_between_nodes_are_not_paced_whatever_the_machine_is_set_to() {
    let (near, far, server, _) = blocks().await;
    for end in [&near, &far] {
        let found = rustix::net::sockopt::tcp_congestion(&**end).expect("a TCP socket");
        assert_eq!(found, "cubic");
    }
    near.end();
    server.shutdown().await;
}

/// Both ends of a stream for blocks from node 1 to node 2, the server, and the switch that cuts node 1 off.
async fn blocks() -> (Arc<wire::Duplex>, Arc<wire::Duplex>, wire::Server, wire::Partition) {
    let pki = Pki::new();
    let (streams, arrived) = std::sync::mpsc::channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    // A machine that is set up for something else than nodes want.
    rustix::net::sockopt::set_tcp_congestion(&listener, "reno").expect("every kernel has it");
    let address = listener.local_addr().expect("bound").to_string();
    let server = wire::Server::serve_tls(listener, pki.endpoint(2), Arc::new(Taking(streams)));
    let stranger = Pki::new();
    assert!(wire::connect_blocks(&address, &stranger.endpoint(1), 2).await.is_err(), "another authority");
    let endpoint = pki.endpoint(1);
    let near = wire::connect_blocks(&address, &endpoint, 2).await.expect("opens");
    let far = arrived.recv().expect("arrives");
    assert_eq!((near.peer().node, far.peer().node), (2, 1));
    (Arc::new(near.into_duplex()), Arc::new(far.into_duplex()), server, endpoint.partition().clone())
}

/// Sends `bytes`, from the front, as far as there is room; gives how many have left.
fn send_some(stream: &wire::Duplex, mut bytes: &[u8]) -> std::io::Result<Option<usize>> {
    stream.send(|room| {
        let count = room.len().min(bytes.len());
        room[..count].copy_from_slice(&bytes[..count]);
        bytes = &bytes[count..];
        count
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_duplex_stream_that_is_full_goes_on_where_it_was_and_keeps_what_is_not_taken() {
    let (near, far, server, _) = blocks().await;
    let sent: Vec<u8> = (0..32_000_000_u32).map(|i| i.to_le_bytes()[1] ^ i.to_le_bytes()[2]).collect();
    let (expected, mut at) = (sent.clone(), 0);
    // Nobody receives: at some time the socket takes no more.
    while let Some(count) = send_some(&near, &sent[at..]).expect("sent") {
        assert!(count > 0 && at < sent.len(), "32 MB do not fit a socket");
        at += count;
    }
    let sending = std::thread::spawn(move || {
        while at < sent.len() {
            match send_some(&near, &sent[at..]).expect("sent") {
                Some(count) => at += count,
                None => {
                    let mut room = [rustix::event::PollFd::new(&*near, rustix::event::PollFlags::OUT)];
                    rustix::event::poll(&mut room, None).expect("polled");
                }
            }
        }
        near.end();
    });
    let mut found: Vec<u8> = Vec::with_capacity(expected.len());
    loop {
        // Odd numbers of bytes: most pieces are taken in part.
        let mut room = 70_001;
        let received = far.receive(true, |piece| {
            let count = piece.len().min(room);
            found.extend_from_slice(&piece[..count]);
            room -= count;
            count
        });
        match received.expect("received").expect("it waits") {
            0 => break,
            count => assert!(count <= 70_001, "not more than it takes"),
        }
    }
    assert!(found == expected, "bytes differ");
    sending.join().expect("no panic");
    server.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_on_a_duplex_stream_returns_when_it_is_ended_also_on_a_node_that_is_cut_off() {
    let (near, far, server, partition) = blocks().await;
    let waiting = Arc::clone(&far);
    let waiting = std::thread::spawn(move || waiting.receive(true, <[u8]>::len));
    far.end();
    assert_eq!(waiting.join().expect("no panic").expect("the end"), Some(0));
    partition.set(true);
    let (sender, receiver) = (Arc::clone(&near), Arc::clone(&near));
    let sender = std::thread::spawn(move || send_some(&sender, b"never arrives"));
    let receiver = std::thread::spawn(move || receiver.receive(true, <[u8]>::len));
    near.end();
    assert!(sender.join().expect("no panic").is_err());
    assert!(matches!(receiver.join().expect("no panic"), Ok(Some(0)) | Err(_)));
    server.shutdown().await;
}
