//! Changing metadata of a closed image, all of it or nothing.
//!
//! ```text
//! header A: new file write id, no log + log entry with the pages -> flush -> header B: its log id  -> flush   <- commit point
//! pages in place -> flush -> header: no log -> flush -> other header -> flush
//! ```
//! **Invariant:** until the header names the log the image is what it was; from then on it is what it becomes, because every
//! opener replays.

use blockio::ImageFile;
use uuid::Uuid;

use crate::error::{VhdxError, doing};
use crate::header::CurrentHeader;
use crate::log::{LogWriter, PAGES_PER_ENTRY, Page};
use crate::mutation::Mutation;
use crate::recover::clear_log_id;

/// Replaces `pages`, at most one log entry of them, in a closed image of `file_bytes` durable bytes. When the guest sees
/// another disk afterwards, it gets a new `data_write_id`: children of what it was must no longer fit.
pub(crate) fn amend(
    file: &dyn ImageFile,
    header: &mut CurrentHeader,
    pages: &[Page],
    file_bytes: u64,
    data_write_id: Option<Uuid>,
    mutation: Option<Mutation>,
) -> Result<(), VhdxError> {
    debug_assert!(header.header.log_id().is_none(), "the image is closed");
    if pages.len() > PAGES_PER_ENTRY {
        return Err(VhdxError::Limit {
            what: "the number of metadata pages that change at once",
            found: crate::format::bytes(pages.len()),
            bound: crate::format::bytes(PAGES_PER_ENTRY),
        });
    }
    header.update(file, |header| {
        header.file_write_id = Uuid::new_v4().to_bytes_le();
        if let Some(id) = data_write_id {
            header.data_write_id = id.to_bytes_le();
        }
    })?;
    let (ring_offset, ring_bytes) = header.log_area();
    let mut log = LogWriter::new(ring_offset, ring_bytes);
    let entry = log.append(pages, file_bytes);
    let at = entry.file_offset;
    file.write_at(at, &entry.content).map_err(doing(format!("writing a log entry at {at:#x}")))?;
    if mutation != Some(Mutation::NameBeforeEntry) {
        file.flush().map_err(doing("flushing the log"))?;
    }
    header.update(file, |header| {
        header.log_id = log.id.to_bytes_le();
        header.log_version = 0.into();
    })?;
    file.flush().map_err(doing("flushing the header"))?;
    for page in pages {
        let at = page.file_offset;
        file.write_at(at, &page.content).map_err(doing(format!("writing metadata at {at:#x}")))?;
    }
    if mutation != Some(Mutation::UnflushedChange) {
        file.flush().map_err(doing("flushing the metadata"))?;
    }
    clear_log_id(file, header, mutation)
}
