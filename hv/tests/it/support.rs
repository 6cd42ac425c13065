//! A VM with the sector-writer and its disks in memory, and waiting for what it says.

use std::sync::Arc;
use std::time::Duration;

use blockio::{BlockDevice, MemoryDevice};
use hv::{BootSource, DEVICES_VERSION, DiskConfig, Firmware, RunState, Vm, VmConfig};
use hv_guest::{Ack, Layout, Report};

pub(crate) const RAM_BYTES: u64 = 16 << 20;
pub(crate) const LAYOUT: Layout = Layout { range: 256, sectors: 8, seed: 7 };
pub(crate) const CMDLINE: &str =
    "verify=0 write=1 range=256 batch=8 ack=1 pages=64 pace=1 span=64 seed=7 gen=1";
/// Far longer than anything here takes; only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(60);

/// False, with a line that says so, where there is no KVM.
pub(crate) fn kvm_is_here() -> bool {
    let here = std::path::Path::new("/dev/kvm").exists();
    if !here {
        println!("skipped: /dev/kvm is missing");
    }
    here
}

pub(crate) struct Disks {
    pub(crate) source: Arc<MemoryDevice>,
    pub(crate) scratch: Arc<MemoryDevice>,
}

impl Disks {
    pub(crate) fn new() -> Self {
        let source = MemoryDevice::new(1 << 20);
        let content: Vec<u8> =
            (0..64_u32 << 10).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        source.write_at(0, &content).unwrap();
        Self { source: Arc::new(source), scratch: Arc::new(MemoryDevice::new(LAYOUT.range * 4096)) }
    }

    pub(crate) fn configs(&self, attached: bool) -> Vec<DiskConfig> {
        let config = |slot, device: &Arc<MemoryDevice>, read_only, serial: &str| DiskConfig {
            slot,
            device: attached.then(|| Arc::clone(device) as Arc<dyn BlockDevice>),
            read_only,
            serial: serial.into(),
        };
        vec![config(0, &self.source, true, "source"), config(1, &self.scratch, false, "scratch")]
    }

    pub(crate) fn attach_to(&self, vm: &Vm) {
        vm.attach_disk(0, self.source.clone()).unwrap();
        vm.attach_disk(1, self.scratch.clone()).unwrap();
    }

    pub(crate) fn verify(&self, acked: Ack) -> Report {
        let mut image = vec![0; usize::try_from(self.scratch.geometry().size_bytes).unwrap()];
        self.scratch.read_at(0, &mut image).unwrap();
        hv_guest::verify_image(&image[..], LAYOUT, acked).unwrap()
    }
}

/// A VM without disks whose guest has been started in the role that `cmdline` names.
pub(crate) fn in_role(cmdline: &str, memory_bytes: u64) -> Vm {
    let boot = BootSource { kernel: hv_guest::IMAGE, initrd: None, cmdline, firmware: Firmware::CommandLine };
    let boot = Some(boot);
    let config = VmConfig {
        memory_bytes,
        cpus: 1,
        boot,
        disks: vec![],
        net: None,
        console_bytes: 1 << 18,
        devices: DEVICES_VERSION,
    };
    let vm = Vm::build(config).unwrap();
    vm.resume().unwrap();
    vm
}

pub(crate) fn writer(disks: Vec<DiskConfig>) -> Vm {
    let boot = BootSource {
        kernel: hv_guest::SECTOR_WRITER,
        initrd: None,
        cmdline: CMDLINE,
        firmware: Firmware::CommandLine,
    };
    Vm::build(VmConfig {
        memory_bytes: RAM_BYTES,
        cpus: 1,
        boot: Some(boot),
        disks,
        net: None,
        console_bytes: 1 << 20,
        devices: DEVICES_VERSION,
    })
    .unwrap()
}

/// A VM without a kernel, for a state to be restored into.
pub(crate) fn empty(disks: Vec<DiskConfig>) -> Vm {
    empty_with(RAM_BYTES, 1, disks)
}

pub(crate) fn empty_with(memory_bytes: u64, cpus: u32, disks: Vec<DiskConfig>) -> Vm {
    Vm::build(VmConfig {
        memory_bytes,
        cpus,
        boot: None,
        disks,
        net: None,
        console_bytes: 1 << 20,
        devices: DEVICES_VERSION,
    })
    .unwrap()
}

pub(crate) fn text(vm: &Vm) -> String {
    String::from_utf8_lossy(&vm.console().read(0, usize::MAX).data).into_owned()
}

/// Waits until the console fulfils `until`; fails when the guest fails or ends.
pub(crate) fn wait_console(vm: &Vm, what: &str, until: impl Fn(&str) -> bool) {
    loop {
        let before = vm.console().end();
        let said = text(vm);
        assert!(!said.contains("FAIL"), "the guest failed:\n{said}");
        if until(&said) {
            return;
        }
        assert_eq!(vm.run_state(), RunState::Running, "the guest ended before {what}:\n{said}");
        let more = vm.console().read_waiting(before, 1, LIMIT);
        assert!(
            !more.data.is_empty() || vm.console().is_closed(),
            "nothing was said while waiting for {what}:\n{said}"
        );
    }
}

/// Waits until the guest has acknowledged more than `sequence`.
pub(crate) fn wait_ack_beyond(vm: &Vm, sequence: u64) -> Ack {
    wait_console(vm, "an acknowledgement", |said| acked(said).is_some_and(|ack| ack.sequence > sequence));
    acked(&text(vm)).unwrap()
}

fn acked(said: &str) -> Option<Ack> {
    hv_guest::last_ack(said.as_bytes())
}
