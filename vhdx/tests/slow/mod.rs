//! A second reader, written from the format reference alone: slow, short, and without a line of the crate under test.
//!
//! ```text
//! headers -> log (every start tried) -> pages laid over the file -> regions -> metadata -> BAT -> bytes
//! ```
//! It judges what the crate writes, and the crate judges it: both read every sample and every image of a crash alike. Where
//! the crate is lazy or clever (caches, in-memory patches, one pass over the ring), this one does the obvious thing each time.
//!
//! **Invariant:** it shares nothing with the crate but the block device below and the checksum function.
#![allow(dead_code, clippy::allow_attributes, reason = "every test program uses another part")]

mod log;

use std::collections::BTreeMap;
use std::sync::Arc;

use blockio::ImageFile;

use log::Patch;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// What the reader could not make sense of.
pub(crate) type Outcome<T> = Result<T, String>;

/// An open image, with its parent if it has one.
pub(crate) struct Slow {
    file: Arc<dyn ImageFile>,
    /// Changes of the log, oldest first.
    patches: Vec<Patch>,
    file_bytes: u64,
    bat_offset: u64,
    bat_bytes: u64,
    /// Size of a payload block.
    pub(crate) block_bytes: u64,
    /// Size of the virtual disk.
    pub(crate) disk_bytes: u64,
    /// Logical sector size.
    pub(crate) sector_bytes: u64,
    has_parent: bool,
    /// Keys and values of the parent locator.
    pub(crate) locator: BTreeMap<String, String>,
    /// As the current header has it.
    pub(crate) data_write_id: [u8; 16],
    parent: Option<Box<Slow>>,
}

/// The newer of the valid headers: 4096 bytes.
fn current_header(file: &dyn ImageFile) -> Outcome<Vec<u8>> {
    let slots = [64 * KIB, 128 * KIB].map(|offset| raw(file, offset, 4096));
    let valid = |slot: &Vec<u8>| slot.starts_with(b"head") && sealed(slot);
    let newest = slots.into_iter().filter(valid).max_by_key(|slot| u64_at(slot, 8));
    newest.ok_or_else(|| "no valid header".to_owned())
}

impl Slow {
    /// Opens one image; its parent, if any, is given to [`Self::over`].
    pub(crate) fn open(file: &Arc<dyn ImageFile>) -> Outcome<Self> {
        if raw(&**file, 0, 8) != b"vhdxfile" {
            return Err("not a VHDX".to_owned());
        }
        let header = current_header(&**file)?;
        let mut slow = Self {
            file: Arc::clone(file),
            patches: Vec::new(),
            file_bytes: file.geometry().size_bytes,
            bat_offset: 0,
            bat_bytes: 0,
            block_bytes: 0,
            disk_bytes: 0,
            sector_bytes: 0,
            has_parent: false,
            locator: BTreeMap::new(),
            data_write_id: id_at(&header, 32),
            parent: None,
        };
        if let Some(replay) = log::read(&**file, &header)? {
            slow.file_bytes = slow.file_bytes.max(replay.last_file_bytes);
            slow.patches = replay.patches;
        }
        let metadata = slow.regions()?;
        slow.items(metadata)?;
        Ok(slow)
    }

    /// Puts the image on its parent.
    pub(crate) fn over(mut self, parent: Self) -> Outcome<Self> {
        let linked = ["parent_linkage", "parent_linkage2"]
            .iter()
            .filter_map(|key| self.locator.get(*key))
            .any(|value| *value == braced(&parent.data_write_id));
        if !linked || parent.sector_bytes != self.sector_bytes {
            return Err(format!(
                "the parent {} is not the one of {:?}",
                braced(&parent.data_write_id),
                self.locator
            ));
        }
        self.parent = Some(Box::new(parent));
        Ok(self)
    }

    /// Opens a child over its parents, the nearest first.
    pub(crate) fn chain(files: &[Arc<dyn ImageFile>]) -> Outcome<Self> {
        let [first, parents @ ..] = files else { return Err("an empty chain".to_owned()) };
        let slow = Self::open(first)?;
        if parents.is_empty() { Ok(slow) } else { slow.over(Self::chain(parents)?) }
    }

    /// The bytes of a range of the virtual disk; zeros past its end.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Outcome<Vec<u8>> {
        let mut content = Vec::new();
        let mut at = offset;
        while at < offset + len {
            // Only a block that is partly present needs a look at every sector.
            let partly = at < self.disk_bytes && self.entry(at / self.block_bytes)? & 7 == 7;
            let unit = if partly { self.sector_bytes } else { self.block_bytes };
            let piece = (unit - at % unit).min(offset + len - at);
            content.extend(self.read_within(at, piece)?);
            at += piece;
        }
        Ok(content)
    }

    /// Whether a block has, or may have, content other than zeros: for skipping through large disks.
    pub(crate) fn may_hold_data(&self, offset: u64, len: u64) -> Outcome<bool> {
        let end = (offset + len).min(self.disk_bytes);
        for block in offset / self.block_bytes..end.div_ceil(self.block_bytes) {
            match (self.entry(block)? & 7, &self.parent) {
                (6 | 7, _) => return Ok(true),
                (0, Some(parent)) if parent.may_hold_data(offset, len)? => return Ok(true),
                _ => (),
            }
        }
        Ok(false)
    }

    fn read_within(&self, at: u64, len: u64) -> Outcome<Vec<u8>> {
        let zeros = || vec![0; small(len)];
        if at >= self.disk_bytes {
            return Ok(zeros());
        }
        if at + len > self.disk_bytes {
            let mut content = self.read_within(at, self.disk_bytes - at)?;
            content.resize(small(len), 0);
            return Ok(content);
        }
        let (block, within) = (at / self.block_bytes, at % self.block_bytes);
        let entry = self.entry(block)?;
        let here = || Ok(self.bytes((entry >> 20) * MIB + within, len));
        let above = || self.parent.as_ref().map_or_else(|| Ok(zeros()), |parent| parent.read(at, len));
        match entry & 7 {
            0 => above(),
            1..=3 => Ok(zeros()),
            6 => here(),
            7 if self.sector_is_here(block, at / self.sector_bytes)? => here(),
            7 => above(),
            state => Err(format!("block {block} has state {state}")),
        }
    }

    fn chunk_ratio(&self) -> u64 {
        (1 << 23) * self.sector_bytes / self.block_bytes
    }

    fn entry(&self, block: u64) -> Outcome<u64> {
        self.bat_word(block + block / self.chunk_ratio())
    }

    fn bat_word(&self, index: u64) -> Outcome<u64> {
        if index * 8 >= self.bat_bytes {
            return Err(format!("entry {index} lies past the end of the BAT"));
        }
        Ok(u64_at(&self.bytes(self.bat_offset + index * 8, 8), 0))
    }

    fn sector_is_here(&self, block: u64, sector: u64) -> Outcome<bool> {
        let chunk = block / self.chunk_ratio();
        let entry = self.bat_word(chunk * (self.chunk_ratio() + 1) + self.chunk_ratio())?;
        if entry & 7 != 6 {
            return Err(format!("block {block} is partly present without a bitmap"));
        }
        let bit = sector % (1 << 23);
        let byte = self.bytes((entry >> 20) * MIB + bit / 8, 1)[0];
        Ok(byte >> (bit % 8) & 1 == 1)
    }

    /// Finds both regions, gives the place of the metadata.
    fn regions(&mut self) -> Outcome<u64> {
        let tables = [192 * KIB, 256 * KIB].map(|offset| self.bytes(offset, 64 * KIB));
        let table = tables.into_iter().find(|table| table.starts_with(b"regi") && sealed(table));
        let table = table.ok_or("no valid region table")?;
        let find = |name: &str| {
            (0..u64::from(u32_at(&table, 8)).min(2047))
                .map(|number| &table[small(16 + number * 32)..])
                .find(|entry| braced(&id_at(entry, 0)) == name)
                .map(|entry| (u64_at(entry, 16), u64::from(u32_at(entry, 24))))
                .ok_or(format!("no region {name}"))
        };
        (self.bat_offset, self.bat_bytes) = find("{2dc27766-f623-4200-9d64-115e9bfd4a08}")?;
        Ok(find("{8b7ca206-4790-4b9a-b8fe-575f050f886e}")?.0)
    }

    fn items(&mut self, metadata: u64) -> Outcome<()> {
        let table = self.bytes(metadata, 64 * KIB);
        if !table.starts_with(b"metadata") {
            return Err("no metadata table".to_owned());
        }
        let item = |name: &str| {
            (1..=u64::from(u16_at(&table, 10)).min(2047))
                .map(|number| &table[small(number * 32)..])
                .find(|entry| braced(&id_at(entry, 0)) == name)
                .map(|entry| {
                    self.bytes(metadata + u64::from(u32_at(entry, 16)), u64::from(u32_at(entry, 20)).min(MIB))
                })
        };
        let must = |name: &str| item(name).ok_or(format!("no item {name}"));
        let parameters = must("{caa16737-fa36-4d43-b3b6-33f0aa44e76b}")?;
        let disk_bytes = u64_at(&must("{2fa54224-cd1b-4876-b211-5dbed83bf4b8}")?, 0);
        let sector_bytes = u64::from(u32_at(&must("{8141bf1d-a96f-4709-ba47-f233a8faab5f}")?, 0));
        let locator = item("{a8d35f2d-b30b-454d-abf7-d3d84834ab0c}");
        self.block_bytes = u64::from(u32_at(&parameters, 0));
        self.has_parent = u32_at(&parameters, 4) & 2 != 0;
        (self.disk_bytes, self.sector_bytes) = (disk_bytes, sector_bytes);
        if !self.block_bytes.is_power_of_two() || ![512, 4096].contains(&sector_bytes) {
            return Err(format!("blocks of {}, sectors of {sector_bytes}", self.block_bytes));
        }
        self.locator = locator.filter(|_| self.has_parent).map(|item| pairs(&item)).unwrap_or_default();
        Ok(())
    }

    /// Bytes of the file with the log laid over; zeros where there is nothing.
    fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut content = raw(&*self.file, offset, len);
        for patch in &self.patches {
            patch.lay_over(offset, &mut content);
        }
        content
    }
}

/// Bytes of the file as they lie there; zeros past its end.
fn raw(file: &dyn ImageFile, offset: u64, len: u64) -> Vec<u8> {
    let there = file.geometry().size_bytes.saturating_sub(offset).min(len);
    let mut content = vec![0; small(there)];
    if there > 0 {
        file.read_at(offset, &mut content).expect("the range lies in the file");
    }
    content.resize(small(len), 0);
    content
}

/// Whether the checksum of a header or a table, four bytes behind its start, is right.
fn sealed(structure: &[u8]) -> bool {
    let mut blank = structure.to_vec();
    blank[4..8].fill(0);
    crc32c::crc32c(&blank) == u32_at(structure, 4)
}

fn pairs(item: &[u8]) -> BTreeMap<String, String> {
    let text = |offset: u32, len: u16| {
        let units: Vec<u16> =
            item[offset as usize..][..usize::from(len)].chunks_exact(2).map(|unit| u16_at(unit, 0)).collect();
        String::from_utf16_lossy(&units)
    };
    let pair = |number: usize| {
        let entry = &item[20 + number * 12..];
        let (key, value) = (u32_at(entry, 0), u32_at(entry, 4));
        (text(key, u16_at(entry, 8)), text(value, u16_at(entry, 10)))
    };
    (0..usize::from(u16_at(item, 18))).map(pair).collect()
}

/// A GUID as locators spell it.
pub(crate) fn braced(id: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    let (a, b, c) = (u32_at(id, 0), u16_at(id, 4), u16_at(id, 6));
    format!("{{{a:08x}-{b:04x}-{c:04x}-{}-{}}}", hex(&id[8..10]), hex(&id[10..]))
}

fn id_at(bytes: &[u8], at: usize) -> [u8; 16] {
    bytes[at..at + 16].try_into().expect("16 bytes")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn small(value: u64) -> usize {
    usize::try_from(value).expect("it fits into memory")
}
