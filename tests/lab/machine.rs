//! One emulated machine. To kill its process is to cut its power.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::network::Network;
use crate::serial::Serial;
use crate::tool::{Doing, LabError, run, text};

/// How long a machine may take from its start to the prompt of its init.
const BOOT_WITHIN: Duration = Duration::from_secs(180);
/// What an init says when its shell takes commands.
pub(crate) const READY: &str = "machine-is-ready";

/// What a machine is made of.
#[derive(Debug)]
pub(crate) struct MachineSpec<'a> {
    pub(crate) name: &'a str,
    /// From 1; also the last part of its addresses.
    pub(crate) number: u8,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    /// Words for its init, such as `role=node`.
    pub(crate) words: &'a str,
    /// Raw images: /dev/vda and so on.
    pub(crate) drives: &'a [PathBuf],
}

/// A running machine; killed when dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    process: Child,
    pub(crate) serial: Serial,
}

impl Machine {
    /// Boots a machine whose init ends in a shell on the serial port.
    pub(crate) fn boot(spec: &MachineSpec<'_>, network: &Network, folder: &Path) -> Result<Self, LabError> {
        let tap = network.add_tap(spec.number)?;
        let socket = folder.join(format!("{}.serial", spec.name));
        let mut process = Command::new("qemu-system-x86_64");
        let kernel_log = folder.join(format!("{}.kernel", spec.name));
        process.args(arguments(spec, &tap, &socket, &kernel_log));
        let log =
            std::fs::File::create(folder.join(format!("{}.qemu", spec.name))).doing("making QEMU's log")?;
        let process =
            process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().doing("starting QEMU")?;
        let mut machine = Starting(Some(process));
        let log = folder.join(format!("{}.log", spec.name));
        let serial = Serial::connect(spec.name, &socket, &log, &kernel_log)?;
        serial.wait_for(READY, BOOT_WITHIN)?;
        Ok(Self { process: machine.0.take().expect("just started"), serial })
    }

    /// Stops or continues the whole machine.
    pub(crate) fn signal(&self, signal: &str) -> Result<(), LabError> {
        run("kill", &["-s", signal, &self.process.id().to_string()]).map(drop)
    }

    /// Runs a command in the machine.
    pub(crate) fn run(&mut self, command: &str, limit: Duration) -> Result<String, LabError> {
        self.serial.run(command, limit)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        cut_power(&mut self.process);
    }
}

/// A process whose machine is not there yet.
struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(process) = &mut self.0 {
            cut_power(process);
        }
    }
}

fn cut_power(process: &mut Child) {
    drop(process.kill());
    drop(process.wait());
}

/// TCG with AMD's virtualisation, which gives the machine a KVM of its own.
fn arguments(spec: &MachineSpec<'_>, tap: &str, socket: &Path, kernel_log: &Path) -> Vec<String> {
    let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut arguments =
        words("-M q35 -accel tcg,thread=multi -cpu max,+svm,+npt -display none -monitor none -no-reboot");
    let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    add("-m", spec.memory_mib.to_string());
    add("-smp", spec.cpus.to_string());
    add("-kernel", text(spec.kernel).to_owned());
    add("-initrd", text(spec.initrd).to_owned());
    // A kernel that measures its timer against loops finds fault with one that waits for a processor of the host.
    // It has a port of its own, so that its words do not get into what a command says.
    let kernel = "console=ttyS1 panic=-1 quiet no_timer_check";
    add("-append", format!("{kernel} number={} {}", spec.number, spec.words));
    add("-serial", format!("unix:{},server=on,wait=off", text(socket)));
    add("-serial", format!("file:{}", text(kernel_log)));
    add("-netdev", format!("tap,id=net,ifname={tap},script=no,downscript=no"));
    add("-device", format!("virtio-net-pci,netdev=net,mac=52:54:00:00:00:{:02x}", spec.number));
    for drive in spec.drives {
        add("-drive", format!("file={},format=raw,if=virtio,cache=unsafe", text(drive)));
    }
    arguments
}
