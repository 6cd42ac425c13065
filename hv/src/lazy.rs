//! RAM that comes from a file while the guest already runs.
//!
//! ```text
//!   vCPU or device touches a page that is not there --userfaultfd--> fault thread --reads--> file --copies--> page
//!                                                                    prefetch thread, from the first page to the last
//! ```
//! RAM is filled in chunks of 64 KiB, each by the thread that has claimed it. A page appears as a whole, after its checksum was
//! compared, and wakes whoever waits for it. A page of zeros, which the file does not have, appears when it is touched: RAM that
//! the guest never used takes no memory here either. When all are there the kernel is told that nothing is missing any more.
//!
//! **Invariants:** a page that cannot be read never appears: who waits for it waits, until whoever was told ends the VM. While
//! RAM is not complete only this process may read it: to others a page that is missing looks like zeros.
#![expect(unsafe_code, reason = "the kernel fills pages of this process by ioctls that have no library here")]

use std::fmt;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use blockio::BlockDevice;
use threads::Kind;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use crate::memory::{GuestRam, PAGE_BYTES};
use crate::snapshot::{PageSums, SnapshotError, offset_of};
use crate::state::SavedImage;

/// `UFFDIO` of linux/userfaultfd.h.
const KIND: u32 = 0xaa;
const API: u64 = 0xaa;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const REGISTER_MISSING: u64 = 1;
const EVENT_PAGE_FAULT: u8 = 0x12;
const MESSAGE_BYTES: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

const CHUNK_PAGES: u64 = 16;
/// Chunks that the prefetch thread reads at once: 1 MiB.
const CHUNKS_AHEAD: usize = 16;
const PAGE_LEN: usize = 4096;
const STACK_BYTES: usize = 128 << 10;

const UNCLAIMED: u8 = 0;
const CLAIMED: u8 = 1;
const THERE: u8 = 2;

#[repr(C)]
#[derive(Debug, Default)]
struct ApiRequest {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
#[derive(Debug, Default)]
struct Zero {
    range: Range,
    mode: u64,
    done: i64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, KIND, 0x00);
ioctl_iowr_nr!(UFFDIO_API, KIND, 0x3f, ApiRequest);
ioctl_iowr_nr!(UFFDIO_REGISTER, KIND, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, KIND, 0x01, Range);
ioctl_ior_nr!(UFFDIO_WAKE, KIND, 0x02, Range);
ioctl_iowr_nr!(UFFDIO_COPY, KIND, 0x03, Copy);
ioctl_iowr_nr!(UFFDIO_ZEROPAGE, KIND, 0x04, Zero);

/// What the threads here ask of the kernel, for those who forbid everything else.
#[must_use]
pub fn fault_calls() -> [libc::c_ulong; 4] {
    [UFFDIO_COPY(), UFFDIO_ZEROPAGE(), UFFDIO_WAKE(), UFFDIO_UNREGISTER()]
}

/// Why RAM cannot come lazily, or did not come.
#[derive(Debug, thiserror::Error)]
pub enum LazyError {
    /// The kernel refused.
    #[error("{what} failed")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is damaged, or cannot be read.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// A descriptor that tells of missing pages. To be opened while the process still has its rights.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Opens one that also tells of pages that the kernel itself misses, as KVM does.
    ///
    /// # Errors
    /// When the kernel has none, or this process may not.
    pub fn open() -> io::Result<Self> {
        const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let descriptor = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
            // SAFETY: a call on numbers; what it gives is checked below.
            Ok(device) => unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), FLAGS as libc::c_ulong) },
            // SAFETY: as above. Descriptors are small numbers.
            Err(_) => i32::try_from(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) }).unwrap_or(-1),
        };
        checked(descriptor)?;
        // SAFETY: the kernel has just made this descriptor for us alone.
        let fault = Self(unsafe { OwnedFd::from_raw_fd(descriptor) });
        let mut api = ApiRequest { api: API, features: FEATURE_MISSING_SHMEM, ioctls: 0 };
        // SAFETY: the kernel reads and writes a structure of the size that the request names.
        checked(unsafe { ioctl_with_mut_ref(&fault.0, UFFDIO_API(), &mut api) })?;
        Ok(fault)
    }

    fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let mut register = Register { range: Range { start, len }, mode: REGISTER_MISSING, ioctls: 0 };
        // SAFETY: as above. The range is a mapping of guest RAM, whose pages are only ever filled by their chunk's owner.
        checked(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut register) })
    }

    fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: the kernel reads a structure of the size that the request names.
        checked(unsafe { ioctl_with_ref(&self.0, UFFDIO_UNREGISTER(), &Range { start, len }) })
    }

    fn wake(&self, start: u64, len: u64) -> io::Result<()> {
        // SAFETY: as above.
        checked(unsafe { ioctl_with_ref(&self.0, UFFDIO_WAKE(), &Range { start, len }) })
    }

    /// Makes pages appear with this content. One that is there already stays.
    fn copy(&self, to: u64, bytes: &[u8]) -> io::Result<()> {
        self.fill(to, bytes.len() as u64, |at| {
            let from = bytes[usize::try_from(at).expect("inside of the bytes")..].as_ptr() as u64;
            let mut copy = Copy { to: to + at, from, len: bytes.len() as u64 - at, mode: 0, done: 0 };
            // SAFETY: the source is readable for its length, and the target a registered range of guest RAM.
            let done = checked(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut copy) });
            (done, copy.done)
        })
    }

    /// Makes pages of zeros appear.
    fn zero(&self, to: u64, len: u64) -> io::Result<()> {
        self.fill(to, len, |at| {
            let mut zero = Zero { range: Range { start: to + at, len: len - at }, mode: 0, done: 0 };
            // SAFETY: the target is a registered range of guest RAM.
            let done = checked(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_ZEROPAGE(), &mut zero) });
            (done, zero.done)
        })
    }

    /// The kernel may stop after a part, and at a page that is there already.
    fn fill(&self, to: u64, len: u64, mut some: impl FnMut(u64) -> (io::Result<()>, i64)) -> io::Result<()> {
        let mut at = 0;
        while at < len {
            let (outcome, done) = some(at);
            match outcome {
                Ok(()) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    at += u64::try_from(done).unwrap_or(0);
                }
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    at += u64::try_from(done).unwrap_or(0);
                    self.wake(to + at, PAGE_BYTES)?;
                    at += PAGE_BYTES;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The address of the next fault, if there is one.
    fn next(&self) -> io::Result<Option<u64>> {
        let mut message = [0; MESSAGE_BYTES];
        match rustix::io::read(&self.0, &mut message[..]) {
            Ok(MESSAGE_BYTES) if message[0] == EVENT_PAGE_FAULT => {
                let address = &message[MESSAGE_ADDRESS..MESSAGE_ADDRESS + 8];
                Ok(Some(u64::from_le_bytes(address.try_into().expect("eight bytes"))))
            }
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

fn checked(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A piece of RAM as it is mapped here.
#[derive(Clone, Copy, Debug)]
struct Piece {
    host: u64,
    first_page: u64,
    pages: u64,
}

struct Shared {
    fault: Userfault,
    file: Arc<dyn BlockDevice>,
    pages: PageSums,
    pieces: Vec<Piece>,
    chunks: Vec<AtomicU8>,
    /// Chunks that are not there yet.
    left: AtomicUsize,
    stop: AtomicBool,
    /// Wakes the fault thread, so that it ends.
    end: EventFd,
    /// What came of it. A leaf.
    outcome: Mutex<Option<Result<(), String>>>,
    told: Condvar,
    there: Box<dyn Fn() + Send + Sync>,
}

/// What a thread does.
type Work = fn(&Shared) -> Result<(), LazyError>;

/// RAM on its way. The VM must not outlive it: dropped after the vCPUs.
pub struct LazyRam {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for LazyRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyRam").field("chunks_left", &self.shared.left).finish_non_exhaustive()
    }
}

impl LazyRam {
    /// Begins to fill RAM that nobody has touched. `there` is called when all of it is, `failed` when a page cannot be had.
    pub(crate) fn start(
        fault: Userfault,
        file: Arc<dyn BlockDevice>,
        image: &SavedImage,
        ram: &GuestRam,
        there: impl Fn() + Send + Sync + 'static,
        failed: impl Fn(String) + Send + Sync + 'static,
    ) -> Result<Self, LazyError> {
        let system = |what| move |source| LazyError::System { what, source };
        let pages = PageSums::of_image(image, ram.bytes())?;
        let pieces = pieces_of(ram);
        for piece in &pieces {
            fault.register(piece.host, piece.pages * PAGE_BYTES).map_err(system("registering RAM"))?;
        }
        let chunks =
            usize::try_from((ram.bytes() / PAGE_BYTES).div_ceil(CHUNK_PAGES)).expect("less than RAM");
        let end =
            EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).map_err(system("making an eventfd"))?;
        let shared = Arc::new(Shared {
            fault,
            file,
            pages,
            pieces,
            chunks: (0..chunks).map(|_| AtomicU8::new(UNCLAIMED)).collect(),
            left: AtomicUsize::new(chunks),
            stop: AtomicBool::new(false),
            end,
            outcome: Mutex::default(),
            told: Condvar::new(),
            there: Box::new(there),
        });
        let mut lazy = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        let failed = Arc::new(failed);
        let both: [(&str, Work); 2] = [("ram-faults", Shared::serve), ("ram-ahead", Shared::prefetch)];
        for (name, work) in both {
            let (shared, failed) = (Arc::clone(&shared), Arc::clone(&failed));
            let work = move || {
                if let Err(error) = work(&shared)
                    && shared.decide(Err(with_cause(&error)))
                {
                    failed(with_cause(&error));
                }
            };
            let builder = Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
            lazy.threads
                .push(threads::spawn(Kind::Memory, builder, work).map_err(system("starting a thread"))?);
        }
        Ok(lazy)
    }

    /// Returns when all of RAM is there.
    ///
    /// # Errors
    /// Why it never will be.
    pub(crate) fn wait(&self) -> Result<(), String> {
        let outcome = self.shared.lock();
        let told = self.shared.told.wait_while(outcome, |outcome| outcome.is_none());
        told.unwrap_or_else(PoisonError::into_inner).clone().expect("waited for")
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        drop(self.shared.end.write(1));
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Result<(), String>>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first word counts; whether this was it.
    fn decide(&self, outcome: Result<(), String>) -> bool {
        let mut known = self.lock();
        let first = known.is_none();
        if first {
            *known = Some(outcome);
            self.told.notify_all();
        }
        drop(known);
        drop(self.end.write(1));
        first
    }

    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Acquire) || self.lock().is_some()
    }

    /// The fault thread: fills what somebody waits for.
    fn serve(&self) -> Result<(), LazyError> {
        let mut buffer = vec![0; usize::try_from(CHUNK_PAGES).expect("few") * PAGE_LEN];
        let system = |source| LazyError::System { what: "looking for missing pages", source };
        while !self.is_over() {
            self.wait_for_fault().map_err(system)?;
            while let Some(address) = self.fault.next().map_err(system)? {
                let Some(page) = self.page_at(address) else { continue };
                let start = address / PAGE_BYTES * PAGE_BYTES;
                if !self.pages.has(page) {
                    self.zero(start).map_err(system)?;
                    continue;
                }
                let chunk = usize::try_from(page / CHUNK_PAGES).expect("inside of RAM");
                if self.claim(chunk) {
                    self.bring(chunk, 1, &mut buffer)?;
                } else if self.chunks[chunk].load(Ordering::Acquire) == THERE {
                    // It came while the message was on its way.
                    self.fault.wake(start, PAGE_BYTES).map_err(system)?;
                }
            }
        }
        Ok(())
    }

    fn wait_for_fault(&self) -> io::Result<()> {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut both = [poll(self.fault.0.as_raw_fd()), poll(self.end.as_raw_fd())];
        // SAFETY: an array of two structures that lives over the call.
        match checked(unsafe { libc::poll(both.as_mut_ptr(), 2, -1) }) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// The prefetch thread: everything, in order, before it is asked for.
    fn prefetch(&self) -> Result<(), LazyError> {
        let mut buffer = vec![0; CHUNKS_AHEAD * usize::try_from(CHUNK_PAGES).expect("few") * PAGE_LEN];
        let mut at = 0;
        while at < self.chunks.len() && !self.is_over() {
            let ahead = (at..self.chunks.len()).take(CHUNKS_AHEAD);
            let claimed = ahead.take_while(|chunk| self.claim(*chunk)).count();
            if claimed > 0 {
                self.bring(at, claimed, &mut buffer)?;
            }
            // The one that ended the row is somebody else's.
            at += claimed.max(1);
        }
        Ok(())
    }

    fn claim(&self, chunk: usize) -> bool {
        let claimed =
            self.chunks[chunk].compare_exchange(UNCLAIMED, CLAIMED, Ordering::AcqRel, Ordering::Acquire);
        claimed.is_ok()
    }

    /// Fills chunks that this thread has claimed.
    fn bring(&self, first: usize, count: usize, buffer: &mut [u8]) -> Result<(), LazyError> {
        let all: u64 = self.pieces.iter().map(|piece| piece.pages).sum();
        let start = first as u64 * CHUNK_PAGES;
        let end = (start + count as u64 * CHUNK_PAGES).min(all);
        let bytes = &mut buffer[..usize::try_from(end - start).expect("few") * PAGE_LEN];
        if (start..end).any(|page| self.pages.has(page)) {
            self.file
                .read_at(offset_of(start), bytes)
                .map_err(|source| SnapshotError::Io { what: "reading RAM", source })?;
        }
        let mut page = start;
        while page < end {
            let host_end = self.piece_of(page).map_or(page, |piece| piece.first_page + piece.pages).min(end);
            let run = (page..host_end).take_while(|at| self.pages.has(*at)).count() as u64;
            self.fill(page, run, &bytes[usize::try_from(page - start).expect("few") * PAGE_LEN..])?;
            page += run.max(1);
        }
        (first..first + count).for_each(|chunk| self.chunks[chunk].store(THERE, Ordering::Release));
        if self.left.fetch_sub(count, Ordering::AcqRel) == count {
            self.all_there()?;
        }
        Ok(())
    }

    fn fill(&self, page: u64, run: u64, bytes: &[u8]) -> Result<(), LazyError> {
        let Some(piece) = self.piece_of(page).filter(|_| run > 0) else { return Ok(()) };
        let host = piece.host + (page - piece.first_page) * PAGE_BYTES;
        let bytes = &bytes[..usize::try_from(run).expect("few") * PAGE_LEN];
        self.pages.check(page, bytes)?;
        let filled = self.fault.copy(host, bytes);
        filled.map_err(|source| LazyError::System { what: "filling missing pages", source })
    }

    /// A page that the file does not have. The kernel makes it itself once nothing is missing any more, and lets go who waits.
    fn zero(&self, host: u64) -> io::Result<()> {
        match self.fault.zero(host, PAGE_BYTES) {
            Err(_) if self.left.load(Ordering::Acquire) == 0 => Ok(()),
            outcome => outcome,
        }
    }

    fn all_there(&self) -> Result<(), LazyError> {
        for piece in &self.pieces {
            self.fault
                .unregister(piece.host, piece.pages * PAGE_BYTES)
                .map_err(|source| LazyError::System { what: "telling that RAM is complete", source })?;
        }
        self.decide(Ok(()));
        (self.there)();
        Ok(())
    }

    fn piece_of(&self, page: u64) -> Option<&Piece> {
        self.pieces.iter().find(|piece| (piece.first_page..piece.first_page + piece.pages).contains(&page))
    }

    fn page_at(&self, address: u64) -> Option<u64> {
        let inside = |piece: &&Piece| (piece.host..piece.host + piece.pages * PAGE_BYTES).contains(&address);
        let piece = self.pieces.iter().find(inside)?;
        Some(piece.first_page + (address - piece.host) / PAGE_BYTES)
    }
}

fn pieces_of(ram: &GuestRam) -> Vec<Piece> {
    let mut first_page = 0;
    let piece = |region: crate::memory::RamRegion| {
        let piece = Piece { host: region.host, first_page, pages: region.bytes / PAGE_BYTES };
        first_page += piece.pages;
        piece
    };
    ram.regions().map(piece).collect()
}

fn with_cause(error: &LazyError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
