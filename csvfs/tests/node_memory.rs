//! What a node remembers under grants costs no message, and is never older than what another node has done.

mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use csvfs::node::{AtHand, Attr, FsError, NAME_BYTES_MAX, Node, ROOT_INO, SetAttr, XattrFlags};
use csvfs::proto::Timestamp;
use world::{Dice, PLAIN, World, append, create, later, open, read, wait, write};

/// Rounds of the long tests: a few hundred, or as many as asked for.
fn rounds() -> u64 {
    std::env::var("CSVFS_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(300)
}

fn messages(node: &Node, work: impl FnOnce()) -> u64 {
    let before = node.stats().requests_sent;
    work();
    node.stats().requests_sent - before
}

fn names(node: &Node, dir: u64) -> Vec<(Vec<u8>, Attr)> {
    let (mut found, mut cookie) = (Vec::new(), 0);
    loop {
        let page = node.readdir(dir, cookie, 7).expect("a page");
        cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
        found.extend(page.entries.into_iter().map(|entry| (entry.name, entry.attr)));
        if page.end {
            return found;
        }
    }
}

#[test]
fn what_was_asked_before_costs_no_message() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let dir = b.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    for number in 0..50 {
        drop(b.create(dir, format!("f{number}").as_bytes(), &PLAIN, true).expect("a file"));
    }
    b.symlink(dir, b"link", b"f0", &PLAIN).expect("a link");
    let tagged = b.lookup(dir, b"f1").expect("it is there").ino;
    b.set_xattr(tagged, b"user.tag", b"value", XattrFlags::default()).expect("an attribute");
    let look = || {
        assert_eq!(names(&a, dir).len(), 51);
        for number in 0..50 {
            let attr = a.resolve(&format!("dir/f{number}")).expect("the name");
            assert_eq!(a.getattr(attr.ino).expect("attributes"), attr);
            assert!(a.get_xattr(attr.ino, b"security.capability").is_err());
        }
        assert_eq!(a.get_xattr(tagged, b"user.tag").expect("its value"), &b"value"[..]);
        assert_eq!(a.list_xattrs(tagged).expect("its names").len(), 1);
        let link = a.lookup(dir, b"link").expect("the link").ino;
        assert_eq!(a.readlink(link).expect("its target"), b"f0");
        a.getattr(ROOT_INO).expect("the root");
    };
    look();
    look();
    // What is refused, here an attribute that is not there, is not remembered.
    let refused = messages(&a, || drop(a.get_xattr(tagged, b"security.capability")));
    assert_eq!((messages(&a, look), refused), (1, 1));
}

#[test]
fn that_a_file_with_attributes_has_no_capabilities_is_asked_once() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "f");
    write(&file, 0, b"content").expect("a write");
    assert!(!file.may_have_capabilities(), "it has no attribute");
    a.set_xattr(file.ino(), b"user.tag", b"value", XattrFlags::default()).expect("an attribute");
    write(&file, 0, b"content").expect("a write");
    assert!(file.may_have_capabilities(), "nobody has asked what it has");
    file.clear_capabilities().expect("there are none");
    assert!(!file.may_have_capabilities());
    let again = || {
        write(&file, 0, b"content").expect("a write");
        assert!(!file.may_have_capabilities());
        file.clear_capabilities().expect("there are none");
    };
    assert_eq!(messages(&a, again), 0);
    b.set_xattr(file.ino(), b"security.capability", b"all", XattrFlags::default()).expect("an attribute");
    write(&file, 0, b"content").expect("a write");
    assert!(file.may_have_capabilities());
    file.clear_capabilities().expect("they are gone");
    assert_eq!(b.list_xattrs(file.ino()).expect("its names"), [&b"user.tag"[..]]);
}

#[test]
fn a_file_that_is_read_again_and_again_costs_no_message() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let file = create(&a, "f");
    write(&file, 0, &[7; 30_000]).expect("a write");
    drop(file);
    let look = |node: &Arc<Node>| {
        let file = open(node, "f");
        assert_eq!(read(&file, 0, 40_000).expect("a read"), [7; 30_000]);
    };
    for node in [&a, &b] {
        // What the writer gives back may be on its way during the first.
        let hundred = || messages(node, || (0..100).for_each(|_| look(node)));
        assert!((0..20).any(|_| hundred() == 0), "reads go on to cost messages");
    }
}

#[test]
fn what_this_node_changes_itself_it_knows_without_asking() {
    let world = World::new();
    let a = world.node(1);
    let dir = a.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    a.lookup(ROOT_INO, b"dir").expect("the directory");
    let change = |number: u64| {
        let (old, new) = (format!("old{number}"), format!("new{number}"));
        drop(a.create(dir, old.as_bytes(), &PLAIN, true).expect("a file"));
        a.rename(dir, old.as_bytes(), dir, new.as_bytes(), 0).expect("a rename");
        let attr = a.lookup(dir, new.as_bytes()).expect("the new name");
        a.setattr(attr.ino, &SetAttr { mode: Some(0o600), ..SetAttr::default() }).expect("a chmod");
        assert_eq!(a.getattr(attr.ino).expect("attributes").mode, 0o600);
        a.unlink(dir, new.as_bytes()).expect("an unlink");
        assert!(a.lookup(dir, new.as_bytes()).is_err());
    };
    change(0);
    // Create, rename, chmod, unlink, the name that is not there; giving back the file that is gone takes some more.
    assert!(messages(&a, || (1..=10).for_each(change)) <= 10 * 10);
    assert_eq!(names(&a, dir), []);
}

#[test]
fn what_is_removed_or_replaced_goes_back_with_the_same_message() {
    let world = World::new();
    let a = world.node(1);
    let dir = a.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    let make = |name: &[u8]| drop(a.create(dir, name, &PLAIN, true).expect("a file"));
    let rounds = || {
        for _ in 0..10 {
            make(b"removed");
            a.unlink(dir, b"removed").expect("an unlink");
            make(b"new");
            make(b"replaced");
            a.rename(dir, b"new", dir, b"replaced", 0).expect("a rename");
            a.unlink(dir, b"replaced").expect("an unlink");
            a.rmdir(dir, b"deeper").expect_err("there is none");
            a.mkdir(dir, b"deeper", &PLAIN).expect("a directory");
            a.rmdir(dir, b"deeper").expect("an rmdir");
        }
    };
    assert_eq!(messages(&a, rounds), 10 * 9);
    let report = world.node(2).check().expect("a check");
    assert_eq!(
        (report.orphans, report.problems.len()),
        (0, 0),
        "nothing of them is held any more: {report:?}"
    );
}

#[test]
fn what_is_not_in_a_directory_costs_no_message_where_all_of_it_is_known() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let absent = |node: &Node, dir: u64, name: &str| {
        let error = node.lookup(dir, name.as_bytes()).expect_err("it is not there");
        assert_eq!(error.errno(), libc::ENOENT);
    };
    // Made here: it is empty, and what is in it later came from here.
    let made = a.mkdir(ROOT_INO, b"made", &PLAIN).expect("a directory").ino;
    drop(a.create(made, b"one", &PLAIN, true).expect("a file"));
    a.rename(made, b"one", made, b"two", 0).expect("a rename");
    let looks = || {
        absent(&a, made, "one");
        absent(&a, made, "three");
        a.lookup(made, b"two").expect("the file");
    };
    assert_eq!(messages(&a, looks), 0);
    let too_long = a.lookup(made, &[b'x'; NAME_BYTES_MAX + 1]).expect_err("it cannot be a name");
    assert_eq!(too_long.errno(), libc::ENAMETOOLONG);
    assert_eq!(a.lookup_at_hand(made, &[b'x'; NAME_BYTES_MAX + 1]), AtHand::Unknown);
    // Read to its end: all of it is known here too.
    assert_eq!(names(&b, made).len(), 1);
    assert_eq!(messages(&b, || absent(&b, made, "three")), 0);
    // A change by another node is seen by the next look, and what it leaves is not taken for all.
    drop(b.create(made, b"three", &PLAIN, true).expect("a file"));
    assert!(a.lookup(made, b"three").is_ok());
    a.unlink(made, b"three").expect("an unlink");
    absent(&b, made, "three");
    assert!(b.lookup(made, b"two").is_ok());
}

#[test]
fn what_threads_of_one_node_do_at_once_leaves_no_name_behind_that_is_not_found() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let dir = a.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    for round in 0..rounds() / 10 {
        thread::scope(|scope| {
            for number in 0..4 {
                let mut dice = Dice(round * 4 + number + 1);
                let a = &a;
                scope.spawn(move || {
                    for _ in 0..20 {
                        let (name, other) = (format!("x{}", dice.roll(6)), format!("x{}", dice.roll(6)));
                        // Whoever comes second is refused; that is not what is looked at here.
                        let _outcome = match dice.roll(4) {
                            0 => a.create(dir, name.as_bytes(), &PLAIN, true).map(drop),
                            1 => a.unlink(dir, name.as_bytes()),
                            2 => a.lookup(dir, name.as_bytes()).map(drop),
                            _ => a.rename(dir, name.as_bytes(), dir, other.as_bytes(), 0),
                        };
                    }
                });
            }
        });
        let there = |node: &Node| -> Vec<bool> {
            (0..6).map(|number| node.lookup(dir, format!("x{number}").as_bytes()).is_ok()).collect()
        };
        assert_eq!(there(&a), there(&b), "round {round}");
        // A listing that is whole again, for the next round.
        assert_eq!(names(&a, dir).len(), there(&b).iter().filter(|is| **is).count(), "round {round}");
    }
}

#[test]
fn memory_is_bounded() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    for number in 0..500 {
        drop(create(&b, &format!("f{number}")));
    }
    a.set_memory(50);
    for _ in 0..2 {
        assert_eq!(names(&a, ROOT_INO).len(), 500);
        assert!((0..500).all(|number| a.lookup(ROOT_INO, format!("f{number}").as_bytes()).is_ok()));
    }
    // What is too much is given back by messages, some of which may be under way.
    while a.stats().files > 60 {
        thread::yield_now();
    }
    // A lower bound counts at once, for what is remembered already.
    a.set_memory(5);
    assert_eq!(a.memory(), 5);
    while a.stats().files > 15 {
        thread::yield_now();
    }
    a.detach().expect("a detach");
    assert!(world.problems(&b).is_empty());
}

// Invariant E1: what is remembered is claimed from the next coordinator, which recalls it as any grant.
#[test]
fn what_is_remembered_stays_true_when_the_coordinator_changes() {
    let world = World::new();
    let (a, b) = (world.node(1), world.node(2));
    let ino = create(&b, "f").ino();
    for _ in 0..2 {
        a.lookup(ROOT_INO, b"f").expect("the file");
    }
    world.kill_coordinator();
    assert_eq!(a.lookup(ROOT_INO, b"f").expect("from memory").ino, ino);
    world.start_coordinator();
    b.setattr(ino, &SetAttr { mode: Some(0o611), ..SetAttr::default() }).expect("a chmod");
    assert_eq!(a.lookup(ROOT_INO, b"f").expect("the file").mode, 0o611);
    b.rename(ROOT_INO, b"f", ROOT_INO, b"g", 0).expect("a rename");
    assert_eq!(a.lookup(ROOT_INO, b"f").expect_err("the old name").errno(), libc::ENOENT);
    assert_eq!(a.lookup(ROOT_INO, b"g").expect("the new name").ino, ino);
}

/// What should be there: names, and of each inode its mode and size.
#[derive(Default)]
struct Tree {
    names: BTreeMap<String, u64>,
    inodes: BTreeMap<u64, (u32, u64)>,
}

impl Tree {
    fn links(&self, ino: u64) -> u32 {
        u32::try_from(self.names.values().filter(|found| **found == ino).count()).expect("few")
    }

    fn agrees_with(&self, node: &Node, dir: u64, round: u64) {
        let listed: BTreeMap<String, u64> = names(node, dir)
            .into_iter()
            .map(|(name, attr)| (String::from_utf8(name).expect("plain"), attr.ino))
            .collect();
        assert_eq!(listed, self.names, "round {round}: the listing");
        for name in (round.saturating_sub(20)..round + 2).map(|number| format!("n{number}")) {
            if !self.names.contains_key(&name) {
                let error = node.lookup(dir, name.as_bytes()).expect_err("a name that is not there");
                assert_eq!(error.errno(), libc::ENOENT, "round {round}: {name}");
            }
        }
        for (name, ino) in &self.names {
            let attr = node.lookup(dir, name.as_bytes()).expect("a name that is there");
            let (mode, size) = self.inodes[ino];
            let want = (*ino, mode, size, self.links(*ino));
            assert_eq!((attr.ino, attr.mode, attr.size_bytes, attr.nlink), want, "round {round}: {name}");
        }
    }
}

fn one_change(
    node: &Arc<Node>,
    dir: u64,
    tree: &mut Tree,
    dice: &mut Dice,
    round: u64,
) -> Result<(), FsError> {
    let some = |tree: &Tree, dice: &mut Dice| {
        let at = dice.size(tree.names.len().max(1));
        tree.names.iter().nth(at).map(|(name, ino)| (name.clone(), *ino))
    };
    let fresh = format!("n{round}");
    let Some((name, ino)) = some(tree, dice).filter(|_| dice.roll(8) > 0) else {
        let (attr, _) = node.create(dir, fresh.as_bytes(), &PLAIN, true)?;
        tree.names.insert(fresh, attr.ino);
        tree.inodes.insert(attr.ino, (0o644, 0));
        return Ok(());
    };
    match dice.roll(9) {
        7 => {
            node.rename(dir, name.as_bytes(), dir, fresh.as_bytes(), libc::RENAME_NOREPLACE)?;
            tree.names.remove(&name);
            tree.names.insert(fresh, ino);
        }
        8 => {
            let (other, its) = some(tree, dice).expect("there is one");
            node.rename(dir, name.as_bytes(), dir, other.as_bytes(), libc::RENAME_EXCHANGE)?;
            tree.names.extend([(name, its), (other, ino)]);
        }
        0 => {
            node.unlink(dir, name.as_bytes())?;
            tree.names.remove(&name);
        }
        1 => {
            let (over, _) = some(tree, dice).expect("there is one");
            node.rename(dir, name.as_bytes(), dir, over.as_bytes(), 0)?;
            if tree.names[&over] != ino {
                tree.names.remove(&name);
                tree.names.insert(over, ino);
            }
        }
        2 => {
            node.link(ino, dir, fresh.as_bytes())?;
            tree.names.insert(fresh, ino);
        }
        3 => {
            let mode = 0o600 + u32::try_from(dice.roll(8)).expect("small");
            node.setattr(ino, &SetAttr { mode: Some(mode), ..SetAttr::default() })?;
            tree.inodes.entry(ino).and_modify(|known| known.0 = mode);
        }
        4 => {
            let size = dice.roll(10_000);
            node.setattr(ino, &SetAttr { size_bytes: Some(size), ..SetAttr::default() })?;
            tree.inodes.entry(ino).and_modify(|known| known.1 = size);
        }
        _ => {
            let len = 1 + dice.size(5000);
            let bytes = dice.bytes(len);
            append(&*node.open(ino)?, &bytes)?;
            tree.inodes.entry(ino).and_modify(|known| known.1 += bytes.len() as u64);
        }
    }
    Ok(())
}

#[test]
fn three_nodes_agree_on_names_and_attributes_after_each_change() {
    let world = World::new();
    let nodes = [world.node(1), world.node(2), world.node(3)];
    let dir = nodes[0].mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    let (mut tree, mut dice) = (Tree::default(), Dice(0xcafe_f00d));
    for round in 0..rounds() {
        let node = &nodes[dice.size(3)];
        one_change(node, dir, &mut tree, &mut dice, round)
            .unwrap_or_else(|why| panic!("round {round}: {why}"));
        let looks = nodes.iter().cycle().skip(dice.size(3)).take(1 + dice.size(3));
        looks.for_each(|node| tree.agrees_with(node, dir, round));
    }
    nodes.iter().for_each(|node| tree.agrees_with(node, dir, rounds()));
    assert!(world.problems(&nodes[0]).is_empty());
}

/// Has two nodes and two threads of the changing node look at what one of them changes: nobody sees less than what was
/// done before it looked, and nobody sees something go back.
fn nobody_sees_the_past(change: impl Fn(&Arc<Node>, u64) + Sync, look: impl Fn(&Node) -> u64 + Sync) {
    let world = World::new();
    let nodes = [world.node(1), world.node(2), world.node(3)];
    drop(create(&nodes[0], "f"));
    change(&nodes[0], 0);
    let (done, end) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for node in [&nodes[0], &nodes[0], &nodes[1], &nodes[2]] {
            scope.spawn(|| {
                let mut last = 0;
                while !end.load(Ordering::SeqCst) {
                    // What was seen anywhere counts, not only what has returned.
                    let before = done.load(Ordering::SeqCst).max(last);
                    last = look(node);
                    assert!(last >= before, "saw {last} after {before}");
                    done.fetch_max(last, Ordering::SeqCst);
                }
            });
        }
        for number in 1..=rounds() {
            // Now and then another node makes the change.
            change(&nodes[usize::try_from(number / 10 % 2).expect("0 or 1")], number);
            done.fetch_max(number, Ordering::SeqCst);
        }
        end.store(true, Ordering::SeqCst);
    });
}

#[test]
fn nobody_sees_attributes_of_the_past() {
    let at = |seconds: u64| Timestamp { seconds: seconds.cast_signed(), nanos: 0 };
    nobody_sees_the_past(
        |node, number| {
            let ino = node.lookup(ROOT_INO, b"f").expect("the file").ino;
            node.setattr(ino, &SetAttr { mtime: Some(at(number)), ..SetAttr::default() }).expect("a change");
        },
        |node| node.lookup(ROOT_INO, b"f").expect("the file").mtime.seconds.cast_unsigned(),
    );
}

#[test]
fn nobody_finds_names_of_the_past() {
    nobody_sees_the_past(
        |node, number| {
            let name = |number: u64| format!("{number}");
            drop(node.create(ROOT_INO, name(number).as_bytes(), &PLAIN, true).expect("a file"));
            if number > 0 {
                node.unlink(ROOT_INO, name(number - 1).as_bytes()).expect("an unlink");
            }
        },
        |node| {
            let numbers = names(node, ROOT_INO)
                .into_iter()
                .filter_map(|(name, _)| String::from_utf8(name).expect("plain").parse::<u64>().ok());
            numbers.max().expect("there is always one")
        },
    );
}

// Invariant C4: a change that nobody waits for has one outcome too, across coordinators, and it is known here when it is told.
#[test]
fn changes_begun_without_waiting_end_once_and_are_known_when_they_do() {
    let world = World::new();
    let a = world.node(1);
    let dir = a.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    let name = |number: u64| format!("f{number}").into_bytes();
    let known = |node: &Arc<Node>, name: Vec<u8>| {
        let node = node.clone();
        move || node.lookup_at_hand(dir, &name)
    };
    world.stop_coordinator();
    let create = |number| later(|done| a.create_then(dir, &name(number), &PLAIN, true, done));
    let begun: Vec<_> = (0..100).map(create).collect();
    assert!(begun.iter().all(|outcome| outcome.try_recv().is_err()), "there is no coordinator");
    world.start_coordinator();
    let made: Vec<_> =
        begun.iter().map(|outcome| outcome.recv().expect("each ends").expect("a file")).collect();
    assert!(begun.iter().all(|outcome| outcome.recv().is_err()), "each ended once");
    // As long as any of them was under way nothing was told of the directory.
    for (number, made) in (0..).zip(made) {
        let attr = made.attr_at_hand().expect("nobody else has it");
        assert_eq!(a.lookup_at_hand(dir, &name(number)), AtHand::Is(Box::new(attr)));
    }
    let (gone, new) = (known(&a, name(0)), known(&a, b"new".to_vec()));
    let (renamed, was, is) = wait(|done| {
        a.rename_then((dir, &name(0)), (dir, b"new"), (0, [0, 0]), move |outcome| {
            done((outcome, gone(), new()));
        });
    });
    renamed.expect("a rename");
    assert!(was == AtHand::Absent && matches!(is, AtHand::Is(_)), "{was:?}, {is:?}");
    let gone = known(&a, b"new".to_vec());
    let (removed, was) =
        wait(|done| a.remove_then(dir, b"new", false, move |outcome| done((outcome, gone()))));
    removed.expect("an unlink");
    assert_eq!(was, AtHand::Absent);
    // What cannot be asked for ends at once.
    let refused = later(|done| a.remove_then(dir, b"a/b", false, done)).try_recv();
    assert!(refused.expect("no message is needed").is_err());
}

#[test]
fn what_is_open_as_a_directory_is_not_opened_as_a_file_nor_the_other_way_round() {
    let world = World::new();
    let a = world.node(1);
    let dir = a.mkdir(ROOT_INO, b"dir", &PLAIN).expect("a directory").ino;
    let (attr, file) = a.create(ROOT_INO, b"file", &PLAIN, true).expect("a file");
    let open = a.open_directory(dir).expect("a directory");
    assert_eq!(a.open(dir).expect_err("no file").errno(), libc::EISDIR);
    assert_eq!(a.open_directory(attr.ino).expect_err("no directory").errno(), libc::ENOTDIR);
    assert!(a.open_at_hand(dir).is_none() && a.open_directory_at_hand(attr.ino).is_none());
    assert!(a.open_at_hand(attr.ino).is_some() && a.open_directory_at_hand(dir).is_some());
    drop((open, file));
}
