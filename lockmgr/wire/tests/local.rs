//! Unix sockets: the asynchronous server with the blocking client, and the blocking server with both clients.

mod support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use support::{ECHO, Echo, HELD, Pki};
use uuid::Uuid;
use wire::{
    BlockingCallbacks, BlockingConnection, BlockingServer, Local, Refusal, RefusalCode, RefuseAll, Server,
    Via, WireError,
};

fn unnamed() -> Local {
    Local { cluster: Uuid::nil(), node: 2, name: "hv test".to_owned() }
}

fn no_callbacks() -> BlockingCallbacks {
    BlockingCallbacks { pushed: Box::new(|_, _| {}), closed: Box::new(|_| {}) }
}

struct AsyncServer {
    runtime: tokio::runtime::Runtime,
    server: Server,
    echo: Arc<Echo>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

fn async_server() -> AsyncServer {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("node.sock");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let (echo, received) = Echo::new();
    // The receivers must outlive the server.
    std::mem::forget(received);
    let server = runtime.block_on(async {
        let listener = tokio::net::UnixListener::bind(&path).expect("bind");
        Server::serve_unix(listener, Pki::new().local(2), Arc::clone(&echo) as Arc<dyn wire::Handler>)
    });
    AsyncServer { runtime, server, echo, path, _folder: folder }
}

#[test]
fn a_blocking_client_calls_and_gets_pushes_and_learns_the_end() {
    let served = async_server();
    let (pushes, pushed) = channel();
    let (ends, ended) = channel();
    let callbacks = BlockingCallbacks {
        pushed: Box::new(move |service, body| pushes.send((service, body)).expect("test listens")),
        closed: Box::new(move |error| ends.send(error).expect("test listens")),
    };
    let client = BlockingConnection::connect(&served.path, &unnamed(), callbacks).expect("connects");
    assert!(matches!(client.peer().via, Via::Unix { .. }));
    assert_eq!(client.call(ECHO, Bytes::from_static(b"hello")).expect("reply"), Bytes::from_static(b"hello"));
    let refused = client.call(9999, Bytes::new()).expect_err("unknown service");
    assert!(matches!(&refused, WireError::Refused(refusal) if refusal.code == RefusalCode::Unsupported));

    let connection = served.echo.connections.lock().expect("lock")[0].clone();
    connection.push(11, Bytes::from_static(b"recall")).expect("queued");
    assert_eq!(pushed.recv().expect("push"), (11, Bytes::from_static(b"recall")));

    let (replies, replied) = channel();
    client.send(HELD, Bytes::new(), Box::new(move |outcome| replies.send(outcome).expect("test listens")));
    while served.echo.held.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    connection.close();
    assert!(matches!(replied.recv().expect("answer"), Err(WireError::Closed { .. })));
    assert!(matches!(ended.recv().expect("end"), WireError::Closed { .. }));
    assert!(client.call(ECHO, Bytes::new()).is_err(), "a closed connection fails at once");
    drop(connection);
    served.echo.gate.add_permits(1);
    served.runtime.block_on(served.server.shutdown());
}

#[test]
fn many_blocking_calls_run_at_once() {
    let served = async_server();
    let client = BlockingConnection::connect(&served.path, &unnamed(), no_callbacks()).expect("connects");
    let (replies, replied) = channel();
    for i in 0..2000u32 {
        let replies = replies.clone();
        let done = move |outcome: Result<Bytes, WireError>| replies.send((i, outcome)).expect("test listens");
        client.send(ECHO, Bytes::copy_from_slice(&i.to_le_bytes()), Box::new(done));
    }
    for _ in 0..2000 {
        let (i, outcome) = replied.recv().expect("answer");
        assert_eq!(outcome.expect("reply")[..], i.to_le_bytes());
    }
    drop(client);
    served.runtime.block_on(served.server.shutdown());
}

#[test]
fn dropping_a_blocking_client_fails_its_calls() {
    let served = async_server();
    let client = BlockingConnection::connect(&served.path, &unnamed(), no_callbacks()).expect("connects");
    let (replies, replied) = channel();
    client.send(HELD, Bytes::new(), Box::new(move |outcome| replies.send(outcome).expect("test listens")));
    drop(client);
    assert!(matches!(replied.recv().expect("answer"), Err(WireError::Closed { .. })));
    served.echo.gate.add_permits(1);
    served.runtime.block_on(served.server.shutdown());
}

#[test]
fn a_local_peer_that_sends_garbage_is_cut_off_and_others_are_served() {
    let served = async_server();
    for garbage in [&b"\xff\xff\xff\xff too long"[..], b"\x03\0\0\0abc", b"\x0c\0\0\0aaaaaaaaaaaa"] {
        let mut stream = UnixStream::connect(&served.path).expect("connects");
        stream.write_all(garbage).expect("sent");
        let mut answer = Vec::new();
        stream.shutdown(std::net::Shutdown::Write).expect("half closed");
        stream.read_to_end(&mut answer).expect("closed in order");
    }
    let client = BlockingConnection::connect(&served.path, &unnamed(), no_callbacks()).expect("connects");
    assert!(client.call(ECHO, Bytes::new()).is_ok());
    drop(client);
    served.runtime.block_on(served.server.shutdown());
}

fn blocking_server(folder: &tempfile::TempDir) -> (BlockingServer, PathBuf, Arc<AtomicUsize>) {
    let path = folder.path().join("control.sock");
    let listener = UnixListener::bind(&path).expect("bind");
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let handler = move |_: &wire::Peer, service: u16, body: Bytes| {
        counted.fetch_add(1, Ordering::SeqCst);
        if service == ECHO { Ok(body) } else { Err(Refusal::unsupported(service)) }
    };
    (BlockingServer::serve(listener, unnamed(), Box::new(handler)).expect("serves"), path, calls)
}

#[test]
fn a_blocking_server_serves_both_kinds_of_client_and_ends_when_dropped() {
    let folder = tempfile::tempdir().expect("folder");
    let (server, path, calls) = blocking_server(&folder);
    let ended = Arc::new(Mutex::new(None));
    let end = Arc::clone(&ended);
    let callbacks = BlockingCallbacks {
        pushed: Box::new(|_, _| {}),
        closed: Box::new(move |error| *end.lock().expect("lock") = Some(error)),
    };
    let client = BlockingConnection::connect(&path, &unnamed(), callbacks).expect("connects");
    assert_eq!(client.call(ECHO, Bytes::from_static(b"1")).expect("reply"), Bytes::from_static(b"1"));
    assert!(matches!(client.call(1, Bytes::new()), Err(WireError::Refused(_))));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let connection = wire::connect_unix(&path, &unnamed(), Arc::new(RefuseAll)).await.expect("connects");
        assert_eq!(
            connection.call(ECHO, Bytes::from_static(b"2")).await.expect("reply"),
            Bytes::from_static(b"2")
        );
        connection.close();
        connection.closed().await;
    });
    drop(server);
    drop(client);
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    assert!(ended.lock().expect("lock").is_some());
}

#[test]
fn a_reply_in_progress_is_sent_before_a_blocking_server_ends() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("control.sock");
    let (started, starts) = channel();
    let (go_on, goes_on) = channel::<()>();
    let goes_on = Mutex::new(goes_on);
    let handler = move |_: &wire::Peer, _: u16, body: Bytes| {
        started.send(()).expect("test listens");
        goes_on.lock().expect("lock").recv().expect("test lets it");
        Ok(body)
    };
    let listener = UnixListener::bind(&path).expect("bind");
    let server = BlockingServer::serve(listener, unnamed(), Box::new(handler)).expect("serves");
    let client = BlockingConnection::connect(&path, &unnamed(), no_callbacks()).expect("connects");
    let call = std::thread::spawn(move || client.call(ECHO, Bytes::from_static(b"stop")));
    starts.recv().expect("started");
    let ending = std::thread::spawn(move || drop(server));
    go_on.send(()).expect("handler waits");
    assert_eq!(call.join().expect("caller").expect("reply"), Bytes::from_static(b"stop"));
    ending.join().expect("ended");
}
