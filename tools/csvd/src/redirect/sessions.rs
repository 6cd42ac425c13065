//! Who goes through this node now: one stream per key, and the certainty that its end is the end.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
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

struct Session {
    number: u64,
    /// Ends the session's stream. It may be over already; then the session is about to leave.
    cut_off: Box<dyn Fn() + Send>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.number)
    }
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

    /// Begins a session, after the former one for `key` has ended with all that it had begun. Blocks until then. `cut_off`
    /// ends its stream, at any moment and without waiting.
    pub(crate) fn enter(&self, key: &K, cut_off: impl Fn() + Send + 'static) -> u64 {
        let mut table = self.lock();
        while let Some(former) = table.sessions.get(key) {
            (former.cut_off)();
            table = self.left.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
        let number = table.next;
        table.next += 1;
        table.sessions.insert(key.clone(), Session { number, cut_off: Box::new(cut_off) });
        number
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
                (session.cut_off)();
                any = true;
            }
            if !any {
                return;
            }
            table = self.left.wait(table).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    /// A session, and what hears that it is cut off.
    fn begin(sessions: &Sessions<u8>, key: u8) -> (u64, Receiver<()>) {
        let (tell, told) = channel();
        (sessions.enter(&key, move || tell.send(()).expect("the test listens")), told)
    }

    // Invariants A1 and C9: the end of a session is known only when it has left by itself.
    #[test]
    fn a_session_is_over_when_it_has_left_and_not_when_it_is_cut_off() {
        let sessions = Arc::new(Sessions::default());
        let (number, cut_off) = begin(&sessions, 7);
        let (tell, told) = channel();
        let ending = Arc::clone(&sessions);
        let end = std::thread::spawn(move || {
            ending.end(|key| *key == 7);
            tell.send(()).expect("the test listens");
        });
        cut_off.recv().expect("it is cut off");
        assert!(told.try_recv().is_err(), "but what it has begun may still be under way");
        sessions.leave(&7, number);
        told.recv().expect("now it has ended");
        end.join().expect("no panic");
        sessions.end(|_| true);
    }

    #[test]
    fn a_new_session_waits_for_the_end_of_the_former_one() {
        let sessions = Arc::new(Sessions::default());
        let (first, cut_off) = begin(&sessions, 1);
        let entering = Arc::clone(&sessions);
        let entered = std::thread::spawn(move || entering.enter(&1, || ()));
        cut_off.recv().expect("the first is cut off");
        sessions.leave(&1, first);
        assert_ne!(entered.join().expect("no panic"), first);
    }
}
