//! What a disk costs in flushes and writes. Counts do not depend on the machine, so they are the bar.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use blockio::{BlockDevice, Geometry, ImageFile, IoError, IoOp, IoRequest, MemoryDevice};
use common::{MIB, read_only};
use vhdx::{Builder, ChildSpec, Disk, ParentResolver, Spec};

/// Counts what reaches the file.
struct Counter {
    inner: MemoryDevice,
    flushes: AtomicUsize,
    writes: AtomicUsize,
    resizes: AtomicUsize,
}

impl Counter {
    fn counts(&self) -> (usize, usize) {
        (self.flushes.load(Ordering::SeqCst), self.writes.load(Ordering::SeqCst))
    }

    fn changes(&self) -> usize {
        self.counts().0 + self.counts().1 + self.resizes.load(Ordering::SeqCst)
    }
}

impl BlockDevice for Counter {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn submit(&self, request: IoRequest) {
        match &request.op {
            IoOp::Flush => drop(self.flushes.fetch_add(1, Ordering::SeqCst)),
            IoOp::Read { .. } => (),
            _ => drop(self.writes.fetch_add(1, Ordering::SeqCst)),
        }
        self.inner.submit(request);
    }
}

impl ImageFile for Counter {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.resizes.fetch_add(1, Ordering::SeqCst);
        self.inner.set_len(size_bytes)
    }

    fn identity(&self) -> String {
        self.inner.identity()
    }
}

fn image(spec: &Spec) -> Arc<Counter> {
    let inner = MemoryDevice::new(0);
    vhdx::create(&inner, spec).expect("it is created");
    let zero = || AtomicUsize::new(0);
    Arc::new(Counter { inner, flushes: zero(), writes: zero(), resizes: zero() })
}

fn open(file: &Arc<Counter>) -> Disk {
    Builder::open(Arc::clone(file) as Arc<dyn ImageFile>).writable().expect("it opens for writing")
}

/// Flushes and writes of the file during `action`.
fn cost(file: &Counter, action: impl FnOnce()) -> (usize, usize) {
    let before = file.counts();
    action();
    let after = file.counts();
    (after.0 - before.0, after.1 - before.1)
}

fn spec() -> Spec {
    Spec { block_bytes: MIB, ..Spec::dynamic(1024 * MIB) }
}

#[test]
fn a_disk_that_is_never_written_changes_nothing() {
    let file = image(&spec());
    let disk = open(&file);
    disk.flush().expect("it flushes");
    disk.run(IoOp::Discard { offset: 0, len: 64 * MIB }).expect("nothing is there");
    disk.run(IoOp::WriteZeroes { offset: 512, len: 5 * MIB, may_unmap: false }).expect("all is zero");
    disk.close().expect("it closes");
    assert_eq!(file.changes(), 0);
}

#[test]
fn an_allocation_costs_no_flush_and_a_guest_flush_costs_one() {
    let file = image(&spec());
    let disk = open(&file);
    let first = cost(&file, || disk.write_at(0, &[1; 4096]).expect("it is writable"));
    // Two headers, the empty first entry of the log, the payload.
    assert_eq!(first, (2, 4), "the first write of a session");
    let many = cost(&file, || {
        for block in 1..20 {
            disk.write_at(block * MIB, &[1; 4096]).expect("it is writable");
        }
    });
    assert_eq!(many, (0, 19), "allocations cost their payload only");
    // The header that is one update behind, and one log entry.
    assert_eq!(cost(&file, || disk.flush().expect("it flushes")), (1, 2), "20 allocations");
    disk.write_at(21 * MIB, &[1; 4096]).expect("it is writable");
    assert_eq!(cost(&file, || disk.flush().expect("it flushes")), (1, 1), "one allocation");
    disk.write_at(0, &[2; 4096]).expect("it is writable");
    assert_eq!(cost(&file, || disk.flush().expect("it flushes")), (1, 0), "payload only");
    assert_eq!(cost(&file, || disk.flush().expect("it flushes")), (0, 0), "nothing since the last");
    // BAT page, two headers.
    assert_eq!(cost(&file, || assert!(disk.close().is_ok())), (3, 3), "close");
    assert_eq!(read_only(&(file as Arc<dyn ImageFile>)).data_from(0), Some(0..MIB));
}

#[test]
fn a_thousand_allocations_with_a_flush_each_cost_a_thousand_flushes_and_the_ends_of_generations() {
    let file = image(&spec());
    let disk = open(&file);
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.flush().expect("it flushes");
    let (flushes, writes) = cost(&file, || {
        for block in 1..1001 {
            disk.write_at(block * MIB, &[1; 512]).expect("it is writable");
            disk.flush().expect("it flushes");
        }
    });
    // 63 entries of 8 KiB per half-ring of 512 KiB. Growth goes with a flush that happens anyway.
    let generations = 1000 / 63;
    assert_eq!(flushes, 1000 + 2 * generations);
    // Payload and entry each time; then pages in place, the empty entry, and two headers, of which one comes later.
    assert!((2000..=2000 + 6 * generations).contains(&writes), "{writes} writes");
    disk.close().expect("it closes");
}

#[test]
fn forced_writes_to_durable_blocks_cost_no_flush() {
    let file = image(&spec());
    let disk = open(&file);
    let fua = |offset, value| {
        let buf = blockio::IoBuf::zeroed(4096);
        buf.copy_from(&[value; 4096]);
        disk.run(IoOp::Write { offset, buf, fua: true }).expect("it is writable");
    };
    fua(0, 1);
    assert_eq!(cost(&file, || fua(0, 2)), (0, 1), "its mapping is durable");
    assert_eq!(cost(&file, || fua(MIB, 3)).0, 1, "a new block needs the log");
}

// One page of the BAT maps 512 blocks, so these writes touch 130 pages: more than one entry, and more than half the ring.
#[test]
fn blocks_in_more_pages_than_an_entry_holds_cost_one_flush_per_entry_and_survive() {
    let file = image(&Spec { block_bytes: MIB, ..Spec::dynamic(130 * 512 * MIB) });
    let disk = open(&file);
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.flush().expect("it flushes");
    for page in 0..130 {
        disk.write_at(page * 512 * MIB, &[2; 512]).expect("it is writable");
    }
    // Two entries, and the end of a generation between them.
    assert!(cost(&file, || disk.flush().expect("it flushes")).0 <= 2 + 2 * 2);
    // Killed: only the log has what was acknowledged.
    drop(disk);
    let image = read_only(&(file as Arc<dyn ImageFile>));
    for page in 0..130 {
        assert!(common::bytes_at(&image, page * 512 * MIB, 512) == [2; 512], "block {} is lost", page * 512);
    }
}

#[test]
fn what_a_guest_gives_up_costs_nothing_before_its_flush() {
    let file = image(&spec());
    let disk = open(&file);
    disk.write_at(0, &vec![1; 16 << 20]).expect("it is writable");
    disk.flush().expect("it flushes");
    let given_up = cost(&file, || {
        disk.run(IoOp::Discard { offset: 0, len: 4 * MIB }).expect("it discards");
        let op = IoOp::WriteZeroes { offset: 8 * MIB, len: 4 * MIB, may_unmap: true };
        disk.run(op).expect("it zeroes");
    });
    assert_eq!(given_up, (0, 0));
    assert_eq!(cost(&file, || disk.flush().expect("it flushes")), (1, 1), "eight blocks in one entry");
    disk.close().expect("it closes");
}

// The one exception to a flush per flush: where the parent showed before, bytes are durable before the log counts them.
#[test]
fn a_flush_of_a_child_costs_a_second_one_only_where_its_parent_showed() {
    let parent: Arc<dyn ImageFile> = Arc::new(MemoryDevice::new(0));
    vhdx::create(&parent, &spec()).expect("it is created");
    let files = BTreeMap::from([("/vms/parent".to_owned(), Arc::clone(&parent))]);
    let resolver = || ParentResolver::new(Arc::new(files.clone())).root("/vms");
    let inner = MemoryDevice::new(0);
    let paths = resolver().paths("/vms/child", "/vms/parent").expect("both are paths");
    let child = ChildSpec { block_bytes: MIB, ..ChildSpec::new(paths) };
    vhdx::create_child(&inner, &read_only(&parent), &child).expect("it is created");
    let zero = || AtomicUsize::new(0);
    let file = Arc::new(Counter { inner, flushes: zero(), writes: zero(), resizes: zero() });
    let open = Builder::open(Arc::clone(&file) as Arc<dyn ImageFile>).parents(resolver(), "/vms/child");
    let disk = open.writable().expect("it opens for writing");
    let write = |offset, len| disk.write_at(offset, &vec![1; len]).expect("it is writable");
    let flush = || cost(&file, || disk.flush().expect("it flushes"));
    write(0, 512);
    // The header that is one update behind, and one entry: a page of the bitmap and two of the table.
    assert_eq!(flush(), (2, 2), "the first sector of a block");
    write(512, 4096);
    assert_eq!(flush(), (2, 1), "more sectors of it");
    write(0, 512);
    assert_eq!(flush(), (1, 0), "sectors that are here already");
    assert_eq!(cost(&file, || write(MIB, 1 << 20)), (0, 1), "a whole block costs its payload");
    assert_eq!(flush(), (2, 1), "a whole block");
    disk.run(IoOp::WriteZeroes { offset: 2 * MIB, len: MIB, may_unmap: true }).expect("it zeroes");
    assert_eq!(flush(), (1, 1), "a block that hides its parent without bytes");
    write(2 * MIB, 512);
    assert_eq!(flush(), (1, 1), "a block that read as zeros");
    for block in 4..24 {
        write(block * MIB, 512);
    }
    assert_eq!(flush(), (2, 1), "twenty blocks at once");
    assert_eq!(flush(), (0, 0), "nothing since the last");
    disk.close().expect("it closes");
}

#[test]
fn a_replay_costs_four_flushes() {
    let file = image(&spec());
    let disk = open(&file);
    disk.write_at(0, &[1; 4096]).expect("it is writable");
    disk.flush().expect("it flushes");
    drop(disk);
    // File write id; the page in place; no log, in one header and in the other.
    let mut disk = None;
    assert_eq!(cost(&file, || disk = Some(open(&file))), (4, 4));
    assert_eq!(
        cost(&file, || assert!(disk.expect("it is open").close().is_ok())),
        (0, 0),
        "nothing was written"
    );
}
