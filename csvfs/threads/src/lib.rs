//! Threads that say what they are for, so that a program can confine each to what it needs.
//!
//! ```text
//!   spawn(kind, work) --> a thread                                    programs that confine nothing
//!   spawn(kind, work) --> "spawner" --> a thread: confine, then work  after `confine_with`
//! ```
//! What a thread is confined to holds for all that it starts. A library starts threads wherever it notices that it needs one,
//! so with confinement one thread, which has kept the rights of the program, starts those of all others.
//!
//! **Invariant:** after [`confine_with`] no work of [`spawn`] begins before its thread is confined. A thread that cannot be
//! confined is one that cannot be started.

mod prompt;

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::thread::{Builder, JoinHandle};

pub use prompt::prompt;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Executes a virtual processor.
    Vcpu,
    /// Serves the queues of a virtual device.
    Device,
    /// Fills guest memory that is touched before it is there.
    Memory,
    /// Serves an `io_uring`, which is made before it is confined.
    Ring,
    /// Makes blocking calls on open files.
    Calls,
    /// Runs completions and tasks that were handed over.
    Tasks,
    /// Finds ways to a device: opens files and connections.
    Ways,
    /// Keeps a connection to a block server, and makes it anew.
    Network,
    /// Connects to a server of this machine again.
    Link,
    /// Reads or writes the frames of a connection, and runs what waits for them.
    Frames,
    /// Takes connections of this machine.
    Accept,
    /// Carries out what a supervisor asks for.
    Control,
    /// Works on an image that is in use.
    Images,
    /// Waits for an event, and tells others of it.
    Watch,
    /// The program's first thread, once all others are there.
    Main,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Vcpu,
        Self::Device,
        Self::Memory,
        Self::Ring,
        Self::Calls,
        Self::Tasks,
        Self::Ways,
        Self::Network,
        Self::Link,
        Self::Frames,
        Self::Accept,
        Self::Control,
        Self::Images,
        Self::Watch,
        Self::Main,
    ];
}

/// Confines the calling thread, for good.
pub type Confine = fn(Kind) -> io::Result<()>;

type Work = Box<dyn FnOnce() + Send>;

/// A thread to be started, and where to tell what came of it.
struct Order {
    builder: Builder,
    work: Work,
    answer: Sender<io::Result<JoinHandle<()>>>,
}

struct Confinement {
    confine: Confine,
    orders: Sender<Order>,
}

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// From here on every new thread is confined by `confine`. Called once, by a program, while it has the rights that its threads
/// need before they are confined.
///
/// # Errors
/// When the system has no thread, or it was called before.
pub fn confine_with(confine: Confine) -> io::Result<()> {
    let (orders, ordered) = channel::<Order>();
    Builder::new().name("spawner".into()).spawn(move || {
        while let Ok(Order { builder, work, answer }) = ordered.recv() {
            // Who asked waits for the answer.
            drop(answer.send(builder.spawn(work)));
        }
    })?;
    CONFINEMENT
        .set(Confinement { confine, orders })
        .map_err(|_| io::Error::other("threads are confined already"))
}

/// From here on a new thread has nothing of who asks for it: one like the caller starts it. For a program that confines no thread
/// and keeps some of them on a processor, which holds for all that these start, too. Called once.
///
/// # Errors
/// As [`confine_with`].
pub fn start_apart() -> io::Result<()> {
    confine_with(|_| Ok(()))
}

/// Starts a thread and confines it to what its kind needs.
///
/// # Errors
/// When the system has no thread, or it cannot be confined.
pub fn spawn(
    kind: Kind,
    builder: Builder,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    if CONFINEMENT.get().is_none() {
        return builder.spawn(work);
    }
    let (tell, told) = channel();
    let thread = spawn_free(builder, move || {
        let confined = confine(kind);
        let goes_on = confined.is_ok();
        // Who asked waits below.
        drop(tell.send(confined));
        if goes_on {
            work();
        }
    })?;
    told.recv().unwrap_or_else(|_| Err(io::Error::other("the thread ended at once")))?;
    Ok(thread)
}

/// Starts a thread that has to do something before it can be confined; then it calls [`confine`] by itself.
///
/// # Errors
/// When the system has no thread.
pub fn spawn_free(builder: Builder, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let Some(confinement) = CONFINEMENT.get() else { return builder.spawn(work) };
    let (answer, answered) = channel();
    let gone = || io::Error::other("the thread that starts others is gone");
    confinement.orders.send(Order { builder, work: Box::new(work), answer }).map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}

/// Confines the calling thread, for good, in a program that confines its threads.
///
/// # Errors
/// When the system refuses.
pub fn confine(kind: Kind) -> io::Result<()> {
    CONFINEMENT.get().map_or(Ok(()), |confinement| (confinement.confine)(kind))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::thread;

    use super::*;

    thread_local! {
        static CONFINED_TO: Cell<Option<Kind>> = const { Cell::new(None) };
    }

    fn note(kind: Kind) -> io::Result<()> {
        if kind == Kind::Main {
            return Err(io::Error::other("refused"));
        }
        CONFINED_TO.set(Some(kind));
        Ok(())
    }

    // One test, because what is set holds for the whole program.
    #[test]
    fn work_begins_when_its_thread_is_confined_and_never_without() {
        let (tell, told) = channel();
        let says = |tell: &Sender<_>| {
            let tell = tell.clone();
            move || {
                tell.send((CONFINED_TO.get(), thread::current().name().map(str::to_owned)))
                    .expect("it is heard");
            }
        };
        spawn(Kind::Vcpu, Builder::new(), says(&tell)).expect("a thread");
        assert_eq!(told.recv(), Ok((None, None)), "nothing is confined by itself");

        confine_with(note).expect("the first time");
        confine_with(note).expect_err("the second time");
        let thread = spawn(Kind::Vcpu, Builder::new().name("named".into()), says(&tell)).expect("a thread");
        assert_eq!(told.recv(), Ok((Some(Kind::Vcpu), Some("named".into()))));
        thread.join().expect("it ends");

        let inner = says(&tell);
        spawn(Kind::Ring, Builder::new(), move || drop(spawn(Kind::Tasks, Builder::new(), inner)))
            .expect("a thread");
        assert_eq!(told.recv(), Ok((Some(Kind::Tasks), None)), "a thread is confined for itself alone");

        spawn_free(Builder::new(), says(&tell)).expect("a thread");
        assert_eq!(told.recv(), Ok((None, None)), "who confines himself is free until then");

        spawn(Kind::Main, Builder::new(), says(&tell)).expect_err("what cannot be confined is not started");
        drop(tell);
        told.recv().expect_err("its work has not begun");
    }
}
