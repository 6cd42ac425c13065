//! Who goes through this node now: one stream per key, and the certainty that its end is the end.

use std::collections::HashMap;
use std::hash::Hash;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Sessions by what they are for.
#[derive(Debug)]
pub(crate) struct Sessions<K> {
    /// Rank: a leaf.
    table: Mutex<Table<K>>,
    left: Condvar,
}

#[derive(Debug)]
struct Table<K> {
    sessions: HashMap<K, Session>,
    next: u64,
}

#[derive(Debug)]
struct Session {
    number: u64,
    /// A second handle to the session's stream, to cut it off.
    stream: OwnedFd,
}

impl<K> Default for Sessions<K> {
    fn default() -> Self {
        Self { table: Mutex::new(Table { sessions: HashMap::new(), next: 1 }), left: Condvar::new() }
    }
}

impl<K: Clone + Eq + Hash> Sessions<K> {
    fn lock(&self) -> MutexGuard<'_, Table<K>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a session, after the former one for `key` has ended with all that it had begun. Blocks until then.
    pub(crate) fn enter(&self, key: &K, stream: &OwnedFd) -> std::io::Result<u64> {
        let stream = stream.as_fd().try_clone_to_owned()?;
        let mut table = self.lock();
        while let Some(former) = table.sessions.get(key) {
            cut_off(former);
            table = self.left.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        let number = table.next;
        table.next += 1;
        table.sessions.insert(key.clone(), Session { number, stream });
        Ok(number)
    }

    /// The session has ended: nothing of it can reach a device any more.
    pub(crate) fn leave(&self, key: &K, number: u64) {
        let mut table = self.lock();
        if table.sessions.get(key).is_some_and(|session| session.number == number) {
            table.sessions.remove(key);
        }
        drop(table);
        self.left.notify_all();
    }

    /// Ends the sessions that `wanted` names, and returns when they have ended. Blocks.
    pub(crate) fn end(&self, wanted: impl Fn(&K) -> bool) {
        let mut table = self.lock();
        loop {
            let mut any = false;
            for (_, session) in table.sessions.iter().filter(|(key, _)| wanted(key)) {
                cut_off(session);
                any = true;
            }
            if !any {
                return;
            }
            table = self.left.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn cut_off(session: &Session) {
    // It may be over already; then it is about to leave.
    let _ = rustix::net::shutdown(&session.stream, rustix::net::Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use super::*;

    // Invariants A1 and C9: the end of a session is known only when it has left by itself.
    #[test]
    fn a_session_is_over_when_it_has_left_and_not_when_it_is_cut_off() {
        let sessions = Arc::new(Sessions::default());
        let (near, mut far) = UnixStream::pair().expect("a pair");
        let number = sessions.enter(&7, &near.into()).expect("a session");
        let (tell, told) = channel();
        let ending = Arc::clone(&sessions);
        let end = std::thread::spawn(move || {
            ending.end(|key| *key == 7);
            tell.send(()).expect("the test listens");
        });
        assert_eq!(far.read(&mut [0]).expect("it is cut off"), 0);
        assert!(told.try_recv().is_err(), "but what it has begun may still be under way");
        sessions.leave(&7, number);
        told.recv().expect("now it has ended");
        end.join().expect("no panic");
        sessions.end(|_| true);
    }

    #[test]
    fn a_new_session_waits_for_the_end_of_the_former_one() {
        let sessions = Arc::new(Sessions::default());
        let (near, mut far) = UnixStream::pair().expect("a pair");
        let stream = OwnedFd::from(near);
        let first = sessions.enter(&1, &stream).expect("a session");
        let (entering, second) = (Arc::clone(&sessions), stream.try_clone().expect("a handle"));
        let entered = std::thread::spawn(move || entering.enter(&1, &second).expect("a session"));
        assert_eq!(far.read(&mut [0]).expect("the first is cut off"), 0);
        sessions.leave(&1, first);
        assert_ne!(entered.join().expect("no panic"), first);
    }
}
