//! Memory of a ring's entries, which the kernel and this program fill in turn.
//!
//! ```text
//!   | headers, one page | payload, as large as the largest request |    one mapping each
//! ```
//! Pages that no request has used take no memory.
//!
//! **Invariant:** from a request's arrival until its answer is committed the memory is this program's, else the kernel's.
#![expect(unsafe_code, reason = "maps memory, and reads and writes what the kernel does through the mapping")]

use std::io;
use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;

use blockio::{IoBuf, Memory};
use rustix::mm::{MapFlags, ProtFlags};

use crate::wire::abi::{OutHeader, RingEntry, RingHeaders};
use crate::wire::session::REQUEST_BYTES_MAX;

const PAGE_BYTES: usize = 4096;
const PAYLOAD_BYTES: usize = REQUEST_BYTES_MAX as usize;
const MAPPED_BYTES: usize = PAGE_BYTES + PAYLOAD_BYTES;
const _: () = assert!(size_of::<RingHeaders>() <= PAGE_BYTES);

/// One entry's mapping. The addresses are told to the kernel as they stand in `parts`.
#[derive(Debug)]
pub(super) struct EntryMemory {
    start: NonNull<u8>,
    parts: [libc::iovec; 2],
}

// SAFETY: the mapping is owned, and both sides touch it in turn, as the module says; access by several threads of this program
// goes through raw copies.
unsafe impl Send for EntryMemory {}
// SAFETY: as above.
unsafe impl Sync for EntryMemory {}

impl EntryMemory {
    pub(super) fn new() -> io::Result<Self> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice; nothing else refers to it.
        let mapped =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), MAPPED_BYTES, access, flags)? };
        let start = NonNull::new(mapped.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: the payload begins inside the mapping.
        let payload = unsafe { start.add(PAGE_BYTES) };
        let part = |at: NonNull<u8>, iov_len| libc::iovec { iov_base: at.as_ptr().cast(), iov_len };
        Ok(Self { start, parts: [part(start, PAGE_BYTES), part(payload, PAYLOAD_BYTES)] })
    }

    /// Where the kernel finds both parts, and how many they are. Good as long as the entry stays where it is.
    pub(super) fn parts(self: &Arc<Self>) -> (u64, u32) {
        (self.parts.as_ptr().addr() as u64, 2)
    }

    /// The headers of the request that has arrived.
    pub(super) fn headers(&self) -> RingHeaders {
        // SAFETY: the mapping is large enough and page-aligned, any bytes are headers, and the kernel is done with it.
        unsafe { self.start.cast::<RingHeaders>().read() }
    }

    /// Says what the answer is: a header, and so much of the payload.
    pub(super) fn answer(&self, header: OutHeader, payload_bytes: u32) {
        let entry = RingEntry { flags: 0, commit_id: header.unique, payload_bytes, _pad: 0, _reserved: 0 };
        // SAFETY: both lie inside the page of the headers and are aligned in it; the kernel looks at them after the commit.
        unsafe {
            self.start.cast::<OutHeader>().write(header);
            self.start.add(offset_of!(RingHeaders, entry)).cast::<RingEntry>().write(entry);
        }
    }

    /// The payload as the buffer of an I/O request.
    pub(super) fn payload(self: &Arc<Self>) -> IoBuf {
        IoBuf::foreign(Arc::clone(self) as Arc<dyn Memory>)
    }
}

// SAFETY: the payload stays mapped as long as the value lives, and no reference to its bytes is ever made.
unsafe impl Memory for EntryMemory {
    fn start(&self) -> NonNull<u8> {
        // SAFETY: inside the mapping.
        unsafe { self.start.add(PAGE_BYTES) }
    }

    fn len(&self) -> usize {
        PAYLOAD_BYTES
    }
}

impl Drop for EntryMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length. Nothing refers to it: buffers hold this value, and a ring's entry is
        // held until the kernel has given it back.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), MAPPED_BYTES) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn an_answer_stands_where_the_kernel_looks_for_it() {
        let memory = Arc::new(EntryMemory::new().expect("memory"));
        memory.payload().copy_from(b"data");
        memory.answer(OutHeader { len: 20, error: 0, unique: 7 }, 4);
        let headers = memory.headers();
        let out = OutHeader::read_from_prefix(&headers.in_out).expect("a header").0;
        assert_eq!((out.len, out.error, out.unique), (20, 0, 7));
        assert_eq!((headers.entry.commit_id, headers.entry.payload_bytes), (7, 4));
        let payload = memory.payload();
        drop(memory);
        assert_eq!(payload.slice(0..4).to_vec(), b"data", "a buffer keeps the mapping");
    }
}
