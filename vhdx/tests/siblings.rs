//! An image that others refer to as their parent is not changed by accident, and those others are never read wrongly.

mod common;

use std::ops::ControlFlow;
use std::sync::Arc;

use blockio::{BlockDevice, ImageFile};
use common::{Folder, MIB, bytes_at, image_file, new_file, path};
use vhdx::{
    Builder, ChildSpec, ErrorKind, HostFiles, NewSize, ParentResolver, Spec, VhdxError, create, create_child,
};

const SIZE: u64 = 6 * MIB;

/// A base with sevens and two children of it, one in a folder below.
fn family() -> Folder {
    let mut folder = Folder::default();
    folder.base("base.vhdx", &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) });
    let disk = folder.disk("base.vhdx");
    disk.write_at(0, &[7; 4096]).expect("it is writable");
    disk.close().expect("it closes");
    drop(disk);
    folder.child("first.avhdx", "base.vhdx", |_| ());
    folder.child("below/second.AVHDX", "base.vhdx", |_| ());
    folder
}

fn builder(folder: &Folder, name: &str) -> Builder {
    folder.open(name)
}

fn refused<T>(outcome: Result<T, VhdxError>, named: &str) {
    let Err(error) = outcome else { panic!("it has children") };
    assert_eq!(error.kind(), ErrorKind::HasChildren, "{error}");
    assert!(error.to_string().contains(named), "{error}");
}

#[test]
fn children_are_found_in_all_allowed_folders() {
    let mut folder = family();
    // A copy of the base has children of its own only by name: those here lead to the base.
    let copy = folder.add("copy.vhdx");
    let base = &folder.0[&path("base.vhdx")];
    let size = base.geometry().size_bytes;
    copy.set_len(size).expect("memory grows");
    copy.write_at(0, &bytes_at(base, 0, usize::try_from(size).expect("small"))).expect("it is writable");
    folder.child("third.avhdx", "first.avhdx", |_| ());
    // What only looks like an image does not matter.
    folder.add("broken.vhdx");
    let found = builder(&folder, "base.vhdx").children().expect("it is readable");
    assert_eq!(found, [path("below/second.AVHDX"), path("first.avhdx")]);
    assert_eq!(builder(&folder, "first.avhdx").children().expect("it is readable"), [path("third.avhdx")]);
    for name in ["copy.vhdx", "third.avhdx"] {
        assert!(builder(&folder, name).children().expect("it is readable").is_empty(), "{name}");
    }
}

#[test]
fn a_parent_is_not_written_resized_or_merged_before_its_children_are_gone() {
    let folder = family();
    let before = bytes_at(&folder.0[&path("base.vhdx")], 0, 4 << 20);
    refused(builder(&folder, "base.vhdx").writable(), "first.avhdx");
    refused(builder(&folder, "base.vhdx").inactive(), "first.avhdx");
    refused(builder(&folder, "base.vhdx").resize(NewSize::ExpandTo(2 * SIZE)), "second.AVHDX");
    let base = Arc::clone(&folder.0[&path("base.vhdx")]);
    // The first may not be merged: the second would lose its parent.
    refused(builder(&folder, "first.avhdx").merge(&base, &mut |_| ()), "second.AVHDX");
    assert!(bytes_at(&base, 0, 4 << 20) == before, "nothing was changed");
    builder(&folder, "base.vhdx").read_only().expect("reading is no change");
    for name in ["first.avhdx", "below/second.AVHDX"] {
        assert_eq!(bytes_at(&folder.image(name), 0, 4096), [7; 4096]);
    }
}

#[test]
fn a_child_with_a_child_is_not_merged_and_its_last_child_is() {
    let mut folder = family();
    folder.0.remove(&path("below/second.AVHDX"));
    folder.child("top.avhdx", "first.avhdx", |_| ());
    let (base, first) =
        (Arc::clone(&folder.0[&path("base.vhdx")]), Arc::clone(&folder.0[&path("first.avhdx")]));
    refused(builder(&folder, "first.avhdx").merge(&base, &mut |_| ()), "top.avhdx");
    // Below the disk in use all are known: the top itself, and the one that goes.
    let disk = folder.disk("top.avhdx");
    disk.merge_parent(&first, &base, &mut |_| ()).expect("nobody else needs them");
    assert_eq!(bytes_at(&disk, 0, 4096), [7; 4096]);
    disk.close().expect("it closes");
    drop(disk);
    folder.0.remove(&path("first.avhdx"));
    builder(&folder, "top.avhdx").merge(&base, &mut |_| ()).expect("it is the last");
    assert_eq!(bytes_at(&folder.image("base.vhdx"), 0, 4096), [7; 4096]);
}

#[test]
fn a_disk_in_use_that_got_a_child_is_not_resized_or_compacted() {
    let mut folder = Folder::default();
    folder.base("base.vhdx", &Spec { block_bytes: MIB, ..Spec::dynamic(SIZE) });
    let child = folder.add("child.avhdx");
    // The disk knows the child's place in the folder before there is a child.
    let disk = folder.disk("base.vhdx");
    let paths = folder.resolver().paths(&path("child.avhdx"), &path("base.vhdx")).expect("both are paths");
    create_child(&child, &folder.image("base.vhdx"), &ChildSpec::new(paths)).expect("it is created");
    refused(disk.resize(NewSize::ExpandTo(2 * SIZE)), "child.avhdx");
    refused(disk.compact(&mut |_| ControlFlow::Continue(())), "child.avhdx");
    folder.image("child.avhdx");
}

// A change that was insisted on is announced: children are refused by name from then on.
#[test]
fn children_of_a_parent_that_was_changed_all_the_same_are_refused() {
    let folder = family();
    let disk = builder(&folder, "base.vhdx").despite_children(true).writable().expect("it was insisted on");
    folder.image("first.avhdx");
    disk.write_at(0, &[8; 512]).expect("it is writable");
    disk.resize(NewSize::ExpandTo(2 * SIZE)).expect("it was insisted on");
    disk.close().expect("it closes");
    for name in ["first.avhdx", "below/second.AVHDX"] {
        let error = folder.open(name).read_only().expect_err("its parent was changed");
        assert_eq!(error.kind(), ErrorKind::ParentMismatch, "{error}");
    }
    builder(&folder, "base.vhdx").writable().expect("it has no children any more");
}

#[test]
fn children_among_the_files_of_this_machine_are_found() {
    let place = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(place.path().join("deep")).expect("the test folder is writable");
    std::os::unix::fs::symlink("/", place.path().join("deep/out")).expect("the test folder is writable");
    let name = |file: &str| place.path().join(file).to_string_lossy().into_owned();
    let (base, child) = (name("base.vhdx"), name("deep/child.avhdx"));
    let root = place.path().to_string_lossy().into_owned();
    let resolver = || ParentResolver::new(Arc::new(HostFiles::default())).root(&root);
    create(&*new_file(base.as_ref()), &Spec::dynamic(SIZE)).expect("it is created");
    let open = || Builder::open(image_file(base.as_ref())).parents(resolver(), &base);
    let spec = ChildSpec::new(resolver().paths(&child, &base).expect("both are paths"));
    create_child(&*new_file(child.as_ref()), &open().read_only().expect("it opens"), &spec).expect("created");
    assert_eq!(open().children().expect("it is readable"), std::slice::from_ref(&child));
    refused(open().resize(NewSize::ExpandTo(2 * SIZE)), "deep/child.avhdx");
    std::fs::remove_file(&child).expect("it exists");
    open().resize(NewSize::ExpandTo(2 * SIZE)).expect("nobody needs it any more");
}
