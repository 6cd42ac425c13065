//! Giving space of the file back while the guest uses the disk.
//!
//! ```text
//!   file:  [areas][ A ][ 0 ][ B ][ gap ][ C ]      blocks that are all zeros give their place up,
//!          [areas][ A ][ C ][ B ]                  the highest blocks move to the lowest gaps, the file is cut behind the last
//! ```
//! Blocks that the guest is writing at the moment are passed over and tried again; one that it never lets go of stays.
//!
//! **Invariant:** the guest reads the same bytes before, during and after; the id that children refer to stays.

use std::ops::ControlFlow;

use blockio::BlockDevice;

use crate::children::{self, Reach};
use crate::core::{Core, Ticket, lock};
use crate::disk::Disk;
use crate::error::VhdxError;
use crate::format::MIB;
use crate::moves::{Move, Moves};

/// Bytes moved between two flushes; at least one block.
const BATCH_BYTES: u64 = 64 * MIB;
/// Rounds over blocks that were being written.
const ROUNDS_MAX: usize = 4;

/// How far a compaction has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CompactProgress {
    /// Blocks that were looked at.
    pub scanned_blocks: u64,
    /// Blocks of the disk.
    pub total_blocks: u64,
    /// Blocks that gave up their place, because they are all zeros.
    pub zero_blocks: u64,
    /// Blocks that moved.
    pub moved_blocks: u64,
}

/// What a compaction did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compacted {
    /// Size of the file before.
    pub old_file_bytes: u64,
    /// Size of the file now.
    pub new_file_bytes: u64,
    /// Blocks that gave up their place.
    pub zero_blocks: u64,
    /// Blocks that moved.
    pub moved_blocks: u64,
    /// It was cancelled; what was done until then is done.
    pub cancelled: bool,
}

/// Told how far it is; says whether to go on.
pub type CompactWatch<'a> = &'a mut dyn FnMut(CompactProgress) -> ControlFlow<()>;

impl Disk {
    /// Gives back the space of blocks that are zero and of gaps, while the guest goes on. Requests to a block wait while it is
    /// moved, and all of them for a few flushes at the end.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidInput`] for a fixed image, which promises to keep its space,
    /// [`crate::ErrorKind::HasChildren`] when others may have it open as their parent; else when the file fails or the disk is
    /// closed meanwhile. The image is sound in any case.
    pub fn compact(&self, watch: CompactWatch<'_>) -> Result<Compacted, VhdxError> {
        let core = self.core();
        if core.params.fixed {
            let text = "a fixed image keeps the space of all its blocks; convert it to a dynamic one to give space back";
            return Err(VhdxError::InvalidInput(text.to_owned()));
        }
        children::refuse(&core.file, &self.options(), Reach::Everywhere, &[])?;
        let _alone = lock(&core.compaction);
        let old_file_bytes = core.file.geometry().size_bytes;
        let mut run = Run { disk: self, watch, progress: CompactProgress::default() };
        let cancelled = run.drop_zero_blocks()?.is_break() || run.move_blocks_down()?.is_break();
        let CompactProgress { zero_blocks, moved_blocks, .. } = run.progress;
        self.give_back()?;
        let new_file_bytes = self.core().file.geometry().size_bytes;
        Ok(Compacted { old_file_bytes, new_file_bytes, zero_blocks, moved_blocks, cancelled })
    }
}

struct Run<'a> {
    disk: &'a Disk,
    watch: CompactWatch<'a>,
    progress: CompactProgress,
}

impl Run<'_> {
    /// Admitted for one batch: a close or a resize waits for it, not for all of the compaction.
    fn enter(&self) -> Result<Ticket, VhdxError> {
        let refused = |source| VhdxError::Io { doing: "compacting the image".to_owned(), source };
        self.disk.enter().map_err(refused)
    }

    fn drop_zero_blocks(&mut self) -> Result<ControlFlow<()>, VhdxError> {
        let mut block = 0;
        loop {
            let ticket = self.enter()?;
            let bat = &ticket.core().bat;
            self.progress.total_blocks = bat.shape.blocks;
            let Some(owner) =
                (block..bat.shape.blocks).find(|block| bat.get(*block).owned_offset().is_some())
            else {
                self.progress.scanned_blocks = bat.shape.blocks;
                return Ok((self.watch)(self.progress));
            };
            block = owner + 1;
            self.progress.zero_blocks += u64::from(drop_zero_block(ticket, owner)?);
            self.progress.scanned_blocks = block;
            if (self.watch)(self.progress).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
    }

    fn move_blocks_down(&mut self) -> Result<ControlFlow<()>, VhdxError> {
        for _ in 0..ROUNDS_MAX {
            let mut left = highest_first(&self.disk.core()).into_iter();
            let mut passed_over = 0;
            while left.len() > 0 {
                let mut moves = Moves::begin(self.enter()?)?;
                passed_over += fill_batch(&mut moves, &mut left)?;
                self.progress.moved_blocks += moves.finish()?;
                if (self.watch)(self.progress).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
            }
            if passed_over == 0 {
                break;
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

/// True when the block gave its place up.
fn drop_zero_block(ticket: Ticket, block: u64) -> Result<bool, VhdxError> {
    let is_anchor = ticket.core().bat.get(block).place().is_none();
    let mut moves = Moves::begin(ticket)?;
    if is_anchor {
        moves.drop_anchor(block);
        return Ok(false);
    }
    let dropped = moves.looks_zero(block)? && moves.drop_if_zero(block)?;
    if dropped {
        moves.finish()?;
    }
    Ok(dropped)
}

/// Copies blocks until the batch is full, or none can go lower; how many were being written.
fn fill_batch(moves: &mut Moves, left: &mut std::vec::IntoIter<u64>) -> Result<u64, VhdxError> {
    let room = (BATCH_BYTES / moves.block_bytes()).max(1);
    let (mut copied, mut passed_over) = (0, 0);
    while copied < room {
        let Some(block) = left.next() else { break };
        match moves.copy_down(block)? {
            Move::Copied => copied += 1,
            Move::NotNow => passed_over += 1,
            // Those that follow lie lower still.
            Move::NoRoom => *left = Vec::new().into_iter(),
        }
    }
    Ok(passed_over)
}

/// Blocks by their place in the file, the last first.
fn highest_first(core: &Core) -> Vec<u64> {
    let placed = |block| core.bat.get(block).place().map(|place| (place, block));
    let mut blocks: Vec<_> = (0..core.bat.shape.blocks).filter_map(placed).collect();
    blocks.sort_unstable_by(|a, b| b.cmp(a));
    blocks.into_iter().map(|(_, block)| block).collect()
}
