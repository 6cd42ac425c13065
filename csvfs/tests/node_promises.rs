//! Attributes that a kernel was promised: it tells them without asking, and nobody ever contradicts it.

mod world;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use blockio::{Permission, WriteRight};
use csvfs::node::{Attr, KernelCache, Node, ROOT_INO, SetAttr, XattrFlags};
use world::{Dice, PLAIN, World, append, buf_of, create, fsync, later, write};

type Then = Box<dyn FnOnce() + Send>;

/// The thread of a program.
const THREAD: u32 = 7;

/// A kernel's memory of attributes. What it is to forget it forgets at once, or, when it is `slow`, when the test says so.
#[derive(Default)]
struct Kernel {
    told: Mutex<HashMap<u64, Attr>>,
    slow: AtomicBool,
    late: Mutex<Vec<(u64, Then)>>,
    asked: Condvar,
}

impl KernelCache for Kernel {
    fn give_up(&self, _ino: u64, _range: std::ops::Range<u64>, then: Then) {
        then();
    }

    fn forget_attributes(&self, ino: u64, then: Then) {
        if self.slow.load(Ordering::SeqCst) {
            lock(&self.late).push((ino, then));
            self.asked.notify_all();
        } else {
            lock(&self.told).remove(&ino);
            then();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kernel {
    fn of(node: &Node) -> Arc<Self> {
        let kernel = Arc::new(Self::default());
        assert!(node.set_kernel(kernel.clone()));
        kernel
    }

    /// A program asks: whether the answer came with a promise.
    fn looks(&self, node: &Node, ino: u64) -> bool {
        let Some((attr, keep)) = node.promise(ino, THREAD) else { return false };
        if keep.is_zero() {
            lock(&self.told).remove(&ino);
        } else {
            lock(&self.told).insert(ino, attr);
        }
        !keep.is_zero()
    }

    /// Waits until it was told to forget the inode, and gives what follows.
    fn asked_to_forget(&self, ino: u64) -> Then {
        let mut late = lock(&self.late);
        loop {
            if let Some(at) = late.iter().position(|(asked, _)| *asked == ino) {
                return late.remove(at).1;
            }
            late = self.asked.wait(late).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Looks until there is a promise: what was just done may still be ending.
fn promised(kernel: &Kernel, node: &Node, ino: u64) {
    for _ in 0..100_000 {
        node.getattr(ino).expect("attributes");
        if kernel.looks(node, ino) {
            return;
        }
        thread::yield_now();
    }
    panic!("inode {ino} is never promised");
}

fn mode(mode: u32) -> SetAttr {
    SetAttr { mode: Some(mode), ..SetAttr::default() }
}

// Invariants F1 and F3: the change is not made before the kernel has forgotten what was before.
#[test]
fn what_another_node_changes_waits_until_the_kernel_has_forgotten_it() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let kernel = Kernel::of(&a);
    let ino = create(&b, "f").ino();
    promised(&kernel, &a, ino);
    kernel.slow.store(true, Ordering::SeqCst);
    let (tell, told) = mpsc::channel();
    let changing = b.clone();
    let change = thread::spawn(move || {
        changing.setattr(ino, &mode(0o600)).expect("a change");
        tell.send(()).expect("the test waits");
    });
    let forgotten = kernel.asked_to_forget(ino);
    assert!(told.try_recv().is_err(), "the kernel still tells the mode of before");
    forgotten();
    told.recv().expect("the change is made");
    change.join().expect("it ends");
    assert_eq!(a.getattr(ino).expect("attributes").mode, 0o600);
}

#[test]
fn what_this_node_changes_waits_as_well() {
    let world = World::new();
    let a = world.node(1);
    let kernel = Kernel::of(&a);
    let file = create(&a, "f");
    let waits = |what: &str, ino: u64, change: &dyn Fn(Box<dyn FnOnce(bool) + Send>)| {
        kernel.slow.store(false, Ordering::SeqCst);
        promised(&kernel, &a, ino);
        kernel.slow.store(true, Ordering::SeqCst);
        let made = later(change);
        let forgotten = kernel.asked_to_forget(ino);
        assert!(made.try_recv().is_err(), "{what}");
        // Another one may be promised too.
        kernel.slow.store(false, Ordering::SeqCst);
        lock(&kernel.late).drain(..).for_each(|(_, then)| then());
        forgotten();
        assert!(made.recv().expect("it ends"), "{what}");
    };
    waits("a write", file.ino(), &|tell| file.write(0, buf_of(b"abc"), |made| tell(made.is_ok())));
    fsync(&file).expect("flushed");
    waits("a new file", ROOT_INO, &|tell| {
        a.create_then(ROOT_INO, b"g", &PLAIN, true, |made| tell(made.is_ok()));
    });
    waits("a rename", ROOT_INO, &|tell| {
        a.rename_then((ROOT_INO, b"g"), (ROOT_INO, b"h"), (0, [0, 0]), |made| tell(made.is_ok()));
    });
    waits("a removal", ROOT_INO, &|tell| a.remove_then(ROOT_INO, b"h", false, |made| tell(made.is_ok())));
    let (node, ino) = (a.clone(), file.ino());
    waits("a new mode", ino, &|tell| {
        let node = node.clone();
        thread::spawn(move || tell(node.setattr(ino, &mode(0o600)).is_ok()));
    });
    waits("an attribute", ino, &|tell| {
        let node = node.clone();
        thread::spawn(move || {
            tell(node.set_xattr(ino, b"user.a", b"value", XattrFlags::default()).is_ok());
        });
    });
    waits("a new size", ino, &|tell| {
        let node = node.clone();
        let size = SetAttr { size_bytes: Some(1), ..SetAttr::default() };
        thread::spawn(move || tell(node.setattr(ino, &size).is_ok()));
    });
}

// Invariant F2: the kernel may wait for a page before it forgets anything.
#[test]
fn pages_that_are_written_back_wait_for_no_promise() {
    let world = World::new();
    let a = world.node(1);
    let kernel = Kernel::of(&a);
    let file = create(&a, "f");
    write(&file, 0, &[1; 8192]).expect("written");
    fsync(&file).expect("flushed");
    promised(&kernel, &a, file.ino());
    kernel.slow.store(true, Ordering::SeqCst);
    let write = later(|tell| file.write(0, buf_of(&[2; 4096]), tell));
    let forgotten = kernel.asked_to_forget(file.ino());
    let page = later(|tell| file.write_page(4096, buf_of(&[3; 4096]), tell));
    assert_eq!(page.recv().expect("it ends").expect("a page"), 4096);
    assert!(write.try_recv().is_err());
    forgotten();
    assert_eq!(write.recv().expect("it ends").expect("a write"), 4096);
}

// The kernel counts the name down when it comes to the answer, from what it was told last.
#[test]
fn what_has_lost_one_of_several_names_here_is_not_promised() {
    let world = World::new();
    let a = world.node(1);
    let kernel = Kernel::of(&a);
    let [removed, replaced, moved] = ["f", "g", "h"].map(|name| {
        let ino = create(&a, name).ino();
        a.link(ino, ROOT_INO, format!("{name}2").as_bytes()).expect("a second name");
        promised(&kernel, &a, ino);
        ino
    });
    a.unlink(ROOT_INO, b"f").expect("removed");
    a.rename(ROOT_INO, b"h", ROOT_INO, b"g", 0).expect("replaced");
    for ino in [removed, replaced] {
        assert!((0..1000).all(|_| !kernel.looks(&a, ino)));
        assert_eq!(a.getattr(ino).expect("attributes").nlink, 1);
    }
    promised(&kernel, &a, moved);
}

/// A lease that ends when the test says so.
#[derive(Default)]
struct Lease {
    over: AtomicBool,
}

impl WriteRight for Lease {
    fn check(&self) -> Permission {
        if self.over.load(Ordering::SeqCst) { Permission::Wait } else { Permission::Granted }
    }

    fn lasts(&self) -> Duration {
        if self.over.load(Ordering::SeqCst) { Duration::ZERO } else { Duration::from_millis(300) }
    }
}

// Invariants B3 and F5: others may have what this node held once its lease is over.
#[test]
fn when_the_lease_is_over_nothing_is_told_from_memory_and_no_promise_is_longer() {
    let world = World::new();
    let a = world.node(1);
    let kernel = Kernel::of(&a);
    let lease = Arc::new(Lease::default());
    assert!(a.set_right(lease.clone()));
    let dir = a.mkdir(ROOT_INO, b"d", &PLAIN).expect("a directory").ino;
    let file = a.create(dir, b"f", &PLAIN, true).expect("a file").1;
    a.set_xattr(file.ino(), b"user.a", b"value", XattrFlags::default()).expect("an attribute");
    let look = || {
        let before = a.stats().requests_sent;
        a.lookup(dir, b"f").expect("the file");
        a.getattr(dir).expect("attributes");
        a.get_xattr(file.ino(), b"user.a").expect("a value");
        a.readdir(dir, 0, 10).expect("a listing");
        a.stats().requests_sent - before
    };
    look();
    assert_eq!(look(), 0);
    promised(&kernel, &a, dir);
    assert_eq!(a.promise(dir, THREAD).map(|(_, keep)| keep), Some(Duration::from_millis(300)));
    lease.over.store(true, Ordering::SeqCst);
    assert_eq!((look(), a.promise(dir, THREAD)), (4, None));
    lease.over.store(false, Ordering::SeqCst);
    assert_eq!(look(), 0);
}

// Whatever three nodes do, what their kernels tell is what the nodes themselves tell.
#[test]
fn kernels_tell_what_their_nodes_tell_whatever_happens() {
    const NAMES: u64 = 6;
    let seed = std::env::var("CSVFS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0x5eed);
    let world = World::new();
    let nodes = [world.node(1), world.node(2), world.node(3)];
    let kernels = nodes.each_ref().map(|node| Kernel::of(node));
    let dirs = [ROOT_INO, nodes[0].mkdir(ROOT_INO, b"d", &PLAIN).expect("a directory").ino];
    let mut dice = Dice(seed);
    let mut told = 0;
    for round in 0..3_000 {
        let node = &nodes[usize::try_from(dice.roll(3)).expect("small")];
        let dir = |dice: &mut Dice| dirs[usize::from(dice.roll(2) == 1)];
        let name = |dice: &mut Dice| format!("f{}", dice.roll(NAMES));
        let (parent, one) = (dir(&mut dice), name(&mut dice));
        let found = node.lookup(parent, one.as_bytes()).map(|attr| attr.ino);
        let opened = || found.clone().and_then(|ino| node.open(ino));
        // Names that are there or not, as it comes.
        match dice.roll(12) {
            0 | 1 => drop(node.create(parent, one.as_bytes(), &PLAIN, true)),
            2 => drop(node.unlink(parent, one.as_bytes())),
            3 => {
                let (to, other) = (dir(&mut dice), name(&mut dice));
                let flags = if dice.roll(4) == 0 { libc::RENAME_EXCHANGE } else { 0 };
                drop(node.rename(parent, one.as_bytes(), to, other.as_bytes(), flags));
            }
            4 => drop(found.map(|ino| node.link(ino, dir(&mut dice), name(&mut dice).as_bytes()))),
            5 => {
                drop(
                    found.map(|ino| node.setattr(ino, &mode(u32::try_from(dice.roll(0o1000)).unwrap_or(0)))),
                );
            }
            6 => drop(opened().map(|file| append(&file, &[1; 5000]))),
            7 => drop(opened().map(|file| file.set_size(dice.roll(9000)))),
            8 => drop(opened().map(|file| fsync(&file))),
            9 => drop(found.map(|ino| node.set_xattr(ino, b"user.a", &[0; 8], XattrFlags::default()))),
            10 => drop(opened().map(|file| node.clone_file(&file, dir(&mut dice), b"clone", &PLAIN))),
            _ => drop(node.unlink(dir(&mut dice), b"clone")),
        }
        for (node, kernel) in nodes.iter().zip(&kernels) {
            let kept: Vec<(u64, Attr)> = lock(&kernel.told).iter().map(|(ino, attr)| (*ino, *attr)).collect();
            told += kept.len();
            for (ino, attr) in kept {
                let now = node.getattr(ino).ok();
                assert_eq!(now, Some(attr), "round {round} of seed {seed}: of inode {ino}");
            }
            // Some look, so that some promises are out.
            for dir in dirs {
                let looked_at = name(&mut dice);
                if let Ok(attr) = node.lookup(dir, looked_at.as_bytes()) {
                    kernel.looks(node, attr.ino);
                }
                kernel.looks(node, dir);
            }
        }
    }
    assert!(told > 3_000, "only {told} promises were looked at");
    assert_eq!(world.problems(&nodes[0]), Vec::<String>::new());
}
