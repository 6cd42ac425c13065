//! What the coordinator counts as open on a node, when answers come late and the node attaches anew: an open file without a name
//! keeps its blocks as long as it is counted.

mod world;

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use csvfs::local::LocalLink;
use csvfs::node::{CoordinatorLink, File, Node, ROOT_INO, ReplyTo};
use csvfs::proto::request::Op;
use csvfs::proto::{Reply, Request};
use world::{World, create, fsync, open, read, write};

const CONTENT: [u8; 10_000] = [9; 10_000];

/// A kind of request.
type Kind = fn(&Op) -> bool;

/// An answer that has come, and to whom.
type Late = (ReplyTo, Result<Reply, csvfs::node::LinkError>);

/// A way to the coordinator on which answers to some requests come late: the requests have arrived in time.
struct Slow {
    link: Arc<LocalLink>,
    state: Mutex<State>,
    came: Condvar,
}

#[derive(Default)]
struct State {
    slow: Vec<Kind>,
    late: Vec<(Kind, Late)>,
}

impl Slow {
    fn on(world: &World) -> Arc<Self> {
        Arc::new(Self { link: world.link.clone(), state: Mutex::default(), came: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic under the lock")
    }

    /// From now on such answers come late.
    fn hold(&self, kind: Kind) {
        self.lock().slow.push(kind);
    }

    /// Waits until the answer to such a request is there.
    fn wait_held(&self, kind: Kind) {
        let none = |state: &mut State| !state.late.iter().any(|(late, _)| std::ptr::fn_addr_eq(*late, kind));
        drop(self.came.wait_while(self.lock(), none).expect("no panic under the lock"));
    }

    /// Answers of this kind come, and come in time from now on.
    fn release(&self, kind: Kind) {
        let mut state = self.lock();
        state.slow.retain(|slow| !std::ptr::fn_addr_eq(*slow, kind));
        let (released, kept) = std::mem::take(&mut state.late)
            .into_iter()
            .partition(|(late, _)| std::ptr::fn_addr_eq(*late, kind));
        state.late = kept;
        drop(state);
        let released: Vec<(Kind, Late)> = released;
        for (_, (done, outcome)) in released {
            done(outcome);
        }
    }
}

struct SlowLink(Arc<Slow>);

impl CoordinatorLink for SlowLink {
    fn send(&self, request: Request, done: ReplyTo) {
        let op = request.op.as_ref().expect("a request asks for something");
        let kind = self.0.lock().slow.iter().copied().find(|slow| slow(op));
        let slow = self.0.clone();
        let done: ReplyTo = match kind {
            None => done,
            Some(kind) => Box::new(move |outcome| {
                slow.lock().late.push((kind, (done, outcome)));
                slow.came.notify_all();
            }),
        };
        self.0.link.send(request, done);
    }
}

fn closes(op: &Op) -> bool {
    matches!(op, Op::Close(_))
}

fn opens(op: &Op) -> bool {
    matches!(op, Op::Open(_))
}

fn attaches(op: &Op) -> bool {
    matches!(op, Op::Attach(_))
}

/// Has the node attach anew.
fn announce(world: &World) {
    world.pushes.announce(world.volume, lockmgr::Term(world.term()), lockmgr::NodeId(1));
}

/// The last name of a file that is open on one node goes on another: it can be read there as long as it is open.
fn loses_its_name_and_lives_on(file: &File, elsewhere: &Arc<Node>) {
    elsewhere.unlink(ROOT_INO, b"f").expect("an unlink");
    // What nobody has open any more is freed before this is answered.
    elsewhere.statfs().expect("an answer");
    assert!(read(file, 0, 20_000).expect("a read") == CONTENT);
    assert_eq!(file.attr().expect("attributes").nlink, 0);
}

fn with_a_file() -> (World, Arc<Slow>, Arc<Node>, Arc<Node>) {
    let world = World::new();
    let slow = Slow::on(&world);
    let (a, b) = (world.node_by(1, Arc::new(SlowLink(slow.clone()))), world.node(2));
    let file = create(&a, "f");
    write(&file, 0, &CONTENT).expect("a write");
    fsync(&file).expect("an fsync");
    drop(file);
    (world, slow, a, b)
}

// Invariant C7: what was closed before an attach is not in its claims, and counts no second time against what was opened since.
#[test]
fn a_close_whose_answer_is_late_does_not_count_against_a_later_open() {
    let (world, slow, a, b) = with_a_file();
    slow.hold(closes);
    // The other node takes all that is held of it: it is closed.
    let other = open(&b, "f");
    write(&other, 0, &CONTENT).expect("a write");
    fsync(&other).expect("an fsync");
    drop(other);
    slow.wait_held(closes);
    let file = open(&a, "f");
    announce(&world);
    // Answered after the attach, and after the close was sent again.
    a.statfs().expect("an answer");
    slow.release(closes);
    loses_its_name_and_lives_on(&file, &b);
}

// Invariant C7: what was counted before an attach that does not claim it is counted no more.
#[test]
fn an_open_whose_answer_is_older_than_an_attach_is_asked_for_again() {
    let (world, slow, a, b) = with_a_file();
    let ino = b.lookup(ROOT_INO, b"f").expect("the name").ino;
    // It is closed on the first node.
    let other = open(&b, "f");
    write(&other, 0, &CONTENT).expect("a write");
    fsync(&other).expect("an fsync");
    drop(other);
    while a.stats().files > 1 {
        thread::yield_now();
    }
    slow.hold(opens);
    let opener = {
        let a = a.clone();
        thread::spawn(move || a.open(ino))
    };
    slow.wait_held(opens);
    slow.hold(attaches);
    announce(&world);
    slow.wait_held(attaches);
    slow.release(opens);
    slow.release(attaches);
    let file = opener.join().expect("no panic").expect("an open");
    loses_its_name_and_lives_on(&file, &b);
}

// The same for a file that is new.
#[test]
fn a_file_that_is_made_while_its_node_attaches_anew_is_open() {
    let world = World::new();
    let slow = Slow::on(&world);
    let (a, b) = (world.node_by(1, Arc::new(SlowLink(slow.clone()))), world.node(2));
    let made: Kind = |op| matches!(op, Op::Create(_));
    slow.hold(made);
    let maker = {
        let a = a.clone();
        thread::spawn(move || create(&a, "f"))
    };
    slow.wait_held(made);
    slow.hold(attaches);
    announce(&world);
    slow.wait_held(attaches);
    slow.release(made);
    slow.release(attaches);
    let file = maker.join().expect("no panic");
    write(&file, 0, &CONTENT).expect("a write");
    fsync(&file).expect("an fsync");
    loses_its_name_and_lives_on(&file, &b);
}
