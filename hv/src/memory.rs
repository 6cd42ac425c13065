//! Guest RAM: one memfd, mapped once, with a bitmap of what devices have written.
//!
//! ```text
//!   0 ............ 3 GiB        3-4 GiB           4 GiB ...
//!   low RAM                     device registers  the rest of RAM
//! ```
//! **Invariant:** a device marks a page dirty after the data is in it (H4), and holds a [`GuestRam`] as long as it may
//! write.
#![expect(unsafe_code, reason = "devices transfer directly between disks and the mapping of guest RAM")]

mod bulk;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::Arc;

use blockio::IoBuf;
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, BitmapSlice};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollection, MmapRegion, VolatileSlice,
};

/// The mapping that virtqueues and boot code work on.
pub(crate) type RamMap = GuestMemoryMmap<AtomicBitmap>;

/// First address that is not RAM: device registers and the interrupt controllers live up to 4 GiB.
pub(crate) const HOLE_START: u64 = 3 << 30;
/// RAM continues here.
pub(crate) const HOLE_END: u64 = 4 << 30;
/// Smallest unit of RAM.
pub const PAGE_BYTES: u64 = 4096;
const PAGE_LEN: usize = 4096;
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
    file: Arc<File>,
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
        check_size(bytes)?;
        let failed = |error: rustix::io::Errno| MemoryError::Map { bytes, cause: error.to_string() };
        let memfd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC).map_err(failed)?;
        rustix::fs::ftruncate(&memfd, bytes).map_err(failed)?;
        Self::of_file(File::from(memfd), bytes)
    }

    /// RAM of a VM of another process, by that process's memfd. What is written here is what its guest sees.
    ///
    /// # Errors
    /// [`MemoryError::Size`] also when the file has another size, or what the system said.
    pub fn of_file(file: File, bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let failed = |cause: String| MemoryError::Map { bytes, cause };
        if file.metadata().map_err(|error| failed(error.to_string()))?.len() != bytes {
            return Err(MemoryError::Size { bytes });
        }
        let file = Arc::new(file);
        let mut ranges = Vec::new();
        for (start, len, offset) in layout(bytes) {
            let len = usize::try_from(len).map_err(|e| failed(e.to_string()))?;
            ranges.push((GuestAddress(start), len, Some(FileOffset::from_arc(Arc::clone(&file), offset))));
        }
        let map = RamMap::from_ranges_with_files(ranges).map_err(|e| failed(e.to_string()))?;
        Ok(Self { map: Arc::new(map), file, bytes })
    }

    /// The memfd that holds it, to be shared with a process that copies it.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
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
        self.io_buf(address_of(offset).ok_or(outside)?, len)
    }

    /// Copies bytes out of guest RAM, at an offset that counts RAM only.
    ///
    /// # Errors
    /// [`MemoryError::Outside`], also for a piece on both sides of the hole.
    pub fn read_linear(&self, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address: offset, len: into.len() as u64 };
        let slice = self.slice(address_of(offset).ok_or(outside)?, into.len())?;
        // SAFETY: the slice is as long as `into`, and its guard keeps it mapped.
        unsafe { bulk::read(slice.ptr_guard().as_ptr(), into) };
        Ok(())
    }

    /// Copies bytes into guest RAM, at an offset that counts RAM only, and marks them dirty.
    ///
    /// # Errors
    /// [`MemoryError::Outside`], also for a piece on both sides of the hole.
    pub fn write_linear(&self, offset: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address: offset, len: bytes.len() as u64 };
        let address = address_of(offset).ok_or(outside)?;
        let pages = offset.is_multiple_of(PAGE_BYTES) && bytes.len().is_multiple_of(PAGE_LEN);
        // A single page has often been read just before, and is in the caches.
        if !pages || bytes.len() <= PAGE_LEN {
            return self.write(address, bytes);
        }
        let slice = self.slice(address, bytes.len())?;
        // SAFETY: the slice is as long as `bytes`, and its guard keeps it mapped.
        unsafe { bulk::write(slice.ptr_guard_mut().as_ptr(), bytes) };
        slice.bitmap().mark_dirty(0, bytes.len());
        Ok(())
    }

    /// The pages that devices have written since the last call, a bit each, for each piece of RAM.
    pub(crate) fn take_device_writes(&self) -> Vec<Vec<u64>> {
        let regions: &GuestRegionCollection<_> = &self.map;
        regions.iter().map(|region| MmapRegion::bitmap(region).get_and_reset()).collect()
    }

    /// Start and end, counting RAM only, of the ranges that may hold something else than zeros: pages that were ever
    /// touched.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn touched_ranges(&self) -> Result<Vec<(u64, u64)>, MemoryError> {
        let failed =
            |error: rustix::io::Errno| MemoryError::Map { bytes: self.bytes, cause: error.to_string() };
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.bytes {
            let start = match rustix::fs::seek(&*self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(failed(error)),
            };
            let end = rustix::fs::seek(&*self.file, SeekFrom::Hole(start)).map_err(failed)?.min(self.bytes);
            ranges.push((start, end));
            at = end;
        }
        Ok(ranges)
    }

    /// Gives whole pages back to the system: they read as zeros from then on, here, in the guest and in every process that maps
    /// this RAM, and take no memory until they are written or looked at again.
    ///
    /// # Errors
    /// [`MemoryError::Outside`] when they are not whole pages of RAM, or what the system said.
    pub fn discard(&self, address: u64, bytes: u64) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address, len: bytes };
        let whole = address.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        let Some(len) = usize::try_from(bytes).ok().filter(|len| whole && *len > 0) else {
            return Err(outside);
        };
        self.slice(address, len)?;
        let offset = offset_of(address).ok_or(outside)?;
        rustix::fs::fallocate(
            &*self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            bytes,
        )
        .map_err(|error| MemoryError::Map { bytes: self.bytes, cause: error.to_string() })?;
        // Afterwards, as after any write: a move that has sent the pages sends the zeros too.
        self.mark_dirty(address, len);
        Ok(())
    }

    /// As [`GuestRam::discard`], at an offset that counts RAM only.
    ///
    /// # Errors
    /// As there, also for pages on both sides of the hole.
    pub fn discard_linear(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        let outside = MemoryError::Outside { address: offset, len: bytes };
        self.discard(address_of(offset).ok_or(outside)?, bytes)
    }

    /// Whether there is a whole page at this address.
    pub(crate) fn has_page(&self, address: u64) -> bool {
        self.map.check_range(GuestAddress(address), PAGE_LEN)
    }

    /// What of it takes memory of the system now.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
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

fn check_size(bytes: u64) -> Result<(), MemoryError> {
    if (BYTES_MIN..=BYTES_MAX).contains(&bytes) && bytes.is_multiple_of(PAGE_BYTES) {
        return Ok(());
    }
    Err(MemoryError::Size { bytes })
}

/// Address of an offset that counts RAM only.
fn address_of(offset: u64) -> Option<u64> {
    if offset < HOLE_START { Some(offset) } else { offset.checked_add(HOLE_END - HOLE_START) }
}

/// The other way round, of an address in RAM.
fn offset_of(address: u64) -> Option<u64> {
    if address < HOLE_START { Some(address) } else { address.checked_sub(HOLE_END - HOLE_START) }
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
    fn discarded_pages_are_zeros_take_no_memory_and_count_as_written() {
        let ram = GuestRam::new(BYTES_MIN).unwrap();
        ram.write(0, &vec![7; 16 * PAGE_LEN]).unwrap();
        drop(ram.take_device_writes());
        let before = ram.used_bytes();
        ram.discard(2 * PAGE_BYTES, 3 * PAGE_BYTES).unwrap();
        assert_eq!(before - ram.used_bytes(), 3 * PAGE_BYTES);
        assert_eq!(ram.take_device_writes()[0][0], 0b11100);
        for (page, content) in [(1, 7), (2, 0), (4, 0), (5, 7)] {
            let mut bytes = [9; PAGE_LEN];
            ram.read(page * PAGE_BYTES, &mut bytes).unwrap();
            assert_eq!(bytes, [content; PAGE_LEN], "page {page}");
        }
    }

    #[test]
    fn what_is_no_whole_page_of_ram_is_not_discarded() {
        let ram = GuestRam::new(BYTES_MIN).unwrap();
        ram.write(0, &[7; PAGE_LEN]).unwrap();
        for (address, bytes) in [
            (0, 0),
            (0, 1),
            (1, PAGE_BYTES),
            (BYTES_MIN, PAGE_BYTES),
            (BYTES_MIN - PAGE_BYTES, 2 * PAGE_BYTES),
            (HOLE_START, PAGE_BYTES),
            (HOLE_END, PAGE_BYTES),
            (u64::MAX - PAGE_BYTES + 1, PAGE_BYTES),
            (0, u64::MAX - PAGE_BYTES + 1),
        ] {
            assert!(ram.discard(address, bytes).is_err(), "{bytes} bytes at {address:#x}");
        }
        assert_eq!(ram.used_bytes(), PAGE_BYTES);
    }

    #[test]
    fn above_the_hole_the_right_page_is_discarded() {
        let ram = GuestRam::new(HOLE_START + BYTES_MIN).unwrap();
        ram.write(HOLE_END + PAGE_BYTES, &[7; PAGE_LEN]).unwrap();
        ram.write(HOLE_START - PAGE_BYTES, &[7; PAGE_LEN]).unwrap();
        ram.discard(HOLE_END + PAGE_BYTES, PAGE_BYTES).unwrap();
        assert_eq!(ram.used_bytes(), PAGE_BYTES);
        ram.discard_linear(HOLE_START - PAGE_BYTES, PAGE_BYTES).unwrap();
        assert_eq!(ram.used_bytes(), 0);
        let mut bytes = [9; 1];
        ram.read(HOLE_END + PAGE_BYTES, &mut bytes).unwrap();
        assert_eq!(bytes, [0]);
    }

    // Invariant H4
    #[test]
    fn pages_that_are_copied_in_mass_are_what_they_were_and_count_as_written() {
        let (from, to) = (GuestRam::new(BYTES_MIN).unwrap(), GuestRam::new(BYTES_MIN).unwrap());
        let content: Vec<u8> =
            (0..64 * PAGE_LEN).map(|at| (at * 31 + at / PAGE_LEN).to_le_bytes()[0]).collect();
        from.write(0, &content).unwrap();
        for (offset, len) in [(0, 16), (PAGE_LEN, 1), (3 * PAGE_LEN, 9 * PAGE_LEN + 5), (8, 8 * PAGE_LEN)] {
            let mut bytes = vec![0; len];
            from.read_linear(offset as u64, &mut bytes).unwrap();
            assert!(bytes == content[offset..][..len], "{len} bytes at {offset}");
        }
        for (page, pages) in [(0, 1), (1, 2), (5, 8), (20, 19)] {
            drop(to.take_device_writes());
            let part = &content[page * PAGE_LEN..][..pages * PAGE_LEN];
            to.write_linear((page * PAGE_LEN) as u64, part).unwrap();
            let mut bytes = vec![0; part.len()];
            to.read((page * PAGE_LEN) as u64, &mut bytes).unwrap();
            assert!(bytes == part, "{pages} pages from {page}");
            assert_eq!(to.take_device_writes()[0][0], ((1 << pages) - 1) << page);
        }
    }

    #[test]
    fn pages_that_are_copied_in_mass_lie_in_one_piece_of_ram() {
        let ram = GuestRam::new(HOLE_START + BYTES_MIN).unwrap();
        let mut bytes = vec![0; 2 * PAGE_LEN];
        for offset in
            [HOLE_START - PAGE_BYTES, HOLE_START + BYTES_MIN - PAGE_BYTES, u64::MAX - PAGE_BYTES + 1]
        {
            assert!(ram.write_linear(offset, &bytes).is_err(), "into {offset:#x}");
            assert!(ram.read_linear(offset, &mut bytes).is_err(), "out of {offset:#x}");
        }
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for bytes in [0, BYTES_MIN - 4096, BYTES_MIN + 1, u64::MAX] {
            assert!(matches!(GuestRam::new(bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }
}
