//! Malformed images: each is refused by name, or tolerated where the specification says so. One row, one damage.

mod common;

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use common::{MIB, bytes_at};
use vhdx::{Builder, ErrorKind, Spec};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const ITEMS: u64 = METADATA + (64 << 10);
const BAT: u64 = 3 * MIB;
const BLOCK: u64 = MIB;

/// An image under a knife.
struct Patient(MemoryDevice);

impl Patient {
    /// Sixteen blocks; the first three lie at 4, 5 and 6 MiB.
    fn new() -> Self {
        let file = Arc::new(MemoryDevice::with_block_bytes(0, 1));
        vhdx::create(&file, &Spec { block_bytes: BLOCK, ..Spec::dynamic(16 * BLOCK) })
            .expect("it is created");
        let disk = Builder::open(Arc::clone(&file) as Arc<dyn ImageFile>).writable().expect("it opens");
        for block in 0..3 {
            disk.write_at(block * BLOCK, &[7; 4096]).expect("it is writable");
        }
        disk.close().expect("it closes");
        drop(disk);
        Self(file.fork())
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        self.0.write_at(offset, bytes).expect("inside the image");
    }

    /// Fixes the checksum of the structure at `offset`, four bytes behind its start.
    fn seal(&self, offset: u64, len: usize) {
        self.put(offset + 4, &[0; 4]);
        let sum = crc32c::crc32c(&bytes_at(&self.0, offset, len));
        self.put(offset + 4, &sum.to_le_bytes());
    }

    /// Changes both headers alike.
    fn header(&self, at: u64, bytes: &[u8]) -> &Self {
        for header in HEADERS {
            self.put(header + at, bytes);
            self.seal(header, 4096);
        }
        self
    }

    fn regions(&self, at: u64, bytes: &[u8]) -> &Self {
        for table in REGIONS {
            self.put(table + at, bytes);
            self.seal(table, 64 << 10);
        }
        self
    }

    fn bat(&self, block: u64, entry: u64) -> &Self {
        self.put(BAT + block * 8, &entry.to_le_bytes());
        self
    }

    fn metadata(&self, at: u64, bytes: &[u8]) -> &Self {
        self.put(METADATA + at, bytes);
        self
    }

    /// Entry of metadata item `number`: params, size, logical sector, physical sector, id.
    fn item(&self, number: u64, at: u64, bytes: &[u8]) -> &Self {
        self.metadata(32 + number * 32 + at, bytes)
    }
}

const LOG_ID: [u8; 16] = [0x5a; 16];

/// A log entry with one descriptor per target.
fn entry(sequence: u64, tail: u32, sizes: (u64, u64), targets: &[(&[u8; 4], u64, u64)]) -> Vec<u8> {
    let data = targets.iter().filter(|target| target.0 == b"desc").count();
    let mut entry = vec![0; 4096 * (1 + data)];
    let len = u32::try_from(entry.len()).expect("small");
    let count = u32::try_from(targets.len()).expect("small");
    entry[..4].copy_from_slice(b"loge");
    entry[8..12].copy_from_slice(&len.to_le_bytes());
    entry[12..16].copy_from_slice(&tail.to_le_bytes());
    entry[16..24].copy_from_slice(&sequence.to_le_bytes());
    entry[24..28].copy_from_slice(&count.to_le_bytes());
    entry[32..48].copy_from_slice(&LOG_ID);
    entry[48..56].copy_from_slice(&sizes.0.to_le_bytes());
    entry[56..64].copy_from_slice(&sizes.1.to_le_bytes());
    let mut sector = 4096;
    for (number, (signature, offset, zeros)) in targets.iter().enumerate() {
        let at = 64 + number * 32;
        entry[at..at + 4].copy_from_slice(*signature);
        entry[at + 8..at + 16].copy_from_slice(&zeros.to_le_bytes());
        entry[at + 16..at + 24].copy_from_slice(&offset.to_le_bytes());
        entry[at + 24..at + 32].copy_from_slice(&sequence.to_le_bytes());
        if *signature == b"desc" {
            entry[sector..sector + 4].copy_from_slice(b"data");
            entry[sector + 4..sector + 8]
                .copy_from_slice(&sequence.to_be_bytes()[..4].iter().rev().copied().collect::<Vec<_>>());
            entry[sector + 4092..sector + 4096].copy_from_slice(&sequence.to_le_bytes()[..4]);
            sector += 4096;
        }
    }
    let sum = crc32c::crc32c(&entry);
    entry[4..8].copy_from_slice(&sum.to_le_bytes());
    entry
}

impl Patient {
    fn log(&self, entries: &[Vec<u8>]) -> &Self {
        self.header(48, &LOG_ID);
        let mut at = LOG;
        for entry in entries {
            self.put(at, entry);
            at += entry.len() as u64;
        }
        self
    }
}

/// What must happen.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    /// Neither reading nor writing.
    Refused(ErrorKind),
    /// Reading, but no writing.
    ReadOnly(ErrorKind),
    /// Both.
    Works,
}

use ErrorKind::{Corrupt, Incomplete, Limit, LogUnrecoverable, NotVhdx, OrphanLogId, Truncated, Unsupported};
use Wanted::{ReadOnly, Refused, Works};

type Row = (&'static str, Wanted, fn(&Patient));

const SIZE: u64 = 7 * MIB;

const ROWS: &[Row] = &[
    ("untouched", Works, |_| ()),
    ("empty file", Refused(NotVhdx), |p| p.0.set_len(0).expect("it shrinks")),
    ("zeros", Refused(NotVhdx), |p| p.put(0, &[0; 4096])),
    ("a qcow2 image", Refused(NotVhdx), |p| p.put(0, b"QFI\xfb\0\0\0\x03")),
    ("cut inside the header area", Refused(Truncated), |p| p.0.set_len(512 << 10).expect("it shrinks")),
    ("cut before the BAT", Refused(Truncated), |p| p.0.set_len(3 * MIB).expect("it shrinks")),
    ("cut inside a block", Refused(Corrupt), |p| p.0.set_len(6 * MIB + 512).expect("it shrinks")),
    ("first header torn", Works, |p| p.put(HEADERS[0] + 100, b"x")),
    ("second header torn", Works, |p| p.put(HEADERS[1] + 100, b"x")),
    ("both headers torn", Refused(Corrupt), |p| HEADERS.iter().for_each(|at| p.put(at + 100, b"x"))),
    ("equal numbers, different headers", Refused(Corrupt), |p| {
        p.header(8, &9_u64.to_le_bytes());
        p.put(HEADERS[1] + 16, &[1; 16]);
        p.seal(HEADERS[1], 4096);
    }),
    ("equal numbers, identical headers", Works, |p| {
        p.header(8, &9_u64.to_le_bytes()).header(16, &[3; 32]);
    }),
    ("header number at its end", ReadOnly(Corrupt), |p| {
        p.header(8, &u64::MAX.to_le_bytes()).header(16, &[3; 32]);
    }),
    ("version 2", Refused(Unsupported), |p| {
        p.header(66, &[2, 0]);
    }),
    ("log version 1 without a log", Works, |p| {
        p.header(64, &[1, 0]);
    }),
    ("log version 1 with a log", Refused(Unsupported), |p| {
        p.header(64, &[1, 0]).header(48, &LOG_ID);
    }),
    ("log offset unaligned", Refused(Corrupt), |p| {
        p.header(72, &(MIB + 4096).to_le_bytes());
    }),
    ("log length unaligned", Refused(Corrupt), |p| {
        p.header(68, &((1_u32 << 20) + 4096).to_le_bytes());
    }),
    ("log shorter than 1 MiB", Refused(Corrupt), |p| {
        p.header(68, &4096_u32.to_le_bytes());
    }),
    ("log in the header area", Refused(Corrupt), |p| {
        p.header(72, &0_u64.to_le_bytes());
    }),
    ("log past the end", Refused(Corrupt), |p| {
        p.header(72, &(64 * MIB).to_le_bytes());
    }),
    ("log offset near 2^64", Refused(Corrupt), |p| {
        p.header(72, &(u64::MAX - MIB + 1).to_le_bytes());
    }),
    ("log over the BAT", Refused(Corrupt), |p| {
        p.header(72, &BAT.to_le_bytes());
    }),
    ("log over a block", Refused(Corrupt), |p| {
        p.header(72, &(4 * MIB).to_le_bytes());
    }),
    ("log longer than allowed", Refused(Limit), |p| {
        p.header(68, &(512_u32 << 20).to_le_bytes());
    }),
    ("no log, none needed", ReadOnly(Unsupported), |p| {
        p.header(68, &[0; 12]);
    }),
    ("no log, but an id", Refused(Corrupt), |p| {
        p.header(68, &[0; 4]).header(48, &LOG_ID);
    }),
    ("orphan log id", ReadOnly(OrphanLogId), |p| {
        p.header(48, &LOG_ID);
    }),
    ("an entry, but torn", Refused(LogUnrecoverable), |p| {
        let mut torn = entry(1, 0, (SIZE, SIZE), &[]);
        torn[100] = 1;
        p.log(&[torn]);
    }),
    ("an empty entry", Works, |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[])]);
    }),
    ("tail outside of the run", Refused(LogUnrecoverable), |p| {
        p.log(&[entry(1, 0x8000, (SIZE, SIZE), &[])]);
    }),
    ("entry of length 0", Refused(LogUnrecoverable), |p| {
        let mut bad = entry(1, 0, (SIZE, SIZE), &[]);
        bad[8..12].copy_from_slice(&[0; 4]);
        p.log(&[bad]);
    }),
    ("entry longer than the ring", Refused(LogUnrecoverable), |p| {
        let mut bad = entry(1, 0, (SIZE, SIZE), &[]);
        bad[8..12].copy_from_slice(&(2_u32 << 20).to_le_bytes());
        p.log(&[bad]);
    }),
    ("more descriptors than fit", Refused(LogUnrecoverable), |p| {
        let mut bad = entry(1, 0, (SIZE, SIZE), &[]);
        bad[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        p.log(&[bad]);
    }),
    ("a stale follower with an older number", Works, |p| {
        // Replayed, it would hide the first block.
        p.log(&[entry(9, 0, (SIZE, SIZE), &[]), entry(3, 0, (SIZE, SIZE), &[(b"zero", BAT, 4096)])]);
    }),
    ("log rewrites a header", Refused(Corrupt), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"zero", 64 << 10, 4096)])]);
    }),
    ("log rewrites itself", Refused(Corrupt), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"desc", LOG, 0)])]);
    }),
    ("log writes past the end", Refused(Corrupt), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"desc", SIZE, 0)])]);
    }),
    ("log target near 2^64", Refused(Corrupt), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"zero", u64::MAX - 4095, 8192)])]);
    }),
    ("log zeroes terabytes", Refused(Corrupt), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"zero", BAT, 1 << 44)])]);
    }),
    ("log names a longer durable file", Refused(Truncated), |p| {
        p.log(&[entry(1, 0, (SIZE + MIB, SIZE + MIB), &[])]);
    }),
    ("log promises an absurd file", Refused(Corrupt), |p| {
        p.log(&[entry(1, 0, (SIZE, 1 << 60), &[])]);
    }),
    ("first region table torn", Works, |p| p.put(REGIONS[0] + 20, b"x")),
    ("second region table torn", Works, |p| p.put(REGIONS[1] + 20, b"x")),
    ("both region tables torn", Refused(Corrupt), |p| REGIONS.iter().for_each(|at| p.put(at + 20, b"x"))),
    ("too many regions", Refused(Corrupt), |p| {
        p.regions(8, &2048_u32.to_le_bytes());
    }),
    ("no regions", Refused(Corrupt), |p| {
        p.regions(8, &0_u32.to_le_bytes());
    }),
    ("a region twice", Refused(Corrupt), |p| {
        let bat = bytes_at(&p.0, REGIONS[0] + 16, 32);
        p.regions(48, &bat);
    }),
    ("an unknown required region", Refused(Unsupported), |p| {
        p.regions(8, &3_u32.to_le_bytes()).regions(80, &[9; 16]).regions(96, &SIZE.to_le_bytes());
        p.regions(104, &(1_u32 << 20).to_le_bytes()).regions(108, &1_u32.to_le_bytes());
    }),
    ("an unknown optional region", Works, |p| {
        p.0.set_len(SIZE + MIB).expect("it grows");
        p.regions(8, &3_u32.to_le_bytes()).regions(80, &[9; 16]).regions(96, &SIZE.to_le_bytes());
        p.regions(104, &(1_u32 << 20).to_le_bytes());
    }),
    ("a block in an unknown optional region", Refused(Corrupt), |p| {
        p.regions(8, &3_u32.to_le_bytes()).regions(80, &[9; 16]).regions(96, &(5 * MIB).to_le_bytes());
        p.regions(104, &(1_u32 << 20).to_le_bytes());
    }),
    ("a region of length 0", Refused(Corrupt), |p| {
        p.regions(40, &[0; 4]);
    }),
    ("a region unaligned", Refused(Corrupt), |p| {
        p.regions(32, &(BAT + 512).to_le_bytes());
    }),
    ("a BAT of gigabytes", Refused(Truncated), |p| {
        p.regions(40, &0xfff0_0000_u32.to_le_bytes());
    }),
    ("a BAT past the end", Refused(Truncated), |p| {
        p.regions(32, &(1_u64 << 50).to_le_bytes());
    }),
    ("metadata over the BAT", Refused(Corrupt), |p| {
        p.regions(64, &BAT.to_le_bytes());
    }),
    ("a BAT too small for the disk", Refused(Corrupt), |p| {
        p.put(ITEMS + 8, &(1_u64 << 40).to_le_bytes());
    }),
    ("no metadata signature", Refused(Corrupt), |p| {
        p.metadata(0, b"m3tadata");
    }),
    ("too many items", Refused(Corrupt), |p| {
        p.metadata(10, &2048_u16.to_le_bytes());
    }),
    ("no size item", Refused(Corrupt), |p| {
        p.item(1, 0, &[9; 16]).item(1, 24, &[0; 4]);
    }),
    ("an item twice", Refused(Corrupt), |p| {
        let first = bytes_at(&p.0, METADATA + 32, 32);
        p.item(4, 0, &first);
    }),
    ("an item outside of the region", Refused(Corrupt), |p| {
        p.item(4, 16, &(1_u32 << 20).to_le_bytes());
    }),
    ("an item inside of the table", Refused(Corrupt), |p| {
        p.item(4, 16, &4096_u32.to_le_bytes());
    }),
    ("items that overlap", Refused(Corrupt), |p| {
        p.item(4, 16, &(64_u32 << 10).to_le_bytes());
    }),
    ("an item id of zero", Refused(Corrupt), |p| {
        p.item(4, 0, &[0; 16]);
    }),
    ("an item too long", Refused(Corrupt), |p| {
        p.item(1, 20, &9_u32.to_le_bytes());
    }),
    ("an item with odd flags", Works, |p| {
        p.item(1, 24, &4_u32.to_le_bytes());
    }),
    ("an unknown required item", Refused(Unsupported), |p| {
        p.metadata(10, &6_u16.to_le_bytes()).item(5, 0, &[9; 16]).item(5, 24, &4_u32.to_le_bytes());
    }),
    ("an unknown optional item", Works, |p| {
        p.metadata(10, &6_u16.to_le_bytes()).item(5, 0, &[9; 16]);
    }),
    ("the incomplete marker", Refused(Incomplete), |p| {
        let id = uuid::uuid!("71CC85F0-1B69-4E28-9558-C3BF83AE75D3").to_bytes_le();
        p.metadata(10, &6_u16.to_le_bytes()).item(5, 0, &id).item(5, 24, &4_u32.to_le_bytes());
    }),
    ("block size 0", Refused(Corrupt), |p| p.put(ITEMS, &0_u32.to_le_bytes())),
    ("block size no power of two", Refused(Corrupt), |p| p.put(ITEMS, &(3_u32 << 20).to_le_bytes())),
    ("block size 512 MiB", Refused(Corrupt), |p| p.put(ITEMS, &(512_u32 << 20).to_le_bytes())),
    ("reserved parameter bits", ReadOnly(Corrupt), |p| p.put(ITEMS + 4, &0x80_u32.to_le_bytes())),
    ("a parent without a locator", Refused(Corrupt), |p| p.put(ITEMS + 4, &2_u32.to_le_bytes())),
    ("disk size 0", Refused(Corrupt), |p| p.put(ITEMS + 8, &0_u64.to_le_bytes())),
    ("disk size no multiple of the sector", Refused(Corrupt), |p| p.put(ITEMS + 8, &(MIB + 1).to_le_bytes())),
    ("disk size over 64 TiB", Refused(Corrupt), |p| p.put(ITEMS + 8, &(65_u64 << 40).to_le_bytes())),
    ("logical sector 0", Refused(Corrupt), |p| p.put(ITEMS + 16, &0_u32.to_le_bytes())),
    ("physical sector 513", Refused(Corrupt), |p| p.put(ITEMS + 20, &513_u32.to_le_bytes())),
    ("two blocks in one place", Refused(Corrupt), |p| {
        p.bat(1, (4 * MIB) | 6);
    }),
    ("a block in the header area", Refused(Corrupt), |p| {
        p.bat(1, 6);
    }),
    ("a block over the log", Refused(Corrupt), |p| {
        p.bat(1, LOG | 6);
    }),
    ("a block over the metadata", Refused(Corrupt), |p| {
        p.bat(1, METADATA | 6);
    }),
    ("a block past the end", Refused(Corrupt), |p| {
        p.bat(1, SIZE | 6);
    }),
    ("a block near 2^64", Refused(Corrupt), |p| {
        p.bat(1, !0xf_ffff | 6);
    }),
    ("state 4", Refused(Corrupt), |p| {
        p.bat(8, 4);
    }),
    ("state 5", Refused(Corrupt), |p| {
        p.bat(8, 5);
    }),
    ("partially present without a parent", Refused(Corrupt), |p| {
        p.bat(1, (5 * MIB) | 7);
    }),
    ("an anchor in the place of another block", Refused(Corrupt), |p| {
        p.bat(8, (4 * MIB) | 3);
    }),
    ("reserved bits in a BAT entry", ReadOnly(Corrupt), |p| {
        p.bat(8, 0x10);
    }),
    ("reserved bits without a place", ReadOnly(Corrupt), |p| {
        p.bat(9, 0x8_0000);
    }),
    ("a user item that is required", Refused(Corrupt), |p| {
        p.metadata(10, &6_u16.to_le_bytes()).item(5, 0, &[9; 16]).item(5, 24, &5_u32.to_le_bytes());
    }),
    ("an empty item with a place", Refused(Corrupt), |p| {
        p.metadata(10, &6_u16.to_le_bytes()).item(5, 0, &[9; 16]).item(5, 16, &(65_u32 << 10).to_le_bytes());
    }),
    ("a user item by the id of a known one", Works, |p| {
        let size = bytes_at(&p.0, METADATA + 64, 16);
        p.metadata(10, &6_u16.to_le_bytes()).item(5, 0, &size).item(5, 24, &1_u32.to_le_bytes());
    }),
    ("a metadata region longer than anyone's", Refused(Limit), |p| {
        p.0.set_len(512 * MIB).expect("it grows");
        p.regions(64, &(16 * MIB).to_le_bytes()).regions(72, &(129_u32 << 20).to_le_bytes());
    }),
    ("sizes of the log entry unaligned", Refused(LogUnrecoverable), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE + 512), &[])]);
    }),
    ("an entry near the end of its numbers", Works, |p| {
        p.log(&[entry(u64::MAX, 0, (SIZE, SIZE), &[])]);
    }),
    ("an entry of number 0", Refused(LogUnrecoverable), |p| {
        p.log(&[entry(0, 0, (SIZE, SIZE), &[])]);
    }),
    ("a log target that is no page", Refused(LogUnrecoverable), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"zero", BAT + 512, 4096)])]);
    }),
    ("a zero length that is no page", Refused(LogUnrecoverable), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"zero", BAT, 512)])]);
    }),
    ("a descriptor of no known kind", Refused(LogUnrecoverable), |p| {
        p.log(&[entry(1, 0, (SIZE, SIZE), &[(b"what", BAT, 4096)])]);
    }),
    ("a region in the header area", Refused(Corrupt), |p| {
        p.regions(32, &0_u64.to_le_bytes());
    }),
    ("a region near 2^64", Refused(Corrupt), |p| {
        p.regions(32, &(u64::MAX - MIB + 1).to_le_bytes());
    }),
    ("a reserved field of the region table", ReadOnly(Corrupt), |p| {
        p.regions(12, &[1]);
    }),
    ("unknown flags of a region", ReadOnly(Corrupt), |p| {
        p.regions(44, &3_u32.to_le_bytes());
    }),
    ("a reserved field of the metadata table", ReadOnly(Corrupt), |p| {
        p.metadata(20, &[1]);
    }),
    ("unknown flags of an item", ReadOnly(Corrupt), |p| {
        p.item(1, 24, &0x16_u32.to_le_bytes());
    }),
    ("a reserved field of an item", ReadOnly(Corrupt), |p| {
        p.item(1, 28, &1_u32.to_le_bytes());
    }),
    ("an item longer than 1 MiB", Refused(Corrupt), |p| {
        p.item(4, 20, &((1_u32 << 20) + 1).to_le_bytes());
    }),
    ("geometry and labels as Microsoft's code knows them", Works, |p| {
        let ids = [
            uuid::uuid!("DA02D7BC-3D3A-423C-AC88-2A36AB21479B"),
            uuid::uuid!("10E1AE8A-4B7E-4169-A40F-CD70DE928393"),
        ];
        p.metadata(10, &7_u16.to_le_bytes());
        for (number, id) in (5..).zip(ids) {
            p.item(number, 0, &id.to_bytes_le()).item(number, 24, &6_u32.to_le_bytes());
        }
    }),
    ("a place of a block that is not present", Works, |p| {
        p.bat(8, 5 * MIB);
    }),
    ("an offset without a meaning", Works, |p| {
        p.bat(8, (4 * MIB) | 2);
    }),
];

#[test]
fn every_malformed_image_is_refused_by_name_or_lawfully_tolerated() {
    for (name, wanted, damage) in ROWS {
        let patient = Patient::new();
        damage(&patient);
        let pristine = patient.0.to_bytes();
        let file: Arc<dyn ImageFile> = Arc::new(patient.0);
        let open = || Builder::open(Arc::clone(&file));
        let read = open().read_only();
        let report = vhdx::check(&file);
        let file_now = bytes_at(&file, 0, pristine.len());
        assert!(file_now == pristine, "{name}: reading wrote to the file");
        match wanted {
            Refused(kind) => {
                let error = read.expect_err(name);
                assert_eq!(error.kind(), *kind, "{name}: {error}");
                assert_eq!(open().writable().expect_err(name).kind(), *kind, "{name} for writing");
                assert!(!report.is_sound(), "{name}");
                assert!(error.to_string().len() > 30, "{name}: {error}");
            }
            ReadOnly(kind) => {
                let image = read.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(bytes_at(&image, 0, 4096), [7; 4096], "{name}");
                let error = open().writable().expect_err(name);
                assert_eq!(error.kind(), *kind, "{name}: {error}");
            }
            Works => {
                let image = read.unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(bytes_at(&image, 0, 4096), [7; 4096], "{name}");
                assert!(report.is_sound(), "{name}: {:?}", report.errors);
                let disk = open().writable().unwrap_or_else(|error| panic!("{name}: {error}"));
                disk.write_at(8 * BLOCK, &[8; 4096]).expect(name);
                disk.close().expect(name);
                assert!(vhdx::check(&file).is_sound(), "{name} after writing");
                let image = open().read_only().expect(name);
                assert_eq!(bytes_at(&image, 0, 4096), [7; 4096], "{name} after writing");
                assert_eq!(bytes_at(&image, 8 * BLOCK, 4096), [8; 4096], "{name} after writing");
            }
        }
    }
}

#[test]
fn a_ring_full_of_plausible_entries_ends_the_scan_early() {
    // Each sector claims to start an entry as long as the ring, with a wrong checksum: all of it would be read 256 times.
    let patient = Patient::new();
    let mut claim = vec![0; 4096];
    claim[..64].copy_from_slice(&entry(1, 0, (SIZE, SIZE), &[])[..64]);
    claim[8..12].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    for sector in 0..256 {
        patient.put(LOG + sector * 4096, &claim);
    }
    patient.header(48, &LOG_ID);
    let file: Arc<dyn ImageFile> = Arc::new(patient.0);
    let error = Builder::open(file).read_only().expect_err("no entry is valid");
    assert!(matches!(error.kind(), Limit | LogUnrecoverable), "{error}");
}

#[test]
fn random_damage_never_panics_and_what_opens_is_readable() {
    let mut random = common::Random(0xdead_beef);
    for _ in 0..300 {
        let patient = Patient::new();
        // The places where meaning is; checksums made right again, so that the damage gets past them.
        for _ in 0..=random.below(3) {
            let at = match random.below(5) {
                0 => HEADERS[0] + random.below(80),
                1 => REGIONS[0] + random.below(100),
                2 => METADATA + random.below(224),
                3 => ITEMS + random.below(40),
                _ => BAT + random.below(128),
            };
            patient.put(
                at,
                &random.next().to_le_bytes()[..usize::try_from(random.below(8) + 1).expect("small")],
            );
        }
        patient.seal(HEADERS[0], 4096);
        patient.seal(REGIONS[0], 64 << 10);
        let file: Arc<dyn ImageFile> = Arc::new(patient.0);
        drop(vhdx::check(&file));
        if let Ok(image) = Builder::open(Arc::clone(&file)).read_only() {
            let size = image.geometry().size_bytes;
            let len = usize::try_from(size.min(16 * MIB)).expect("small") / 4096 * 4096;
            drop(image.read_at(0, &mut vec![0; len]));
        }
        drop(Builder::open(file).writable());
    }
}
