//! Clients and servers of other projects: QEMU, libnbd, nbdkit. Each test names the program that it needs; the test command
//! of the workspace installs them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use blockio::{
    BlockDevice, FileDevice, IoError, IoOp, NbdAddress, NbdDevice, NbdExport, NbdOptions, OpenOptions,
    open_uri,
};
use tempfile::TempDir;

use crate::support::{Served, pattern};

const SIZE: u64 = 8 << 20;

/// Runs a program that must succeed; gives what it printed.
fn must(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

fn image(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("image");
    drop(FileDevice::create(&path, SIZE).expect("an image"));
    path
}

fn serve_image(path: &Path, read_only: bool) -> Served {
    let device = Arc::new(FileDevice::open(path, OpenOptions::buffered()).expect("the image"));
    Served::new(NbdExport { allocation: Some(device.clone()), ..NbdExport::new(device, read_only) })
}

#[test]
fn qemu_writes_reads_zeroes_trims_and_maps_an_export() {
    let folder = TempDir::new().expect("a folder");
    let path = image(&folder);
    let served = serve_image(&path, false);
    let uri = served.uri();
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 1M 4k",
        "write -z 256k 64k",
        "discard 512k 64k",
        "flush",
        "read -P 0x11 0 256k",
        "read -P 0 256k 64k",
        "read -P 0x22 1M 4k",
    ];
    let mut arguments = vec!["-f", "raw", "--discard=unmap"];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(&uri);
    must("qemu-io", &arguments);
    let map = must("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"data\": true") && map.contains("\"data\": false"), "holes are told: {map}");
    drop(served);
    let bytes = std::fs::read(&path).expect("the image");
    assert!(
        bytes[..4096].iter().all(|byte| *byte == 0x11) && bytes[1 << 20] == 0x22 && bytes[256 << 10] == 0
    );
}

#[test]
fn qemu_img_copies_an_export_whole() {
    let folder = TempDir::new().expect("a folder");
    let path = image(&folder);
    std::fs::write(&path, pattern(usize::try_from(SIZE).expect("small"), 5)).expect("content");
    let served = serve_image(&path, true);
    let copy = folder.path().join("copy");
    must("qemu-img", &["convert", "-f", "raw", "-O", "raw", &served.uri(), copy.to_str().expect("UTF-8")]);
    assert!(std::fs::read(&copy).expect("the copy") == std::fs::read(&path).expect("the image"));
}

#[test]
fn nbdinfo_sees_what_the_export_can_do() {
    let folder = TempDir::new().expect("a folder");
    let served = serve_image(&image(&folder), false);
    let info = must("nbdinfo", &["--json", &served.uri()]);
    for wanted in [
        "\"export-size\": 8388608",
        "\"structured\": true",
        "\"can_fua\": true",
        "\"can_trim\": true",
        "\"can_zero\": true",
        "\"can_multi_conn\": true",
        "\"can_flush\": true",
        "base:allocation",
        "\"block_size_maximum\": 33554432",
        "\"is_read_only\": false",
    ] {
        assert!(info.contains(wanted), "{wanted} is missing in {info}");
    }
    let list = must("nbdinfo", &["--list", "--json", &served.uri()]);
    assert!(list.contains("\"export-name\": \"\""), "{list}");
    let map = must("nbdinfo", &["--map", &served.uri()]);
    assert!(map.contains("hole"), "{map}");
}

#[test]
fn nbdcopy_copies_over_several_connections_in_both_directions() {
    let folder = TempDir::new().expect("a folder");
    let (from, to) = (image(&folder), folder.path().join("to"));
    drop(FileDevice::create(&to, SIZE).expect("an image"));
    std::fs::write(&from, pattern(usize::try_from(SIZE).expect("small"), 9)).expect("content");
    let (source, target) = (serve_image(&from, true), serve_image(&to, false));
    must("nbdcopy", &["--connections=4", "--flush", &source.uri(), &target.uri()]);
    assert!(std::fs::read(&to).expect("the copy") == std::fs::read(&from).expect("the image"));
}

/// A server of another project; killed and waited for in the end.
struct Foreign {
    child: Child,
    folder: TempDir,
}

impl Foreign {
    /// Starts `program` and waits until its socket answers a client.
    fn start(program: &str, arguments: impl FnOnce(&str, &str) -> Vec<String>) -> (Self, NbdDevice) {
        let folder = TempDir::new().expect("a folder");
        let path = image(&folder);
        let socket = folder.path().join("socket");
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        let child = Command::new(program)
            .args(arguments(&text(&socket), &text(&path)))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program} cannot be started: {error}"));
        let mut foreign = Self { child, folder };
        let address = NbdAddress::unix(socket, "");
        loop {
            if let Ok(client) = NbdDevice::open(&address, NbdOptions::default()) {
                return (foreign, client);
            }
            if let Some(status) = foreign.child.try_wait().expect("a child") {
                let errors = foreign.child.stderr.take().map(|errors| BufReader::new(errors).lines());
                panic!("{program} ended with {status}: {:?}", errors.map(Iterator::collect::<Vec<_>>));
            }
            std::thread::yield_now();
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What any server of a writable image must do for our client.
fn exercise(client: &NbdDevice) {
    assert_eq!(client.geometry().size_bytes, SIZE);
    let wanted = pattern(5 << 20, 3);
    client.write_at(4096, &wanted).expect("write");
    client.run(IoOp::WriteZeroes { offset: 8192, len: 65536, may_unmap: true }).expect("zero");
    client.run(IoOp::Discard { offset: 6 << 20, len: 65536 }).expect("discard");
    client.flush().expect("flush");
    let mut found = vec![1; wanted.len()];
    client.read_at(4096, &mut found).expect("read");
    assert!(found[..4096] == wanted[..4096] && found[4096..4096 + 65536].iter().all(|byte| *byte == 0));
    assert!(found[69632..] == wanted[69632..]);
}

#[test]
fn our_client_works_with_qemu_nbd() {
    let (foreign, client) = Foreign::start("qemu-nbd", |socket, image| {
        ["-f", "raw", "-t", "-e", "4", "--discard=unmap", "-k", socket, image].map(str::to_owned).into()
    });
    exercise(&client);
    let uri = format!("nbd+unix:///?socket={}", foreign.folder.path().join("socket").display());
    open_uri(&uri, OpenOptions::default()).expect("by its URI").read_at(0, &mut [0; 512]).expect("read");
    let unknown = NbdAddress::unix(foreign.folder.path().join("socket"), "other");
    let error = NbdDevice::open(&unknown, NbdOptions::default()).expect_err("no such export").to_string();
    assert!(error.contains("no export named `other`"), "{error}");
}

#[test]
fn our_client_works_with_nbdkit_and_puts_reads_with_holes_together() {
    let (_foreign, client) = Foreign::start("nbdkit", |socket, image| {
        ["-f", "-U", socket, "file", image].map(str::to_owned).into()
    });
    exercise(&client);
}

#[test]
fn errors_that_nbdkit_injects_are_errors_of_their_requests_alone() {
    let (_foreign, client) = Foreign::start("nbdkit", |socket, image| {
        ["-f", "-U", socket, "--filter=error", "file", image, "error-pread=ENOSPC", "error-pread-rate=50%"]
            .map(str::to_owned)
            .into()
    });
    let outcomes: Vec<_> = (0..64).map(|_| client.read_at(0, &mut [0; 4096])).collect();
    let failed = outcomes.iter().filter(|outcome| matches!(outcome, Err(IoError::NoSpace { .. }))).count();
    assert!(
        outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(IoError::NoSpace { .. }))),
        "{outcomes:?}"
    );
    assert!(failed > 0 && failed < 64, "{failed} of 64 failed");
}
