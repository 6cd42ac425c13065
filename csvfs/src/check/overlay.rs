//! A device whose writes go to memory: what a crashed store writes while it recovers must not reach the LUN.
//!
//! **Invariant:** the device underneath sees reads only.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use blockio::{BlockDevice, Geometry, IoBuf, IoError, IoOp, IoRequest};

const BLOCK: usize = 4096;

/// See the module. It answers within `submit`: it is for tools, not for the I/O path.
pub(super) struct Overlay {
    below: Arc<dyn BlockDevice>,
    /// Blocks that were written, by number.
    written: Mutex<BTreeMap<u64, Box<[u8; BLOCK]>>>,
}

impl Overlay {
    pub(super) fn new(below: Arc<dyn BlockDevice>) -> Self {
        Self { below, written: Mutex::new(BTreeMap::new()) }
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), IoError> {
        self.below.read_at(offset, into)?;
        let written = self.written.lock().expect("no panic while it is held");
        for (i, chunk) in into.chunks_mut(BLOCK).enumerate() {
            if let Some(block) = written.get(&(offset / BLOCK as u64 + i as u64)) {
                chunk.copy_from_slice(&block[..chunk.len()]);
            }
        }
        Ok(())
    }

    fn put(&self, offset: u64, len: usize, block: impl Fn(usize) -> Box<[u8; BLOCK]>) {
        let mut written = self.written.lock().expect("no panic while it is held");
        for i in 0..len / BLOCK {
            written.insert(offset / BLOCK as u64 + i as u64, block(i));
        }
    }

    fn perform(&self, op: IoOp) -> Result<(), IoError> {
        match op {
            IoOp::Read { offset, buf } => self.read_into(offset, &buf),
            IoOp::Write { offset, buf, .. } => {
                let bytes = buf.to_vec();
                self.check(offset, bytes.len() as u64)?;
                let block = |i: usize| {
                    let part = bytes[i * BLOCK..].first_chunk::<BLOCK>().expect("whole blocks were checked");
                    Box::new(*part)
                };
                self.put(offset, bytes.len(), block);
                Ok(())
            }
            IoOp::WriteZeroes { offset, len, .. } => {
                self.check(offset, len)?;
                let len = usize::try_from(len).map_err(|_| IoError::Closed)?;
                self.put(offset, len, |_| Box::new([0; BLOCK]));
                Ok(())
            }
            IoOp::Flush | IoOp::Discard { .. } => Ok(()),
        }
    }

    fn read_into(&self, offset: u64, buf: &IoBuf) -> Result<(), IoError> {
        self.check(offset, buf.len() as u64)?;
        let mut bytes = vec![0; buf.len()];
        self.read(offset, &mut bytes)?;
        buf.copy_from(&bytes);
        Ok(())
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), IoError> {
        let Geometry { size_bytes, block_bytes, .. } = self.geometry();
        let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
        if inside && offset.is_multiple_of(BLOCK as u64) && len.is_multiple_of(BLOCK as u64) {
            return Ok(());
        }
        Err(IoError::OutOfRange { op: "overlay access", offset, len, size_bytes, block_bytes })
    }
}

impl BlockDevice for Overlay {
    fn geometry(&self) -> Geometry {
        self.below.geometry()
    }

    fn submit(&self, request: IoRequest) {
        let outcome = self.perform(request.op);
        (request.done)(outcome);
    }
}
