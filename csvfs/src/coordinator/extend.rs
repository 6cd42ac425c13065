//! A volume that grows with its LUN, while it is used.
//!
//! ```text
//!   superblock: new size, both copies --> tables: the new blocks are free, and accounted for
//! ```
//! The tables say how many blocks they account for. A crash between the two steps leaves a superblock that is ahead; the
//! next coordinator does the second step when it opens (G1). **Invariant:** no block is free before the superblock that
//! has it is on both copies.

use super::core::Core;
use super::open::{held_back, still_owner};
use crate::alloc::Allocator;
use crate::extents::Run;
use crate::format::layout::BLOCK_BYTES;
use crate::format::superblock::Superblock;
use crate::meta::{StoreError, Tables};
use crate::proto::{Extended, reply};
use crate::refusal::{OpError, errno};
use crate::volume::{VolumeError, usable_bytes};

impl Core {
    pub(super) fn extend(&mut self, tables: &mut Tables<'_>) -> Result<reply::Result, OpError> {
        let old_bytes = self.lun_bytes;
        let new_bytes = usable_bytes(self.device.size_now());
        if new_bytes < old_bytes {
            let what = format!("the LUN has {new_bytes} bytes, less than the volume's {old_bytes}");
            return Err(errno(libc::EINVAL, what));
        }
        if new_bytes > old_bytes {
            self.write_size(new_bytes)?;
            let run = Run { start: old_bytes / BLOCK_BYTES, blocks: (new_bytes - old_bytes) / BLOCK_BYTES };
            self.alloc.free(run);
            tables.put_area_blocks(new_bytes / BLOCK_BYTES)?;
            self.lun_bytes = new_bytes;
            self.held_back = held_back(new_bytes);
            self.hold_back();
            tracing::info!(volume = %self.volume, old_bytes, new_bytes, "the volume was extended");
        }
        Ok(reply::Result::Extended(Extended { old_bytes, new_bytes }))
    }

    fn write_size(&self, lun_bytes: u64) -> Result<(), OpError> {
        let device = self.device.as_ref();
        if !still_owner(device, self).is_ok_and(|ours| ours) {
            let how = "the owner block names a newer coordinator".to_owned();
            return Err(StoreError::Superseded { how }.into());
        }
        let failed = |error: VolumeError| StoreError::Engine {
            doing: "write the volume's new size",
            source: Box::new(error),
        };
        let block = Superblock::read(device).map_err(failed)?;
        block.resized(device, lun_bytes).map_err(failed)?;
        Ok(())
    }
}

/// What of the LUN the tables do not account for becomes free: an extension that was cut short is finished. Gives whether
/// anything was written.
pub(super) fn account_for(
    tables: &mut Tables<'_>,
    alloc: &mut Allocator,
    lun_bytes: u64,
) -> Result<bool, StoreError> {
    let blocks = lun_bytes / BLOCK_BYTES;
    let known = tables.area_blocks()?;
    if known == Some(blocks) {
        return Ok(false);
    }
    // A volume of an older version accounts for all of it: it could not be extended.
    let start = known.unwrap_or(blocks);
    if start > blocks {
        return Err(StoreError::Damaged {
            what: format!("the tables have {start} blocks, the LUN {blocks}"),
        });
    }
    if start < blocks {
        tracing::info!(blocks = blocks - start, "finishing an extension of the volume");
        alloc.free(Run { start, blocks: blocks - start });
    }
    for (start, blocks) in alloc.settle().map_err(|twice| StoreError::Damaged { what: twice.to_string() })? {
        match blocks {
            Some(blocks) => tables.put_free(start, blocks)?,
            None => tables.remove_free(start)?,
        }
    }
    tables.put_area_blocks(blocks)?;
    Ok(true)
}
