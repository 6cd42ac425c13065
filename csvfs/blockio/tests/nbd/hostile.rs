//! Peers that do not keep to the protocol: they are cut off, others are served, and nothing grows.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;

use blockio::{BlockDevice, IoError, MemoryDevice, NbdAddress, NbdDevice, NbdOptions};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::support::Served;

const SIZE: u64 = 1 << 20;
const IHAVEOPT: &[u8; 8] = b"IHAVEOPT";

fn option(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = IHAVEOPT.to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&flags.to_be_bytes());
    bytes.extend_from_slice(&command.to_be_bytes());
    bytes.extend_from_slice(&7_u64.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// A client that has come as far as the transmission phase, by the option of old clients.
fn old_client(served: &Served) -> UnixStream {
    let mut stream = UnixStream::connect(served.socket()).expect("connect");
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("a greeting");
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    stream.write_all(&3_u32.to_be_bytes()).expect("flags");
    stream.write_all(&option(1, 0, b"")).expect("EXPORT_NAME");
    let mut export = [0; 10];
    stream.read_exact(&mut export).expect("size and flags");
    assert_eq!(export[..8], SIZE.to_be_bytes());
    stream
}

fn is_cut_off(mut stream: UnixStream) -> bool {
    let mut rest = Vec::new();
    // A reset is an end too.
    stream.read_to_end(&mut rest).is_ok_and(|_| rest.len() < 4096) || rest.len() < 4096
}

#[test]
fn a_client_that_breaks_the_protocol_is_cut_off_and_others_are_served() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let good = served.open();
    let in_handshake: [&[u8]; 4] = [
        &[0xff; 4],
        &[&[0, 0, 0, 3][..], &[0; 16]].concat(),
        &[&[0, 0, 0, 3][..], b"GET / HTTP/1.1\r\n\r\n"].concat(),
        &[&[0, 0, 0, 3][..], &option(1, 3, &[0xff, 0xfe, 0xfd])].concat(),
    ];
    for bytes in in_handshake {
        let mut stream = UnixStream::connect(served.socket()).expect("connect");
        stream.write_all(bytes).expect("send");
        assert!(is_cut_off(stream), "{bytes:02x?}");
    }
    for bytes in [vec![0; 28], request(0, 1, 0, u32::MAX), request(0, 1, 0, (32 << 20) + 1)] {
        let mut stream = old_client(&served);
        stream.write_all(&bytes).expect("send");
        assert!(is_cut_off(stream), "{bytes:02x?}");
    }
    good.read_at(0, &mut [0; 512]).expect("the good client is served");
}

#[test]
fn an_option_that_is_too_long_is_refused_without_being_kept() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let mut stream = UnixStream::connect(served.socket()).expect("connect");
    stream.read_exact(&mut [0; 18]).expect("a greeting");
    stream.write_all(&[0, 0, 0, 3]).expect("flags");
    stream.write_all(&option(7, 1 << 20, &vec![0; 1 << 20])).expect("the server reads on");
    let mut head = [0; 20];
    stream.read_exact(&mut head).expect("an answer");
    assert_eq!(head[12..16], (1_u32 << 31 | 9).to_be_bytes(), "NBD_REP_ERR_TOO_BIG");
}

#[test]
fn requests_that_must_not_be_done_get_an_error_and_the_client_goes_on() {
    let device = Arc::new(MemoryDevice::new(SIZE));
    let served = Served::of(device.clone());
    let mut stream = old_client(&served);
    let cases = [
        (request(0, 0, SIZE, 512), libc::EINVAL),
        (request(0, 0, u64::MAX - 511, 512), libc::EINVAL),
        (request(0, 0, 1, 512), libc::EINVAL),
        (request(0, 0, 0, u32::MAX), libc::EINVAL),
        ([request(0, 1, SIZE, 512), vec![1; 512]].concat(), libc::ENOSPC),
        ([request(0, 1, 100, 512), vec![1; 512]].concat(), libc::EINVAL),
        (request(0, 6, SIZE - 512, 1024), libc::ENOSPC),
        (request(0x8000, 0, 0, 512), libc::EINVAL),
        (request(0, 5, 0, 512), libc::EINVAL),
        (request(0, 7, 0, 512), libc::EINVAL),
        (request(0, 99, 0, 0), libc::EINVAL),
        (request(0, 3, 0, 0), 0),
    ];
    for (bytes, errno) in cases {
        stream.write_all(&bytes).expect("send");
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).expect("a reply");
        assert_eq!(reply[4..8], errno.to_be_bytes(), "{bytes:02x?}");
    }
    assert!(device.to_bytes().iter().all(|byte| *byte == 0), "nothing was written");
}

#[test]
fn a_client_that_reads_no_replies_is_not_read_from_and_costs_bounded_memory() {
    let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
    let mut stream = old_client(&served);
    stream.set_nonblocking(true).expect("a flag");
    // 64 KiB each: far more than the server may hold for one client.
    let wanted = request(0, 0, 0, 64 << 10);
    let mut asked = 0;
    while asked < 1 << 20 {
        match stream.write(&wanted) {
            Ok(sent) if sent == wanted.len() => asked += 1,
            _ => break,
        }
    }
    assert!(asked < 100_000, "the server stops reading");
    served.open().read_at(0, &mut [0; 512]).expect("others are served");
}

/// A server that says what the test says, to one client.
fn fake_server(say: impl FnOnce(UnixStream) + Send + 'static) -> (TempDir, NbdAddress) {
    let folder = TempDir::new().expect("a folder for the test");
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).expect("listen");
    thread::spawn(move || {
        if let Ok((stream, _)) = listener.accept() {
            say(stream);
        }
    });
    (folder, NbdAddress::unix(path, ""))
}

const GREETING: &[u8; 18] = b"NBDMAGICIHAVEOPT\0\x03";

fn option_reply(number: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for field in [number, kind, u32::try_from(data.len()).expect("short")] {
        bytes.extend_from_slice(&field.to_be_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}

/// As far as the transmission phase of an export of `size` bytes.
fn handshake(size: u64) -> Vec<u8> {
    let mut info = vec![0, 0];
    info.extend_from_slice(&size.to_be_bytes());
    info.extend_from_slice(&[0x01, 0x6d]);
    [GREETING.to_vec(), option_reply(8, 1, b""), option_reply(7, 3, &info), option_reply(7, 1, b"")].concat()
}

#[test]
fn a_server_that_offers_nonsense_is_refused_with_the_reason() {
    let cases: [(Vec<u8>, &str); 6] = [
        (b"SSH-2.0-OpenSSH_9.2 and so on".to_vec(), "no NBD server"),
        (b"NBDMAGICIHAVEOPT\0\0".to_vec(), "too old"),
        ([GREETING.to_vec(), vec![0; 40]].concat(), "cannot be read"),
        (
            [GREETING.to_vec(), option_reply(8, 1 << 31 | 1, b""), option_reply(7, 1 << 31 | 6, b"no such")]
                .concat(),
            "no export",
        ),
        ([GREETING.to_vec(), option_reply(8, 1, b""), option_reply(7, 1, b"")].concat(), "size"),
        (handshake(u64::MAX), "bytes"),
    ];
    for (bytes, reason) in cases {
        let (_folder, address) = fake_server(move |mut stream| {
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let error = NbdDevice::open(&address, NbdOptions::default()).expect_err("nonsense").to_string();
        assert!(error.contains(reason), "{error}");
    }
}

#[test]
fn a_server_that_breaks_the_protocol_loses_its_client_which_loses_nothing() {
    let (_folder, address) = fake_server(|mut stream| {
        stream.write_all(&handshake(SIZE)).expect("send");
        let mut asked = vec![0; 4 + 16 + 16 + 4 + 2 + 2 + 28];
        stream.read_exact(&mut asked).expect("options and a request");
        // A reply to a request that nobody has made.
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend_from_slice(&[0; 12]);
        stream.write_all(&reply).expect("send");
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let client = NbdDevice::open(&address, NbdOptions::default()).expect("a good handshake");
    let error = client.read_at(0, &mut [0; 512]).expect_err("the request fails");
    assert!(matches!(&error, IoError::Lost { why, .. } if why.contains("protocol")), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_bytes_of_a_client_are_served_or_refused(
        steps in proptest::collection::vec((0_u16..10, any::<u16>(), 0_u64..SIZE * 2, 0_u32..70_000), 0..12),
        noise in proptest::collection::vec(any::<u8>(), 0..100),
        aligned: bool,
    ) {
        let served = Served::of(Arc::new(MemoryDevice::new(SIZE)));
        let mut stream = old_client(&served);
        let mut reading = stream.try_clone().expect("a second handle");
        let drain = thread::spawn(move || drop(std::io::copy(&mut reading, &mut std::io::sink())));
        for (command, flags, offset, length) in steps {
            let round = if aligned { 512 } else { 1 };
            let (offset, length) = (offset / u64::from(round) * u64::from(round), length / round * round);
            let mut bytes = request(if aligned { flags & 1 } else { flags }, command, offset, length);
            if command == 1 {
                bytes.resize(bytes.len() + length as usize, 0xaa);
            }
            if stream.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = stream.write_all(&noise);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        drain.join().expect("the server closes");
        served.open().read_at(0, &mut [0; 512]).expect("others are served");
    }
}
