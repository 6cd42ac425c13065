//! Opening an image costs what is used of it, not what it could hold. Bytes read and memory taken are counted, not timed.

mod common;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blockio::{BlockDevice, Geometry, ImageFile, IoError, IoOp, IoRequest};
use common::{MIB, bytes_at, new_file};
use vhdx::{Builder, Spec, create};

/// Counts what is read.
struct Counted {
    inner: Arc<dyn ImageFile>,
    read: AtomicU64,
}

impl BlockDevice for Counted {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        if let IoOp::Read { buf, .. } = &request.op {
            self.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
        }
        self.inner.submit(request);
    }
}

impl ImageFile for Counted {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.inner.set_len(size_bytes)
    }

    fn identity(&self) -> String {
        self.inner.identity()
    }

    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        self.inner.data_from(from)
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a Linux system");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it is always there");
    let kib: u64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    kib << 10
}

#[test]
fn opening_64_tib_reads_and_keeps_little_whatever_the_block_size() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for block_bytes in [MIB, 32 * MIB] {
        let path = folder.path().join(block_bytes.to_string());
        let spec = Spec { block_bytes, ..Spec::dynamic(64 << 40) };
        create(&new_file(&path), &spec).expect("it is created");
        let file = Arc::new(Counted { inner: common::image_file(&path), read: AtomicU64::new(0) });
        let open = || Builder::open(Arc::clone(&file) as Arc<dyn ImageFile>);
        let before = resident_bytes();

        let disk = open().writable().expect("it opens");
        // At both ends, and in the middle.
        for offset in [0, 31 << 40, (64 << 40) - 4096] {
            disk.write_at(offset, &[7; 4096]).expect("it is writable");
        }
        disk.close().expect("it closes");
        drop(disk);
        let image = open().read_only().expect("it opens");
        assert_eq!(bytes_at(&image, 31 << 40, 8192), [[7; 4096], [0; 4096]].concat());
        assert!(
            resident_bytes().saturating_sub(before) < 80 << 20,
            "{block_bytes}: {} bytes",
            resident_bytes()
        );
        // Three pages of the table are in use. The rest are the other structures, of three opens and a few looks.
        let read = file.read.load(Ordering::SeqCst);
        assert!(read < 4 << 20, "{block_bytes}: {read} bytes were read");
    }
}
