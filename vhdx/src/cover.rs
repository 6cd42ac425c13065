//! The last block of a child that grows: its rest, behind the old end of the disk, must read as zeros and not as the parent.
//!
//! ```text
//!   child    [ ... | last block:  here | parent |  rest  ]      rest: its bits are set, its bytes are zero
//!   old end  ------------------------------------^
//! ```
//! A block without a place gets one for its rest alone; nothing is copied from the parent.
//!
//! **Invariant:** the table and the bitmap change in memory here, and on disk with the log entry that makes the disk larger.

use crate::bat::Entry;
use crate::bitmap::BITMAP_BYTES;
use crate::load::Loaded;
use crate::log::Page;
use crate::resolve::BlockPart;

/// What the rest of the last block needs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cover {
    /// It reads as zeros already.
    Nothing,
    /// Bits: the block has its place, and zeros there.
    Bits(BlockPart),
    /// A place, bits, and a bitmap to hold them if the chunk has none.
    Place {
        /// The rest.
        rest: BlockPart,
        /// Size of a block.
        block_bytes: u64,
        /// The chunk has no bitmap.
        bitmap: bool,
    },
}

impl Cover {
    /// What an image needs whose parent shows so many bytes.
    pub(crate) fn needed(loaded: &Loaded, shown_bytes: u64) -> Self {
        let shape = loaded.bat.shape;
        let block = shape.blocks - 1;
        let within = shape.bytes_in(block);
        let rest = BlockPart { block, within, len: shape.block_bytes - within };
        let entry = loaded.bat.get(block);
        if loaded.bitmaps.is_none() || rest.len == 0 || shown_bytes <= shape.disk_bytes {
            return Self::Nothing;
        }
        match (entry.is_unsaid(), entry.data_offset(), entry.place()) {
            (true, ..) => {
                let bitmap = loaded.bat.bitmap_place(block / shape.chunk_ratio).is_none();
                Self::Place { rest, block_bytes: shape.block_bytes, bitmap }
            }
            (false, None, Some(_)) => Self::Bits(rest),
            _ => Self::Nothing,
        }
    }

    /// Bytes of the file that it takes.
    pub(crate) fn room_bytes(&self) -> u64 {
        match self {
            Self::Place { block_bytes, bitmap, .. } => block_bytes + if *bitmap { BITMAP_BYTES } else { 0 },
            Self::Nothing | Self::Bits(_) => 0,
        }
    }

    /// Changes the table and the bitmap in memory. `start` is where the room begins, which reads as zeros.
    pub(crate) fn place(&self, loaded: &Loaded, start: u64) {
        let (Some(rest), Some(bitmaps)) = (self.rest(), &loaded.bitmaps) else { return };
        if let Self::Place { block_bytes, bitmap, .. } = self {
            // Bits of an earlier life of the block may be on disk.
            bitmaps.clear(rest.block);
            loaded.bat.set(rest.block, Entry::partial(start));
            if *bitmap {
                loaded.bat.set_bitmap(rest.block / loaded.bat.shape.chunk_ratio, start + block_bytes);
            }
        }
        bitmaps.set(&rest);
    }

    /// Pages of the table that changed.
    pub(crate) fn bat_pages(&self, loaded: &Loaded) -> impl Iterator<Item = u64> + use<> {
        let pages = match self {
            Self::Place { rest, bitmap, .. } => {
                let block = loaded.bat.page_of(rest.block);
                let chunk = loaded.bat.page_of_bitmap(rest.block / loaded.bat.shape.chunk_ratio);
                [Some(block), (*bitmap && chunk != block).then_some(chunk)]
            }
            Self::Nothing | Self::Bits(_) => [None, None],
        };
        pages.into_iter().flatten()
    }

    /// Pages of the bitmap that changed.
    pub(crate) fn bitmap_pages(&self, loaded: &Loaded) -> Vec<Page> {
        let (Some(rest), Some(bitmaps)) = (self.rest(), &loaded.bitmaps) else { return Vec::new() };
        let page = |page| Page {
            file_offset: loaded.bat.bitmap_page_offset(page).expect("its bitmap has a place"),
            content: bitmaps.page_bytes(page),
        };
        bitmaps.pages_of(rest.block).map(page).collect()
    }

    fn rest(&self) -> Option<BlockPart> {
        match self {
            Self::Nothing => None,
            Self::Bits(rest) | Self::Place { rest, .. } => Some(*rest),
        }
    }
}
