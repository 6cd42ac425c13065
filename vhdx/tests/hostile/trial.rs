//! What every image goes through, and what must hold.
#![expect(clippy::disallowed_methods, reason = "the bound on time is what is tested")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use blockio::{BlockDevice, Geometry, ImageFile, IoError, IoOp, IoRequest, MemoryDevice, Recorder};
use vhdx::Builder;

use crate::common::{MIB, Random, bytes_at};
use crate::slow::Slow;

/// Far more than any of these images takes on a busy machine; an endless loop takes longer.
const TIME_MAX: Duration = Duration::from_secs(20);
/// Passes over the file that opening and checking may read.
const READ_PASSES_MAX: u64 = 8;

/// Counts what is read and passes writes on to be counted by the recorder below.
struct Meter {
    inner: Arc<Recorder<MemoryDevice>>,
    read_bytes: AtomicU64,
}

impl BlockDevice for Meter {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        if let IoOp::Read { buf, .. } = &request.op {
            self.read_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        }
        self.inner.submit(request);
    }
}

impl ImageFile for Meter {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.inner.set_len(size_bytes)
    }

    fn identity(&self) -> String {
        self.inner.identity()
    }
}

/// Tries an image. Whether it was accepted.
pub(crate) fn try_image(image: &MemoryDevice, why: &str) -> bool {
    let start = Instant::now();
    let accepted = read(image, why);
    write(image, why);
    let took = start.elapsed();
    assert!(took < TIME_MAX, "{why}: it took {took:?}");
    accepted
}

fn read(image: &MemoryDevice, why: &str) -> bool {
    let recorder = Arc::new(Recorder::new(image.fork()));
    let meter = Arc::new(Meter { inner: Arc::clone(&recorder), read_bytes: AtomicU64::new(0) });
    let file: Arc<dyn ImageFile> = Arc::clone(&meter) as Arc<dyn ImageFile>;
    let opened = Builder::open(Arc::clone(&file)).read_only();
    let report = vhdx::check(&file);
    drop(vhdx::info(&file));
    drop(Builder::open(Arc::clone(&file)).inactive());
    let (read, size) = (meter.read_bytes.load(Ordering::Relaxed), image.geometry().size_bytes);
    assert!(read <= READ_PASSES_MAX * size + MIB, "{why}: {read} bytes were read of a file of {size}");
    let accepted = opened.is_ok();
    if let Ok(opened) = opened {
        assert!(report.is_sound(), "{why}: it was opened, but {:?}", report.errors);
        let slow = Slow::open(&file).unwrap_or_else(|fault| panic!("{why}: the second reader: {fault}"));
        for at in places(opened.geometry(), why) {
            let len = usize::try_from(slow.sector_bytes).expect("a sector");
            let theirs = slow.read(at, slow.sector_bytes).unwrap_or_else(|fault| panic!("{why}: {fault}"));
            let ours = bytes_at(&opened, at, len);
            let differs = ours.iter().zip(&theirs).position(|(one, other)| one != other);
            let Some(place) = differs else { continue };
            let (ours, theirs) = (&ours[place..], &theirs[place..]);
            panic!(
                "{why}: at {at} + {place} we read {:x?}, the other reader {:x?}",
                &ours[..8.min(ours.len())],
                &theirs[..8.min(theirs.len())]
            );
        }
    }
    assert_eq!(recorder.position(), 0, "{why}: reading wrote");
    accepted
}

/// Some sectors of the disk: of each block at the start, the last, and a few at random.
fn places(geometry: Geometry, why: &str) -> Vec<u64> {
    let sector = u64::from(geometry.block_bytes);
    assert!(geometry.size_bytes.is_multiple_of(sector) && geometry.size_bytes > 0, "{why}: {geometry:?}");
    let mut random = Random(geometry.size_bytes | 1);
    let starts = (0..24).map(|block| block * MIB).filter(|at| *at < geometry.size_bytes);
    let any = (0..16).map(|_| random.below(geometry.size_bytes / sector) * sector);
    starts.chain(any).chain([geometry.size_bytes - sector]).collect()
}

/// Whatever lets itself be written takes what is written, and is sound afterwards.
fn write(image: &MemoryDevice, why: &str) {
    let file: Arc<dyn ImageFile> = Arc::new(image.fork());
    let Ok(disk) = Builder::open(Arc::clone(&file)).growth_bytes(MIB).repair(true).writable() else { return };
    let Geometry { size_bytes, block_bytes, .. } = disk.geometry();
    let sector = vec![0xA5; usize::try_from(block_bytes).expect("a sector")];
    let last = size_bytes - u64::from(block_bytes);
    let mut written = false;
    for at in [0, last] {
        // A block of 256 MiB need not fit into the memory that there is.
        written = disk.write_at(at, &sector).and_then(|()| disk.flush()).is_ok();
    }
    let closed = disk.close();
    drop(disk);
    if !written {
        return;
    }
    closed.unwrap_or_else(|error| panic!("{why}: it does not close: {error}"));
    let report = vhdx::check(&file);
    assert!(report.is_sound(), "{why}: writing left {:?}", report.errors);
    let image = Builder::open(file).read_only().unwrap_or_else(|error| panic!("{why}: {error}"));
    assert!(bytes_at(&image, last, sector.len()) == sector, "{why}: what was written is not there");
}
