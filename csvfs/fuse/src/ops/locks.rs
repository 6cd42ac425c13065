//! Locks: `fcntl` (POSIX and OFD) and `flock`, held across nodes by the coordinator.
//!
//! ```text
//!   SETLKW --> asked, no thread waits --> answered when granted
//!                  ^
//!   INTERRUPT -----'  EINTR
//!   FLUSH (a descriptor is closed)         the process's POSIX locks of the file go
//!   RELEASE (an open file's last one)      its `flock` and OFD locks go
//! ```

use std::sync::Arc;

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
            UNLOCK => self.done(reply, move |shared| shared.node.unlock(&lock)),
            _ => reply.error(libc::EINVAL),
        }
    }

    fn lock(&self, fh: u64, lock: Lock, wait: bool, reply: Reply) {
        if !lock.flock
            && let Some(open) = self.shared.files.get(fh)
        {
            open.locked_by(lock.owner);
        }
        let unique = reply.unique();
        if !self.shared.interrupts.begin(unique) {
            return reply.error(libc::EINTR);
        }
        let shared = Arc::clone(&self.shared);
        let request = self.shared.node.lock(&lock, wait, move |outcome| {
            shared.interrupts.end(unique);
            reply.done(outcome.map_err(|error| errno(&error)));
        });
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
        if let Some(open) = self.shared.files.get(args.fh) {
            open.unlocked_by(args.lock_owner);
        }
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
        let owners = closed.iter().flat_map(|open| open.lockers()).map(|owner| (owner, false));
        let flock = (args.release_flags & RELEASE_FLOCK_UNLOCK != 0).then_some((args.lock_owner, true));
        let owners: Vec<_> = owners.chain(flock).collect();
        if owners.is_empty() {
            drop(closed);
            return reply.ok();
        }
        let shared = Arc::clone(&self.shared);
        self.pool.run(Lane::Closing, move || {
            for (owner, flock) in owners {
                if let Err(error) = shared.node.unlock_all(header.ino, owner, flock) {
                    tracing::warn!(ino = header.ino, %error, "locks of a closed file were not given up");
                }
            }
            drop(closed);
            reply.ok();
        });
    }
}

fn lock(ino: u64, args: &LkIn) -> Lock {
    Lock {
        ino,
        owner: args.owner,
        start: args.lock.start,
        end: args.lock.end,
        write: args.lock.kind == WRITE,
        flock: args.flags & LK_FLOCK != 0,
        pid: args.lock.pid,
    }
}
