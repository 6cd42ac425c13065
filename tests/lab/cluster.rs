//! A cluster of emulated machines on the emulated SAN, and what can be done to it.
//!
//! ```text
//!   node1 .. nodeN --10.77.0.x--> each other        unplug: cut off from everything
//!                  --10.78.0.x--> SAN               lose_path: cut off from the LUN alone
//! ```

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::kernel::Kernel;
use crate::machine::Machine;
use crate::network::Network;
use crate::node::{Extra, Node};
use crate::san::{ADDRESS, STORAGE_NET, Storage};
use crate::tool::{Doing, LabError};

/// How long something may take that the cluster does by itself.
pub(crate) const LIMIT: Duration = Duration::from_secs(240);
pub(crate) const SOCKET: &str = "/data/n/csvd.sock";
pub(crate) const MOUNT: &str = "/data/n/mnt/vol1";
/// The file that nodes write in turn. Its folder is on the volume alone: a program that goes on while a daemon begins anew must not
/// find a place for it below the mount.
pub(crate) const CONTESTED: &str = "/data/n/mnt/vol1/shared/contested";
/// MiB and processors of a node: more processors than the host has wait for each other in vain.
const SIZE: (u32, u32) = (768, 1);
const DATA_MIB: u64 = 256;
const MODULES: &[&str] = &["sd_mod", "iscsi_tcp", "sg"];
const PROGRAMS: &[&str] = &["/usr/sbin/iscsid", "/usr/bin/iscsiadm"];
/// Blocks of a file that nodes write in turn.
pub(crate) const BLOCKS: usize = 64;
/// A block of the LUN that holds nothing and is nobody's (csvfs/FORMAT.md): in the half of the heartbeat area where
/// `cluster validate` tries things out, behind the blocks of all nodes.
const SPARE_BLOCK: u64 = (3 << 20 | 1 << 19) / 4096 + 65;

/// An I/O error comes after so many seconds without the SAN, so that the cluster and not the kernel decides what then.
fn iscsid_conf(without_san_s: u32) -> String {
    format!(
        "node.startup = manual
node.session.timeo.replacement_timeout = {without_san_s}
node.conn[0].timeo.login_timeout = 15
node.conn[0].timeo.logout_timeout = 15
node.conn[0].timeo.noop_out_interval = 2
node.conn[0].timeo.noop_out_timeout = {without_san_s}
node.session.err_timeo.abort_timeout = 5
node.session.err_timeo.lu_reset_timeout = 5
node.session.err_timeo.tgt_reset_timeout = 5
node.session.initial_login_retry_max = 100
node.session.auth.authmethod = None
"
    )
}

fn login() -> String {
    format!(
        "ip addr add {STORAGE_NET}.$(word number)/24 dev eth0
mkdir -p /etc/iscsi /var/lib/iscsi /run/lock/iscsi /var/lock /run/initiatorname
echo InitiatorName=iqn.2026-11.lab:node$(word number) > /etc/iscsi/initiatorname.iscsi
"
    )
}

/// What the nodes of a scenario are made of, beside what every cluster needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kit<'a> {
    /// MiB and processors.
    pub(crate) size: (u32, u32),
    pub(crate) programs: &'a [&'a str],
    /// Lines of the init, run once the network is up.
    pub(crate) init: &'a str,
    /// What lies below `/data`.
    pub(crate) content: Option<&'a Path>,
    /// Whether they run guests.
    pub(crate) guests: bool,
    /// Base of the cluster's times: machines in emulation on two processors are some times slower than real ones.
    pub(crate) base_ms: u32,
    pub(crate) without_san_s: u32,
}

impl Kit<'_> {
    pub(crate) const PLAIN: Self = Self {
        size: SIZE,
        programs: &[],
        init: "",
        content: None,
        guests: false,
        base_ms: 400,
        without_san_s: 3,
    };

    /// For a debug build on a machine that may be busy: nobody is taken for dead who is only slow.
    pub(crate) const PATIENT: Self = Self { base_ms: 1000, without_san_s: 20, ..Self::PLAIN };
}

/// The cluster. Everything goes when it is dropped.
pub(crate) struct SanCluster {
    /// Declared in the order in which they must go.
    pub(crate) nodes: Vec<Option<Node>>,
    pub(crate) san: Option<Machine>,
    pub(crate) storage: Storage,
    network: Network,
    kernel: Kernel,
    initrd: PathBuf,
    folder: PathBuf,
    size: (u32, u32),
    base_ms: u32,
    started: Instant,
}

impl SanCluster {
    /// Boots a SAN and `count` nodes, forms a cluster, makes a volume on the LUN, and waits until all have mounted it.
    pub(crate) fn start(folder: &Path, count: u8) -> Result<Self, LabError> {
        let mut lab = Self::machines(folder, count, &Kit::PLAIN)?;
        for number in 1..=count {
            lab.log_in(number)?;
        }
        lab.found()?;
        for number in 2..=count {
            lab.join(number, "")?;
        }
        lab.make_volume(count)?;
        Ok(lab)
    }

    /// Boots a SAN, two nodes that have a volume on its LUN, and a witness that never logs in to it, as node 3.
    pub(crate) fn start_with_witness(folder: &Path, kit: &Kit<'_>) -> Result<Self, LabError> {
        let mut lab = Self::machines(folder, 3, kit)?;
        lab.log_in(1)?;
        lab.log_in(2)?;
        lab.found()?;
        lab.join(2, "")?;
        lab.join(3, "--witness")?;
        lab.make_volume(2)?;
        Ok(lab)
    }

    /// Boots a SAN and two nodes that have a volume on its LUN. The witness is a second daemon on the machine of node 1, which
    /// is the one that a scenario leaves alone.
    pub(crate) fn start_small(folder: &Path) -> Result<Self, LabError> {
        let mut lab = Self::machines(folder, 2, &Kit::PATIENT)?;
        lab.log_in(1)?;
        lab.log_in(2)?;
        lab.found()?;
        lab.join(2, "")?;
        lab.join_as(1, "witness", "--listen 10.77.0.1:7401 --dir /data/w --witness")?;
        lab.make_volume(2)?;
        Ok(lab)
    }

    /// Machines that run, without a cluster.
    fn machines(folder: &Path, count: u8, kit: &Kit<'_>) -> Result<Self, LabError> {
        let started = Instant::now();
        let kernel = Kernel::get(&crate::scenarios::cache()?)?;
        let extra = Extra {
            modules: MODULES,
            programs: &[PROGRAMS, kit.programs].concat(),
            files: &[
                ("etc/iscsi/iscsid.conf", &iscsid_conf(kit.without_san_s)),
                ("etc/passwd", "root:x:0:0:root:/:/bin/sh\n"),
            ],
            init: &(login() + kit.init),
            guests: kit.guests,
        };
        let initrd = Node::pack(&kernel, folder, "san-node", &extra)?;
        let storage = Storage::make(&kernel, folder)?;
        let network = Network::new()?;
        let empty = folder.join("empty");
        std::fs::create_dir_all(&empty).doing("making a folder")?;
        let (san, nodes) = std::thread::scope(|scope| {
            let san = scope.spawn(|| storage.boot(&kernel, &network, folder, false));
            let boot = |number| {
                let (kernel, network, initrd, content) =
                    (&kernel, &network, &initrd, kit.content.unwrap_or(&empty));
                scope.spawn(move || {
                    Node::make_drive(folder, number, DATA_MIB, content)?;
                    Node::boot_from(kernel, network, folder, number, initrd, kit.size)
                })
            };
            let booting: Vec<_> = (1..=count).map(boot).collect();
            let joined = |machine: std::thread::ScopedJoinHandle<'_, Result<Node, LabError>>| {
                machine.join().expect("booting does not panic")
            };
            let nodes: Result<Vec<_>, _> = booting.into_iter().map(joined).collect();
            (san.join().expect("booting does not panic"), nodes)
        });
        let (san, nodes) = (Some(san?), nodes?.into_iter().map(Some).collect());
        let folder = folder.to_owned();
        let (size, base_ms) = (kit.size, kit.base_ms);
        let lab = Self { nodes, san, storage, network, kernel, initrd, folder, size, base_ms, started };
        lab.say("the machines are up");
        Ok(lab)
    }

    pub(crate) fn say(&self, what: &str) {
        println!("lab: {:5.1} s  {what}", self.started.elapsed().as_secs_f64());
    }

    /// A node that runs, by its number from 1.
    pub(crate) fn node(&mut self, number: u8) -> &mut Node {
        self.nodes[usize::from(number) - 1].as_mut().expect("a node that runs")
    }

    pub(crate) fn run(&mut self, number: u8, command: &str) -> Result<String, LabError> {
        self.node(number).machine.run(command, LIMIT)
    }

    /// `csvctl` on a node that has a daemon.
    pub(crate) fn ctl(&mut self, number: u8, command: &str) -> Result<Value, LabError> {
        self.node(number).ctl(SOCKET, command)
    }

    /// Logs in to the SAN; the LUN is /dev/sda then.
    fn log_in(&mut self, number: u8) -> Result<(), LabError> {
        self.run(
            number,
            &format!(
                "iscsid && iscsiadm -m discovery -t sendtargets -p {ADDRESS}:3260 && iscsiadm -m node -l && \
                 for turn in $(seq 300); do [ -b /dev/sda ] && break; sleep 0.1; done; [ -b /dev/sda ]"
            ),
        )
        .map(drop)
    }

    fn found(&mut self) -> Result<(), LabError> {
        let base_ms = self.base_ms;
        self.node(1).ctl(
            "",
            &format!("cluster create --name lab --node node1 --listen 10.77.0.1:7400 --dir /data/n --base-ms {base_ms}"),
        )?;
        self.say("the cluster is founded");
        Ok(())
    }

    fn join(&mut self, number: u8, options: &str) -> Result<(), LabError> {
        let place = format!("--listen 10.77.0.{number}:7400 --dir /data/n {options}");
        self.join_as(number, &format!("node{number}"), &place)
    }

    /// Starts a daemon on machine `number` that joins as `name`.
    fn join_as(&mut self, number: u8, name: &str, options: &str) -> Result<(), LabError> {
        let token = self.ctl(1, "cluster token")?;
        let token =
            token["token"].as_str().ok_or_else(|| LabError::new("cluster token gave none"))?.to_owned();
        self.node(number).ctl("", &format!("node join --token {token} --node {name} {options}"))?;
        self.until(1, "cluster show", &format!("{name} votes"), |shown| {
            let nodes = shown["nodes"].as_array().cloned().unwrap_or_default();
            nodes.iter().any(|node| node["name"] == name && node["voter"] == true)
        })
        .map(drop)
    }

    fn make_volume(&mut self, count: u8) -> Result<(), LabError> {
        let made = self.ctl(1, "volume create vol1 --lun /dev/sda")?;
        check(made["fence"] == "reservation", "a SAN's LUN is fenced by reservations", &made)?;
        for number in 1..=count {
            self.ctl(number, "cluster wait --volume vol1 --timeout 200")?;
        }
        self.run(1, &format!("mkdir {MOUNT}/shared"))?;
        self.say("the volume is mounted everywhere");
        Ok(())
    }

    /// Asks until the answer is as wanted; each question takes its time in emulation, so there is no pause in between.
    pub(crate) fn until(
        &mut self,
        number: u8,
        question: &str,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value, LabError> {
        let begun = Instant::now();
        loop {
            let answer = self.ctl(number, question)?;
            if wanted(&answer) {
                self.say(what);
                return Ok(answer);
            }
            if begun.elapsed() > LIMIT {
                return Err(LabError::new(format!("`{what}` did not happen within {LIMIT:?}: {answer}")));
            }
        }
    }

    /// Waits until the records hold a node for this.
    pub(crate) fn until_node(&mut self, asked: u8, number: u8, state: &str) -> Result<(), LabError> {
        let name = format!("node{number}");
        self.until(asked, "node list", &format!("{name} is {state}"), |list| {
            let nodes = list["nodes"].as_array().cloned().unwrap_or_default();
            nodes.iter().any(|node| node["name"] == name.as_str() && node["state"] == state)
        })
        .map(drop)
    }

    /// Waits until so many nodes reach the LUN themselves.
    pub(crate) fn until_direct(&mut self, asked: u8, count: usize) -> Result<(), LabError> {
        self.until(asked, "volume state vol1", &format!("{count} nodes reach the LUN again"), |rows| {
            let rows = rows["states"].as_array().cloned().unwrap_or_default();
            rows.iter().filter(|row| row["state"] == "direct").count() == count
        })
        .map(drop)
    }

    /// Waits until a node that was fenced although it lives has come back by itself, as a later incarnation.
    pub(crate) fn until_anew(&mut self, asked: u8, number: u8) -> Result<(), LabError> {
        let what = format!("node{number} has begun anew");
        self.until(asked, &format!("node show node{number}"), &what, |node| {
            node["state"] == "up" && node["epoch"].as_u64() > Some(1)
        })
        .map(drop)
    }

    /// Waits until the daemon of a node has begun anew by itself. It answers nobody in between.
    pub(crate) fn until_itself_anew(&mut self, number: u8) -> Result<(), LabError> {
        let shown = format!("csvctl --connect {SOCKET} --json node show node{number} 2>/dev/null");
        let anew = format!("{shown} | grep '\"state\":\"up\"' | grep -q '\"epoch\":[2-9]'");
        let wait = format!("for turn in $(seq 400); do {anew} && break; sleep 0.1; done; {anew}");
        self.run(number, &wait)?;
        self.say(&format!("node{number} has begun anew by itself"));
        Ok(())
    }

    /// All events, as text.
    pub(crate) fn events(&mut self, number: u8) -> Result<String, LabError> {
        self.ctl(number, "events").map(|events| events.to_string())
    }

    /// Fills the contested file with blocks that begin with `mark`.
    pub(crate) fn write(&mut self, number: u8, mark: &str) -> Result<(), LabError> {
        let make = make_blocks(mark);
        let write = format!(
            "{make} && dd if=/tmp/{mark} of={CONTESTED} bs=4096 count={BLOCKS} conv=notrunc,fsync 2>/dev/null"
        );
        self.run(number, &write).map(drop)
    }

    /// The contested file holds such blocks, and nothing else.
    pub(crate) fn check_content(&mut self, number: u8, mark: &str) -> Result<(), LabError> {
        let make = make_blocks(mark);
        self.run(number, &format!("{make} && cmp /tmp/{mark} {CONTESTED}")).map(drop)
    }

    /// A program that writes such blocks until it is refused; then there is a file /tmp/refused.
    pub(crate) fn write_for_ever(&mut self, number: u8, mark: &str) -> Result<(), LabError> {
        let make = make_blocks(mark);
        let one = format!("dd if=/tmp/{mark} of={CONTESTED} bs=4096 count={BLOCKS} conv=notrunc");
        let script = format!(
            "{make}; {{ (while {one} 2>/tmp/why; do echo >> /tmp/rounds; done; touch /tmp/refused) > /dev/null 2>&1 & }}"
        );
        self.run(number, &format!("rm -f /tmp/rounds /tmp/refused; {script}")).map(drop)
    }

    /// How often it has written them all.
    pub(crate) fn rounds(&mut self, number: u8) -> Result<u64, LabError> {
        let said = self.run(number, "cat /tmp/rounds 2>/dev/null | wc -l")?;
        said.trim().parse().doing(format_args!("counting rounds in {said:?}"))
    }

    /// Waits until it has written so many more.
    pub(crate) fn until_rounds(&mut self, number: u8, more: u64) -> Result<(), LabError> {
        let wanted = self.rounds(number)? + more;
        let look = format!(
            "for turn in $(seq 2000); do [ $(cat /tmp/rounds 2>/dev/null | wc -l) -ge {wanted} ] && break; [ -e /tmp/refused ] && cat /tmp/why && break; sleep 0.1; done; [ $(cat /tmp/rounds | wc -l) -ge {wanted} ]"
        );
        self.run(number, &look).map(drop)
    }

    pub(crate) fn check_lun(&self, mark: &str, blocks: usize) -> Result<(), LabError> {
        let found = self.storage.blocks_with(mark)?;
        check(found == blocks, &format!("{blocks} blocks of {mark} on the LUN"), &found.into())
    }

    pub(crate) fn check_volume(&mut self, number: u8) -> Result<(), LabError> {
        let report = self.ctl(number, "volume check vol1")?;
        check(report["problems"].as_array().is_some_and(Vec::is_empty), "a volume without problems", &report)
    }

    /// A hang of the whole machine, and its end.
    pub(crate) fn freeze(&mut self, number: u8) -> Result<(), LabError> {
        self.say(&format!("node{number} is stopped in its tracks"));
        self.node(number).machine.signal("STOP")
    }

    pub(crate) fn thaw(&mut self, number: u8) -> Result<(), LabError> {
        self.say(&format!("node{number} goes on"));
        self.node(number).machine.signal("CONT")
    }

    /// A hang of the daemon alone: its machine, and whoever writes on the mount, go on.
    pub(crate) fn stop_daemon(&mut self, number: u8) -> Result<(), LabError> {
        self.say(&format!("the daemon of node{number} is stopped"));
        self.run(number, "kill -STOP $(pidof csvd)").map(drop)
    }

    pub(crate) fn continue_daemon(&mut self, number: u8) -> Result<(), LabError> {
        self.say(&format!("the daemon of node{number} goes on"));
        self.run(number, "kill -CONT $(pidof csvd)").map(drop)
    }

    /// The LUN itself takes a write of this machine, whoever asks for it there.
    pub(crate) fn check_taken_by_lun(&mut self, number: u8) -> Result<(), LabError> {
        let said = self.write_past_daemon(number)?;
        check(said.contains("landed"), &format!("a write of node{number} that the LUN takes"), &said.into())
    }

    /// The LUN itself refuses the writes of this machine, whoever asks for them there (A2). Call it while the daemon is stopped:
    /// it would come back as the next incarnation, with a key.
    pub(crate) fn check_refused_by_lun(&mut self, number: u8) -> Result<(), LabError> {
        let said = self.write_past_daemon(number)?;
        let refused = said.contains("Invalid exchange") && !said.contains("landed");
        check(refused, &format!("a reservation conflict for a write of node{number}"), &said.into())?;
        self.say(&format!("the LUN refuses what node{number} writes"));
        Ok(())
    }

    /// A write to the LUN without the cluster's programs, once a read shows that there is a path. Says what came of it.
    fn write_past_daemon(&mut self, number: u8) -> Result<String, LabError> {
        let read = "dd if=/dev/sda of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null";
        let write = format!(
            "dd if=/dev/zero of=/dev/sda bs=4096 seek={SPARE_BLOCK} count=1 oflag=direct conv=notrunc 2>&1 && echo landed"
        );
        self.run(
            number,
            &format!(
                "for turn in $(seq 600); do {read} && break; sleep 0.1; done; {read} && {{ {write}; true; }}"
            ),
        )
    }

    /// Pulls the network cable, or plugs it in.
    pub(crate) fn plug(&self, number: u8, plugged: bool) -> Result<(), LabError> {
        self.say(&format!("node{number}: cable {}", if plugged { "plugged in" } else { "pulled" }));
        self.network.set_link(number, plugged)
    }

    /// Cuts the way to the SAN alone, or mends it.
    pub(crate) fn set_path(&mut self, number: u8, there: bool) -> Result<(), LabError> {
        self.say(&format!("node{number}: path to the SAN {}", if there { "mended" } else { "cut" }));
        let action = if there { "add" } else { "del" };
        self.run(number, &format!("ip addr {action} {STORAGE_NET}.{number}/24 dev eth0")).map(drop)
    }

    pub(crate) fn cut_power(&mut self, number: u8) {
        self.say(&format!("node{number}: power cut"));
        self.nodes[usize::from(number) - 1] = None;
        self.network.remove_tap(number);
    }

    pub(crate) fn cut_power_of_san(&mut self) {
        self.say("the SAN: power cut");
        self.san = None;
        self.network.remove_tap(9);
    }

    pub(crate) fn boot_san(&mut self) -> Result<(), LabError> {
        self.boot_san_that(false)
    }

    /// The SAN comes back without a registration and without a reservation: it has kept none, or lost what it had kept.
    pub(crate) fn boot_san_that_forgets(&mut self) -> Result<(), LabError> {
        self.boot_san_that(true)
    }

    fn boot_san_that(&mut self, forgets: bool) -> Result<(), LabError> {
        self.san = Some(self.storage.boot(&self.kernel, &self.network, &self.folder, forgets)?);
        self.say(if forgets { "the SAN is back, without any key" } else { "the SAN is back" });
        Ok(())
    }

    /// Boots a node that has lost its power, with the daemon that it had.
    pub(crate) fn boot(&mut self, number: u8) -> Result<(), LabError> {
        let node =
            Node::boot_from(&self.kernel, &self.network, &self.folder, number, &self.initrd, self.size)?;
        self.nodes[usize::from(number) - 1] = Some(node);
        self.log_in(number)?;
        self.start_daemon(number)
    }

    /// Starts the daemon of a node that has ended.
    pub(crate) fn start_daemon(&mut self, number: u8) -> Result<(), LabError> {
        let start = "umount -l /data/n/mnt/vol1 2>/dev/null; setsid csvd --config /data/n/csvd.toml > /dev/null 2>&1 < /dev/null & \
                     for turn in $(seq 600); do [ -S /data/n/csvd.sock ] && break; sleep 0.1; done; [ -S /data/n/csvd.sock ]";
        self.run(number, &format!("rm -f /data/n/csvd.sock; {start}")).map(drop)
    }

    /// Waits until all nodes are up and have the volume.
    pub(crate) fn until_whole(&mut self, numbers: &[u8]) -> Result<(), LabError> {
        for number in numbers {
            let wait = format!("cluster wait --nodes {} --volume vol1 --timeout 200", numbers.len());
            self.ctl(*number, &wait)?;
        }
        self.say("the cluster is whole");
        Ok(())
    }
}

/// Makes /tmp/MARK: blocks that begin with the mark.
fn make_blocks(mark: &str) -> String {
    format!(
        "[ -f /tmp/{mark} ] || {{ for turn in $(seq {BLOCKS}); do (printf {mark}; cat /dev/zero) | head -c 4096; done > /tmp/{mark}; }}"
    )
}

/// What a scenario claims.
pub(crate) fn check(holds: bool, claim: &str, found: &Value) -> Result<(), LabError> {
    if holds { Ok(()) } else { Err(LabError::new(format!("not found: {claim}; found {found}"))) }
}
