//! The way to the kernel: `/dev/fuse`, opened once and cloned for each further reader.
//!
//! A request is answered on the channel that it was read from: that is where the kernel looks for it.
#![expect(unsafe_code, reason = "one ioctl, which clones the connection for a further reader")]

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

/// One descriptor of a connection.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// A new connection, not yet mounted.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open("/dev/fuse", flags, Mode::empty())?))
    }

    /// One more way to the same connection, with requests of its own: readers do not disturb each other.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);
        let clone = Self::open()?;
        let of = u32::try_from(self.0.as_raw_fd()).map_err(io::Error::other)?;
        // SAFETY: FUSE_DEV_IOC_CLONE reads one u32, the descriptor of the connection, from where its argument points to.
        unsafe { ioctl(&clone.0, Setter::<CLONE, u32>::new(of))? };
        Ok(clone)
    }

    /// The next request; none when the connection has ended.
    pub(crate) fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        loop {
            match rustix::io::read(&self.0, &mut *buffer) {
                Ok(len) => return Ok(Some(&buffer[..len])),
                Err(Errno::NODEV) => return Ok(None),
                // Nothing was taken: a request was interrupted before it was read.
                Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Tells the kernel something unasked: whether it knows what that is about.
    pub(crate) fn tell(&self, parts: &[IoSlice<'_>]) -> bool {
        match rustix::io::writev(&self.0, parts) {
            Err(Errno::NOENT) => false,
            // Where the connection has ended there is nothing left to tell.
            Ok(_) | Err(Errno::NODEV) => true,
            Err(error) => {
                tracing::warn!(%error, "the kernel did not take what it was told");
                true
            }
        }
    }

    /// Sends a reply.
    pub(crate) fn send(&self, parts: &[IoSlice<'_>]) {
        match rustix::io::writev(&self.0, parts) {
            // The caller was interrupted, or the connection has ended: nobody waits for the reply.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::warn!(%error, "the kernel did not take a reply"),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
