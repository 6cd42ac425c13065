//! A stock Linux as the guest of `hv`: kernel of a Debian package, ext4 root on a VHDX on the cluster volume.
//!
//! ```text
//!   lab machine (stock kernel, emulated SVM): csvd, hv --KVM--> guest (the same stock kernel, two processors)
//!                                                                 initrd: virtio_mmio, virtio_blk, ext4 -> root on vda
//!                                                                 its init: writes, syncs, checks, powers off by ACPI
//! ```

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cluster::check;
use crate::drive;
use crate::kernel::Kernel;
use crate::network::Network;
use crate::node::Node;
use crate::tool::{Doing, LabError};
use crate::tree::Tree;

/// An emulated guest in an emulated machine.
const GUEST_WITHIN: Duration = Duration::from_secs(300);
const ROOT_MIB: u64 = 64;
const GUEST_MODULES: &[&str] =
    &["virtio_mmio", "virtio_blk", "ext4", "crc32c_generic", "virtio_net", "virtio-rng"];
const SOCKET: &str = "/data/c/n1/csvd.sock";

/// The initrd of the guest: finds its root and goes there.
const GUEST_INITRD: &str = "
for turn in $(seq 600); do [ -b /dev/vda ] && break; sleep 0.1; done
mkdir -p /root; mount -t ext4 /dev/vda /root || { echo \"guest: no root\"; cat /proc/partitions; dmesg | tail -n 20; poweroff -f; }
exec switch_root /root /sbin/init
";

/// The init on the ext4 root.
const GUEST_INIT: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sys /sys; /bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
echo \"guest: init on $(grep ' / ' /proc/mounts | tail -n 1 | cut -d' ' -f1,3), $(nproc) processors, $(uname -r)\"
echo \"guest: clock $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)\"
dd if=/dev/urandom of=/written bs=64k count=64 2>/dev/null; sync
before=$(sha256sum < /written); echo 3 > /proc/sys/vm/drop_caches
[ \"$(sha256sum < /written)\" = \"$before\" ] && echo \"guest: disk holds $before\"
umount -r / 2>/dev/null; mount -o remount,ro / ; sync
echo \"guest: switches itself off\"
poweroff -f
";

pub(crate) fn run() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let kernel = Kernel::get(&super::cache()?)?;
        let content = folder.join("content");
        prepare(&kernel, &content, GUEST_INIT)?;
        let network = Network::new()?;
        let started = Instant::now();
        let mut node = Node::boot(&kernel, &network, folder, 1, &content)?;
        println!("lab: the machine is up after {:.1} s", started.elapsed().as_secs_f64());
        node.ctl("", "dev up --nodes 1 --dir /data/c --lun-size 1G --volume vol1")?;
        println!("lab: the cluster is up after {:.1} s", started.elapsed().as_secs_f64());
        node.ctl("", "vhdx convert /data/root.raw /data/c/n1/mnt/vol1/root.vhdx --to vhdx")?;
        node.ctl(
            SOCKET,
            "vm create debian --memory 384M --cpus 2 --disk /data/c/n1/mnt/vol1/root.vhdx \
             --kernel /data/vmlinuz --initrd /data/guest.initrd --cmdline 'console=ttyS0 panic=-1 quiet'",
        )?;
        node.ctl(SOCKET, "vm start debian")?;
        let said = follow_guest(&mut node)?;
        check_guest(&kernel, &said)?;
        println!("lab: the guest has ended after {:.1} s", started.elapsed().as_secs_f64());
        node.ctl("", "dev down --dir /data/c")?;
        Ok(())
    })
}

/// Kernel, initrd and root of a guest, as files for the machines it runs on. `init` is the one on the root.
pub(super) fn prepare(kernel: &Kernel, content: &Path, init: &str) -> Result<(), LabError> {
    fs::create_dir_all(content).doing("making a folder")?;
    fs::copy(kernel.image(), content.join("vmlinuz")).doing("copying the kernel")?;
    let initrd = Tree::new(GUEST_INITRD)?;
    initrd.add_modules(kernel, GUEST_MODULES)?;
    initrd.pack(&content.join("guest.initrd"))?;
    let root = Tree::new("")?;
    root.add_text("sbin/init", init, 0o755)?;
    for folder in ["proc", "sys", "dev", "tmp", "kept"] {
        root.add_text(&format!("{folder}/.keep"), "", 0o644)?;
    }
    drive::ext4(&content.join("root.raw"), ROOT_MIB, root.path())
}

/// Waits for the guest's end; gives all that it has said. Whoever follows a console is told of the end once it is recorded.
fn follow_guest(node: &mut Node) -> Result<String, LabError> {
    let limit = GUEST_WITHIN.as_secs();
    // Ends with the VM; busybox' timeout bounds it.
    let follow = format!("timeout {limit} csvctl --connect {SOCKET} vm console debian --follow");
    let said = node.machine.run(&follow, GUEST_WITHIN + Duration::from_secs(60))?;
    println!("{}", said.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n"));
    let shown = node.ctl(SOCKET, "vm show debian")?;
    check(shown["state"] == "stopped", "a guest that has switched itself off", &shown)?;
    Ok(said)
}

fn check_guest(kernel: &Kernel, said: &str) -> Result<(), LabError> {
    let wanted = [
        format!("guest: init on /dev/vda ext4, 2 processors, {}", kernel.version),
        "guest: clock kvm-clock".to_owned(),
        "guest: disk holds".to_owned(),
        "guest: switches itself off".to_owned(),
    ];
    match wanted.iter().find(|line| !said.contains(line.as_str())) {
        None => Ok(()),
        Some(line) => Err(LabError::new(format!("the guest did not say `{line}`"))),
    }
}
