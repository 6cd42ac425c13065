//! Malformed children: each is refused by name, or tolerated where the specification says so. One row, one damage.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use common::{MIB, bytes_at};
use vhdx::{Builder, ChildSpec, ErrorKind, ParentResolver, Spec, create, create_child};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const PARAMETERS: u64 = METADATA + (64 << 10);
/// Parameters, size, two sector sizes and the disk id take 40 bytes.
const LOCATOR: u64 = PARAMETERS + 40;
const BAT: u64 = 3 * MIB;
/// Entry of the sector bitmap: there are 4096 blocks of 1 MiB in a chunk.
const BITMAP_ENTRY: u64 = BAT + 4096 * 8;
const SIZE: u64 = 16 * MIB;

struct Patient {
    parent: Arc<MemoryDevice>,
    child: Arc<MemoryDevice>,
}

fn resolver(parent: &Arc<MemoryDevice>) -> ParentResolver {
    let file = Arc::clone(parent) as Arc<dyn ImageFile>;
    ParentResolver::new(Arc::new(BTreeMap::from([("/vms/parent".to_owned(), file)]))).root("/vms")
}

impl Patient {
    /// The parent holds sevens; the child has one sector of block 0 and all of block 1.
    fn new() -> Self {
        let parent = Arc::new(MemoryDevice::with_block_bytes(0, 1));
        create(&parent, &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) }).expect("it is created");
        let file = Arc::clone(&parent) as Arc<dyn ImageFile>;
        let disk = Builder::open(Arc::clone(&file)).writable().expect("it opens");
        disk.write_at(0, &vec![7; 3 << 20]).expect("it is writable");
        disk.close().expect("it closes");
        drop(disk);
        let child = Arc::new(MemoryDevice::with_block_bytes(0, 1));
        let paths = resolver(&parent).paths("/vms/child", "/vms/parent").expect("both are paths");
        let spec = ChildSpec { block_bytes: MIB, ..ChildSpec::new(paths) };
        create_child(&child, &Builder::open(file).read_only().expect("it opens"), &spec)
            .expect("it is created");
        let patient = Self { parent, child };
        let disk = patient.open().writable().expect("it opens");
        disk.write_at(512, &[8; 512]).expect("it is writable");
        disk.write_at(MIB, &vec![9; 1 << 20]).expect("it is writable");
        disk.close().expect("it closes");
        drop(disk);
        patient
    }

    fn open(&self) -> Builder {
        let file = Arc::clone(&self.child) as Arc<dyn ImageFile>;
        Builder::open(file).parents(resolver(&self.parent), "/vms/child")
    }

    fn put(&self, offset: u64, bytes: &[u8]) -> &Self {
        self.child.write_at(offset, bytes).expect("inside the image");
        self
    }

    fn entry(&self, at: u64) -> u64 {
        u64::from_le_bytes(bytes_at(&*self.child, at, 8).try_into().expect("8 bytes"))
    }

    fn set(&self, at: u64, entry: u64) {
        self.put(at, &entry.to_le_bytes());
    }

    /// A field of pair `number`: key offset 0, value offset 4, key length 8, value length 10.
    fn pair(&self, number: u64, field: u64, bytes: &[u8]) {
        self.put(LOCATOR + 20 + number * 12 + field, bytes);
    }

    /// Where the text of pair `number` lies: of its key, or of its value.
    fn text(&self, number: u64, value: bool) -> u64 {
        let at = LOCATOR + 20 + number * 12 + if value { 4 } else { 0 };
        LOCATOR + u64::from(u32::from_le_bytes(bytes_at(&*self.child, at, 4).try_into().expect("4 bytes")))
    }

    /// Changes the data write id of the parent.
    fn parent_id(&self, id: [u8; 16]) {
        for header in HEADERS {
            self.parent.write_at(header + 32, &id).expect("inside the image");
            self.parent.write_at(header + 4, &[0; 4]).expect("inside the image");
            let sum = crc32c::crc32c(&bytes_at(&*self.parent, header, 4096));
            self.parent.write_at(header + 4, &sum.to_le_bytes()).expect("inside the image");
        }
    }
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

type Row = (&'static str, Option<ErrorKind>, fn(&Patient));

use ErrorKind::{Corrupt, Limit, ParentMismatch, Unsupported};

const ROWS: &[Row] = &[
    ("untouched", None, |_| ()),
    ("a locator of another kind", Some(Unsupported), |p| {
        p.put(LOCATOR, &[9; 16]);
    }),
    ("more pairs than anyone needs", Some(Limit), |p| {
        p.put(LOCATOR + 18, &257_u16.to_le_bytes());
    }),
    ("more pairs than fit", Some(Corrupt), |p| {
        p.put(LOCATOR + 18, &200_u16.to_le_bytes());
    }),
    ("no pairs", Some(Corrupt), |p| {
        p.put(LOCATOR + 18, &[0; 2]);
    }),
    ("a key of odd length", Some(Corrupt), |p| p.pair(0, 8, &27_u16.to_le_bytes())),
    ("a value of odd length", Some(Corrupt), |p| p.pair(1, 10, &3_u16.to_le_bytes())),
    ("a key outside of the item", Some(Corrupt), |p| p.pair(0, 0, &0xffff_u32.to_le_bytes())),
    ("a value near 2^32", Some(Corrupt), |p| p.pair(0, 4, &u32::MAX.to_le_bytes())),
    ("a value inside of the header", Some(Corrupt), |p| p.pair(0, 4, &0_u32.to_le_bytes())),
    ("a NUL in a value", Some(Corrupt), |p| {
        p.put(p.text(1, true), &[0; 2]);
    }),
    ("half of a surrogate pair", Some(Corrupt), |p| {
        p.put(p.text(1, true), &[0x00, 0xd8]);
    }),
    ("a key twice", Some(Corrupt), |p| {
        let first = bytes_at(&*p.child, LOCATOR + 20, 12);
        p.put(LOCATOR + 32, &first);
    }),
    ("no linkage", Some(Corrupt), |p| {
        p.put(p.text(0, false), &utf16("q"));
    }),
    ("a linkage that is no GUID", Some(Corrupt), |p| {
        p.put(p.text(0, true), &utf16("?"));
    }),
    ("no path", Some(Corrupt), |p| {
        p.put(p.text(1, false), &utf16("q"));
    }),
    ("a linkage of zeros", Some(ParentMismatch), |p| {
        p.put(p.text(0, true), &utf16("{00000000-0000-0000-0000-000000000000}"));
    }),
    ("a linkage of zeros and a parent whose id is zero", Some(ParentMismatch), |p| {
        p.put(p.text(0, true), &utf16("{00000000-0000-0000-0000-000000000000}"));
        p.parent_id([0; 16]);
    }),
    ("a parent that was written since", Some(ParentMismatch), |p| p.parent_id([5; 16])),
    ("a locator in an image without a parent", None, |p| {
        p.put(PARAMETERS + 4, &[0; 4]).set(BAT, p.entry(BAT) & !7 | 6);
    }),
    ("partially present without a bitmap", Some(Corrupt), |p| p.set(BITMAP_ENTRY, 0)),
    ("a bitmap in the state of a zero block", Some(Corrupt), |p| p.set(BITMAP_ENTRY, 2)),
    ("a bitmap that is itself partial", Some(Corrupt), |p| p.set(BITMAP_ENTRY, p.entry(BITMAP_ENTRY) | 1)),
    ("a bitmap without a place", Some(Corrupt), |p| p.set(BITMAP_ENTRY, 6)),
    ("a bitmap past the end", Some(Corrupt), |p| p.set(BITMAP_ENTRY, (1 << 40) | 6)),
    ("a bitmap near 2^64", Some(Corrupt), |p| p.set(BITMAP_ENTRY, !0xf_ffff | 6)),
    ("a bitmap over the log", Some(Corrupt), |p| p.set(BITMAP_ENTRY, LOG | 6)),
    ("a bitmap over a block", Some(Corrupt), |p| p.set(BITMAP_ENTRY, p.entry(BAT + 8) & !7 | 6)),
    ("a partial block without a place", Some(Corrupt), |p| p.set(BAT, 7)),
    ("two partial blocks in one place", Some(Corrupt), |p| p.set(BAT + 16, p.entry(BAT))),
    ("a reserved state", Some(Corrupt), |p| p.set(BAT + 24, 4)),
    ("a state of an old draft", Some(Corrupt), |p| p.set(BAT + 24, 5)),
];

#[test]
fn every_malformed_child_is_refused_by_name_or_lawfully_tolerated() {
    for (name, wanted, damage) in ROWS {
        let patient = Patient::new();
        damage(&patient);
        let before = patient.child.to_bytes();
        let outcome = patient.open().read_only().map(|image| bytes_at(&image, 0, 1536));
        if let Some(kind) = wanted {
            let error = outcome.expect_err(name);
            assert_eq!(error.kind(), *kind, "{name}: {error}");
            assert!(error.to_string().len() > 40, "{name}: {error}");
            assert_eq!(patient.open().writable().expect_err(name).kind(), *kind, "{name} for writing");
        } else {
            let read = outcome.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(read[512..1024], [8; 512], "{name}");
            drop(patient.open().writable().unwrap_or_else(|error| panic!("{name}: {error}")));
        }
        assert!(patient.child.to_bytes() == before, "{name}: an open wrote to the file");
    }
}

#[test]
fn random_damage_to_a_child_never_panics() {
    let mut random = common::Random(0xdead_c41d);
    for _ in 0..200 {
        let patient = Patient::new();
        for _ in 0..=random.below(3) {
            let at = match random.below(4) {
                0 => METADATA + random.below(224),
                1 => LOCATOR + random.below(300),
                2 => BAT + random.below(64),
                _ => BITMAP_ENTRY + random.below(8),
            };
            let len = usize::try_from(random.below(8) + 1).expect("small");
            patient.put(at, &random.next().to_le_bytes()[..len]);
        }
        drop(vhdx::check(&(Arc::clone(&patient.child) as Arc<dyn ImageFile>)));
        if let Ok(image) = patient.open().read_only() {
            let len = usize::try_from(image.geometry().size_bytes.min(SIZE)).expect("small") / 4096 * 4096;
            drop(image.read_at(0, &mut vec![0; len]));
        }
        if let Ok(disk) = patient.open().writable() {
            drop(disk.write_at(0, &[1; 4096]));
        }
    }
}
