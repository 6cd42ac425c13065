//! Chains of differencing images: they read as a stack of byte arrays would, and what does not belong together is refused.

mod common;

use std::sync::Arc;

use blockio::{BlockDevice, FileDevice, ImageFile, IoOp, OpenOptions};
use common::{Folder, MIB, assert_sound, bytes_at, path, text};
use proptest::prelude::*;
use vhdx::{
    Builder, ChildSpec, ErrorKind, HostFiles, ParentPaths, ParentResolver, Spec, create, create_child,
};

const SIZE: u64 = 5 * MIB + 512;

fn small(block_bytes: u64) -> Spec {
    Spec { block_bytes, ..Spec::dynamic(SIZE) }
}

#[test]
fn a_write_to_a_child_hides_only_its_own_sectors() {
    let mut folder = Folder::default();
    folder.base("base", &small(2 * MIB));
    let base = folder.disk("base");
    base.write_at(0, &vec![1; 4 << 20]).expect("it is writable");
    base.close().expect("it closes");
    drop(base);
    folder.child("child", "base", |_| ());
    let child = folder.disk("child");
    child.write_at(1024, &[2; 512]).expect("it is writable");
    child.write_at(2 * MIB, &vec![3; 1 << 20]).expect("a whole block");
    child.close().expect("it closes");
    drop(child);
    let content = bytes_at(&folder.image("child"), 0, 4 << 20);
    let mut wanted = vec![1; 4 << 20];
    wanted[1024..1536].fill(2);
    wanted[2 << 20..3 << 20].fill(3);
    assert!(content == wanted);
    let info = vhdx::info(&folder.0["/vms/child"]).expect("it is an image");
    assert_eq!((info.blocks.partial, info.blocks.present, info.blocks.not_present), (1, 1, 4));
    assert_sound(&folder.0["/vms/child"]);
}

#[test]
fn a_partial_block_that_is_filled_becomes_a_whole_one() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |_| ());
    let child = folder.disk("child");
    for part in 0..16_u8 {
        child.write_at(u64::from(part) << 16, &[part + 1; 1 << 16]).expect("it is writable");
    }
    child.close().expect("it closes");
    let info = vhdx::info(&folder.0["/vms/child"]).expect("it is an image");
    assert_eq!((info.blocks.partial, info.blocks.present), (0, 1));
}

#[test]
fn discarded_and_zeroed_blocks_of_a_child_hide_the_parent() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    let base = folder.disk("base");
    base.write_at(0, &vec![1; 5 << 20]).expect("it is writable");
    base.close().expect("it closes");
    drop(base);
    folder.child("child", "base", |_| ());
    let child = folder.disk("child");
    child.run(IoOp::Discard { offset: 0, len: MIB }).expect("it discards");
    child.run(IoOp::WriteZeroes { offset: MIB, len: MIB, may_unmap: false }).expect("it zeroes");
    child.run(IoOp::WriteZeroes { offset: 2 * MIB + 512, len: 512, may_unmap: true }).expect("it zeroes");
    child.close().expect("it closes");
    drop(child);
    let image = folder.image("child");
    assert!(bytes_at(&image, 0, 2 << 20).iter().all(|byte| *byte == 0));
    assert_eq!(bytes_at(&image, 2 * MIB, 1536), [[1; 512], [0; 512], [1; 512]].concat());
    let info = vhdx::info(&folder.0["/vms/child"]).expect("it is an image");
    assert_eq!((info.blocks.zero, info.blocks.partial, info.blocks.unmapped), (2, 1, 0));
}

#[test]
fn a_child_may_be_larger_or_smaller_than_its_parent() {
    for size in [3 * MIB, 9 * MIB + 512] {
        let mut folder = Folder::default();
        folder.base("base", &small(2 * MIB));
        let base = folder.disk("base");
        base.write_at(0, &vec![7; usize::try_from(SIZE).expect("small")]).expect("it is writable");
        base.close().expect("it closes");
        drop(base);
        folder.child("child", "base", |spec| spec.size_bytes = Some(size));
        let mut wanted = vec![7; usize::try_from(size.min(SIZE)).expect("small")];
        wanted.resize(usize::try_from(size).expect("small"), 0);
        assert!(bytes_at(&folder.image("child"), 0, wanted.len()) == wanted, "{size}");
        let child = folder.disk("child");
        child.write_at(size - 512, &[8; 512]).expect("it is writable");
        child.close().expect("it closes");
        let end = wanted.len();
        wanted[end - 512..].fill(8);
        assert!(bytes_at(&folder.image("child"), 0, wanted.len()) == wanted, "{size}");
    }
}

#[test]
fn a_dirty_parent_is_replayed_in_memory_and_never_written() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    let base = folder.disk("base");
    base.write_at(0, &[5; 4096]).expect("it is writable");
    base.flush().expect("it flushes");
    // Killed.
    drop(base);
    let before = bytes_at(&folder.0["/vms/base"], 0, 6 << 20);
    folder.child("child", "base", |_| ());
    let child = folder.disk("child");
    assert_eq!(bytes_at(&child, 0, 4096), [5; 4096]);
    child.write_at(0, &[6; 512]).expect("it is writable");
    child.close().expect("it closes");
    assert_eq!(bytes_at(&folder.image("child"), 512, 512), [5; 512]);
    assert!(bytes_at(&folder.0["/vms/base"], 0, 6 << 20) == before);
}

#[test]
fn a_child_inherits_what_the_disk_is() {
    let mut folder = Folder::default();
    let spec = Spec { logical_sector: 4096, physical_sector: 4096, ..Spec::dynamic(64 * MIB) };
    folder.base("base", &spec);
    folder.child("child", "base", |_| ());
    let (base, child) = (vhdx::info(&folder.0["/vms/base"]), vhdx::info(&folder.0["/vms/child"]));
    let (base, child) = (base.expect("it is an image"), child.expect("it is an image"));
    assert_eq!((child.disk_id, child.disk_bytes), (base.disk_id, base.disk_bytes));
    assert_eq!((child.logical_sector, child.physical_sector), (4096, 4096));
    let parent = child.parent.expect("it has one");
    assert_eq!(parent.linkage, Some(base.data_write_id));
    assert_eq!(parent.paths.relative.as_deref(), Some(r".\base"));
}

fn refused(folder: &Folder, name: &str) -> ErrorKind {
    let kind = folder.open(name).read_only().expect_err("it must not open").kind();
    assert_eq!(folder.open(name).writable().expect_err("it must not open").kind(), kind);
    assert_eq!(folder.open(name).inactive().expect_err("it must not open").kind(), kind);
    kind
}

#[test]
fn a_parent_that_was_written_after_the_fork_is_no_parent_any_more() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |_| ());
    let base = folder.disk("base");
    base.write_at(0, &[1; 512]).expect("nothing stops a writer who does not know of the child");
    base.close().expect("it closes");
    assert_eq!(refused(&folder, "child"), ErrorKind::ParentMismatch);
}

#[test]
fn a_parent_that_was_only_opened_stays_the_parent() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |_| ());
    folder.disk("base").close().expect("it closes");
    folder.image("child");
}

#[test]
fn a_missing_parent_is_named_with_the_paths_that_were_tried() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |_| ());
    folder.0.remove("/vms/base");
    assert_eq!(refused(&folder, "child"), ErrorKind::ParentNotFound);
    let error = folder.open("child").read_only().expect_err("it must not open");
    assert!(error.to_string().contains(r".\base"), "{error}");
}

#[test]
fn a_chain_that_goes_round_is_refused() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |_| ());
    // The child under the name of its parent: no linkage check stops this, because it is the same file.
    folder.0.insert(path("base"), Arc::clone(&folder.0["/vms/child"]));
    assert_eq!(refused(&folder, "child"), ErrorKind::ChainCycle);
}

#[test]
fn sixty_four_parents_are_followed_and_no_more() {
    let mut folder = Folder::default();
    folder.base("0", &small(MIB));
    for depth in 1..=65 {
        folder.child(&depth.to_string(), &(depth - 1).to_string(), |_| ());
    }
    assert_eq!(folder.image("64").parents(), 64);
    assert_eq!(refused(&folder, "65"), ErrorKind::ChainTooDeep);
}

#[test]
fn a_parent_outside_of_the_allowed_folders_is_not_opened() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |spec| {
        spec.parent = ParentPaths { relative: Some(r"..\other\base".to_owned()), ..ParentPaths::default() };
    });
    folder.0.insert("/other/base".to_owned(), Arc::clone(&folder.0["/vms/base"]));
    assert_eq!(refused(&folder, "child"), ErrorKind::PathOutsideRoot);
}

#[test]
fn a_stale_path_to_another_disk_is_passed_over_for_one_that_leads_to_the_parent() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.base("other", &small(MIB));
    folder.child("child", "base", |spec| {
        spec.parent = ParentPaths {
            relative: Some(r".\other".to_owned()),
            volume: None,
            absolute: Some(r"C:\vms\base".to_owned()),
        };
    });
    let resolver = folder.resolver().map(r"c:\VMs", "/vms");
    let file = Arc::clone(&folder.0["/vms/child"]);
    let image =
        Builder::open(file).parents(resolver, "/vms/child").read_only().expect("the second path is right");
    assert_eq!(image.parents(), 1);
}

#[test]
fn a_stale_path_is_put_right_with_the_next_log_entry() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |spec| {
        spec.parent = ParentPaths {
            relative: Some(r"..\old\base".to_owned()),
            volume: None,
            absolute: Some(r"C:\vms\base".to_owned()),
        };
    });
    let file = Arc::clone(&folder.0["/vms/child"]);
    let open = || {
        let resolver = folder.resolver().map(r"C:\vms", "/vms");
        Builder::open(Arc::clone(&file)).parents(resolver, "/vms/child")
    };
    let paths = || vhdx::info(&file).expect("it is an image").parent.expect("it has one").paths;
    open().writable().expect("it opens").close().expect("it closes");
    assert_eq!(
        paths().relative.as_deref(),
        Some(r"..\old\base"),
        "a disk that is not written changes nothing"
    );
    let disk = open().writable().expect("it opens");
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.close().expect("it closes");
    drop(disk);
    assert_eq!(paths().relative.as_deref(), Some(r".\base"));
    assert_eq!(paths().absolute.as_deref(), Some(r"\\?\C:\vms\base"));
    assert_sound(&file);
    folder.image("child");
}

#[test]
fn a_standby_proves_a_closed_image_and_its_parents_and_can_look_again() {
    let mut folder = Folder::default();
    folder.base("base", &small(MIB));
    folder.child("child", "base", |_| ());
    let standby = folder.open("child").inactive().expect("it opens");
    let disk = folder.disk("child");
    disk.write_at(0, &[1; 512]).expect("it is writable");
    disk.flush().expect("it flushes");
    // Its writer is at work: what can be read is read, nothing is replayed, nothing is wrong.
    let standby = standby.reread().expect("it opens");
    let closed = disk.close().expect("it closes");
    drop(disk);
    assert_eq!(standby.parents(), 1);
    let disk = standby.activate_handed_over(closed.file_write_id).expect("it is as it was announced");
    assert_eq!(bytes_at(&disk, 0, 512), [1; 512]);
    disk.close().expect("it closes");
    drop(disk);
    // A block past the end of the closed file is found before anybody relies on the disk.
    let file = &folder.0["/vms/child"];
    file.write_at(3 * MIB, &((1_u64 << 40) | 6).to_le_bytes().repeat(64)).expect("inside the file");
    assert_eq!(folder.open("child").inactive().expect_err("it is damaged").kind(), ErrorKind::Corrupt);
}

#[test]
fn files_of_this_machine_are_followed_below_the_root_only() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let at = |name: &str| folder.path().join(name);
    for name in ["vms", "elsewhere"] {
        std::fs::create_dir(at(name)).expect("the folder is writable");
    }
    let resolver = ParentResolver::new(Arc::new(HostFiles::default())).root(text(&at("vms")));
    let file = |name: &str| -> Arc<dyn ImageFile> {
        std::fs::File::create(at(name)).expect("the folder is writable");
        Arc::new(FileDevice::open(at(name), OpenOptions::buffered()).expect("it opens"))
    };
    create(&file("vms/base.vhdx"), &small(MIB)).expect("it is created");
    let open = |name: &str| {
        let file = FileDevice::open(at(name), OpenOptions::buffered()).expect("it opens");
        Builder::open(Arc::new(file)).parents(resolver.clone(), text(&at(name)))
    };
    let paths =
        resolver.paths(text(&at("vms/child.avhdx")), text(&at("vms/base.vhdx"))).expect("both are paths");
    let base = open("vms/base.vhdx").read_only().expect("it opens");
    create_child(&file("vms/child.avhdx"), &base, &ChildSpec::new(paths)).expect("it is created");
    let disk = open("vms/child.avhdx").writable().expect("it opens");
    disk.write_at(0, &[3; 512]).expect("it is writable");
    disk.close().expect("it closes");
    drop(disk);
    assert_eq!(bytes_at(&open("vms/child.avhdx").read_only().expect("it opens"), 0, 512), [3; 512]);

    let link = |to: &str| {
        drop(std::fs::remove_file(at("vms/base.vhdx")));
        std::os::unix::fs::symlink(to, at("vms/base.vhdx")).expect("the folder is writable");
        open("vms/child.avhdx").read_only().map(|image| image.parents()).map_err(|error| error.kind())
    };
    std::fs::rename(at("vms/base.vhdx"), at("vms/moved.vhdx")).expect("the folder is writable");
    assert_eq!(link("moved.vhdx"), Ok(1), "a link that stays below the root");
    std::fs::copy(at("vms/moved.vhdx"), at("elsewhere/base.vhdx")).expect("the folder is writable");
    assert_eq!(link("../elsewhere/base.vhdx"), Err(ErrorKind::PathOutsideRoot));
    assert_eq!(link("/dev/zero"), Err(ErrorKind::PathOutsideRoot));
    assert_eq!(link("base.vhdx"), Err(ErrorKind::PathOutsideRoot), "a link to itself");
    std::fs::create_dir(at("vms/folder")).expect("the folder is writable");
    assert_eq!(link("folder"), Err(ErrorKind::PathOutsideRoot), "a folder is no image");
}

#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: u64, value: u8 },
    Zero { sector: u64, sectors: u64, may_unmap: bool },
    Discard { block: u64 },
    Fork { block_bytes: u64 },
    Reopen { clean: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = prop_oneof![4 => 1_u64..64, 1 => 1_u64..6000];
    let range =
        (0..SIZE / 512, sectors).prop_map(|(sector, sectors)| (sector, sectors.min(SIZE / 512 - sector)));
    prop_oneof![
        6 => (range.clone(), 1_u8..).prop_map(|((sector, sectors), value)| Step::Write { sector, sectors, value }),
        2 => (range, any::<bool>()).prop_map(|((sector, sectors), may_unmap)| Step::Zero { sector, sectors, may_unmap }),
        1 => (0..5_u64).prop_map(|block| Step::Discard { block }),
        1 => prop_oneof![Just(MIB), Just(2 * MIB), Just(4 * MIB)].prop_map(|block_bytes| Step::Fork { block_bytes }),
        1 => any::<bool>().prop_map(|clean| Step::Reopen { clean }),
    ]
}

fn play(steps: Vec<Step>) {
    let mut folder = Folder::default();
    folder.base("0", &small(2 * MIB));
    let mut model = vec![0; usize::try_from(SIZE).expect("small")];
    let mut levels = vec![];
    let mut disk = folder.disk("0");
    let range = |sector: u64, sectors: u64| {
        let index = |value: u64| usize::try_from(value * 512).expect("small");
        index(sector)..index(sector + sectors)
    };
    for step in steps {
        match step {
            Step::Write { sector, sectors, value } => {
                let bytes = vec![value; range(0, sectors).len()];
                disk.write_at(sector * 512, &bytes).expect("it is writable");
                model[range(sector, sectors)].fill(value);
            }
            Step::Zero { sector, sectors, may_unmap } => {
                let op = IoOp::WriteZeroes { offset: sector * 512, len: sectors * 512, may_unmap };
                disk.run(op).expect("it zeroes");
                model[range(sector, sectors)].fill(0);
            }
            Step::Discard { block } => {
                disk.run(IoOp::Discard { offset: block * MIB, len: MIB }).expect("it discards");
                // A hint: blocks larger than the range stay.
                let after = bytes_at(&disk, block * MIB, 1 << 20);
                let range = range(block * 2048, 2048);
                assert!(after.iter().all(|byte| *byte == 0) || after == model[range.clone()]);
                model[range].copy_from_slice(&after);
            }
            Step::Fork { block_bytes } => {
                disk.close().expect("it closes");
                drop(disk);
                levels.push(model.clone());
                let (parent, name) = ((levels.len() - 1).to_string(), levels.len().to_string());
                folder.child(&name, &parent, |spec| spec.block_bytes = block_bytes);
                disk = folder.disk(&name);
            }
            Step::Reopen { clean } => {
                if clean {
                    disk.close().expect("it closes");
                } else {
                    disk.flush().expect("it flushes");
                }
                drop(disk);
                disk = folder.disk(&levels.len().to_string());
            }
        }
        assert!(bytes_at(&disk, 0, model.len()) == model, "while it is open");
    }
    disk.close().expect("it closes");
    levels.push(model);
    for (depth, wanted) in levels.iter().enumerate() {
        assert_sound(&folder.0[&path(&depth.to_string())]);
        let image = folder.image(&depth.to_string());
        assert!(bytes_at(&image, 0, wanted.len()) == *wanted, "level {depth} keeps what it had");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_behaves_as_a_stack_of_byte_arrays(steps in prop::collection::vec(step(), 1..40)) {
        play(steps);
    }
}
