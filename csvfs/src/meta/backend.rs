//! redb's view of the [`Region`]: a file.
//!
//! redb writes whole pages, except for its 320-byte header at offset 0. The block of the header is therefore kept in
//! memory and written as a whole. **Invariant:** only whole blocks reach the region.

use std::io;
use std::sync::{Arc, Mutex};

use blockio::IoError;

use super::region::Region;

const BLOCK: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct LunBackend {
    region: Arc<Region>,
    /// Block 0 as it was last written; `None` until it is needed.
    head: Mutex<Option<Box<[u8; BLOCK]>>>,
}

impl LunBackend {
    pub(super) fn new(region: Arc<Region>) -> Self {
        Self { region, head: Mutex::new(None) }
    }

    fn write_unaligned(&self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        let start = usize::try_from(offset).ok().filter(|start| start + data.len() <= BLOCK);
        let Some(start) = start else {
            return Err(IoError::Corrupt(format!(
                "an unaligned metadata write of {} at {offset}",
                data.len()
            )));
        };
        let mut head = self.head.lock().expect("no panic while it is held");
        let block = match &mut *head {
            Some(block) => block,
            None => {
                let mut block = Box::new([0; BLOCK]);
                self.region.read(0, &mut block[..])?;
                head.insert(block)
            }
        };
        block[start..start + data.len()].copy_from_slice(data);
        self.region.write(0, &block[..])
    }

    fn read_any(&self, offset: u64, out: &mut [u8]) -> Result<(), IoError> {
        let whole = |n: u64| n.is_multiple_of(BLOCK as u64);
        if whole(offset) && whole(out.len() as u64) {
            return self.region.read(offset, out);
        }
        let skip = offset % BLOCK as u64;
        let start = usize::try_from(skip).expect("below a block");
        let mut blocks = vec![0; (start + out.len()).next_multiple_of(BLOCK)];
        self.region.read(offset - skip, &mut blocks)?;
        out.copy_from_slice(&blocks[start..start + out.len()]);
        Ok(())
    }
}

impl redb::StorageBackend for LunBackend {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.region.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.read_any(offset, out).map_err(io::Error::other)
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.region.set_len(len).map_err(io::Error::other)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        self.region.sync().map_err(io::Error::other)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        let whole = offset.is_multiple_of(BLOCK as u64) && data.len().is_multiple_of(BLOCK);
        let head_too = whole && offset == 0;
        if head_too {
            *self.head.lock().expect("no panic while it is held") = None;
        }
        let outcome =
            if whole { self.region.write(offset, data) } else { self.write_unaligned(offset, data) };
        outcome.map_err(io::Error::other)
    }
}
