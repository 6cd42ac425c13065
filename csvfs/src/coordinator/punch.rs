//! Holes made in files.
//!
//! **Invariant:** what is freed is reusable only after the transaction (C7), and only who is alone with the file frees it.

use lockmgr::{ClientId, Mode};

use super::clones::blocks_of;
use super::core::Core;
use super::space::block_range;
use crate::extents::without;
use crate::format::layout::BLOCK_BYTES;
use crate::meta::Tables;
use crate::namespace::existing;
use crate::proto::{Punch, reply};
use crate::refusal::{OpError, errno};

impl Core {
    pub(super) fn punch(
        &mut self,
        tables: &mut Tables<'_>,
        client: ClientId,
        op: &Punch,
    ) -> Result<reply::Result, OpError> {
        if self.writing_grant(client, op.ino)? != Mode::Exclusive {
            return Err(errno(libc::EINVAL, "only who is alone with a file may make a hole in it"));
        }
        if !op.offset.is_multiple_of(BLOCK_BYTES) || !op.length.is_multiple_of(BLOCK_BYTES) || op.length == 0
        {
            return Err(errno(libc::EINVAL, "a hole is of whole blocks"));
        }
        let mut inode = existing(tables, op.ino)?;
        let range = block_range(op.offset, op.length)?;
        let window =
            tables.extents(op.ino, range.start.saturating_sub(1), range.end.saturating_add(1), usize::MAX)?;
        let (kept, gone) = without(&window, &range, |_| true);
        tables.replace_extents(op.ino, &window, &kept)?;
        inode.blocks = inode.blocks.saturating_sub(blocks_of(&gone));
        (inode.mtime, inode.ctime) = (self.wall, self.wall);
        tables.put_inode(op.ino, &inode)?;
        self.release_blocks(tables, &gone)?;
        Ok(reply::Result::Attr(inode.attr(op.ino)))
    }
}
