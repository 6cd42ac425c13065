//! The metadata region: what the virtual disk is.
//!
//! ```text
//! 0       table: header, up to 2047 entries (id, offset, length, flags)
//! 64 KiB  items, anywhere, never overlapping
//! ```
//! **Invariant:** every size that leaves this module is in its lawful range, so that no later division or loop depends on
//! the file's good will.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;
use zerocopy::{FromBytes, IntoBytes};

use crate::error::{VhdxError, corrupt};
use crate::findings::Findings;
use crate::format::{
    BLOCK_BYTES_MAX, BLOCK_BYTES_MIN, DISK_BYTES_MAX, ITEM_CHS, ITEM_DISK_ID, ITEM_DISK_SIZE,
    ITEM_FILE_PARAMETERS, ITEM_INCOMPLETE, ITEM_IS_REQUIRED, ITEM_IS_USER, ITEM_IS_VIRTUAL_DISK,
    ITEM_LOGICAL_SECTOR, ITEM_PARENT_LOCATOR, ITEM_PHYSICAL_SECTOR, ITEM_PMEM_LABELS, METADATA_BYTES_MAX,
    MIB, MetadataEntry, MetadataTableHeader, PAGE, PARAM_HAS_PARENT, PARAM_LEAVE_ALLOCATED, TABLE_BYTES,
    TABLE_ENTRIES_MAX, index,
};
use crate::locator::Locator;
use crate::log::Page;
use crate::region::Area;
use crate::view::View;

/// Items of the system and of users, the bounds that Microsoft's parser has too.
const SYSTEM_ITEMS_MAX: usize = 1023;
const USER_ITEMS_MAX: usize = 1024;
/// Bytes of items of either class.
const CLASS_BYTES_MAX: u64 = 40 * MIB;

/// What the virtual disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DiskParams {
    /// Size of the disk.
    pub(crate) disk_bytes: u64,
    /// Size of a payload block.
    pub(crate) block_bytes: u64,
    /// Logical sector size: 512 or 4096.
    pub(crate) logical_sector: u32,
    /// Physical sector size, a hint to the guest.
    pub(crate) physical_sector: u32,
    /// SCSI page 83 identity.
    pub(crate) disk_id: Uuid,
    /// Blocks stay allocated (fixed).
    pub(crate) fixed: bool,
    /// A differencing image.
    pub(crate) has_parent: bool,
}

/// One metadata item, as it is copied from an image to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Item {
    pub(crate) id: Uuid,
    pub(crate) flags: u32,
    pub(crate) value: Vec<u8>,
}

/// What the metadata region says.
#[derive(Clone, Debug)]
pub(crate) struct Metadata {
    /// What the disk is.
    pub(crate) params: DiskParams,
    /// Which image it differs from; only when it has a parent.
    pub(crate) locator: Option<Locator>,
}

struct Items {
    region: Area,
    /// Every entry of the table.
    all: Vec<MetadataEntry>,
    /// Items of the system.
    by_id: HashMap<Uuid, MetadataEntry>,
}

/// Items that describe the virtual disk and that nobody here knows: a child inherits them.
pub(crate) fn inherited_items(view: &View, region: Area) -> Result<Vec<Item>, VhdxError> {
    const KNOWN: [Uuid; 4] = [ITEM_DISK_SIZE, ITEM_DISK_ID, ITEM_LOGICAL_SECTOR, ITEM_PHYSICAL_SECTOR];
    let items = read_table(view, region, &mut Findings::default())?;
    let is_known = |entry: &MetadataEntry| {
        entry.flags.get() & ITEM_IS_USER == 0 && KNOWN.contains(&Uuid::from_bytes_le(entry.id))
    };
    let inherits = |entry: &&MetadataEntry| entry.flags.get() & ITEM_IS_VIRTUAL_DISK != 0 && !is_known(entry);
    items.all.iter().filter(inherits).map(|entry| copy_of(view, region, entry)).collect()
}

/// The pages of the region of a parent after a merge: what describes the virtual disk is that of the child, all else stays.
/// None when they say the same already.
pub(crate) fn adopted_pages(parent: (&View, Area), child: (&View, Area)) -> Result<Vec<Page>, VhdxError> {
    let (ours, theirs) = (all_items(parent)?, all_items(child)?);
    let describes_disk = |item: &&Item| item.flags & ITEM_IS_VIRTUAL_DISK != 0;
    let is_same = |a: &Item, b: &Item| a.id == b.id && (a.flags ^ b.flags) & ITEM_IS_USER == 0;
    let child_says: Vec<&Item> = theirs.iter().filter(describes_disk).collect();
    let known: Vec<&Item> = ours.iter().filter(describes_disk).collect();
    if known.len() == child_says.len() && known.iter().all(|item| child_says.contains(item)) {
        return Ok(Vec::new());
    }
    let kept = ours.iter().filter(|item| !describes_disk(item));
    let (mut items, mut last): (Vec<Item>, Vec<Item>) =
        kept.cloned().partition(|item| item.id != ITEM_PARENT_LOCATOR);
    items.extend(
        child_says
            .into_iter()
            .filter(|item| {
                !ours.iter().any(|own| is_same(own, item) && own.flags & ITEM_IS_VIRTUAL_DISK == 0)
            })
            .cloned(),
    );
    // Last, so that it has room to grow when the parent moves.
    items.append(&mut last);
    let (view, region) = parent;
    let mut content = encode_items(&items);
    content.resize(content.len().next_multiple_of(index(PAGE)), 0);
    if crate::format::bytes(content.len()) > region.length {
        return Err(VhdxError::Limit {
            what: "the length of the metadata that a merge takes over",
            found: crate::format::bytes(content.len()),
            bound: region.length,
        });
    }
    let old = view.read(region.offset, content.len(), "metadata region")?;
    let pages = content.chunks_exact(index(PAGE)).zip(old.chunks_exact(index(PAGE)));
    let changed = (region.offset..).step_by(index(PAGE)).zip(pages).filter(|(_, (new, old))| new != old);
    Ok(changed.map(|(file_offset, (new, _))| Page { file_offset, content: new.to_vec() }).collect())
}

fn all_items((view, region): (&View, Area)) -> Result<Vec<Item>, VhdxError> {
    let items = read_table(view, region, &mut Findings::default())?;
    items.all.iter().map(|entry| copy_of(view, region, entry)).collect()
}

fn copy_of(view: &View, region: Area, entry: &MetadataEntry) -> Result<Item, VhdxError> {
    let at = region.offset + u64::from(entry.offset.get());
    let value = view.read(at, entry.length.get() as usize, "metadata item")?;
    Ok(Item { id: Uuid::from_bytes_le(entry.id), flags: entry.flags.get(), value })
}

/// The pages of the region with another parent locator.
pub(crate) fn locator_pages(view: &View, region: Area, locator: &Locator) -> Result<Vec<Page>, VhdxError> {
    let items = read_table(view, region, &mut Findings::default())?;
    let is_locator = |entry: &MetadataEntry| {
        entry.id == ITEM_PARENT_LOCATOR.to_bytes_le() && entry.flags.get() & ITEM_IS_USER == 0
    };
    let number = items.all.iter().position(is_locator);
    let number =
        number.ok_or_else(|| corrupt("metadata table", region.offset, "there is no parent locator"))?;
    let value = locator.encode();
    let (offset, length) =
        (items.room_for(number, value.len())?, u32::try_from(value.len()).expect("it has room"));
    let entry = MetadataEntry { offset: offset.into(), length: length.into(), ..items.all[number] };
    let mut pages = BTreeMap::new();
    let place = region.offset + 32 + crate::format::bytes(number) * 32;
    for (at, content) in [(place, entry.as_bytes()), (region.offset + u64::from(offset), &value)] {
        overlay(&mut pages, view, at, content)?;
    }
    Ok(pages.into_iter().map(|(file_offset, content)| Page { file_offset, content }).collect())
}

/// Puts bytes over the pages that hold them.
fn overlay(
    pages: &mut BTreeMap<u64, Vec<u8>>,
    view: &View,
    at: u64,
    content: &[u8],
) -> Result<(), VhdxError> {
    let (mut at, mut left) = (at, content);
    while !left.is_empty() {
        let (page, within) = (at / PAGE * PAGE, index(at % PAGE));
        let count = left.len().min(index(PAGE) - within);
        if let Entry::Vacant(slot) = pages.entry(page) {
            slot.insert(view.read(page, index(PAGE), "metadata region")?);
        }
        pages.get_mut(&page).expect("just read")[within..within + count].copy_from_slice(&left[..count]);
        (at, left) = (at + crate::format::bytes(count), &left[count..]);
    }
    Ok(())
}

/// Reads and checks the region.
pub(crate) fn read(view: &View, region: Area, findings: &mut Findings) -> Result<Metadata, VhdxError> {
    if region.length > METADATA_BYTES_MAX {
        return Err(VhdxError::Limit {
            what: "the length of the metadata region",
            found: region.length,
            bound: METADATA_BYTES_MAX,
        });
    }
    let items = read_table(view, region, findings)?;
    if items.by_id.contains_key(&ITEM_INCOMPLETE) {
        return Err(VhdxError::Incomplete);
    }
    let params: [u8; 8] = items.value(view, ITEM_FILE_PARAMETERS, "file parameters")?;
    let size: [u8; 8] = items.value(view, ITEM_DISK_SIZE, "virtual disk size")?;
    let disk_id: [u8; 16] = items.value(view, ITEM_DISK_ID, "virtual disk id")?;
    let logical: [u8; 4] = items.value(view, ITEM_LOGICAL_SECTOR, "logical sector size")?;
    let physical: [u8; 4] = items.value(view, ITEM_PHYSICAL_SECTOR, "physical sector size")?;
    let [b0, b1, b2, b3, f0, f1, f2, f3] = params;
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    let found = DiskParams {
        disk_bytes: u64::from_le_bytes(size),
        block_bytes: u64::from(u32::from_le_bytes([b0, b1, b2, b3])),
        logical_sector: u32::from_le_bytes(logical),
        physical_sector: u32::from_le_bytes(physical),
        disk_id: Uuid::from_bytes_le(disk_id),
        // A child promises nothing about its space, whatever the flag says.
        fixed: flags & (PARAM_LEAVE_ALLOCATED | PARAM_HAS_PARENT) == PARAM_LEAVE_ALLOCATED,
        has_parent: flags & PARAM_HAS_PARENT != 0,
    };
    if flags & !(PARAM_LEAVE_ALLOCATED | PARAM_HAS_PARENT) != 0 {
        let error = corrupt("file parameters", region.offset, format!("reserved bits are set: {flags:#x}"));
        findings.unknown_meaning(error);
    }
    items.check_parent(&found, findings)?;
    found.check().map_err(|found| corrupt("metadata item", region.offset, found))?;
    let locator = if found.has_parent { Some(items.locator(view)?) } else { None };
    Ok(Metadata { params: found, locator })
}

/// Where in the file the size of the disk is written.
pub(crate) fn size_offset(view: &View, region: Area) -> Result<u64, VhdxError> {
    let items = read_table(view, region, &mut Findings::default())?;
    items.place(ITEM_DISK_SIZE, 8, "virtual disk size")
}

fn read_table(view: &View, region: Area, findings: &mut Findings) -> Result<Items, VhdxError> {
    let table = view.read(region.offset, index(TABLE_BYTES), "metadata table")?;
    let (header, rest) =
        MetadataTableHeader::ref_from_prefix(&table).expect("the table is longer than its header");
    if header.signature != *b"metadata" {
        return Err(corrupt("metadata table", region.offset, "its signature is not `metadata`"));
    }
    let count = header.entry_count.get();
    if count > TABLE_ENTRIES_MAX {
        return Err(corrupt(
            "metadata table",
            region.offset,
            format!("{count} entries, at most {TABLE_ENTRIES_MAX} fit"),
        ));
    }
    if header.reserved.get() != 0 || header.reserved2 != [0; 20] {
        findings.unknown_meaning(corrupt(
            "metadata table",
            region.offset,
            "a reserved field of it is not zero",
        ));
    }
    let (mut by_id, mut seen, mut spans) = (HashMap::new(), HashMap::new(), Vec::new());
    let mut all = Vec::new();
    for number in 0..usize::from(count) {
        let place = region.offset + 32 + crate::format::bytes(number) * 32;
        let (entry, _) = MetadataEntry::ref_from_prefix(&rest[number * 32..]).expect("the count was checked");
        let id = check_entry(entry, place, region)?;
        if entry.flags.get() > 7 || entry.reserved.get() != 0 {
            let (flags, reserved) = (entry.flags.get(), entry.reserved.get());
            let found = format!("item {id} has the flags {flags:#x} and the reserved field {reserved:#x}");
            findings.unknown_meaning(corrupt("metadata table entry", place, found));
        }
        let user = entry.flags.get() & ITEM_IS_USER != 0;
        if seen.insert((id, user), ()).is_some() {
            return Err(corrupt("metadata table entry", place, format!("item {id} occurs twice")));
        }
        if entry.length.get() > 0 {
            spans.push((entry.offset.get(), entry.offset.get() + entry.length.get(), id));
        }
        all.push(*entry);
        if !user {
            check_known(entry, place, id, findings)?;
            by_id.insert(id, *entry);
        }
    }
    check_amount(&spans, &seen)?;
    spans.sort_unstable();
    if let Some(pair) = spans.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        let found = format!("items {} and {} overlap at {:#x}", pair[0].2, pair[1].2, pair[1].0);
        return Err(corrupt("metadata table", region.offset, found));
    }
    Ok(Items { region, all, by_id })
}

fn check_amount(spans: &[(u32, u32, Uuid)], seen: &HashMap<(Uuid, bool), ()>) -> Result<(), VhdxError> {
    let users = seen.keys().filter(|(_, user)| *user).count();
    let bytes: u64 = spans.iter().map(|(start, end, _)| u64::from(end - start)).sum();
    let limit = |what, found, bound| Err(VhdxError::Limit { what, found, bound });
    match () {
        () if users > USER_ITEMS_MAX => limit(
            "the number of user metadata items",
            crate::format::bytes(users),
            crate::format::bytes(USER_ITEMS_MAX),
        ),
        () if seen.len() - users > SYSTEM_ITEMS_MAX => limit(
            "the number of metadata items",
            crate::format::bytes(seen.len() - users),
            crate::format::bytes(SYSTEM_ITEMS_MAX),
        ),
        () if bytes > 2 * CLASS_BYTES_MAX => {
            limit("the length of all metadata items", bytes, 2 * CLASS_BYTES_MAX)
        }
        () => Ok(()),
    }
}

fn check_entry(entry: &MetadataEntry, place: u64, region: Area) -> Result<Uuid, VhdxError> {
    let id = Uuid::from_bytes_le(entry.id);
    let (offset, length) = (u64::from(entry.offset.get()), u64::from(entry.length.get()));
    let bad = |found: String| Err(corrupt("metadata table entry", place, found));
    if id.is_nil() {
        return bad("its item id is zero".to_owned());
    }
    if entry.flags.get() & ITEM_IS_USER != 0 && entry.flags.get() & ITEM_IS_REQUIRED != 0 {
        return bad(format!("user item {id} is marked as required"));
    }
    if length == 0 {
        return if offset == 0 {
            Ok(id)
        } else {
            bad(format!("empty item {id} has offset {offset:#x}, not 0"))
        };
    }
    if offset < TABLE_BYTES || length > MIB || offset + length > region.length {
        return bad(format!(
            "item {id} has {length:#x} bytes at {offset:#x}, outside of the item area of the region"
        ));
    }
    Ok(id)
}

fn check_known(
    entry: &MetadataEntry,
    place: u64,
    id: Uuid,
    findings: &mut Findings,
) -> Result<(), VhdxError> {
    let flags = entry.flags.get() & (ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED);
    let wanted = match id {
        ITEM_FILE_PARAMETERS | ITEM_PARENT_LOCATOR => ITEM_IS_REQUIRED,
        ITEM_DISK_SIZE | ITEM_DISK_ID | ITEM_LOGICAL_SECTOR | ITEM_PHYSICAL_SECTOR => {
            ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED
        }
        // Neither changes what a sector holds; both are kept.
        ITEM_INCOMPLETE | ITEM_CHS | ITEM_PMEM_LABELS => return Ok(()),
        _ if flags & ITEM_IS_REQUIRED != 0 => {
            return Err(VhdxError::Unsupported {
                what: format!("required metadata item {id} in the table at {place:#x}"),
                hint: "the image needs a newer reader; convert it with the tool that made it",
            });
        }
        _ => return Ok(()),
    };
    if flags != wanted {
        findings
            .warn(format!("metadata item {id} at {place:#x} has flags {flags:#x}, usual are {wanted:#x}"));
    }
    Ok(())
}

impl Items {
    fn value<const N: usize>(&self, view: &View, id: Uuid, name: &'static str) -> Result<[u8; N], VhdxError> {
        let value = view.read(self.place(id, N, name)?, N, name)?;
        Ok(value.try_into().expect("N bytes were read"))
    }

    /// Where an item of `len` bytes lies in the file.
    fn place(&self, id: Uuid, len: usize, name: &'static str) -> Result<u64, VhdxError> {
        let Some(entry) = self.by_id.get(&id) else {
            return Err(corrupt("metadata table", self.region.offset, format!("there is no {name} item")));
        };
        let at = self.region.offset + u64::from(entry.offset.get());
        if entry.length.get() as usize != len {
            let found = format!("the {name} item has {} bytes instead of {len}", entry.length.get());
            return Err(corrupt("metadata item", at, found));
        }
        Ok(at)
    }

    /// Where `len` bytes of an item have room: in its own place, else behind all others.
    fn room_for(&self, number: usize, len: usize) -> Result<u32, VhdxError> {
        let len = crate::format::bytes(len);
        let others =
            self.all.iter().enumerate().filter(|(other, entry)| *other != number && entry.length.get() > 0);
        let spans: Vec<(u64, u64)> = others
            .map(|(_, entry)| {
                (u64::from(entry.offset.get()), u64::from(entry.offset.get() + entry.length.get()))
            })
            .collect();
        let behind = spans.iter().map(|span| span.1).fold(TABLE_BYTES, u64::max);
        let is_free = |start: &u64| {
            let end = start + len;
            *start >= TABLE_BYTES
                && end <= self.region.length
                && spans.iter().all(|span| end <= span.0 || span.1 <= *start)
        };
        let place = [u64::from(self.all[number].offset.get()), behind]
            .into_iter()
            .find(is_free)
            .filter(|_| len <= MIB);
        place.map(|place| u32::try_from(place).expect("a region is shorter than 4 GiB")).ok_or(
            VhdxError::Limit {
                what: "the length of the parent locator",
                found: len,
                bound: self.region.length.saturating_sub(behind).min(MIB),
            },
        )
    }

    fn locator(&self, view: &View) -> Result<Locator, VhdxError> {
        let entry = self.by_id.get(&ITEM_PARENT_LOCATOR).expect("checked with the flag");
        let at = self.region.offset + u64::from(entry.offset.get());
        Locator::parse(&view.read(at, entry.length.get() as usize, "parent locator")?, at)
    }

    fn check_parent(&self, params: &DiskParams, findings: &mut Findings) -> Result<(), VhdxError> {
        let locator = self.by_id.contains_key(&ITEM_PARENT_LOCATOR);
        match (params.has_parent, locator) {
            (true, false) => Err(corrupt(
                "metadata table",
                self.region.offset,
                "the image has a parent, but there is no parent locator",
            )),
            (false, true) => {
                findings.warn(
                    "there is a parent locator, but the image says that it has no parent; it is ignored",
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl DiskParams {
    /// Whether all values are lawful; the reason if not.
    pub(crate) fn check(&self) -> Result<(), String> {
        let Self { disk_bytes, block_bytes, logical_sector, physical_sector, .. } = *self;
        if !block_bytes.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return Err(format!("block size {block_bytes}; it must be a power of two from 1 MiB to 256 MiB"));
        }
        if ![512, 4096].contains(&logical_sector) {
            return Err(format!("logical sector size {logical_sector}; it must be 512 or 4096"));
        }
        if ![512, 4096].contains(&physical_sector) {
            return Err(format!("physical sector size {physical_sector}; it must be 512 or 4096"));
        }
        if disk_bytes == 0
            || disk_bytes > DISK_BYTES_MAX
            || !disk_bytes.is_multiple_of(u64::from(logical_sector))
        {
            return Err(format!(
                "disk size {disk_bytes}; it must be a multiple of the sector size {logical_sector}, up to 64 TiB"
            ));
        }
        Ok(())
    }

    /// The first bytes of a metadata region that describes this disk; the rest of the region is zero.
    pub(crate) fn encode(&self, locator: Option<&Locator>, inherited: &[Item]) -> Vec<u8> {
        let fixed = if self.fixed { PARAM_LEAVE_ALLOCATED } else { 0 };
        let parent = if self.has_parent { PARAM_HAS_PARENT } else { 0 };
        let block = u32::try_from(self.block_bytes).expect("at most 256 MiB");
        let params = [block.to_le_bytes(), (fixed | parent).to_le_bytes()].concat();
        let disk = ITEM_IS_VIRTUAL_DISK | ITEM_IS_REQUIRED;
        let item = |id, flags, value| Item { id, flags, value };
        let mut items = vec![
            item(ITEM_FILE_PARAMETERS, ITEM_IS_REQUIRED, params),
            item(ITEM_DISK_SIZE, disk, self.disk_bytes.to_le_bytes().to_vec()),
            item(ITEM_LOGICAL_SECTOR, disk, self.logical_sector.to_le_bytes().to_vec()),
            item(ITEM_PHYSICAL_SECTOR, disk, self.physical_sector.to_le_bytes().to_vec()),
            item(ITEM_DISK_ID, disk, self.disk_id.to_bytes_le().to_vec()),
        ];
        items.extend_from_slice(inherited);
        // Last, so that it has room to grow when the parent moves.
        items.extend(locator.map(|locator| item(ITEM_PARENT_LOCATOR, ITEM_IS_REQUIRED, locator.encode())));
        encode_items(&items)
    }
}

fn encode_items(items: &[Item]) -> Vec<u8> {
    let mut region = vec![0; index(TABLE_BYTES)];
    let header = MetadataTableHeader {
        signature: *b"metadata",
        reserved: 0.into(),
        entry_count: u16::try_from(items.len()).expect("at most 2047 items").into(),
        reserved2: [0; 20],
    };
    region[..32].copy_from_slice(header.as_bytes());
    for (number, item) in items.iter().enumerate() {
        // An empty item has no place.
        let offset = if item.value.is_empty() { 0 } else { region.len() };
        let entry = MetadataEntry {
            id: item.id.to_bytes_le(),
            offset: u32::try_from(offset).expect("a region is shorter than 4 GiB").into(),
            length: u32::try_from(item.value.len()).expect("at most 1 MiB").into(),
            flags: item.flags.into(),
            reserved: 0.into(),
        };
        let at = 32 + number * 32;
        region[at..at + 32].copy_from_slice(entry.as_bytes());
        region.extend_from_slice(&item.value);
    }
    region
}
