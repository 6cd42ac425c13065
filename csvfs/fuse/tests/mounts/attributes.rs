//! Extended attributes, access control lists, files without a name, times of birth: on two mounts of one volume.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use crate::world::{World, can_mount};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

fn xattr(path: &Path, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0; 64 << 10];
    let len = rustix::fs::getxattr(path, name, &mut value[..])?;
    value.truncate(len);
    Ok(value)
}

fn set(path: &Path, name: &str, value: &[u8]) -> Result<(), Errno> {
    rustix::fs::setxattr(path, name, value, XattrFlags::empty())
}

/// The bytes of a list for the owner, user 1000, the group, the mask and others.
fn acl(owner: u8, user: u8, group: u8, mask: u8, other: u8) -> Vec<u8> {
    let entries = [
        (1, owner, u32::MAX),
        (2, user, 1000),
        (4, group, u32::MAX),
        (16, mask, u32::MAX),
        (32, other, u32::MAX),
    ];
    let mut bytes = vec![2, 0, 0, 0];
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&[tag, 0, permissions, 0]);
        bytes.extend_from_slice(&u32::to_le_bytes(id));
    }
    bytes
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("stat").mode() & 0o7777
}

/// What a program may do beyond its user it may for what it is, so it goes with what it is; nothing else goes.
#[test]
fn capabilities_do_not_survive_a_write_by_anybody() {
    const CAPABILITY: &str = "security.capability";
    // Revision 2: cap_chown, permitted and effective.
    const VALUE: [u8; 20] = [1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let file = File::create_new(a.join("f")).expect("create");
    set(&a.join("f"), "user.color", b"red").expect("set");
    for mount in [&a, &b, &a] {
        set(&mount.join("f"), CAPABILITY, &VALUE).expect("set");
        assert_eq!(xattr(&a.join("f"), CAPABILITY), Ok(VALUE.to_vec()));
        file.write_at(b"other", 0).expect("write");
        for mount in [&a, &b] {
            assert_eq!(xattr(&mount.join("f"), CAPABILITY), Err(Errno::NODATA));
            assert_eq!(xattr(&mount.join("f"), "user.color"), Ok(b"red".to_vec()));
        }
    }
    drop(file);
    world.end();
}

#[test]
fn an_attribute_set_on_one_mount_is_what_the_other_reads() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::write(a.join("f"), b"content").expect("write");
    let held = File::open(b.join("f")).expect("open");
    assert_eq!(xattr(&b.join("f"), "user.color"), Err(Errno::NODATA));
    for round in 0..50_u8 {
        let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
        set(&from.join("f"), "user.color", &[round; 100]).expect("set");
        assert_eq!(xattr(&to.join("f"), "user.color"), Ok(vec![round; 100]), "round {round}");
    }
    set(&a.join("f"), "trusted.note", b"for root").expect("set");
    let mut names = [0; 100];
    let len = rustix::fs::listxattr(b.join("f"), &mut names[..]).expect("list");
    assert_eq!(&names[..len], b"trusted.note\0user.color\0");
    rustix::fs::removexattr(a.join("f"), "user.color").expect("remove");
    assert_eq!(xattr(&b.join("f"), "user.color"), Err(Errno::NODATA));
    drop(held);
    world.end();
}

#[test]
fn attributes_keep_the_rules_of_linux() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let root = world.mount();
    let path = root.join("f");
    fs::write(&path, b"").expect("write");
    let with = |name: &str, flags| rustix::fs::setxattr(&path, name, b"v", flags);
    assert_eq!(with("user.x", XattrFlags::REPLACE), Err(Errno::NODATA));
    with("user.x", XattrFlags::CREATE).expect("create");
    assert_eq!(with("user.x", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(rustix::fs::removexattr(&path, "user.y"), Err(Errno::NODATA));
    assert_eq!(set(&path, "other.x", b"v"), Err(Errno::OPNOTSUPP));
    let large = vec![7; 64 << 10];
    set(&path, "user.large", &large).expect("64 KiB");
    assert_eq!(xattr(&path, "user.large").map(|value| value.len()), Ok(64 << 10));
    assert_eq!(rustix::fs::getxattr(&path, "user.large", &mut [0; 10][..]), Err(Errno::RANGE));
    // All names of a file fit into the largest list that a program can ask for.
    let refused = (0..400).find_map(|n| set(&path, &format!("user.{n:0250}"), b"").err());
    assert_eq!(refused, Some(Errno::NOSPC));
    fs::remove_file(&path).expect("unlink");
    world.end();
}

#[test]
fn access_lists_and_modes_follow_each_other_on_every_mount() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::write(a.join("f"), b"").expect("write");
    set(&a.join("f"), ACCESS, &acl(6, 6, 4, 6, 0)).expect("set");
    assert_eq!(mode(&b.join("f")), 0o660, "the mask shows as the group's bits");
    fs::set_permissions(b.join("f"), fs::Permissions::from_mode(0o640)).expect("chmod");
    assert_eq!(xattr(&a.join("f"), ACCESS), Ok(acl(6, 6, 4, 4, 0)), "chmod changed the mask");
    rustix::fs::removexattr(a.join("f"), ACCESS).expect("remove");
    assert_eq!(xattr(&b.join("f"), ACCESS), Err(Errno::NODATA));
    assert_eq!(set(&a.join("f"), DEFAULT, &acl(7, 7, 5, 7, 5)), Err(Errno::ACCESS), "files have no default");
    assert_eq!(set(&a.join("f"), ACCESS, b"nonsense"), Err(Errno::OPNOTSUPP));
    world.end();
}

#[test]
fn what_is_made_under_a_default_list_inherits_it_and_no_umask() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::create_dir(a.join("d")).expect("mkdir");
    set(&a.join("d"), DEFAULT, &acl(7, 7, 5, 7, 0)).expect("set");
    rustix::fs::mkdirat(CWD, b.join("d/sub"), Mode::from(0o777)).expect("mkdir");
    assert_eq!(mode(&a.join("d/sub")), 0o770, "others get nothing, the umask takes nothing");
    assert_eq!(xattr(&a.join("d/sub"), DEFAULT), Ok(acl(7, 7, 5, 7, 0)));
    drop(
        rustix::fs::open(b.join("d/sub/f"), OFlags::CREATE | OFlags::WRONLY, Mode::from(0o666))
            .expect("create"),
    );
    assert_eq!(mode(&a.join("d/sub/f")), 0o660);
    assert_eq!(xattr(&a.join("d/sub/f"), ACCESS), Ok(acl(6, 7, 5, 6, 0)));
    world.end();
}

#[test]
fn a_file_without_a_name_gets_one_or_is_gone_with_its_last_close() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    let unnamed = |flags| rustix::fs::open(&a, OFlags::TMPFILE | OFlags::RDWR | flags, Mode::from(0o600));
    let file = File::from(unnamed(OFlags::empty()).expect("a file without a name"));
    file.write_all_at(b"before it had a name", 0).expect("write");
    assert_eq!(file.metadata().expect("fstat").nlink(), 0);
    rustix::fs::linkat(&file, "", CWD, a.join("named"), AtFlags::EMPTY_PATH).expect("a name");
    assert_eq!(fs::read(b.join("named")).expect("read"), b"before it had a name");
    assert_eq!(fs::metadata(b.join("named")).expect("stat").nlink(), 1);
    let never = unnamed(OFlags::EXCL).expect("a file without a name");
    assert_eq!(rustix::fs::linkat(&never, "", CWD, a.join("no"), AtFlags::EMPTY_PATH), Err(Errno::NOENT));
    drop((file, never, unnamed(OFlags::empty())));
    world.end();
}

#[test]
fn the_time_of_birth_stays_when_a_file_changes() {
    if !can_mount() {
        return;
    }
    let mut world = World::new();
    let (a, b) = (world.mount(), world.mount());
    fs::write(a.join("f"), b"one").expect("write");
    let born = |path: &Path| {
        let about = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::BTIME).expect("statx");
        assert_ne!(about.stx_mask & StatxFlags::BTIME.bits(), 0);
        (about.stx_btime.tv_sec, about.stx_btime.tv_nsec)
    };
    let first = born(&a.join("f"));
    fs::write(b.join("f"), b"changed").expect("write");
    fs::rename(b.join("f"), b.join("g")).expect("rename");
    assert_eq!(born(&a.join("g")), first);
    assert!(first.0 > 0);
    world.end();
}
