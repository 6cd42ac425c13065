//! Holes made in a file, and ranges that read zeros from now on.
//!
//! ```text
//!   offset                                     offset + len
//!     |  zeros written  | whole blocks: freed  |  zeros written  |
//! ```

use std::ops::Range;
use std::sync::{Arc, mpsc};

use blockio::IoBuf;
use lockmgr::Mode;
use pb::request::Op;

use super::FsError;
use super::inode::{Holding, Inode};
use super::io::{DataOp, What};
use super::map::{block_ceil, block_floor, end_of};
use crate::proto as pb;

impl Inode {
    /// Frees what lies in a range; it reads zeros then. The size stays.
    pub(super) fn punch(self: &Arc<Self>, offset: u64, len: u64) -> Result<(), FsError> {
        let end = end_of(offset, len)?;
        let size = self.size_now()?;
        // Nothing of the last block is visible behind the end of the file.
        let (first, last) =
            (block_ceil(offset), if end >= size { block_ceil(end) } else { block_floor(end) });
        self.zero_edge(offset..end.min(first), size)?;
        if last >= first {
            self.zero_edge(last..end, size)?;
        }
        if first < last { self.free(first..last) } else { Ok(()) }
    }

    /// Writes zeros where something was written. Within one block.
    fn zero_edge(self: &Arc<Self>, range: Range<u64>, size: u64) -> Result<(), FsError> {
        let range = range.start..range.end.min(size);
        if range.is_empty() {
            return Ok(());
        }
        let len = usize::try_from(range.end - range.start).unwrap_or_default();
        let (tell, told) = mpsc::sync_channel(1);
        let done = Box::new(move |outcome: Result<u64, FsError>| drop(tell.send(outcome)));
        let (offset, buf) = (range.start, IoBuf::zeroed(len));
        self.submit(DataOp { what: What::Zero, offset, buf, exact: true, page: false, done });
        told.recv().unwrap_or(Err(FsError::Detached)).map(drop)
    }

    /// Gives whole blocks back to the coordinator.
    fn free(self: &Arc<Self>, blocks: Range<u64>) -> Result<(), FsError> {
        let _hold = self.hold(Mode::Exclusive, Holding::Alone)?;
        self.settle()?;
        let asked_at = self.core.names_now();
        let (offset, length) = (blocks.start, blocks.end - blocks.start);
        let (fresh, at) = self.ask_attr(Op::Punch(pb::Punch { ino: self.ino, offset, length }))?;
        let mut state = self.lock();
        state.let_go(&self.core, blocks.start..blocks.end.min(state.map.end()).max(blocks.start));
        state.map.punch(blocks);
        state.touched_there(&fresh);
        state.merge_attr(fresh, asked_at, at);
        Ok(())
    }

    /// As `punch`, and the range has space of its own afterwards.
    pub(super) fn zero_range(
        self: &Arc<Self>,
        offset: u64,
        len: u64,
        keep_size: bool,
    ) -> Result<(), FsError> {
        self.punch(offset, len)?;
        self.allocate_range(offset, len, keep_size)
    }
}
