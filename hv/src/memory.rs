//! Guest RAM: one memfd, mapped once, with a bitmap of what devices have written.
//!
//! ```text
//!   0 ............ 3 GiB        3-4 GiB           4 GiB ...
//!   low RAM                     device registers  the rest of RAM
//! ```
//! **Invariant:** a device marks a page dirty after the data is in it (H4), and holds a [`GuestRam`] as long as it may
//! write.
#![expect(unsafe_code, reason = "devices transfer directly between disks and the mapping of guest RAM")]

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use blockio::IoBuf;
use rustix::fs::{MemfdFlags, SeekFrom};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BitmapSlice};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollection, VolatileSlice,
};

/// The mapping that virtqueues and boot code work on.
pub(crate) type RamMap = GuestMemoryMmap<AtomicBitmap>;

/// First address that is not RAM: device registers and the interrupt controllers live up to 4 GiB.
pub(crate) const HOLE_START: u64 = 3 << 30;
/// RAM continues here.
pub(crate) const HOLE_END: u64 = 4 << 30;
/// Smallest unit of RAM.
pub const PAGE_BYTES: u64 = 4096;
/// Least RAM: the guest's image at 1 MiB needs some room.
const BYTES_MIN: u64 = 4 << 20;
/// Most RAM; beyond it the 40-bit addresses of a small processor end.
const BYTES_MAX: u64 = 1 << 39;

/// Why guest RAM could not be made or reached.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is out of bounds.
    #[error("guest RAM of {bytes} bytes: give a multiple of {PAGE_BYTES} from {BYTES_MIN} to {BYTES_MAX}")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The system refused it.
    #[error("making {bytes} bytes of guest RAM failed: {cause}")]
    Map {
        /// What was asked for.
        bytes: u64,
        /// What the system said.
        cause: String,
    },
    /// An address outside of RAM.
    #[error("{len} bytes at {address:#x} are not in guest RAM")]
    Outside {
        /// First byte.
        address: u64,
        /// Number of bytes.
        len: u64,
    },
}

/// A piece of guest RAM that is contiguous in the guest and in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Where it is mapped in this process.
    pub(crate) host: u64,
}

/// Guest RAM. Clones share it.
#[derive(Clone, Debug)]
pub struct GuestRam {
    map: Arc<RamMap>,
    bytes: u64,
}

/// A part of guest RAM as the buffer of an I/O request.
struct GuestBuf {
    start: NonNull<u8>,
    len: usize,
    _ram: Arc<RamMap>,
}

// SAFETY: the pointer is into a shared mapping that `_ram` keeps; all access is by raw copies.
unsafe impl Send for GuestBuf {}
// SAFETY: as above.
unsafe impl Sync for GuestBuf {}
// SAFETY: `_ram` keeps the mapping valid as long as the value lives. No Rust reference into guest RAM is ever made: the
// guest itself may write at any time, so everybody uses raw copies.
unsafe impl blockio::Memory for GuestBuf {
    fn start(&self) -> NonNull<u8> {
        self.start
    }
    fn len(&self) -> usize {
        self.len
    }
}

impl GuestRam {
    /// Zeroed RAM of `bytes` bytes. Pages are taken from the system when they are first touched.
    ///
    /// # Errors
    /// [`MemoryError::Size`], or what the system said.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        if !(BYTES_MIN..=BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(MemoryError::Size { bytes });
        }
        let failed = |cause: String| MemoryError::Map { bytes, cause };
        let memfd =
            rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(|e| failed(e.to_string()))?;
        rustix::fs::ftruncate(&memfd, bytes).map_err(|e| failed(e.to_string()))?;
        let file = Arc::new(File::from(memfd));
        let mut ranges = Vec::new();
        for (start, len, offset) in layout(bytes) {
            let len = usize::try_from(len).map_err(|e| failed(e.to_string()))?;
            ranges.push((GuestAddress(start), len, Some(FileOffset::from_arc(Arc::clone(&file), offset))));
        }
        let map = RamMap::from_ranges_with_files(ranges).map_err(|e| failed(e.to_string()))?;
        Ok(Self { map: Arc::new(map), bytes })
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The pieces, in order of address.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion> + '_ {
        let regions: &GuestRegionCollection<_> = &self.map;
        regions.iter().map(|region| RamRegion {
            start: region.start_addr().0,
            bytes: region.len(),
            host: region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .map_or(0, |host| host.addr() as u64),
        })
    }

    pub(crate) fn map(&self) -> &RamMap {
        &self.map
    }

    /// A buffer for I/O on `len` bytes at `address`, without a copy.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] when any byte is not RAM.
    pub fn io_buf(&self, address: u64, len: usize) -> Result<IoBuf, MemoryError> {
        let slice = self.slice(address, len)?;
        let start =
            NonNull::new(slice.ptr_guard_mut().as_ptr()).expect("a mapping does not start at address zero");
        Ok(IoBuf::foreign(Arc::new(GuestBuf { start, len, _ram: Arc::clone(&self.map) })))
    }

    /// A buffer at an offset that counts RAM only, leaving out the hole. Pieces never straddle it unless asked to.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] when any byte is beyond the end, or on both sides of the hole.
    pub fn linear_buf(&self, offset: u64, bytes: u64) -> Result<IoBuf, MemoryError> {
        let outside = MemoryError::Outside { address: offset, len: bytes };
        let Ok(len) = usize::try_from(bytes) else { return Err(outside) };
        let address =
            if offset < HOLE_START { Some(offset) } else { offset.checked_add(HOLE_END - HOLE_START) };
        self.io_buf(address.ok_or(outside)?, len)
    }

    /// Start and end, counting RAM only, of the ranges that may hold something else than zeros: pages that were ever
    /// touched.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn touched_ranges(&self) -> Result<Vec<(u64, u64)>, MemoryError> {
        let failed =
            |error: rustix::io::Errno| MemoryError::Map { bytes: self.bytes, cause: error.to_string() };
        let regions: &GuestRegionCollection<_> = &self.map;
        let Some(file) = regions.iter().next().and_then(GuestMemoryRegion::file_offset) else {
            return Ok(vec![(0, self.bytes)]);
        };
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.bytes {
            let start = match rustix::fs::seek(file.file(), SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(failed(error)),
            };
            let end = rustix::fs::seek(file.file(), SeekFrom::Hole(start)).map_err(failed)?.min(self.bytes);
            ranges.push((start, end));
            at = end;
        }
        Ok(ranges)
    }

    /// Notes that a device has written there.
    pub fn mark_dirty(&self, address: u64, len: usize) {
        if let Ok(slice) = self.slice(address, len) {
            slice.bitmap().mark_dirty(0, len);
        }
    }

    /// Copies bytes out of guest RAM.
    ///
    /// # Errors
    /// [`MemoryError::Outside`].
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let len = into.len() as u64;
        self.map.read_slice(into, GuestAddress(address)).map_err(|_| MemoryError::Outside { address, len })
    }

    /// Copies bytes into guest RAM and marks them dirty.
    ///
    /// # Errors
    /// [`MemoryError::Outside`].
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let len = bytes.len() as u64;
        self.map.write_slice(bytes, GuestAddress(address)).map_err(|_| MemoryError::Outside { address, len })
    }

    fn slice(
        &self,
        address: u64,
        len: usize,
    ) -> Result<VolatileSlice<'_, impl BitmapSlice + '_>, MemoryError> {
        self.map
            .get_slice(GuestAddress(address), len)
            .map_err(|_| MemoryError::Outside { address, len: len as u64 })
    }
}

/// Address, length and offset in the file of each piece.
fn layout(bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut pieces = vec![(0, low, 0)];
    if bytes > low {
        pieces.push((HOLE_END, bytes - low, low));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_for_devices() {
        assert_eq!(layout(1 << 20), [(0, 1 << 20, 0)]);
        assert_eq!(layout(5 << 30), [(0, 3 << 30, 0), (4 << 30, 2 << 30, 3 << 30)]);
    }

    #[test]
    fn a_buffer_outside_of_ram_is_refused() {
        let ram = GuestRam::new(BYTES_MIN).unwrap();
        for (address, len) in
            [(BYTES_MIN, 1), (BYTES_MIN - 1, 2), (u64::MAX, 1), (0, usize::MAX), (HOLE_START, 8)]
        {
            assert!(ram.io_buf(address, len).is_err(), "{len} at {address:#x}");
        }
    }

    #[test]
    fn what_a_device_puts_into_a_buffer_is_in_the_guest() {
        let ram = GuestRam::new(BYTES_MIN).unwrap();
        ram.io_buf(8192, 4).unwrap().copy_from(b"disk");
        let mut seen = [0; 4];
        ram.read(8192, &mut seen).unwrap();
        assert_eq!(&seen, b"disk");
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for bytes in [0, BYTES_MIN - 4096, BYTES_MIN + 1, u64::MAX] {
            assert!(matches!(GuestRam::new(bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }
}
