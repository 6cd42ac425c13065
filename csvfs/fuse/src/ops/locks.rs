//! Locks: `fcntl` (POSIX and OFD) and `flock`, held across nodes by the coordinator.
//!
//! ```text
//!   SETLKW --> asked, no thread waits --> answered when granted
//!                  ^
//!   INTERRUPT -----'  EINTR
//!   FLUSH (a descriptor is closed)         the process's POSIX locks of the file go
//!   RELEASE (an open file's last one)      its `flock` and OFD locks go
//! ```

use std::sync::{Arc, mpsc};

use csvfs::node::Lock;

use super::Ops;
use crate::attr::errno;
use crate::pool::Lane;
use crate::wire::abi::{FileLock, FlushIn, LK_FLOCK, LkIn, RELEASE_FLOCK_UNLOCK, ReleaseIn};
use crate::wire::reply::Reply;
use crate::wire::request::Header;

const READ: u32 = libc::F_RDLCK.cast_unsigned();
const WRITE: u32 = libc::F_WRLCK.cast_unsigned();
const UNLOCK: u32 = libc::F_UNLCK.cast_unsigned();

impl Ops {
    pub(super) fn setlk(&self, header: Header, args: &LkIn, wait: bool, reply: Reply) {
        let lock = lock(header.ino, args);
        match args.lock.kind {
            READ | WRITE => self.lock(args.fh, lock, wait, reply),
            UNLOCK => {
                if !lock.flock {
                    self.shared.lockers.unlocking(&lock);
                }
                self.done(reply, move |shared| shared.node.unlock(&lock));
            }
            _ => reply.error(libc::EINVAL),
        }
    }

    fn lock(&self, fh: u64, lock: Lock, wait: bool, reply: Reply) {
        let unique = reply.unique();
        if !self.shared.interrupts.begin(unique) {
            return reply.error(libc::EINTR);
        }
        let shared = Arc::clone(&self.shared);
        let ask = || {
            self.shared.node.lock(&lock, wait, move |outcome| {
                shared.interrupts.end(unique);
                reply.done(outcome.map_err(|error| errno(&error)));
            })
        };
        let request = if lock.flock { ask() } else { self.shared.lockers.locking(&lock, fh, ask) };
        if self.shared.interrupts.begun(unique, request) {
            self.shared.node.interrupt_lock(request);
        }
    }

    pub(super) fn interrupted(&self, unique: u64) {
        if let Some(request) = self.shared.interrupts.interrupt(unique) {
            self.shared.node.interrupt_lock(request);
        }
    }

    pub(super) fn getlk(&self, header: Header, args: &LkIn, reply: Reply) {
        let lock = lock(header.ino, args);
        let asked = args.lock;
        self.wait(move |shared| match shared.node.query_lock(&lock) {
            Ok(None) => reply.lock(&FileLock { kind: UNLOCK, pid: 0, ..asked }),
            Ok(Some(found)) => reply.lock(&FileLock {
                start: found.lock.start,
                end: found.lock.end,
                kind: if found.lock.write { WRITE } else { READ },
                // A process number of another node would name somebody else here.
                pid: if found.here { found.lock.pid } else { 0 },
            }),
            Err(error) => reply.error(errno(&error)),
        });
    }

    /// A descriptor is closed: the locks of its process go, as POSIX wants it. Nothing is buffered that could be lost.
    pub(super) fn flush(&self, header: Header, args: FlushIn, reply: Reply) {
        self.shared.lockers.unlocking(&range(header.ino, args.lock_owner, (0, u64::MAX)));
        if !self.shared.node.has_locks(header.ino, args.lock_owner, false) {
            return reply.ok();
        }
        let shared = Arc::clone(&self.shared);
        self.pool.run(Lane::Closing, move || {
            let outcome = shared.node.unlock_all(header.ino, args.lock_owner, false);
            reply.done(outcome.map_err(|error| errno(&error)));
        });
    }

    /// The last descriptor of an open file is closed: what it has locked goes, which may wait for the coordinator. That the
    /// node's last handle gives grants back is only begun here.
    pub(super) fn release(&self, header: Header, args: ReleaseIn, reply: Reply) {
        let closed = self.shared.files.remove(args.fh);
        let (ino, handle) = (header.ino, args.fh);
        let flock = args.release_flags & RELEASE_FLOCK_UNLOCK != 0;
        if !flock && self.shared.lockers.has_none(ino, handle) {
            drop(closed);
            return reply.ok();
        }
        let shared = Arc::clone(&self.shared);
        self.pool.run(Lane::Closing, move || {
            let (tell, told) = mpsc::channel();
            shared.lockers.ended(ino, handle, |lock| {
                let tell = tell.clone();
                shared.node.unlock_then(&lock, move |outcome| drop(tell.send(outcome)));
            });
            drop(tell);
            let flock = flock.then(|| shared.node.unlock_all(ino, handle, true));
            for error in told.into_iter().chain(flock).filter_map(Result::err) {
                tracing::warn!(ino, %error, "locks of a closed file were not given up");
            }
            drop(closed);
            reply.ok();
        });
    }
}

/// What is asked for. The owner of a `flock` is the open file, for which the kernel has a number that is used again.
fn lock(ino: u64, args: &LkIn) -> Lock {
    let flock = args.flags & LK_FLOCK != 0;
    let owner = if flock { args.fh } else { args.owner };
    let (write, pid) = (args.lock.kind == WRITE, args.lock.pid);
    Lock { write, flock, pid, ..range(ino, owner, (args.lock.start, args.lock.end)) }
}

fn range(ino: u64, owner: u64, (start, end): (u64, u64)) -> Lock {
    Lock { ino, owner, start, end, write: false, flock: false, pid: 0 }
}
