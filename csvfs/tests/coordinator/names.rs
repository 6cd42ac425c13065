//! Names and attributes follow POSIX.

use csvfs::pb::request::Op;
use csvfs::pb::{self, FileKind, reply};

use crate::world::{ROOT, World, create, make, rename, unlink};

const EXCHANGE: u32 = 2;
const NOREPLACE: u32 = 1;
const WHITEOUT: u32 = 4;

#[test]
fn files_come_and_go() {
    let world = World::new();
    let c = world.client(1);
    let a = c.create(ROOT, "a");
    assert_eq!((a.nlink, a.mode, a.size_bytes), (1, 0o644, 0));
    assert_eq!(c.errno(create(ROOT, "a")), libc::EEXIST);
    assert!(c.exists(ROOT, "a"));
    c.unlink(ROOT, "a");
    assert!(!c.exists(ROOT, "a"));
    assert_eq!(c.errno(unlink(ROOT, "a", false)), libc::ENOENT);
    world.assert_clean(&c);
}

#[test]
fn names_are_checked() {
    let world = World::new();
    let c = world.client(1);
    for bad in ["", ".", "..", "a/b", "a\0b"] {
        assert_eq!(c.errno(create(ROOT, bad)), libc::EINVAL, "{bad:?}");
    }
    assert_eq!(c.errno(create(ROOT, &"x".repeat(256))), libc::ENAMETOOLONG);
    c.create(ROOT, &"x".repeat(255));
    assert_eq!(c.errno(create(4711, "a")), libc::ENOENT);
    let file = c.create(ROOT, "file");
    assert_eq!(c.errno(create(file.ino, "a")), libc::ENOTDIR);
}

#[test]
fn directories_count_their_subdirectories() {
    let world = World::new();
    let c = world.client(1);
    let d = c.mkdir(ROOT, "d");
    c.mkdir(d.ino, "e");
    assert_eq!(c.getattr(ROOT).nlink, 3);
    assert_eq!(c.getattr(d.ino).nlink, 3);
    assert_eq!(c.errno(unlink(ROOT, "d", true)), libc::ENOTEMPTY);
    assert_eq!(c.errno(unlink(d.ino, "e", false)), libc::EISDIR);
    c.done(unlink(d.ino, "e", true));
    c.done(unlink(ROOT, "d", true));
    assert_eq!(c.getattr(ROOT).nlink, 2);
    world.assert_clean(&c);
}

#[test]
fn links_share_one_inode() {
    let world = World::new();
    let c = world.client(1);
    let a = c.create(ROOT, "a");
    let link = |name: &str| Op::Link(pb::Link { ino: a.ino, parent: ROOT, name: name.to_owned().into() });
    assert_eq!(c.attr(link("b")).nlink, 2);
    assert_eq!(c.errno(link("b")), libc::EEXIST);
    c.unlink(ROOT, "a");
    assert_eq!(c.getattr(a.ino).nlink, 1);
    let dir = c.mkdir(ROOT, "d");
    let of_dir = Op::Link(pb::Link { ino: dir.ino, parent: ROOT, name: "e".into() });
    assert_eq!(c.errno(of_dir), libc::EPERM);
    world.assert_clean(&c);
}

#[test]
fn a_rename_replaces_and_moves() {
    let world = World::new();
    let c = world.client(1);
    let (a, d) = (c.create(ROOT, "a"), c.mkdir(ROOT, "d"));
    c.create(d.ino, "b");
    c.done(rename((ROOT, "a"), (d.ino, "b"), 0));
    assert!(!c.exists(ROOT, "a"));
    assert_eq!(
        c.attr(Op::Lookup(pb::Lookup { parent: d.ino, name: "b".into(), cache: false, at_once: false })).ino,
        a.ino
    );
    // Within one directory, onto itself, and onto another name of the same inode.
    c.done(rename((d.ino, "b"), (d.ino, "c"), 0));
    c.done(rename((d.ino, "c"), (d.ino, "c"), 0));
    c.attr(Op::Link(pb::Link { ino: a.ino, parent: ROOT, name: "same".into() }));
    c.done(rename((ROOT, "same"), (d.ino, "c"), 0));
    assert!(c.exists(ROOT, "same"), "renaming between names of one inode does nothing");
    world.assert_clean(&c);
}

#[test]
fn a_rename_keeps_the_tree_a_tree() {
    let world = World::new();
    let c = world.client(1);
    let d = c.mkdir(ROOT, "d");
    let e = c.mkdir(d.ino, "e");
    let f = c.mkdir(e.ino, "f");
    assert_eq!(c.errno(rename((ROOT, "d"), (f.ino, "g"), 0)), libc::EINVAL);
    assert_eq!(c.errno(rename((ROOT, "d"), (d.ino, "g"), 0)), libc::EINVAL);
    c.done(rename((e.ino, "f"), (ROOT, "f"), 0));
    assert_eq!(c.getattr(e.ino).nlink, 2);
    assert_eq!(c.errno(rename((ROOT, "f"), (ROOT, "d"), 0)), libc::ENOTEMPTY);
    let file = c.create(ROOT, "file");
    assert_eq!(c.errno(rename((ROOT, "file"), (ROOT, "d"), 0)), libc::EISDIR);
    assert_eq!(c.errno(rename((ROOT, "d"), (ROOT, "file"), 0)), libc::ENOTDIR);
    assert_eq!(c.getattr(file.ino).nlink, 1);
    c.done(rename((d.ino, "e"), (ROOT, "f"), 0));
    world.assert_clean(&c);
}

#[test]
fn flags_of_rename_are_kept() {
    let world = World::new();
    let c = world.client(1);
    let (a, d) = (c.create(ROOT, "a"), c.mkdir(ROOT, "d"));
    let b = c.mkdir(d.ino, "b");
    assert_eq!(c.errno(rename((ROOT, "a"), (d.ino, "b"), NOREPLACE)), libc::EEXIST);
    c.done(rename((ROOT, "a"), (d.ino, "b"), EXCHANGE));
    assert_eq!(
        c.attr(Op::Lookup(pb::Lookup { parent: d.ino, name: "b".into(), cache: false, at_once: false })).ino,
        a.ino
    );
    assert_eq!(
        c.attr(Op::Lookup(pb::Lookup { parent: ROOT, name: "a".into(), cache: false, at_once: false })).ino,
        b.ino
    );
    assert_eq!(c.errno(rename((ROOT, "a"), (ROOT, "none"), EXCHANGE)), libc::ENOENT);
    for together in [EXCHANGE | NOREPLACE, EXCHANGE | WHITEOUT, 8] {
        assert_eq!(c.errno(rename((ROOT, "a"), (d.ino, "b"), together)), libc::EINVAL, "{together}");
    }
    // A directory may not be exchanged with its own descendant.
    c.done(rename((ROOT, "a"), (d.ino, "inner"), 0));
    assert_eq!(c.errno(rename((d.ino, "inner"), (ROOT, "d"), EXCHANGE)), libc::EINVAL);
    world.assert_clean(&c);
}

#[test]
fn symlinks_tell_where_they_point() {
    let world = World::new();
    let c = world.client(1);
    let mut op = make(ROOT, "s", FileKind::Symlink);
    if let Op::Create(create) = &mut op {
        create.target = "/some/where".into();
    }
    let s = c.attr(op);
    assert_eq!(s.size_bytes, 11);
    match c.ask(Op::ReadLink(pb::ReadLink { ino: s.ino })) {
        reply::Result::LinkTarget(target) => assert_eq!(target.target, "/some/where"),
        other => panic!("{other:?}"),
    }
    assert_eq!(c.errno(Op::ReadLink(pb::ReadLink { ino: ROOT })), libc::EINVAL);
}

#[test]
fn a_listing_goes_on_where_it_stopped_while_names_change() {
    let world = World::new();
    let c = world.client(1);
    for i in 0..10 {
        c.create(ROOT, &format!("f{i}"));
    }
    let page =
        |cookie| match c.ask(Op::ReadDir(pb::ReadDir { ino: ROOT, cookie, max_entries: 4, cache: false })) {
            reply::Result::DirPage(page) => page,
            other => panic!("{other:?}"),
        };
    let first = page(0);
    assert_eq!((first.entries.len(), first.end, first.parent), (4, false, ROOT));
    c.unlink(ROOT, "f2");
    c.unlink(ROOT, "f5");
    c.create(ROOT, "late");
    let (mut names, mut cookie) = (Vec::new(), first.entries[3].cookie);
    loop {
        let next = page(cookie);
        names.extend(next.entries.iter().map(|e| String::from_utf8_lossy(&e.name).into_owned()));
        if next.end {
            break;
        }
        cookie = next.entries.last().expect("not the end").cookie;
    }
    assert_eq!(names, ["f4", "f6", "f7", "f8", "f9", "late"]);
}

#[test]
fn attributes_are_set_and_setgid_is_inherited() {
    let world = World::new();
    let c = world.client(1);
    let d = c.mkdir(ROOT, "d");
    let set =
        pb::SetAttr { ino: d.ino, mode: Some(0o2775), gid: Some(42), uid: Some(7), ..Default::default() };
    let changed = c.attr(Op::SetAttr(set));
    assert_eq!((changed.mode, changed.uid, changed.gid), (0o2775, 7, 42));
    assert_eq!(c.create(d.ino, "f").gid, 42);
    assert_eq!(c.mkdir(d.ino, "e").mode & 0o2000, 0o2000);
}

#[test]
fn a_new_owner_does_not_inherit_a_program_that_runs_as_somebody_else() {
    let world = World::new();
    let c = world.client(1);
    let ino = c.create(ROOT, "su").ino;
    let set = |mode, uid| c.attr(Op::SetAttr(pb::SetAttr { ino, mode, uid, ..pb::SetAttr::default() })).mode;
    assert_eq!(set(Some(0o6755), None), 0o6755);
    assert_eq!(set(None, Some(5)), 0o755);
    assert_eq!(set(Some(0o6745), None), 0o6745);
    assert_eq!(set(None, Some(6)), 0o2745);
    assert_eq!(set(Some(0o4755), Some(7)), 0o4755);
}
