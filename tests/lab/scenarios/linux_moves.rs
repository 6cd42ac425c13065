//! A stock Linux that moves between two machines while it works and while somebody outside talks to it; then its node loses
//! its power.
//!
//! ```text
//!   witness --TCP--> guest: echoes each line        node1 <--10 live moves, 1 quick--> node2, power cut
//!                      |                              '-- both: bridge br0 = eth0 + vm0 (the guest's tap)
//!                      '--> rounds on its ext4 root (a VHDX on the SAN): write, sync, read back past the cache;
//!                           a part of memory is copied and checked; a disk that appears gets a filesystem
//! ```

use crate::cluster::{Kit, LIMIT, MOUNT, SOCKET, SanCluster, check};
use crate::kernel::Kernel;
use crate::scenarios::linux_guest;
use crate::tool::LabError;

const LIVE_MOVES: u8 = 10;
const GUEST: &str = "10.77.0.50";
/// What the client has sent and got back, on the witness.
const ECHOED: &str = "/tmp/echoed";
/// Of a whole emulated machine that has three others beside it on two processors.
const BLACKOUT: &str = "5s";
const SIZE: (u32, u32) = (1280, 1);
/// Judges the guest's filesystem in the end.
const PROGRAMS: &[&str] = &["/sbin/e2fsck"];

/// The machine's addresses move to a bridge that the guest's tap is on.
const BRIDGE: &str = "
ip addr flush dev eth0
brctl addbr br0; brctl addif br0 eth0; ip link set br0 up
ip addr add 10.77.0.$(word number)/24 dev br0; ip addr add 10.78.0.$(word number)/24 dev br0
tunctl -t vm0; brctl addif br0 vm0; ip link set vm0 up
";

/// The init on the ext4 root. What it says ends with a dot, so that half a line is not taken for a whole one.
const GUEST_INIT: &str = "#!/bin/busybox sh
export PATH=/bin:/sbin
/bin/busybox mount -t proc proc /proc; /bin/busybox mount -t sysfs sys /sys; /bin/busybox mount -t devtmpfs dev /dev
/bin/busybox --install -s /bin
mount -t tmpfs tmpfs /tmp
ip link set lo up; ip link set eth0 up; ip addr add 10.77.0.50/24 dev eth0
round=0
for sum in $(ls /kept | grep sum | sort -n); do
  of=${sum%.sum}
  [ \"$(sha256sum < /kept/$of)\" = \"$(cat /kept/$sum)\" ] && echo \"guest: kept $of.\" && round=$of
done
nc -ll -p 7000 -e /bin/cat &
(nc -l -p 7001 < /dev/null > /dev/null; touch /tmp/end) &
dd if=/dev/urandom of=/tmp/memory bs=64k count=64 2>/dev/null; memory=$(sha256sum < /tmp/memory)
echo \"guest: works from round $round on.\"
try_disk() {
  mke2fs /dev/vdb > /dev/null && mkdir -p /tmp/extra && mount -t ext4 /dev/vdb /tmp/extra || return 1
  cp /tmp/memory /tmp/extra/copy && umount /tmp/extra && mount -t ext4 /dev/vdb /tmp/extra || return 1
  [ \"$(sha256sum < /tmp/extra/copy)\" = \"$memory\" ] && umount /tmp/extra
}
while [ ! -e /tmp/end ]; do
  round=$((round + 1))
  dd if=/dev/urandom of=/kept/$round bs=64k count=4 2>/dev/null
  sha256sum < /kept/$round > /kept/$round.sum
  sync
  [ \"$(dd if=/kept/$round bs=64k iflag=direct 2>/dev/null | sha256sum)\" = \"$(cat /kept/$round.sum)\" ] || echo \"guest: BAD disk.\"
  cp /tmp/memory /tmp/copy; mv /tmp/copy /tmp/memory
  [ \"$(sha256sum < /tmp/memory)\" = \"$memory\" ] || echo \"guest: BAD memory.\"
  echo \"guest: synced $round.\"
  rm -f /kept/$((round - 2)) /kept/$((round - 2)).sum
  if [ $(cat /sys/block/vdb/size 2>/dev/null || echo 0) -gt 0 ] && [ ! -e /tmp/tried ]; then
    touch /tmp/tried
    if try_disk; then echo \"guest: extra disk of $(cat /sys/block/vdb/size) sectors holds.\"; else echo \"guest: BAD extra disk.\"; fi
  fi
  sleep 1
done
killall nc cat; mount -o remount,ro /; sync
echo \"guest: switches itself off.\"
poweroff -f
";

pub(super) fn run() -> Result<(), LabError> {
    super::in_folder(|folder| {
        let content = folder.join("content");
        linux_guest::prepare(&Kernel::get(&super::cache()?)?, &content, GUEST_INIT)?;
        let kit = Kit {
            size: SIZE,
            programs: PROGRAMS,
            init: BRIDGE,
            content: Some(&content),
            guests: true,
            ..Kit::PLAIN
        };
        let mut lab = SanCluster::start_with_witness(folder, &kit)?;
        start_guest(&mut lab)?;
        talk(&mut lab)?;
        for turn in 0..LIVE_MOVES {
            move_and_look(&mut lab, "live", 2 - turn % 2)?;
        }
        move_and_look(&mut lab, "quick", 2)?;
        check_talk(&mut lab)?;
        lab.say("one connection has lived through all moves");
        add_disk(&mut lab)?;
        lose_node(&mut lab)?;
        end(&mut lab)
    })
}

fn start_guest(lab: &mut SanCluster) -> Result<(), LabError> {
    lab.ctl(1, &format!("vhdx convert /data/root.raw {MOUNT}/root.vhdx --to vhdx"))?;
    lab.ctl(
        1,
        &format!(
            "vm create debian --memory 128M --disk {MOUNT}/root.vhdx --net vm0 --kernel /data/vmlinuz \
             --initrd /data/guest.initrd --cmdline 'console=ttyS0 panic=-1 quiet'"
        ),
    )?;
    lab.ctl(1, "vm start debian")?;
    until_said(lab, "the guest works", |said| last(said, "synced") > Some(1)).map(drop)
}

/// A client on the witness sends numbers, one after the other, over one connection.
fn talk(lab: &mut SanCluster) -> Result<(), LabError> {
    let send = "i=0; while [ -e /tmp/talk ]; do i=$((i+1)); echo $i; usleep 200000; done";
    lab.run(
        3,
        &format!("touch /tmp/talk; {{ ({send}) | nc {GUEST} 7000 > {ECHOED} 2>/tmp/why & }} < /dev/null"),
    )?;
    until_echo(lab)
}

/// Waits until more of what the client has sent has come back.
fn until_echo(lab: &mut SanCluster) -> Result<(), LabError> {
    let look = format!(
        "had=$(cat {ECHOED} | wc -l); for turn in $(seq 1200); do [ $(cat {ECHOED} | wc -l) -gt $had ] && break; \
         pidof nc > /dev/null || break; sleep 0.1; done; cat /tmp/why; [ $(cat {ECHOED} | wc -l) -gt $had ]"
    );
    lab.run(3, &look).map(drop)
}

/// It is the connection of the beginning, and all that was sent has come back, in order.
fn check_talk(lab: &mut SanCluster) -> Result<(), LabError> {
    let whole = format!(
        "pidof nc && lines=$(wc -l < {ECHOED}) && head -n $lines {ECHOED} > /tmp/got && seq $lines | cmp - /tmp/got"
    );
    lab.run(3, &whole).map(drop)
}

fn move_and_look(lab: &mut SanCluster, kind: &str, to: u8) -> Result<(), LabError> {
    let report =
        lab.ctl(1, &format!("vm migrate debian --to node{to} --type {kind} --max-blackout {BLACKOUT}"))?;
    let whole = report["type"] == kind && report["disk_bytes_copied"] == 0;
    check(whole, &format!("a {kind} move that copies no disk"), &report)?;
    let ms = |field: &str| report[field].as_f64().unwrap_or_default();
    lab.say(&format!(
        "a {kind} move to node{to}: {:.0} ms, the guest stood still for {:.0} ms",
        ms("total_ms"),
        ms("blackout_ms")
    ));
    let shown = lab.ctl(1, "vm show debian")?;
    check(
        shown["owner"] == format!("node{to}") && shown["state"] == "running",
        "a VM that runs there",
        &shown,
    )?;
    let before = last(&console(lab)?, "synced");
    until_said(lab, "the guest works on", |said| last(said, "synced") > before)?;
    until_echo(lab)
}

fn add_disk(lab: &mut SanCluster) -> Result<(), LabError> {
    lab.ctl(1, &format!("vhdx create {MOUNT}/extra.vhdx --size 16M"))?;
    lab.ctl(1, &format!("vm disk add debian {MOUNT}/extra.vhdx"))?;
    until_said(lab, "the guest uses a disk that was added", |said| {
        said.contains("guest: extra disk of 32768 sectors holds.")
    })
    .map(drop)
}

/// The node that the guest runs on loses its power: the other one starts it again, with all that it has synced.
fn lose_node(lab: &mut SanCluster) -> Result<(), LabError> {
    let synced = last(&console(lab)?, "synced");
    lab.run(3, "rm /tmp/talk; killall nc; true")?;
    lab.cut_power(2);
    lab.until(1, "vm show debian", "the guest runs again on node1", |vm| {
        vm["state"] == "running" && vm["owner"] == "node1"
    })?;
    let said = until_said(lab, "the guest works again", |said| last(said, "synced").is_some())?;
    check(last(&said, "kept") >= synced, &format!("what was synced in round {synced:?}"), &said.into())?;
    talk(lab)
}

fn end(lab: &mut SanCluster) -> Result<(), LabError> {
    lab.run(3, &format!("rm /tmp/talk; echo | nc {GUEST} 7001"))?;
    lab.until(1, "vm show debian", "the guest has switched itself off", |vm| vm["state"] == "stopped")?;
    lab.ctl(1, &format!("vhdx convert {MOUNT}/root.vhdx /data/after.raw --to raw"))?;
    let judged = lab.run(1, "e2fsck -fn /data/after.raw")?;
    lab.say(&format!("its filesystem is clean: {}", judged.lines().last().unwrap_or_default()));
    lab.check_volume(1)
}

/// What the guest has said since its boot, as far as it is kept.
fn console(lab: &mut SanCluster) -> Result<String, LabError> {
    let said = lab.run(1, &format!("csvctl --connect {SOCKET} vm console debian"))?;
    check(!said.contains("BAD"), "a guest that finds what it has written", &said.as_str().into())?;
    Ok(said)
}

fn until_said(lab: &mut SanCluster, what: &str, wanted: impl Fn(&str) -> bool) -> Result<String, LabError> {
    let begun = std::time::Instant::now();
    loop {
        let said = console(lab)?;
        if wanted(&said) {
            lab.say(what);
            return Ok(said);
        }
        if begun.elapsed() > LIMIT {
            return Err(LabError::new(format!(
                "`{what}` did not happen within {LIMIT:?}; the guest said:\n{said}"
            )));
        }
    }
}

/// The number in the last whole line such as `guest: synced 7.`
fn last(said: &str, word: &str) -> Option<u64> {
    let begin = format!("guest: {word} ");
    let number = |line: &str| line.trim_end().strip_prefix(&begin)?.strip_suffix('.')?.parse().ok();
    said.lines().rev().find_map(number)
}
