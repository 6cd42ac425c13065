//! A block device or regular file of this machine.
//!
//! ```text
//!   submit -> Job::plan (check, bounce) -> io_uring thread | pool of blocking threads (where io_uring is refused)
//!                                       -> the calling thread, where it wants that (`here`)
//! ```
//!
//! Direct by default: the page cache of one node must never stand between another node and the LUN.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use rustix::fs::{AtFlags, SeekFrom, StatxFlags};

use crate::held::Held;
use crate::here;
use crate::job::Job;
use crate::poison::Poison;
use crate::queue::Workers;
use crate::reserve::KernelReservations;
use crate::uring::Uring;
use crate::{
    BlockDevice, Geometry, IO_ALIGN, ImageFile, IoError, IoOp, IoRequest, Reservations, WriteRight, pool,
};

/// Threads of the engine without io_uring.
const POOL_THREADS: usize = 8;

/// How to open a [`FileDevice`].
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Whether writes are allowed.
    pub writable: bool,
    /// `O_DIRECT`: past the page cache, in whole blocks of the device. Otherwise buffered, in any bytes.
    pub direct: bool,
    /// Requests in flight in the kernel; more wait in the device's queue.
    pub queue_depth: u32,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { writable: true, direct: true, queue_depth: 128 }
    }
}

impl OpenOptions {
    /// The default, read-only.
    #[must_use]
    pub fn read_only() -> Self {
        Self { writable: false, ..Self::default() }
    }

    /// The default, through the page cache and in any bytes: for image tools on any path.
    #[must_use]
    pub fn buffered() -> Self {
        Self { direct: false, ..Self::default() }
    }
}

/// The open file and what is known about it; shared by the handle and its engine.
pub(crate) struct Target {
    pub(crate) fd: OwnedFd,
    pub(crate) path: PathBuf,
    pub(crate) is_block: bool,
    pub(crate) block_bytes: u32,
    /// Alignment that the device wants of memory.
    pub(crate) memory_align: usize,
    pub(crate) can_discard: AtomicBool,
    pub(crate) poison: Poison,
    /// What the blocking threads may not do yet.
    pub(crate) held: Held,
    /// Jobs that were planned and are not finished.
    pub(crate) jobs: AtomicUsize,
    /// Jobs in a row that found no other one.
    alone: AtomicUsize,
    size_bytes: AtomicU64,
    writable: bool,
}

/// A block device or regular file.
///
/// The size is in whole blocks: of a file opened `direct`, a tail that is shorter than a block is not reachable.
pub struct FileDevice {
    target: Arc<Target>,
    engine: Engine,
    /// Calls that io_uring does not know.
    slow: Workers<Job>,
}

enum Engine {
    Uring(Uring),
    Pool(Workers<Job>),
}

impl Engine {
    /// Whether the device is closed for good although somebody has it open.
    fn has_failed(&self) -> bool {
        match self {
            Self::Uring(uring) => uring.has_failed(),
            Self::Pool(_) => false,
        }
    }
}

impl FileDevice {
    /// Opens an existing block device or regular file.
    ///
    /// # Errors
    /// [`IoError::NotOpened`], with the reason and a hint.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, IoError> {
        let path = path.as_ref();
        let file = Self::open_file(path, options)?;
        Self::over(file, path, options, None)
    }

    /// The open file alone, for a process that cannot open it by itself and goes on with [`FileDevice::of_file`].
    ///
    /// # Errors
    /// [`IoError::NotOpened`], with the reason and a hint.
    pub fn open_file(path: impl AsRef<Path>, options: OpenOptions) -> Result<File, IoError> {
        let path = path.as_ref();
        let flags = if options.direct { libc::O_DIRECT } else { 0 };
        let opened = File::options().read(true).write(options.writable).custom_flags(flags).open(path);
        opened.map_err(|error| not_opened(path, &error))
    }

    /// Takes a file that somebody else has opened at `path`, with the same options. `can_discard` is what
    /// [`FileDevice::takes_discards`] has said there.
    ///
    /// # Errors
    /// As [`FileDevice::open`].
    pub fn of_file(
        file: File,
        path: impl AsRef<Path>,
        options: OpenOptions,
        can_discard: bool,
    ) -> Result<Self, IoError> {
        Self::over(file, path.as_ref(), options, Some(can_discard))
    }

    /// Whether the device takes discards, as the system says where all of it can be seen.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn takes_discards(file: &File) -> std::io::Result<bool> {
        let about = file.metadata()?;
        Ok(!about.file_type().is_block_device() || discards(about.rdev()))
    }

    /// Makes a new sparse file of `size_bytes` and opens it for direct I/O; where the file system has none (some
    /// network and overlay file systems), buffered.
    ///
    /// # Errors
    /// [`IoError::NotOpened`], also when the file exists.
    pub fn create(path: impl AsRef<Path>, size_bytes: u64) -> Result<Self, IoError> {
        let path = path.as_ref();
        let made = File::options().read(true).write(true).create_new(true).open(path);
        let file = made.map_err(|error| not_opened(path, &error))?;
        file.set_len(size_bytes).map_err(|error| not_opened(path, &error))?;
        let direct = OpenOptions::default();
        match Self::open(path, direct) {
            Err(_) => Self::open(path, OpenOptions { direct: false, ..direct }),
            opened => opened,
        }
    }

    fn over(
        file: File,
        path: &Path,
        options: OpenOptions,
        can_discard: Option<bool>,
    ) -> Result<Self, IoError> {
        let target = Arc::new(Target::examine(file, path, options, can_discard)?);
        let name = thread_name(path);
        let engine = match Uring::start(&name, options.queue_depth, &target) {
            Ok(uring) => Engine::Uring(uring),
            Err(error) => {
                warn_once(&error);
                Engine::Pool(pool::start(&name, POOL_THREADS, Arc::clone(&target)))
            }
        };
        let slow = pool::start(&name, 1, Arc::clone(&target));
        Ok(Self { target, engine, slow })
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.target.path
    }

    /// Where data begins at or after `offset`; nothing when there is none, or the system cannot tell.
    pub(crate) fn next_data(&self, offset: u64) -> Option<u64> {
        rustix::fs::seek(&self.target.fd, SeekFrom::Data(offset)).ok()
    }

    /// Where a hole begins at or after `offset`; nothing when the system cannot tell.
    pub(crate) fn next_hole(&self, offset: u64) -> Option<u64> {
        rustix::fs::seek(&self.target.fd, SeekFrom::Hole(offset)).ok()
    }
}

impl BlockDevice for FileDevice {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.target.size(),
            block_bytes: self.target.block_bytes,
            can_discard: self.target.can_discard.load(Ordering::Relaxed),
        }
    }

    fn size_now(&self) -> u64 {
        self.target.measure().unwrap_or_else(|_| self.target.size())
    }

    fn reservations(&self) -> Option<Arc<dyn Reservations>> {
        if !self.target.is_block {
            return None;
        }
        let handle = self.target.fd.try_clone().ok()?;
        Some(Arc::new(KernelReservations::new(handle)))
    }

    fn submit(&self, request: IoRequest) {
        self.push(Job::plan(request, &self.target));
    }

    fn submit_under(&self, request: IoRequest, right: &Arc<dyn WriteRight>) {
        self.push(Job::plan(request, &self.target).under(right));
    }

    fn rights_changed(&self) {
        if let Engine::Uring(uring) = &self.engine {
            uring.rights_changed();
        }
        self.target.held.take().into_iter().for_each(|job| self.push(job));
    }
}

impl FileDevice {
    fn push(&self, job: Job) {
        let alone = self.target.alone_in_a_row();
        match &self.engine {
            engine if here::wanted(job.transfer_bytes(), alone) && !engine.has_failed() => {
                here::carry_out(|| pool::carry_out(job, &self.target));
            }
            _ if job.is_slow() => self.slow.push(job),
            Engine::Uring(uring) => uring.push(job),
            Engine::Pool(pool) => pool.push(job),
        }
    }
}

impl Drop for FileDevice {
    fn drop(&mut self) {
        for job in self.target.held.take() {
            job.finish(&self.target, Err(IoError::Closed));
        }
    }
}

impl ImageFile for FileDevice {
    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.target.set_len(size_bytes)
    }

    fn identity(&self) -> String {
        match rustix::fs::fstat(&self.target.fd) {
            Ok(stat) if self.target.is_block => format!("block:{:x}", stat.st_rdev),
            Ok(stat) => format!("file:{:x}:{}", stat.st_dev, stat.st_ino),
            Err(_) => format!("path:{}", self.target.path.display()),
        }
    }

    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        self.target.data_from(from)
    }
}

impl fmt::Debug for FileDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileDevice").field("path", &self.target.path).finish_non_exhaustive()
    }
}

impl Target {
    fn examine(
        file: File,
        path: &Path,
        options: OpenOptions,
        can_discard: Option<bool>,
    ) -> Result<Self, IoError> {
        let about = file.metadata().map_err(|error| not_opened(path, &error))?;
        let is_block = about.file_type().is_block_device();
        if !is_block && !about.is_file() {
            let why = "it is neither a block device nor a regular file".to_owned();
            return Err(IoError::NotOpened { what: path.display().to_string(), why });
        }
        let (block_bytes, memory_align) =
            if options.direct { direct_alignment(&file, is_block) } else { (1, 1) };
        let can_discard = can_discard.unwrap_or_else(|| !is_block || discards(about.rdev()));
        let target = Self {
            fd: file.into(),
            path: path.to_owned(),
            is_block,
            block_bytes,
            memory_align,
            can_discard: AtomicBool::new(can_discard && options.writable),
            poison: Poison::default(),
            held: Held::default(),
            jobs: AtomicUsize::new(0),
            alone: AtomicUsize::new(0),
            size_bytes: AtomicU64::new(0),
            writable: options.writable,
        };
        target.measure().map_err(|error| not_opened(path, &error.into()))?;
        Ok(target)
    }

    /// How many jobs in a row, the one that comes now included, have found no other one here.
    fn alone_in_a_row(&self) -> usize {
        if self.jobs.load(Ordering::Relaxed) <= 1 {
            return self.alone.fetch_add(1, Ordering::Relaxed) + 1;
        }
        self.alone.store(0, Ordering::Relaxed);
        0
    }

    fn size(&self) -> u64 {
        self.size_bytes.load(Ordering::Acquire)
    }

    /// Asks the system for the size; another handle may have changed it.
    fn measure(&self) -> rustix::io::Result<u64> {
        let bytes = if self.is_block {
            rustix::fs::seek(&self.fd, SeekFrom::End(0))?
        } else {
            rustix::fs::fstat(&self.fd)?.st_size.cast_unsigned()
        };
        let whole = bytes / u64::from(self.block_bytes) * u64::from(self.block_bytes);
        self.size_bytes.store(whole, Ordering::Release);
        Ok(whole)
    }

    /// The next data after the holes at `from`; everything, where the file system does not tell.
    fn data_from(&self, from: u64) -> Option<Range<u64>> {
        let size = self.size();
        if from >= size || self.is_block {
            return (from < size).then_some(from..size);
        }
        let start = match rustix::fs::seek(&self.fd, SeekFrom::Data(from)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => return None,
            Err(_) => return Some(from..size),
        };
        let end = rustix::fs::seek(&self.fd, SeekFrom::Hole(start)).unwrap_or(size);
        Some(start..end.min(size).max(start))
    }

    fn set_len(&self, size_bytes: u64) -> Result<(), IoError> {
        self.poison.check()?;
        if self.is_block || !size_bytes.is_multiple_of(u64::from(self.block_bytes)) {
            return Err(self.out_of_range("set_len", size_bytes, 0));
        }
        let changed = rustix::fs::ftruncate(&self.fd, size_bytes).and_then(|()| self.measure());
        changed.map(drop).map_err(|error| match error.raw_os_error() {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => {
                IoError::NoSpace { what: format!("the file system of {}", self.path.display()) }
            }
            errno => IoError::Os { op: "set_len", offset: size_bytes, errno },
        })
    }

    /// Whether the request may start.
    pub(crate) fn admit(&self, op: &IoOp) -> Result<(), IoError> {
        let (name, offset, len, writes) = match op {
            IoOp::Read { offset, buf } => ("read", *offset, buf.len() as u64, false),
            IoOp::Write { offset, buf, .. } => ("write", *offset, buf.len() as u64, true),
            IoOp::Discard { offset, len } => ("discard", *offset, *len, true),
            IoOp::WriteZeroes { offset, len, .. } => ("write-zeroes", *offset, *len, true),
            // There is nothing to flush in a device that was only read.
            IoOp::Flush => return self.poison.check(),
        };
        if writes {
            self.poison.check()?;
            if !self.writable {
                return Err(IoError::Os { op: name, offset, errno: libc::EROFS });
            }
        }
        let block = u64::from(self.block_bytes);
        let inside = |size| offset.checked_add(len).is_some_and(|end| end <= size);
        let whole = offset.is_multiple_of(block) && len.is_multiple_of(block);
        // The size is asked for again before a refusal: the file may have grown through another handle.
        if whole && (inside(self.size()) || self.measure().is_ok_and(inside)) {
            return Ok(());
        }
        Err(self.out_of_range(name, offset, len))
    }

    fn out_of_range(&self, op: &'static str, offset: u64, len: u64) -> IoError {
        IoError::OutOfRange { op, offset, len, size_bytes: self.size(), block_bytes: self.block_bytes }
    }
}

/// Block size and memory alignment for direct I/O: as the kernel states them, else the safest that works everywhere.
fn direct_alignment(file: &File, is_block: bool) -> (u32, usize) {
    let asked = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(stat) = asked
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_offset_align > 0
    {
        return (stat.stx_dio_offset_align, stat.stx_dio_mem_align.max(1) as usize);
    }
    let logical = if is_block { rustix::fs::ioctl_blksszget(file.as_fd()).ok() } else { None };
    let block = logical.unwrap_or(4096);
    (block, (block as usize).min(IO_ALIGN))
}

/// Whether the block device takes discards, as its queue states.
fn discards(device: u64) -> bool {
    let (major, minor) = (libc::major(device), libc::minor(device));
    ["queue", "../queue"].iter().any(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/discard_max_bytes");
        std::fs::read_to_string(path).is_ok_and(|most| most.trim() != "0")
    })
}

fn not_opened(path: &Path, error: &std::io::Error) -> IoError {
    let hint = match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => " (run as a user who may open it, usually root)",
        Some(libc::ENOENT) => " (check the path)",
        Some(libc::EINVAL) => " (the file system has no direct I/O: open it buffered, or use another one)",
        Some(libc::EBUSY) => " (something else has it open exclusively: a mount, LVM, a RAID)",
        _ => "",
    };
    IoError::NotOpened { what: path.display().to_string(), why: format!("{error}{hint}") }
}

fn thread_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("io:{}", name.chars().filter(|c| *c != '\0').take(12).collect::<String>())
}

fn warn_once(error: &std::io::Error) {
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        tracing::warn!(%error, "io_uring is refused: block I/O goes through a thread pool, which costs more CPU");
    });
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::IoBuf;
    use tempfile::TempDir;

    /// A file of `size_bytes` as an engine sees it.
    pub(crate) fn target(size_bytes: u64) -> (TempDir, Target) {
        let folder = TempDir::new().expect("a folder for the test");
        let path = folder.path().join("file");
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
        file.set_len(size_bytes).expect("set_len");
        let target = Target::examine(file, &path, OpenOptions::buffered(), None).expect("a regular file");
        (folder, Target { block_bytes: 512, ..target })
    }

    #[test]
    fn a_system_without_io_uring_is_served_by_the_pool() {
        let (_folder, target) = target(1 << 20);
        let target = Arc::new(target);
        let engine = Engine::Pool(pool::start("test", POOL_THREADS, Arc::clone(&target)));
        let slow = pool::start("test", 1, Arc::clone(&target));
        let device = FileDevice { target, engine, slow };
        device.write_at(4096, &[7; 8192]).expect("write");
        let forced = IoBuf::zeroed(512);
        forced.copy_from(&[9; 512]);
        device.run(IoOp::Write { offset: 0, buf: forced, fua: true }).expect("forced write");
        device.run(IoOp::WriteZeroes { offset: 4096, len: 4096, may_unmap: true }).expect("zero");
        device.run(IoOp::Discard { offset: 1 << 19, len: 4096 }).expect("discard");
        device.flush().expect("flush");
        let mut back = vec![1; 12288];
        device.read_at(0, &mut back).expect("read");
        assert_eq!((back[0], back[512], back[4096], back[8192]), (9, 0, 0, 7));
        assert!(device.read_at(1 << 20, &mut [0; 512]).is_err());
    }
}
