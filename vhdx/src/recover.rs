//! Making a dirty image clean before it is written: the log is replayed into the file.
//!
//! ```text
//! header: new file write id, same log id -> flush -> pages in place, file grown -> flush -> header: log id zero (both)
//! ```
//! **Invariant:** until the pages are durable the header still names the log, so a crash here only means doing it again.

use std::sync::Arc;

use blockio::ImageFile;
use tracing::info;
use uuid::Uuid;

use crate::error::{VhdxError, doing};
use crate::header::CurrentHeader;
use crate::load::read_identity;
use crate::mutation::Mutation;
use crate::open::Options;
use crate::replay::{LogState, read_log};
use crate::view::View;

/// Replays the log of `file`, if there is one. Tells whether there was.
pub(crate) fn recover(file: &Arc<dyn ImageFile>, options: &Options) -> Result<bool, VhdxError> {
    let view = View::of(file);
    read_identity(&view)?;
    let mut header = CurrentHeader::read(&view)?;
    let replay = match read_log(&view, &header)? {
        LogState::Clean => return Ok(false),
        LogState::Orphan(log_id) if !options.repair => {
            let (file_offset, _) = header.log_area();
            return Err(VhdxError::OrphanLogId { log_id, file_offset });
        }
        LogState::Orphan(_) => None,
        LogState::Dirty(replay) => Some(replay),
    };
    header.update(&**file, |header| header.file_write_id = Uuid::new_v4().to_bytes_le())?;
    flush(file)?;
    if let Some(replay) = replay {
        replay.write_to(&**file, view.file_bytes)?;
        if options.mutation != Some(Mutation::UnflushedReplay) {
            flush(file)?;
        }
        info!(file = %file.identity(), entries = replay.entries, "log replayed");
    }
    clear_log_id(&**file, &mut header, options.mutation)?;
    Ok(true)
}

/// Says in both headers that there is no log. Three durable steps with what came before.
pub(crate) fn clear_log_id(
    file: &dyn ImageFile,
    header: &mut CurrentHeader,
    mutation: Option<Mutation>,
) -> Result<(), VhdxError> {
    header.update(file, |header| header.log_id = [0; 16])?;
    if mutation != Some(Mutation::HeadersTogether) {
        file.flush().map_err(doing("flushing the header"))?;
    }
    header.catch_up(file)?;
    file.flush().map_err(doing("flushing the header"))
}

fn flush(file: &Arc<dyn ImageFile>) -> Result<(), VhdxError> {
    file.flush().map_err(doing("flushing the file during log replay"))
}
