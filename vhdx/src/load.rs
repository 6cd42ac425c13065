//! Reading everything that an open image needs, in the order in which one structure vouches for the next.
//!
//! ```text
//! file identifier -> headers -> log (replayed in memory) -> region tables -> metadata -> BAT -> owners -> sector bitmaps
//! ```
//! **Invariant:** nothing here writes.

use std::sync::Arc;

use blockio::ImageFile;
use tracing::warn;

use uuid::Uuid;

use crate::bat::{Bat, BatShape};
use crate::bitmap::Bitmaps;
use crate::error::{VhdxError, corrupt};
use crate::findings::Findings;
use crate::format::{CREATOR_BYTES, FILE_SIGNATURE, HEADER_AREA_BYTES, index};
use crate::header::CurrentHeader;
use crate::locator::Locator;
use crate::metadata::{self, DiskParams, Metadata};
use crate::open::Options;
use crate::owners::{self, Owners};
use crate::region::{Area, Regions};
use crate::replay::{LogState, read_log};
use crate::view::View;

/// What to do about the log while loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogPolicy {
    /// Read through it.
    InMemory,
    /// Do not look at it: another node may be writing it.
    Ignore,
}

/// An image as it was read.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Content after replay.
    pub(crate) view: View,
    /// The current header.
    pub(crate) header: CurrentHeader,
    /// Where BAT and metadata are.
    pub(crate) regions: Regions,
    /// What the disk is.
    pub(crate) params: DiskParams,
    /// Which image it differs from.
    pub(crate) locator: Option<Locator>,
    /// Where the blocks are.
    pub(crate) bat: Bat,
    /// Which sectors of partially present blocks are here; only with a parent.
    pub(crate) bitmaps: Option<Bitmaps>,
    /// What blocks and bitmaps own.
    pub(crate) owners: Owners,
    /// What the log said.
    pub(crate) log: LogState,
    /// Who made the file.
    pub(crate) creator: String,
}

/// Checks that the file is a VHDX at all and returns who made it.
pub(crate) fn read_identity(view: &View) -> Result<String, VhdxError> {
    let there = index(view.file_bytes.min(4096) / 512 * 512);
    let head = view.read(0, there, "file identifier")?;
    if !head.starts_with(&FILE_SIGNATURE) {
        return Err(VhdxError::NotVhdx {
            found: guess(&head, view.file_bytes),
            hint: "check the path, or convert the image to VHDX first",
        });
    }
    if view.file_bytes < HEADER_AREA_BYTES {
        return Err(VhdxError::Truncated {
            structure: "header area",
            need: HEADER_AREA_BYTES,
            have: view.file_bytes,
        });
    }
    let text = &head[8..8 + CREATOR_BYTES];
    let units =
        text.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).take_while(|unit| *unit != 0);
    let creator = char::decode_utf16(units).map(|char| char.unwrap_or(char::REPLACEMENT_CHARACTER));
    Ok(creator.filter(|char| !char.is_control()).collect())
}

fn guess(head: &[u8], file_bytes: u64) -> String {
    let known: [(&[u8], &str); 5] = [
        (b"QFI\xfb", "a qcow2 image"),
        (b"conectix", "a VHD image of the older format"),
        (b"cxsparse", "a VHD image of the older format"),
        (b"KDMV", "a VMDK image"),
        (b"<<< ", "a VDI image"),
    ];
    let name = known.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, name)| *name);
    match name {
        Some(name) => format!("it is {name}"),
        None if head.iter().all(|byte| *byte == 0) => {
            format!("its first bytes are zero (file of {file_bytes} bytes)")
        }
        None => format!("it starts with {:02x?} instead of `vhdxfile`", &head[..head.len().min(8)]),
    }
}

/// What an image says before its block table.
pub(crate) struct Front {
    view: View,
    header: CurrentHeader,
    regions: Regions,
    /// What the disk is, and which image it differs from.
    pub(crate) metadata: Metadata,
    log: LogState,
    creator: String,
}

/// Reads everything but the block table and what it refers to.
pub(crate) fn read_front(
    file: &Arc<dyn ImageFile>,
    policy: LogPolicy,
    findings: &mut Findings,
) -> Result<Front, VhdxError> {
    let mut view = View::of(file);
    let creator = read_identity(&view)?;
    let header = CurrentHeader::read(&view)?;
    if !header.both_valid {
        findings.warn("one of the two headers is damaged; the other serves");
    }
    let log = match policy {
        LogPolicy::InMemory => read_log(&view, &header)?,
        LogPolicy::Ignore => LogState::Clean,
    };
    match &log {
        LogState::Dirty(replay) => {
            view.view_bytes = replay.file_bytes;
            view.patches = replay.patches.clone();
        }
        LogState::Orphan(id) => {
            findings.warn(format!("the header names the log {id}, which has no entry"));
        }
        LogState::Clean => (),
    }
    let regions = Regions::read(&view, findings)?;
    check_areas(&areas(&header, &regions), view.view_bytes)?;
    let metadata = metadata::read(&view, regions.metadata, findings)?;
    Ok(Front { view, header, regions, metadata, log, creator })
}

impl Loaded {
    /// Reads the image. Errors of single blocks are added to `findings`; what stops the reading is returned.
    pub(crate) fn read(
        file: &Arc<dyn ImageFile>,
        policy: LogPolicy,
        findings: &mut Findings,
    ) -> Result<Self, VhdxError> {
        let front = read_front(file, policy, findings)?;
        let Front { view, header, regions, metadata: Metadata { params, locator }, log, creator } = front;
        let bat = Bat::read(&view, regions.bat, BatShape::of(&params))?;
        // A live log that is not looked at means that the table may be behind it.
        let mut owners = match policy {
            LogPolicy::Ignore if header.header.log_id().is_some() => Owners::default(),
            _ => owners::find(&bat, view.view_bytes, &params, &areas(&header, &regions), findings),
        };
        if policy == LogPolicy::Ignore && !findings.errors.is_empty() && header.is_outdated(&view)? {
            // Its writer was at work between the header and the table: nothing was proved, nothing is wrong.
            findings.errors.clear();
            owners = Owners::default();
        }
        let bitmaps = match (params.has_parent, findings.errors.is_empty()) {
            (true, true) => Some(Bitmaps::read(&view, &bat, &params, &owners.partial)?),
            (true, false) => Some(Bitmaps::empty(&bat.shape, &params)),
            (false, _) => None,
        };
        Ok(Self { view, header, regions, params, locator, bat, bitmaps, owners, log, creator })
    }

    /// The same for an open: the first error ends it, warnings go to the log.
    pub(crate) fn open(file: &Arc<dyn ImageFile>, policy: LogPolicy) -> Result<(Self, Findings), VhdxError> {
        Self::open_as(file, policy, &Options::default())
    }

    /// The same as tolerant as the caller wants it.
    pub(crate) fn open_as(
        file: &Arc<dyn ImageFile>,
        policy: LogPolicy,
        options: &Options,
    ) -> Result<(Self, Findings), VhdxError> {
        let tolerate_draft_states = options.tolerate_draft_states;
        let mut findings = Findings { tolerate_draft_states, ..Findings::default() };
        let loaded = Self::read(file, policy, &mut findings)?;
        let findings = findings.into_result()?;
        for text in &findings.warnings {
            warn!(file = %file.identity(), "{text}");
        }
        Ok((loaded, findings))
    }

    /// Everything that is not a payload block.
    pub(crate) fn areas(&self) -> Vec<Area> {
        areas(&self.header, &self.regions)
    }

    /// End of the last byte that anything owns, as a multiple of 1 MiB.
    pub(crate) fn used_end(&self) -> u64 {
        let owned = self.owners.spans(self.params.block_bytes).map(|(offset, len)| offset + len);
        self.areas().iter().map(Area::end).chain(owned).fold(0, u64::max)
    }

    /// What children refer to.
    pub(crate) fn data_write_id(&self) -> Uuid {
        Uuid::from_bytes_le(self.header.header.data_write_id)
    }

    /// How messages call the file.
    pub(crate) fn name(&self) -> String {
        self.view.file.identity()
    }
}

fn areas(header: &CurrentHeader, regions: &Regions) -> Vec<Area> {
    let (offset, length) = header.log_area();
    let fixed = [
        Area { offset: 0, length: HEADER_AREA_BYTES, owner: "header area" },
        Area { offset, length, owner: "log" },
    ];
    fixed.into_iter().chain(regions.areas()).filter(|area| area.length > 0).collect()
}

fn check_areas(areas: &[Area], view_bytes: u64) -> Result<(), VhdxError> {
    let mut sorted = areas.to_vec();
    sorted.sort_unstable_by_key(|area| area.offset);
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0].end() > pair[1].offset) {
        let found = format!("the {} overlaps the {} at {:#x}", pair[1].owner, pair[0].owner, pair[0].offset);
        return Err(corrupt("layout", pair[1].offset, found));
    }
    match sorted.last() {
        Some(area) if area.end() > view_bytes => Err(corrupt(
            "layout",
            area.offset,
            format!("the {} ends past the end of the file at {view_bytes:#x}", area.owner),
        )),
        _ => Ok(()),
    }
}
