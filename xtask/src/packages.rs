//! The Debian packages that the demo and the tests call programs of.

use std::env;
use std::path::Path;
use std::process::Command;

use crate::run::Failure;

/// A program that must be there, and the packages that bring it, separated by blanks.
pub(crate) struct Need {
    program: &'static str,
    packages: &'static str,
}

const fn need(program: &'static str, packages: &'static str) -> Need {
    Need { program, packages }
}

/// What the demo calls: the C compiler for the guest, qemu-img and mke2fs as independent makers and judges of images.
pub(crate) const DEMO: &[Need] = &[
    need("cc", "gcc libc6-dev"),
    need("ld", "binutils"),
    need("qemu-img", "qemu-utils"),
    need("mke2fs", "e2fsprogs"),
    need("e2fsck", "e2fsprogs"),
    need("debugfs", "e2fsprogs"),
];

/// What the tests and benchmarks call on top: load, system call traces, NBD peers, packed image samples.
pub(crate) const TEST: &[Need] = &[
    need("cc", "gcc libc6-dev"),
    need("ld", "binutils"),
    need("qemu-img", "qemu-utils"),
    need("qemu-io", "qemu-utils"),
    need("qemu-nbd", "qemu-utils"),
    need("mke2fs", "e2fsprogs"),
    need("e2fsck", "e2fsprogs"),
    need("debugfs", "e2fsprogs"),
    need("fio", "fio"),
    need("nbdinfo", "libnbd-bin"),
    need("nbdcopy", "libnbd-bin"),
    need("nbdkit", "nbdkit"),
    need("strace", "strace"),
    need("lsof", "lsof"),
    need("xz", "xz-utils"),
    need("bzip2", "bzip2"),
    // Independent readers of images; the Python ones are installed below the build folder.
    need("7zz", "7zip"),
    need("pip3", "python3 python3-pip"),
];

/// Peers of benchmarks: GlusterFS, and what libfuse's `passthrough_hp` is built with.
pub(crate) const PEERS: &[Need] = &[
    need("glusterd", "glusterfs-server glusterfs-client"),
    need("g++", "g++"),
    need("pkg-config", "pkg-config"),
    need("dpkg-source", "dpkg-dev"),
    need("fusermount3", "fuse3 libfuse3-dev"),
];

/// What the lab calls: the emulator, and what initial RAM disks and drives are made with. The kernel is only downloaded.
pub(crate) const LAB: &[Need] = &[
    need("cc", "gcc libc6-dev"),
    need("ld", "binutils"),
    need("qemu-system-x86_64", "qemu-system-x86"),
    need("busybox", "busybox-static"),
    need("cpio", "cpio"),
    need("depmod", "kmod"),
    need("ip", "iproute2"),
    need("mke2fs", "e2fsprogs"),
    need("iscsid", "open-iscsi"),
];

/// Installs what is missing when run by root on a system with apt, otherwise names the packages.
pub(crate) fn ensure(needs: &[Need]) -> Result<(), Failure> {
    let missing = needs.iter().filter(|need| !on_path(need.program));
    let mut packages: Vec<&str> = missing.flat_map(|need| need.packages.split(' ')).collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !is_root() || !on_path("apt-get") {
        return Err(Failure::new(format!(
            "these packages are missing: {list}\n  install them, as root: apt-get install {list}"
        )));
    }
    println!("xtask: installing {list}");
    apt(&["update", "-qq"])?;
    let mut install = vec!["install", "-y", "-qq", "--no-install-recommends"];
    install.extend(&packages);
    apt(&install)
}

fn apt(arguments: &[&str]) -> Result<(), Failure> {
    let status = Command::new("apt-get").args(arguments).env("DEBIAN_FRONTEND", "noninteractive").status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::new(format!("apt-get {} ended with {status}", arguments.join(" ")))),
        Err(error) => Err(Failure::new(format!("apt-get could not be started: {error}"))),
    }
}

fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    // Administrators' tools are not on every user's path, yet they are where they are.
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|folder| Path::new(&folder).join(program).is_file())
}

fn is_root() -> bool {
    // The owner of /proc/self is the effective user of this process.
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}
