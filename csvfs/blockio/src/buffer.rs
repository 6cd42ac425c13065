//! Memory for I/O, aligned by type.
//!
//! [`AlignedBuf`] is owned and safe to look into. [`IoBuf`] is a counted handle to a part of some memory, the form in
//! which memory travels with a request: it can be split over several devices without a copy.
//!
//! **Invariant:** an [`IoBuf`] keeps its memory alive, so a device may use the pointer until it drops the handle.
#![expect(
    unsafe_code,
    reason = "O_DIRECT needs aligned allocations, and a device writes through a pointer that outlives the call"
)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of all buffers in bytes; at least the logical block size of every supported device.
pub const IO_ALIGN: usize = 4096;

/// An owned, zero-initialised buffer whose address is a multiple of [`IO_ALIGN`].
pub struct AlignedBuf {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its allocation exclusively; there is no interior sharing.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zero bytes. `len` may be any number; the allocation is rounded up to the alignment.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout's size is at least `IO_ALIGN`, never zero.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(raw) else { handle_alloc_error(layout) };
        Self { start, len }
    }

    /// A buffer that holds a copy of `bytes`.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    fn layout(len: usize) -> Layout {
        let size = len.max(1).next_multiple_of(IO_ALIGN);
        Layout::from_size_align(size, IO_ALIGN).expect("an I/O buffer is far smaller than the address space")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.len)) }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes were allocated and initialised to zero.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// Memory that a device may read from or write into while an [`IoBuf`] refers to it.
///
/// # Safety
/// `start()..start() + len()` must stay valid for reads and writes as long as the value lives, and must not be borrowed
/// as a Rust reference while requests are in flight.
pub unsafe trait Memory: Send + Sync {
    /// First byte.
    fn start(&self) -> NonNull<u8>;
    /// Length in bytes.
    fn len(&self) -> usize;
    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

// SAFETY: the allocation lives as long as the buffer. Inside an `IoBuf` no reference to the bytes is handed out; access
// goes through raw copies.
unsafe impl Memory for AlignedBuf {
    fn start(&self) -> NonNull<u8> {
        self.start
    }
    fn len(&self) -> usize {
        self.len
    }
}

#[derive(Clone)]
enum Owner {
    Aligned(Arc<AlignedBuf>),
    Foreign(#[expect(dead_code, reason = "held so that the memory stays")] Arc<dyn Memory>),
}

/// A counted handle to a range of memory, the buffer of an I/O request.
///
/// Clones and slices share the memory. Whoever submits overlapping reads into one `IoBuf` gets some mix of both, as with
/// any DMA; it is no memory error, because the bytes are only touched by raw copies while shared.
#[derive(Clone)]
pub struct IoBuf {
    owner: Owner,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: `Memory` is `Send + Sync`, and the pointer goes where its owner goes.
unsafe impl Send for IoBuf {}
// SAFETY: as above; `&IoBuf` gives no references into the memory.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A zeroed buffer of `len` bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        AlignedBuf::zeroed(len).into()
    }

    /// A handle to memory that belongs to something else, such as the RAM of a guest.
    #[must_use]
    pub fn foreign(memory: Arc<dyn Memory>) -> Self {
        Self { start: memory.start(), len: memory.len(), owner: Owner::Foreign(memory) }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of the first byte, for the device's system calls.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Whether the address is a multiple of `align` bytes.
    #[must_use]
    pub fn is_aligned(&self, align: usize) -> bool {
        self.start.as_ptr().addr().is_multiple_of(align)
    }

    /// The part `range` of this buffer.
    ///
    /// # Panics
    /// When the range is not inside the buffer: that is a bug of the caller.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "slice {range:?} of a buffer of {} bytes",
            self.len
        );
        // SAFETY: the offset is within the allocation, as just checked.
        let start = unsafe { self.start.add(range.start) };
        Self { owner: self.owner.clone(), start, len: range.len() }
    }

    /// Copies bytes out, from the start of the buffer.
    ///
    /// # Panics
    /// When `into` is longer than the buffer.
    pub fn copy_to(&self, into: &mut [u8]) {
        assert!(into.len() <= self.len);
        // SAFETY: the source is valid for `len` bytes as long as `self` lives, and `into` is a distinct exclusive borrow.
        unsafe { std::ptr::copy_nonoverlapping(self.start.as_ptr(), into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in, to the start of the buffer.
    ///
    /// # Panics
    /// When `from` is longer than the buffer.
    pub fn copy_from(&self, from: &[u8]) {
        assert!(from.len() <= self.len);
        // SAFETY: the target is valid for `len` bytes as long as `self` lives; `from` cannot overlap it, because no
        // reference into shared memory exists.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.start.as_ptr(), from.len()) }
    }

    /// Sets every byte to zero.
    pub fn fill_zero(&self) {
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::write_bytes(self.start.as_ptr(), 0, self.len) }
    }

    /// A copy of the bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.copy_to(&mut bytes);
        bytes
    }

    /// The owned buffer, when this is the last handle to the whole of it.
    ///
    /// # Errors
    /// Gives the handle back when other handles exist, when it is a slice, or when the memory is foreign.
    pub fn try_into_aligned(self) -> Result<AlignedBuf, Self> {
        match self.owner {
            Owner::Aligned(buf) if buf.len == self.len => Arc::try_unwrap(buf).map_err(|buf| Self {
                start: self.start,
                len: self.len,
                owner: Owner::Aligned(buf),
            }),
            owner => Err(Self { start: self.start, len: self.len, owner }),
        }
    }
}

impl From<AlignedBuf> for IoBuf {
    fn from(buf: AlignedBuf) -> Self {
        Self { start: buf.start, len: buf.len, owner: Owner::Aligned(Arc::new(buf)) }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} bytes)", self.len)
    }
}
