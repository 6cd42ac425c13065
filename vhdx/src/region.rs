//! The region tables: where the BAT and the metadata are, and which areas belong to something unknown.
//!
//! **Invariant:** an area that any table entry names is never handed out as free space.

use std::collections::HashSet;

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{VhdxError, corrupt};
use crate::findings::Findings;
use crate::format::{
    MIB, REGION_BAT, REGION_METADATA, REGION_TABLE_OFFSETS, RegionEntry, RegionTableHeader, TABLE_BYTES,
    TABLE_ENTRIES_MAX, bytes, checksum_without, index,
};
use crate::view::View;

/// A part of the file that belongs to one structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    /// First byte.
    pub(crate) offset: u64,
    /// Number of bytes.
    pub(crate) length: u64,
    /// Whose it is.
    pub(crate) owner: &'static str,
}

impl Area {
    /// First byte behind it.
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// The regions of an image.
#[derive(Clone, Debug)]
pub(crate) struct Regions {
    /// The block allocation table.
    pub(crate) bat: Area,
    /// The metadata region.
    pub(crate) metadata: Area,
    /// Optional regions that nobody here knows: kept, never touched.
    pub(crate) unknown: Vec<Area>,
}

impl Regions {
    /// Reads the first valid table.
    pub(crate) fn read(view: &View, findings: &mut Findings) -> Result<Self, VhdxError> {
        let first = read_table(view, 0)?;
        let second = read_table(view, 1)?;
        let (table, at) = match (first, second) {
            (Some(first), second) => {
                match second {
                    None => findings.warn("the second region table is damaged; the first serves"),
                    Some(second) if second != first => {
                        findings.warn("the two region tables differ; the first is used");
                    }
                    Some(_) => (),
                }
                (first, REGION_TABLE_OFFSETS[0])
            }
            (None, Some(second)) => {
                findings.warn("the first region table is damaged; the second serves");
                (second, REGION_TABLE_OFFSETS[1])
            }
            (None, None) => {
                let found = "neither copy has a valid signature and checksum";
                return Err(corrupt("region table", REGION_TABLE_OFFSETS[0], found));
            }
        };
        parse(&table, at, view.view_bytes, findings)
    }

    /// All areas of regions.
    pub(crate) fn areas(&self) -> impl Iterator<Item = Area> {
        [self.bat, self.metadata].into_iter().chain(self.unknown.iter().copied())
    }
}

/// The two copies of the table, as far as they are whole.
pub(crate) fn copies(view: &View) -> Result<[Option<Vec<u8>>; 2], VhdxError> {
    Ok([read_table(view, 0)?, read_table(view, 1)?])
}

fn read_table(view: &View, copy: usize) -> Result<Option<Vec<u8>>, VhdxError> {
    let bytes = view.read(REGION_TABLE_OFFSETS[copy], index(TABLE_BYTES), "region table")?;
    let (header, _) =
        RegionTableHeader::ref_from_prefix(&bytes).expect("the table is longer than its header");
    let valid = header.signature == *b"regi" && header.checksum.get() == checksum_without(&bytes, 4);
    Ok(valid.then_some(bytes))
}

/// The table of the image with the BAT at another place and everything else as it is.
pub(crate) fn with_bat_at(view: &View, bat: Area) -> Result<Vec<u8>, VhdxError> {
    let first = read_table(view, 0)?;
    let table = if first.is_some() { first } else { read_table(view, 1)? };
    let lost = || corrupt("region table", REGION_TABLE_OFFSETS[0], "neither copy is valid any more");
    let mut table = table.ok_or_else(lost)?;
    let id = REGION_BAT.to_bytes_le();
    let entry = table[16..].chunks_exact_mut(32).find(|entry| entry[..16] == id).ok_or_else(lost)?;
    let length = u32::try_from(bat.length).expect("a BAT is shorter than 4 GiB");
    entry[16..24].copy_from_slice(&bat.offset.to_le_bytes());
    entry[24..28].copy_from_slice(&length.to_le_bytes());
    let checksum = checksum_without(&table, 4);
    table[4..8].copy_from_slice(&checksum.to_le_bytes());
    Ok(table)
}

fn parse(table: &[u8], at: u64, view_bytes: u64, findings: &mut Findings) -> Result<Regions, VhdxError> {
    let (header, rest) =
        RegionTableHeader::ref_from_prefix(table).expect("the table is longer than its header");
    let count = header.entry_count.get();
    if count > u32::from(TABLE_ENTRIES_MAX) {
        return Err(corrupt("region table", at, format!("{count} entries, at most {TABLE_ENTRIES_MAX} fit")));
    }
    if header.reserved.get() != 0 {
        let found = format!("its reserved field is {:#x}", header.reserved.get());
        findings.unknown_meaning(corrupt("region table", at, found));
    }
    let mut seen = HashSet::new();
    let (mut bat, mut metadata, mut unknown) = (None, None, Vec::new());
    for number in 0..u64::from(count) {
        let place = at + 16 + number * 32;
        let (entry, _) =
            RegionEntry::ref_from_prefix(&rest[index(number * 32)..]).expect("the count was checked");
        let id = Uuid::from_bytes_le(entry.id);
        if !seen.insert(id) {
            return Err(corrupt("region table entry", place, format!("region {id} occurs twice")));
        }
        if entry.required.get() > 1 {
            let found = format!("region {id} has the flags {:#x}, known is 1", entry.required.get());
            findings.unknown_meaning(corrupt("region table entry", place, found));
        }
        let area = check_area(entry, place, id)?;
        match id {
            REGION_BAT => bat = Some(Area { owner: "BAT region", ..area }),
            REGION_METADATA => metadata = Some(Area { owner: "metadata region", ..area }),
            _ if entry.required.get() & 1 == 1 => {
                return Err(VhdxError::Unsupported {
                    what: format!("required region {id} in the table at {place:#x}"),
                    hint: "the image needs a newer reader; convert it with the tool that made it",
                });
            }
            _ => unknown.push(area),
        }
    }
    let missing = |what: &str| corrupt("region table", at, format!("there is no {what} region"));
    let regions = Regions {
        bat: bat.ok_or_else(|| missing("BAT"))?,
        metadata: metadata.ok_or_else(|| missing("metadata"))?,
        unknown,
    };
    // Before anyone allocates memory by these lengths.
    for area in regions.areas() {
        if area.end() > view_bytes {
            return Err(VhdxError::Truncated { structure: area.owner, need: area.end(), have: view_bytes });
        }
    }
    Ok(regions)
}

fn check_area(entry: &RegionEntry, place: u64, id: Uuid) -> Result<Area, VhdxError> {
    let (offset, length) = (entry.file_offset.get(), u64::from(entry.length.get()));
    let aligned = offset.is_multiple_of(MIB) && length.is_multiple_of(MIB);
    if !aligned || offset < MIB || length == 0 || offset.checked_add(length).is_none() {
        let found = format!(
            "region {id} has {length:#x} bytes at {offset:#x}; both must be multiples of 1 MiB, from 1 MiB on"
        );
        return Err(corrupt("region table entry", place, found));
    }
    Ok(Area { offset, length, owner: "unknown region" })
}

/// The bytes of a table that names the two regions.
pub(crate) fn encode(bat: Area, metadata: Area) -> Vec<u8> {
    let entry = |id: Uuid, area: Area| RegionEntry {
        id: id.to_bytes_le(),
        file_offset: area.offset.into(),
        length: u32::try_from(area.length).expect("regions are shorter than 4 GiB").into(),
        required: 1.into(),
    };
    let mut header = RegionTableHeader {
        signature: *b"regi",
        checksum: 0.into(),
        entry_count: 2.into(),
        reserved: 0.into(),
    };
    let mut table = vec![0; index(TABLE_BYTES)];
    table[16..48].copy_from_slice(entry(REGION_BAT, bat).as_bytes());
    table[48..80].copy_from_slice(entry(REGION_METADATA, metadata).as_bytes());
    table[..16].copy_from_slice(header.as_bytes());
    header.checksum = checksum_without(&table, 4).into();
    table[..16].copy_from_slice(header.as_bytes());
    debug_assert_eq!(bytes(table.len()), TABLE_BYTES);
    table
}
