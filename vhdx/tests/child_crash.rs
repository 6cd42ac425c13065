//! A power cut at any moment leaves a child in which each sector is what was flushed last, or newer, or, if nothing was ever
//! flushed there, what the parent has; never the zeros or the leftovers of a block that came before its bytes.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, IoOp, MemoryDevice, Recorder, Unflushed};
use common::{MIB, Random, bytes_at};
use vhdx::{Builder, ChildSpec, Disk, ParentResolver, Spec, create, create_child};

const BLOCKS: u64 = 8;
const BLOCK: u64 = MIB;
/// Sectors of each block that the guest writes, and two that it never does.
const USED: [u64; 5] = [0, 1, 7, 1000, 2047];
const WATCHED: [u64; 2] = [3, 1500];

/// What the parent has in a sector.
fn inherited(sector: u64) -> u64 {
    // One block in four is not in the parent either.
    if sector / 2048 % 4 == 3 { 0 } else { 1 << 40 | sector }
}

fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(64)
}

fn parent() -> Arc<dyn ImageFile> {
    let file: Arc<dyn ImageFile> = Arc::new(MemoryDevice::new(0));
    create(&file, &Spec { block_bytes: 2 * MIB, ..Spec::dynamic(BLOCKS * BLOCK) }).expect("it is created");
    let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens");
    for block in (0..BLOCKS).filter(|block| block % 4 != 3) {
        let sectors = block * 2048..(block + 1) * 2048;
        let bytes: Vec<u8> = sectors.flat_map(|sector| stamped(inherited(sector))).collect();
        disk.write_at(block * BLOCK, &bytes).expect("it is writable");
    }
    disk.close().expect("it closes");
    drop(disk);
    file
}

fn resolver(parent: &Arc<dyn ImageFile>) -> ParentResolver {
    let files = BTreeMap::from([("/vms/parent".to_owned(), Arc::clone(parent))]);
    ParentResolver::new(Arc::new(files)).root("/vms")
}

fn open(file: &Arc<dyn ImageFile>, parent: &Arc<dyn ImageFile>) -> Builder {
    Builder::open(Arc::clone(file)).parents(resolver(parent), "/vms/child").growth_bytes(3 * MIB)
}

/// The guest writes one request at a time, so what it may find after a cut is simple.
struct Guest {
    parent: Arc<dyn ImageFile>,
    recorder: Arc<Recorder<MemoryDevice>>,
    /// Per sector: length of the record when it was written, and what.
    written: BTreeMap<u64, Vec<(usize, u64)>>,
    /// Length of the record when a flush was asked for, and when it was done.
    flushed: Vec<(usize, usize)>,
    stamp: u64,
}

impl Guest {
    fn new() -> Self {
        let parent = parent();
        let made = MemoryDevice::with_block_bytes(0, 1);
        let paths = resolver(&parent).paths("/vms/child", "/vms/parent").expect("both are paths");
        let spec = ChildSpec { block_bytes: BLOCK, ..ChildSpec::new(paths) };
        create_child(&made, &Builder::open(Arc::clone(&parent)).read_only().expect("it opens"), &spec)
            .expect("it is created");
        let base = made.fork();
        let recorder = Arc::new(Recorder::with_base(made, base));
        Self { parent, recorder, written: BTreeMap::new(), flushed: vec![], stamp: 0 }
    }

    fn disk(&self) -> Disk {
        let file = Arc::clone(&self.recorder) as Arc<dyn ImageFile>;
        open(&file, &self.parent).writable().expect("it opens for writing")
    }

    fn note(&mut self, sector: u64, stamp: u64) {
        let from = self.recorder.position();
        self.written.entry(sector).or_default().push((from, stamp));
    }

    fn write(&mut self, disk: &Disk, sector: u64) {
        self.stamp += 1;
        self.note(sector, self.stamp);
        disk.write_at(sector * 512, &stamped(self.stamp)).expect("it is writable");
    }

    fn fill(&mut self, disk: &Disk, block: u64) {
        self.stamp += 1;
        for within in USED.into_iter().chain(WATCHED) {
            self.note(block * 2048 + within, self.stamp);
        }
        disk.write_at(block * BLOCK, &stamped(self.stamp).repeat(2048)).expect("it is writable");
    }

    fn zero(&mut self, disk: &Disk, block: u64, discard: bool) {
        for within in USED.into_iter().chain(WATCHED) {
            self.note(block * 2048 + within, 0);
        }
        let (offset, len) = (block * BLOCK, BLOCK);
        let zeroes = IoOp::WriteZeroes { offset, len, may_unmap: true };
        disk.run(if discard { IoOp::Discard { offset, len } } else { zeroes }).expect("it zeroes");
    }

    fn flush(&mut self, disk: &Disk) {
        let asked = self.recorder.position();
        disk.flush().expect("it flushes");
        self.flushed.push((asked, self.recorder.position()));
    }

    fn run(&mut self, disk: &Disk, random: &mut Random, rounds: u64) {
        for _ in 0..rounds {
            let block = random.below(BLOCKS);
            match random.below(12) {
                0 => self.zero(disk, block, true),
                1 => self.zero(disk, block, false),
                2 => self.fill(disk, block),
                _ => {
                    let within = USED[usize::try_from(random.below(5)).expect("small")];
                    self.write(disk, block * 2048 + within);
                }
            }
            if random.below(3) == 0 {
                self.flush(disk);
            }
        }
    }

    fn allowed(&self, sector: u64, prefix: usize) -> Vec<u64> {
        let promised = self.flushed.iter().rfind(|flush| flush.1 <= prefix).map_or(0, |flush| flush.0);
        let all = self.written.get(&sector).map_or(&[][..], Vec::as_slice);
        let covered = all.iter().rfind(|write| write.0 < promised).map_or(inherited(sector), |write| write.1);
        let later = all.iter().filter(|write| write.0 >= promised && write.0 <= prefix);
        later.map(|write| write.1).chain([covered]).collect()
    }

    fn judge(&self, prefix: usize, choice: Unflushed) {
        let file: Arc<dyn ImageFile> = Arc::new(self.recorder.replay_prefix(prefix, choice));
        let report = vhdx::check(&file);
        assert!(report.is_sound(), "prefix {prefix}, {choice:?}: {:?}", report.errors);
        let image = open(&file, &self.parent).read_only().expect("it opens");
        for sector in (0..BLOCKS)
            .flat_map(|block| USED.into_iter().chain(WATCHED).map(move |within| block * 2048 + within))
        {
            let bytes = bytes_at(&image, sector * 512, 512);
            let stamp = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
            let allowed = self.allowed(sector, prefix);
            assert!(
                bytes == stamped(stamp) && allowed.contains(&stamp),
                "prefix {prefix}, {choice:?}: sector {sector} holds {stamp:#x}, not {allowed:#x?}"
            );
        }
    }

    fn judge_all(&self) {
        for prefix in 0..=self.recorder.position() {
            let seed = prefix as u64;
            self.judge(prefix, Unflushed::None);
            for choice in [
                Unflushed::Torn { seed },
                Unflushed::Subset { seed },
                Unflushed::Subset { seed: seed + 7777 },
            ] {
                self.judge(prefix, choice);
            }
        }
    }
}

// Invariants C2, C3, C5: bits and states only after the bytes that they uncover, acknowledged after both.
#[test]
fn no_power_cut_shows_a_child_other_bytes_than_its_guests_or_its_parents() {
    let mut guest = Guest::new();
    let mut random = Random(0x5eed_0c01);
    let disk = guest.disk();
    guest.run(&disk, &mut random, 60);
    disk.close().expect("it closes");
    let done = guest.recorder.position();
    guest.flushed.push((done, done));
    drop(disk);
    let disk = guest.disk();
    guest.run(&disk, &mut random, 60);
    drop(disk);
    guest.judge_all();
}
