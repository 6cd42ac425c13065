//! Blocking system calls on a few threads.
//!
//! The engine where io_uring is refused, and everywhere the slow lane for calls that io_uring does not know, and what a thread does
//! for itself.
#![expect(
    unsafe_code,
    reason = "transfers go to memory that is shared with others, so no slice may be made of it"
)]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use threads::Kind;

use crate::file::Target;
use crate::job::{Call, Job};
use crate::queue::Workers;
use crate::{IoError, Permission};

/// `BLKDISCARD` of `linux/fs.h`.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Threads that carry jobs out one by one.
pub(crate) fn start(name: &str, threads: usize, target: Arc<Target>) -> Workers<Job> {
    Workers::of_kind(Kind::Calls, name, threads, move |job| carry_out(job, &target))
}

/// Makes all calls of a job and finishes it, or leaves it to wait for its right.
pub(crate) fn carry_out(mut job: Job, target: &Target) {
    let outcome = loop {
        // Right before the call, whatever this thread was stopped for (B3).
        match job.permission() {
            Permission::Granted => {}
            Permission::Revoked(reason) => break Err(IoError::NotPermitted { reason }),
            Permission::Wait => match target.held.hold(job) {
                None => return,
                Some(back) => {
                    job = back;
                    continue;
                }
            },
        }
        let call = match job.call() {
            Ok(call) => call,
            Err(ended) => break ended,
        };
        let outcome = make(call, target.fd.as_raw_fd());
        if let Some(ended) = job.returned(target, outcome) {
            break ended;
        }
    };
    job.finish(target, outcome);
}

/// Makes the call; gives bytes moved or a negated error number, as io_uring does.
fn make(call: Call, fd: RawFd) -> i32 {
    let result = match call {
        // SAFETY: the memory is valid for `len` bytes until the job is finished, which is after this call.
        Call::Read { into, len, offset } => unsafe {
            libc::pread(fd, into.cast(), len as usize, offset.cast_signed())
        },
        Call::Write { from, len, offset, durable } => {
            let part = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: len as usize };
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            // SAFETY: as for the read; one iovec is passed.
            unsafe { libc::pwritev2(fd, &raw const part, 1, offset.cast_signed(), flags) }
        }
        // SAFETY: no memory is involved.
        Call::Sync => unsafe { libc::fdatasync(fd) as isize },
        // SAFETY: no memory is involved.
        Call::Fallocate { mode, offset, len } => unsafe {
            libc::fallocate(fd, mode, offset.cast_signed(), len.cast_signed()) as isize
        },
        Call::DiscardBlocks { offset, len } => {
            let range = [offset, len];
            // SAFETY: the ioctl reads two u64 at the pointer.
            unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) as isize }
        }
    };
    if result < 0 {
        return -std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    }
    i32::try_from(result).expect("a call moves less than 2 GiB")
}
