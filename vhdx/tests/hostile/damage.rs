//! Good images, and what is done to them. Checksums are made right again, so that the damage reaches the code behind them.

use std::sync::Arc;

use blockio::{BlockDevice, ImageFile, MemoryDevice};
use vhdx::{Builder, Spec};

use crate::common::{MIB, Random, bytes_at};

const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGIONS: [u64; 2] = [192 << 10, 256 << 10];

/// Which structure is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Headers,
    Regions,
    Metadata,
    Bat,
    Log,
    Anything,
}

/// A good image and where its parts lie.
pub(crate) struct Base {
    image: MemoryDevice,
    dirty: bool,
}

impl Base {
    /// Closed in order, killed with a dirty log, small and large blocks, both sector sizes, fixed.
    pub(crate) fn all() -> Vec<Self> {
        let small = Spec { block_bytes: MIB, ..Spec::dynamic(20 * MIB) };
        vec![
            Self::made(&small, false),
            Self::made(&small, true),
            Self::made(&Spec { block_bytes: 4 * MIB, ..Spec::dynamic(40 * MIB + 512) }, true),
            Self::made(&Spec { logical_sector: 4096, block_bytes: MIB, ..Spec::dynamic(20 * MIB) }, false),
            Self::made(&Spec { block_bytes: 2 * MIB, ..Spec::fixed(8 * MIB) }, true),
        ]
    }

    /// A copy of the image.
    pub(crate) fn copy(&self) -> MemoryDevice {
        self.image.fork()
    }

    fn made(spec: &Spec, dirty: bool) -> Self {
        let file = Arc::new(MemoryDevice::with_block_bytes(0, 1));
        vhdx::create(&file, spec).expect("it is created");
        let disk = Builder::open(Arc::clone(&file) as Arc<dyn ImageFile>).growth_bytes(4 * MIB);
        let disk = disk.writable().expect("it opens for writing");
        for block in 0..4 {
            disk.write_at(block * 2 * MIB, &[u8::try_from(block).expect("small") + 1; 8192])
                .expect("it is writable");
            disk.flush().expect("it flushes");
        }
        if !dirty {
            disk.close().expect("it closes");
        }
        drop(disk);
        Self { image: file.fork(), dirty }
    }
}

/// An image under the knife.
struct Patient {
    image: MemoryDevice,
    random: Random,
}

/// A good image with one to three damages of a kind. The same for the same seed and case.
pub(crate) fn damaged(bases: &[Base], kind: Kind, seed: u64, case: u64) -> MemoryDevice {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9).wrapping_add(case * 0x5851_f42d + 1) | 1);
    for _ in 0..8 {
        random.next();
    }
    let wanted: Vec<&Base> = bases.iter().filter(|base| base.dirty || kind != Kind::Log).collect();
    let base = wanted[usize::try_from(random.below(wanted.len() as u64)).expect("small")];
    let mut patient = Patient { image: base.image.fork(), random };
    for _ in 0..patient.random.below(3) + 1 {
        patient.damage(kind);
    }
    patient.image
}

impl Patient {
    fn damage(&mut self, kind: Kind) {
        match kind {
            Kind::Headers => self.header(),
            Kind::Regions => self.region(),
            Kind::Metadata => self.metadata(),
            Kind::Bat => self.bat(),
            Kind::Log => self.log(),
            Kind::Anything => match self.random.below(7) {
                0 => self.header(),
                1 => self.region(),
                2 => self.metadata(),
                3 => self.bat(),
                4 => self.log(),
                5 => self.size(),
                _ => self.flip(),
            },
        }
    }

    fn size_bytes(&self) -> u64 {
        self.image.geometry().size_bytes
    }

    /// Bytes inside the file; what would lie outside stays undone.
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        if offset.checked_add(bytes.len() as u64).is_some_and(|end| end <= self.size_bytes()) {
            self.image.write_at(offset, bytes).expect("it lies in the file");
        }
    }

    fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        let inside = offset.checked_add(len as u64).is_some_and(|end| end <= self.size_bytes());
        if inside { bytes_at(&self.image, offset, len) } else { vec![0; len] }
    }

    fn u64_at(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.get(offset, 8).try_into().expect("8 bytes"))
    }

    fn u32_at(&self, offset: u64) -> u64 {
        u64::from(u32::from_le_bytes(self.get(offset, 4).try_into().expect("4 bytes")))
    }

    fn seal(&mut self, offset: u64, len: usize) {
        self.put(offset + 4, &[0; 4]);
        let sum = crc32c::crc32c(&self.get(offset, len));
        self.put(offset + 4, &sum.to_le_bytes());
    }

    /// A number that is likely to hurt.
    fn number(&mut self) -> u64 {
        let near =
            [0, 1, 2, 511, 512, 4096, 1 << 16, MIB, 1 << 32, 1 << 40, 1 << 46, 1 << 62, u64::MAX, 1 << 63];
        let base = near[usize::try_from(self.random.below(near.len() as u64)).expect("small")];
        match self.random.below(5) {
            0 => base,
            1 => base.wrapping_add(1),
            2 => base.wrapping_sub(1),
            3 => self.random.below(self.size_bytes() / MIB + 3) * MIB,
            _ => self.random.next(),
        }
    }

    /// A field of 1, 2, 4 or 8 bytes at a random place of a structure.
    fn field(&mut self, start: u64, len: u64) {
        let width = 1 << self.random.below(4);
        let at = start + self.random.below(len / width) * width;
        let bytes = self.number().to_le_bytes();
        self.put(at, &bytes[..usize::try_from(width).expect("small")]);
    }

    fn header(&mut self) {
        let which = usize::try_from(self.random.below(2)).expect("small");
        self.field(HEADERS[which], 80);
        if self.random.below(8) > 0 {
            let content = self.get(HEADERS[which], 4096);
            self.seal(HEADERS[which], 4096);
            if self.random.below(2) == 0 {
                self.put(HEADERS[1 - which], &content);
                self.seal(HEADERS[1 - which], 4096);
            }
        }
    }

    fn region(&mut self) {
        let which = usize::try_from(self.random.below(2)).expect("small");
        self.field(REGIONS[which], 16 + 3 * 32);
        self.seal(REGIONS[which], 64 << 10);
        if self.random.below(2) == 0 {
            let content = self.get(REGIONS[which], 64 << 10);
            self.put(REGIONS[1 - which], &content);
        }
    }

    /// Where a region lies, by its place in the table that our writer uses; not beyond the file, whatever earlier damage says.
    fn region_at(&self, guid_first: u32) -> u64 {
        let mut entries = (0..2).map(|number| REGIONS[0] + 16 + number * 32);
        let found = entries.find(|entry| self.u32_at(*entry) == u64::from(guid_first));
        found.map_or(2 * MIB, |entry| self.u64_at(entry + 16)).min(self.size_bytes())
    }

    fn metadata(&mut self) {
        let region = self.region_at(0x8B7C_A206);
        match self.random.below(3) {
            0 => self.field(region, 32 + 6 * 32),
            1 => self.field(region + (64 << 10), 64),
            _ => {
                // A whole entry twice, or one item in the place of another.
                let (from, to) = (self.random.below(6), self.random.below(6));
                let entry = self.get(region + 32 + from * 32, 32);
                self.put(region + 32 + to * 32, &entry);
            }
        }
    }

    fn bat(&mut self) {
        let region = self.region_at(0x2DC2_7766);
        let at = region + self.random.below(24) * 8;
        let other = region + self.random.below(24) * 8;
        let word = match self.random.below(4) {
            0 => self.number(),
            1 => (self.random.below(16) * MIB) | self.random.below(8),
            2 => self.u64_at(other),
            _ => (self.u64_at(at) & !7) | self.random.below(8),
        };
        self.put(at, &word.to_le_bytes());
    }

    fn log(&mut self) {
        let (ring, length) =
            (self.u64_at(HEADERS[0] + 72).min(self.size_bytes()), self.u32_at(HEADERS[0] + 68));
        let sectors = (length / 4096).clamp(1, 1 << 16);
        let used: Vec<u64> = (0..sectors)
            .map(|sector| ring + sector * 4096)
            .filter(|at| self.get(*at, 4) == b"loge")
            .collect();
        let Some(at) = (!used.is_empty())
            .then(|| used[usize::try_from(self.random.below(used.len() as u64)).expect("small")])
        else {
            return;
        };
        match self.random.below(4) {
            // The entry's own fields, its descriptors, its data.
            0 => self.field(at, 64),
            1 => self.field(at + 64, 64),
            2 => self.field(at + 4096, 4096),
            _ => {
                let to = ring + self.random.below(sectors) * 4096;
                let entry = self.get(at, 8192);
                self.put(to, &entry);
            }
        }
        let len = self.u32_at(at + 8);
        if (64..=length).contains(&len) {
            self.seal(at, usize::try_from(len).expect("small"));
        }
    }

    fn size(&mut self) {
        let size = match self.random.below(3) {
            0 => self.random.below(self.size_bytes().max(1)),
            1 => self.random.below(self.size_bytes() / MIB + 1) * MIB,
            _ => self.size_bytes() + self.random.below(3 * MIB),
        };
        self.image.set_len(size).expect("it takes any size");
    }

    fn flip(&mut self) {
        let at = self.random.below(5 * MIB);
        let byte = self.get(at, 1)[0] ^ (1 << self.random.below(8));
        self.put(at, &[byte]);
    }
}
