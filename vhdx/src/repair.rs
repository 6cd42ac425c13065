//! Putting right what can be put right without guessing at content.
//!
//! ```text
//! log replayed or its orphan id cleared -> headers -> region tables -> stale table entries -> surplus of the file cut
//! ```
//! **Invariant:** an image with an error is not touched. Each step is atomic or harmless to repeat, so a power cut in the
//! middle leaves an image as sound as before, with fewer defects.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockio::ImageFile;
use uuid::Uuid;

use crate::amend::amend;
use crate::check::{Report, check};
use crate::defects::{Defect, stale_blocks};
use crate::error::{VhdxError, doing};
use crate::findings::Findings;
use crate::format::{MIB, PAGE, REGION_TABLE_OFFSETS, index};
use crate::load::{Loaded, LogPolicy};
use crate::log::{PAGES_PER_ENTRY, Page};
use crate::open::Options;
use crate::recover::recover;
use crate::region;
use crate::running::refuse_unwritable;

/// What a repair did.
#[derive(Clone, Debug)]
pub struct Repaired {
    /// What was put right.
    pub repaired: Vec<Defect>,
    /// The image afterwards.
    pub report: Report,
}

/// Puts right what a check of the image in `file` found, as far as no content must be guessed for it.
///
/// # Errors
/// The first error of the check, with nothing changed: such an image is to be restored from a backup. Otherwise when the file
/// fails.
pub fn repair(file: &Arc<dyn ImageFile>) -> Result<Repaired, VhdxError> {
    let before = check(file);
    if let Some(error) = before.errors.into_iter().next() {
        return Err(error);
    }
    let mut repaired = Vec::new();
    for defect in before.defects {
        put_right(file, &defect)?;
        repaired.push(defect);
    }
    Ok(Repaired { repaired, report: check(file) })
}

fn put_right(file: &Arc<dyn ImageFile>, defect: &Defect) -> Result<(), VhdxError> {
    if matches!(defect, Defect::OrphanLogId { .. } | Defect::DirtyLog { .. }) {
        return recover(file, &Options { repair: true, ..Options::default() }).map(drop);
    }
    // Each step reads anew what the one before has left.
    let mut findings = Findings::default();
    let mut loaded = Loaded::read(file, LogPolicy::InMemory, &mut findings)?;
    refuse_unwritable(&loaded)?;
    match defect {
        Defect::OrphanLogId { .. } | Defect::DirtyLog { .. } => Ok(()),
        Defect::HeaderCopy { .. } => rewrite_headers(&mut loaded),
        Defect::RegionTableCopy { .. } | Defect::RegionTablesDiffer => rewrite_region_tables(&mut loaded),
        Defect::StaleOffsets { .. } => clear_stale_offsets(&mut loaded),
        Defect::LeakedSpace { .. } => {
            let end = loaded.used_end();
            file.set_len(end).map_err(doing(format!("cutting the file to {end} bytes")))?;
            file.flush().map_err(doing("flushing the file"))
        }
    }
}

/// Both copies, one after the other: the damaged one first.
fn rewrite_headers(loaded: &mut Loaded) -> Result<(), VhdxError> {
    let file = &*loaded.view.file;
    loaded.header.update(file, |header| header.file_write_id = Uuid::new_v4().to_bytes_le())?;
    file.flush().map_err(doing("flushing the header"))?;
    loaded.header.catch_up(file)?;
    file.flush().map_err(doing("flushing the header"))
}

/// The copy that counts, to both places in one log entry.
fn rewrite_region_tables(loaded: &mut Loaded) -> Result<(), VhdxError> {
    let ([Some(table), _] | [None, Some(table)]) = region::copies(&loaded.view)? else { return Ok(()) };
    let page = |at: u64, content: &[u8]| Page { file_offset: at, content: content.to_vec() };
    let pages: Vec<Page> = REGION_TABLE_OFFSETS
        .into_iter()
        .flat_map(|offset| (offset..).step_by(index(PAGE)).zip(table.chunks_exact(index(PAGE))))
        .map(|(at, content)| page(at, content))
        .collect();
    change(loaded, &pages)
}

/// Entries without a place are written with none, as many pages at once as a log entry holds.
fn clear_stale_offsets(loaded: &mut Loaded) -> Result<(), VhdxError> {
    let stale: BTreeSet<u64> = stale_blocks(loaded).map(|block| loaded.bat.page_of(block)).collect();
    let stale: Vec<u64> = stale.into_iter().collect();
    for pages in stale.chunks(PAGES_PER_ENTRY) {
        let bat = &loaded.bat;
        let page = |page: &u64| Page { file_offset: bat.page_offset(*page), content: bat.page_bytes(*page) };
        let pages: Vec<Page> = pages.iter().map(page).collect();
        change(loaded, &pages)?;
    }
    Ok(())
}

/// The guest sees nothing of a repair, so children still fit.
fn change(loaded: &mut Loaded, pages: &[Page]) -> Result<(), VhdxError> {
    let file_bytes = loaded.view.file_bytes / MIB * MIB;
    amend(&*loaded.view.file, &mut loaded.header, pages, file_bytes, None, None)
}
