//! POSIX calls of ordinary programs on mounted volumes.
#![expect(clippy::cast_possible_truncation, reason = "the sizes in these tests are small")]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::thread;

use crate::world::{World, can_mount};
use rustix::fs::{CWD, FallocateFlags, RenameFlags};

const MIB: usize = 1 << 20;

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| seed.wrapping_mul(37).wrapping_add((at % 253) as u8)).collect()
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).expect("read_dir");
    entries.map(|entry| entry.expect("entry").file_name().into_string().expect("a plain name")).collect()
}

#[test]
fn what_one_mount_writes_the_other_reads() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::write(a.join("file"), pattern(1, 3 * MIB + 77)).expect("write");
    assert_eq!(fs::read(b.join("file")).expect("read"), pattern(1, 3 * MIB + 77));
    fs::create_dir(b.join("dir")).expect("mkdir");
    fs::rename(b.join("file"), b.join("dir/renamed")).expect("rename");
    assert_eq!(names(&a), BTreeSet::from(["dir".to_owned()]));
    let mut both = File::options().write(true).open(a.join("dir/renamed")).expect("open");
    both.write_all(b"changed").expect("write");
    assert_eq!(
        &fs::read(b.join("dir/renamed")).expect("read")[..10],
        &[b"changed".as_slice(), &pattern(1, 10)[7..]].concat()[..]
    );
    drop(both);
    world.end();
}

#[test]
fn names_links_and_attributes_behave_as_on_any_filesystem() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    let (file, other) = (root.join("file"), root.join("other"));
    fs::write(&file, b"content").expect("write");
    fs::hard_link(&file, &other).expect("link");
    assert_eq!(fs::metadata(&other).expect("stat").nlink(), 2);
    assert_eq!(fs::metadata(&other).expect("stat").ino(), fs::metadata(&file).expect("stat").ino());
    symlink("file", root.join("soft")).expect("symlink");
    assert_eq!(fs::read_link(root.join("soft")).expect("readlink"), Path::new("file"));
    assert_eq!(fs::read(root.join("soft")).expect("read"), b"content");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("chmod");
    assert_eq!(fs::metadata(&other).expect("stat").mode() & 0o7777, 0o640);
    rustix::fs::mknodat(CWD, root.join("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("mkfifo");
    assert!(fs::metadata(root.join("pipe")).expect("stat").file_type().is_fifo());
    let refused = |outcome: std::io::Result<()>| outcome.expect_err("refused").kind();
    fs::create_dir(root.join("full")).expect("mkdir");
    fs::write(root.join("full/x"), b"x").expect("write");
    assert_eq!(refused(fs::remove_dir(root.join("full"))), ErrorKind::DirectoryNotEmpty);
    assert_eq!(refused(fs::create_dir(root.join("full"))), ErrorKind::AlreadyExists);
    assert_eq!(refused(fs::remove_file(root.join("missing"))), ErrorKind::NotFound);
    assert_eq!(refused(fs::create_dir(root.join("n".repeat(256)))), ErrorKind::InvalidFilename);
    world.end();
}

/// Whatever makes a file grow has one limit, and one name for what is beyond it.
#[test]
fn no_file_is_larger_than_another_may_be() {
    if !can_mount() {
        return;
    }
    const LARGEST: u64 = (1 << 62) - 4096;
    let mut world = World::new();
    let root = world.mount();
    let file = File::create_new(root.join("file")).expect("create");
    let write = |end| file.write_at(b"x", end - 1).map(drop);
    let cut = |end| file.set_len(end);
    let allocate = |end: u64| Ok(rustix::fs::fallocate(&file, FallocateFlags::empty(), end - 1, 1)?);
    let grow: [&dyn Fn(u64) -> std::io::Result<()>; 3] = [&write, &cut, &allocate];
    for grow in grow {
        grow(LARGEST).expect("grow");
        assert_eq!(file.metadata().expect("stat").len(), LARGEST);
        file.set_len(0).expect("empty");
        for end in [LARGEST + 1, (1 << 62) + 1, i64::MAX as u64] {
            assert_eq!(grow(end).expect_err("too large").kind(), ErrorKind::FileTooLarge, "{end}");
        }
        assert_eq!(file.metadata().expect("stat").len(), 0);
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for how in [punch, FallocateFlags::ZERO_RANGE] {
        let refused = rustix::fs::fallocate(&file, how, LARGEST, 1).expect_err("beyond any file");
        assert_eq!(refused, rustix::io::Errno::FBIG);
    }
    world.end();
}

/// Whoever opens a name that another mount replaces again and again finds one file or the next, never none.
#[test]
fn a_name_that_is_just_being_replaced_is_there_all_the_time() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::write(a.join("name"), b"0").expect("write");
    thread::scope(|scope| {
        let replacing = scope.spawn(|| {
            for number in 1..=200 {
                fs::write(a.join("new"), number.to_string()).expect("write");
                fs::rename(a.join("new"), a.join("name")).expect("rename");
            }
        });
        while !replacing.is_finished() {
            // The kernel looks twice; that it is outrun twice is for the caller to see, as with any network filesystem.
            let found = File::open(b.join("name")).map_err(|error| error.kind());
            assert!(matches!(found, Ok(_) | Err(ErrorKind::StaleNetworkFileHandle)), "{found:?}");
        }
    });
    assert_eq!(fs::read(b.join("name")).expect("read"), b"200");
    world.end();
}

#[test]
fn rename_replaces_exchanges_and_respects_what_is_there() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    let (a, b) = (root.join("a"), root.join("b"));
    fs::write(&a, b"a").expect("write");
    fs::write(&b, b"b").expect("write");
    let kept = rustix::fs::renameat_with(CWD, &a, CWD, &b, RenameFlags::NOREPLACE);
    assert_eq!(kept, Err(rustix::io::Errno::EXIST));
    rustix::fs::renameat_with(CWD, &a, CWD, &b, RenameFlags::EXCHANGE).expect("exchange");
    assert_eq!((fs::read(&a).expect("read"), fs::read(&b).expect("read")), (b"b".to_vec(), b"a".to_vec()));
    fs::rename(&a, &b).expect("replace");
    assert_eq!(fs::read(&b).expect("read"), b"b");
    assert_eq!(names(&root), BTreeSet::from(["b".to_owned()]));
    world.end();
}

#[test]
fn a_rename_leaves_what_hides_the_old_name_where_it_is_asked_to() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (root, elsewhere) = (world.mount(), world.mount());
    let (a, b) = (root.join("a"), root.join("b"));
    fs::write(&a, b"a").expect("write");
    fs::write(&b, b"b").expect("write");
    assert_eq!(fs::read(elsewhere.join("a")).expect("read"), b"a");
    let hiding = RenameFlags::WHITEOUT;
    let kept = rustix::fs::renameat_with(CWD, &a, CWD, &b, hiding | RenameFlags::NOREPLACE);
    assert_eq!(kept, Err(rustix::io::Errno::EXIST));
    assert!(fs::metadata(&a).expect("stat").is_file(), "nothing happened");
    rustix::fs::renameat_with(CWD, &a, CWD, &b, hiding).expect("a rename");
    for mount in [&root, &elsewhere] {
        assert_eq!(fs::read(mount.join("b")).expect("read"), b"a");
        let left = fs::symlink_metadata(mount.join("a")).expect("stat");
        assert!(left.file_type().is_char_device());
        assert_eq!((left.rdev(), left.mode() & 0o7777, left.nlink()), (0, 0, 1));
        assert_eq!(names(mount), BTreeSet::from(["a".to_owned(), "b".to_owned()]));
    }
    fs::create_dir(root.join("d")).expect("mkdir");
    rustix::fs::renameat_with(CWD, root.join("d"), CWD, root.join("e"), hiding).expect("of a directory");
    assert!(fs::symlink_metadata(elsewhere.join("d")).expect("stat").file_type().is_char_device());
    world.end();
}

/// What a container, say, does with files of its image. The mount goes with the shell.
const OVERLAY: &str = r#"
    cd "$1" && mkdir lower lower/folder merged
    for name in kept removed moved folder/inside; do echo "$name" > "lower/$name"; done
    mount -t overlay -o "lowerdir=lower,upperdir=$2/upper,workdir=$2/work" overlay merged
    cd merged
    rm removed
    mv moved elsewhere
    echo changed > kept
    rm -r folder
    mkdir folder
    test "$(ls . folder | tr '\n' ' ')" = '.: elsewhere folder kept  folder: '
    test "$(cat elsewhere)" = moved
"#;

#[test]
fn a_volume_can_be_the_upper_layer_of_overlayfs() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (root, elsewhere) = (world.mount(), world.mount());
    let folder = tempfile::TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    for layer in ["upper", "work"] {
        fs::create_dir(root.join(layer)).expect("mkdir");
    }
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "sh", "-euc", OVERLAY, "sh"]).arg(folder.path()).arg(&root);
    let output = shell.output().expect("a shell");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let upper = elsewhere.join("upper");
    for hidden in ["removed", "moved"] {
        let left = fs::symlink_metadata(upper.join(hidden)).expect("stat");
        assert!(left.file_type().is_char_device() && left.rdev() == 0, "{hidden}");
    }
    for (name, content) in [("kept", "changed\n"), ("elsewhere", "moved\n")] {
        assert_eq!(fs::read_to_string(upper.join(name)).expect("read"), content);
    }
    world.end();
}

#[test]
fn a_file_lives_on_while_it_is_open_after_its_last_name_went() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let file = File::options().read(true).write(true).create_new(true).open(a.join("gone")).expect("create");
    file.write_all_at(&pattern(3, 10_000), 0).expect("write");
    fs::remove_file(b.join("gone")).expect("unlink on the other mount");
    file.write_all_at(b"still here", 9_990).expect("write");
    let mut tail = [0; 20];
    file.read_exact_at(&mut tail, 9_980).expect("read");
    assert_eq!(&tail[10..], b"still here");
    assert_eq!(file.metadata().expect("fstat").nlink(), 0);
    assert!(names(&a).is_empty());
    drop(file);
    world.end();
}

#[test]
fn a_directory_lives_on_while_it_is_open_after_its_name_went() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    for (remover, how) in [(&a, "removed here"), (&b, "removed on the other mount")] {
        fs::create_dir(a.join("gone")).expect("mkdir");
        let held = File::open(a.join("gone")).expect("open");
        fs::remove_dir(remover.join("gone")).expect("rmdir");
        assert_eq!(held.metadata().expect("fstat").nlink(), 0, "{how}");
        // A kernel that knows that the directory was removed does not ask for the dots either.
        let mut listed = rustix::fs::Dir::read_from(&held).expect("a stream");
        let name = listed
            .find_map(|entry| entry.ok().filter(|entry| !entry.file_name().to_bytes().starts_with(b".")));
        assert!(name.is_none(), "{how}");
        let made = rustix::fs::mkdirat(&held, "inside", rustix::fs::Mode::RWXU);
        assert_eq!(made, Err(rustix::io::Errno::NOENT), "{how}");
    }
    for name in ["one", "other"] {
        fs::create_dir(a.join(name)).expect("mkdir");
    }
    let held = File::open(a.join("other")).expect("open");
    fs::rename(b.join("one"), b.join("other")).expect("a directory in its place");
    assert_eq!(held.metadata().expect("fstat").nlink(), 0);
    drop(held);
    world.end();
}

/// A program that prints what a file's handle, taken on one mount, opens on another: its content, or an error.
const BY_HANDLE: &str = "
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
class Handle(ctypes.Structure):
    _fields_ = [('bytes', ctypes.c_uint), ('type', ctypes.c_int), ('data', ctypes.c_ubyte * 128)]
handle, mount_id = Handle(bytes=128), ctypes.c_int()
path, mount, remove = sys.argv[1:]
assert libc.name_to_handle_at(-100, path.encode(), ctypes.byref(handle), ctypes.byref(mount_id), 0) == 0
if remove == 'remove':
    os.unlink(path)
fd = libc.open_by_handle_at(os.open(mount, os.O_RDONLY), ctypes.byref(handle), os.O_RDONLY)
print(os.read(fd, 100).decode() if fd >= 0 else errno.errorcode[ctypes.get_errno()], end='')
";

#[test]
fn a_handle_of_a_file_opens_it_on_every_mount_until_it_is_removed() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::create_dir(a.join("d")).expect("mkdir");
    fs::write(a.join("d/f"), "content").expect("write");
    let opened = |how: &str| {
        let mut program = Command::new("python3");
        let ran = program
            .arg("-c")
            .arg(BY_HANDLE)
            .arg(a.join("d/f"))
            .arg(&b)
            .arg(how)
            .output()
            .expect("python3 starts");
        String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned()
    };
    assert_eq!(opened("keep"), "content");
    assert_eq!(opened("remove"), "ESTALE");
    world.end();
}

#[test]
fn sizes_holes_and_space_are_as_set() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    let file =
        File::options().read(true).write(true).create_new(true).open(root.join("file")).expect("create");
    file.set_len(10 << 20).expect("grow");
    file.write_all_at(&pattern(5, MIB), 4 << 20).expect("write");
    assert_eq!(file.metadata().expect("fstat").len(), 10 << 20);
    assert!(file.metadata().expect("fstat").blocks() * 512 < 9 << 20, "the rest is a hole");
    let seek = |from| rustix::fs::seek(&file, from);
    assert_eq!(seek(rustix::fs::SeekFrom::Data(0)), Ok(4 << 20));
    assert!(seek(rustix::fs::SeekFrom::Hole(4 << 20)).expect("hole") >= 5 << 20);
    assert_eq!(seek(rustix::fs::SeekFrom::Data(10 << 20)), Err(rustix::io::Errno::NXIO));
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 10 << 20, 1 << 20).expect("allocate");
    assert_eq!(file.metadata().expect("fstat").len(), 11 << 20);
    rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 11 << 20, 1 << 20).expect("allocate");
    assert_eq!(file.metadata().expect("fstat").len(), 11 << 20);
    let mut tail = vec![1; MIB];
    file.read_exact_at(&mut tail, 10 << 20).expect("read");
    assert!(tail.iter().all(|byte| *byte == 0), "allocated and never written: zeros");
    file.set_len(100).expect("shrink");
    file.set_len(8192).expect("grow");
    assert!(fs::read(root.join("file")).expect("read").iter().all(|byte| *byte == 0));
    file.sync_all().expect("fsync");
    drop(file);
    world.end();
}

/// Random writes, holes, zeroed ranges and cuts through two mounts, beside the same in memory.
#[test]
fn holes_and_zeroed_ranges_read_zeros_and_give_their_space_back() {
    if !can_mount() {
        return;
    }
    const END: u64 = 200_000;
    let mut world = World::new();
    let mounts = [world.mount(), world.mount()];
    fs::write(mounts[0].join("f"), b"").expect("write");
    let files =
        mounts.each_ref().map(|m| File::options().read(true).write(true).open(m.join("f")).expect("open"));
    let (mut model, mut dice) = (Vec::<u8>::new(), 88_172_645_463_325_252_u64);
    let mut roll = |below: u64| {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        dice % below
    };
    for round in 0..600_u32 {
        let file = &files[roll(2) as usize];
        let (offset, len) = (roll(END), 1 + roll(30_000));
        let (from, to) = (offset as usize, (offset + len) as usize);
        let fallocate = |flags| rustix::fs::fallocate(file, flags, offset, len).expect("fallocate");
        let zero = |model: &mut Vec<u8>| {
            let end = to.min(model.len());
            model[from.min(end)..end].fill(0);
        };
        match roll(5) {
            0 => {
                fallocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE);
                zero(&mut model);
            }
            1 => {
                fallocate(FallocateFlags::ZERO_RANGE);
                model.resize(model.len().max(to), 0);
                zero(&mut model);
            }
            2 => {
                file.set_len(offset).expect("set_len");
                model.resize(from, 0);
            }
            _ => {
                file.write_all_at(&pattern((round % 251) as u8, len as usize), offset).expect("write");
                model.resize(model.len().max(to), 0);
                model[from..to].copy_from_slice(&pattern((round % 251) as u8, len as usize));
            }
        }
        let other = &files[roll(2) as usize];
        let mut back = vec![1; model.len()];
        other.read_exact_at(&mut back, 0).expect("read");
        assert!(back == model, "round {round}");
        assert_eq!(other.metadata().expect("fstat").len(), model.len() as u64, "round {round}");
    }
    rustix::fs::fallocate(&files[0], FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 2 * END)
        .expect("punch");
    assert_eq!(files[1].metadata().expect("fstat").blocks(), 0, "all space is back");
    drop(files);
    world.end();
}

#[test]
fn a_directory_of_three_thousand_is_listed_whole_while_others_come_and_go() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::create_dir(a.join("many")).expect("mkdir");
    thread::scope(|scope| {
        for lane in 0..6 {
            let folder = if lane % 2 == 0 { a.join("many") } else { b.join("many") };
            scope.spawn(move || {
                for n in 0..500 {
                    File::create(folder.join(format!("file-{lane}-{n:04}"))).expect("create");
                }
            });
        }
    });
    assert_eq!(names(&a.join("many")).len(), 3000);
    let mut listing = fs::read_dir(b.join("many")).expect("read_dir");
    let first = listing.next().expect("not empty").expect("entry").file_name();
    for n in 0..500 {
        fs::remove_file(a.join(format!("many/file-0-{n:04}"))).expect("unlink");
    }
    let rest: BTreeSet<_> = listing.map(|entry| entry.expect("entry").file_name()).collect();
    assert!(!rest.contains(&first), "no name twice");
    let staying = |name: &&std::ffi::OsString| !name.to_string_lossy().starts_with("file-0-");
    let seen = rest.iter().filter(staying).count() + usize::from(staying(&&first));
    assert_eq!(seen, 2500, "what stayed is listed once");
    world.end();
}

#[test]
fn many_threads_write_and_read_their_parts_of_one_file() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let file =
        File::options().read(true).write(true).create_new(true).open(a.join("shared")).expect("create");
    thread::scope(|scope| {
        for lane in 0..8_usize {
            let file = &file;
            scope.spawn(move || {
                for n in 0..40 {
                    let at = ((n * 8 + lane) * 10_000) as u64;
                    file.write_all_at(&pattern(lane as u8 + 1, 10_000), at).expect("write");
                    let mut back = vec![0; 10_000];
                    file.read_exact_at(&mut back, at).expect("read");
                    assert_eq!(back, pattern(lane as u8 + 1, 10_000));
                }
            });
        }
    });
    let all = fs::read(b.join("shared")).expect("read on the other mount");
    assert_eq!(all.len(), 8 * 40 * 10_000);
    for (n, part) in all.chunks(10_000).enumerate() {
        assert_eq!(part, pattern((n % 8) as u8 + 1, 10_000), "part {n}");
    }
    drop(file);
    world.end();
}

#[test]
fn appends_of_two_mounts_never_overwrite_each_other() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let mounts = [world.mount(), world.mount()];
    File::create(mounts[0].join("log")).expect("create");
    thread::scope(|scope| {
        for (lane, mount) in mounts.iter().enumerate() {
            scope.spawn(move || {
                let mut log = OpenOptions::new().append(true).open(mount.join("log")).expect("open");
                for n in 0..100 {
                    log.write_all(format!("{lane} {n:05}\n").as_bytes()).expect("append");
                }
            });
        }
    });
    let text = fs::read_to_string(mounts[0].join("log")).expect("read");
    let lines: BTreeSet<&str> = text.lines().collect();
    assert_eq!((text.len(), lines.len()), (200 * 8, 200));
    world.end();
}

#[test]
fn a_copy_through_the_mount_and_the_free_space_are_right() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    let free = || rustix::fs::statvfs(&root).expect("statvfs");
    let before = free();
    assert!(before.f_bavail > 0 && before.f_namemax == 255);
    fs::write(root.join("from"), pattern(9, 5 * MIB)).expect("write");
    fs::copy(root.join("from"), root.join("to")).expect("copy");
    assert_eq!(fs::read(root.join("to")).expect("read"), pattern(9, 5 * MIB));
    let used = (before.f_bavail - free().f_bavail) * before.f_frsize;
    // The copy shares the blocks of its source until one of them is written.
    assert!((5 << 20..10 << 20).contains(&used), "{used} bytes used");
    let mut file = File::open(root.join("to")).expect("open");
    file.seek(SeekFrom::End(-3)).expect("seek");
    let mut tail = Vec::new();
    file.read_to_end(&mut tail).expect("read");
    assert_eq!(tail, pattern(9, 5 * MIB)[5 * MIB - 3..]);
    drop(file);
    world.end();
}

#[test]
fn an_unmounted_folder_is_empty_and_a_panic_leaves_no_mount_behind() {
    if !can_mount() {
        return;
    }
    let kept = tempfile::TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let place = kept.path().join("where");
    let panicked = thread::spawn({
        let place = place.clone();
        move || {
            let mut world = World::new();
            let mountpoint = world.mount();
            fs::write(mountpoint.join("x"), b"x").expect("write");
            fs::write(place, mountpoint.to_string_lossy().as_bytes()).expect("write");
            std::panic::panic_any("on purpose");
        }
    })
    .join();
    assert!(panicked.is_err());
    let mountpoint = fs::read_to_string(place).expect("read");
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(!mounts.contains(&mountpoint), "{mountpoint} is still mounted");
}

// Invariant F10: a program that holds a file cannot hold the unmount, and is told.
#[test]
fn a_program_that_holds_a_file_gets_an_error_once_the_patience_ends() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    let held =
        File::options().read(true).write(true).create_new(true).open(root.join("held")).expect("create");
    held.write_all_at(b"before", 0).expect("write");
    world.unmount(0);
    assert!(!root.join("held").exists(), "out of the tree");
    let error = held.write_all_at(b"after", 0).expect_err("the connection has ended");
    assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    drop(held);
    world.end();
}

#[test]
fn a_mountpoint_that_cannot_be_one_is_named() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    fs::write(root.join("plain"), b"").expect("write");
    for (place, word) in [("missing", "create it"), ("plain", "not a directory")] {
        let refused = world.mount_at(&root.join(place)).expect_err("refused").to_string();
        assert!(refused.contains(place) && refused.contains(word), "{refused}");
    }
    world.end();
}
