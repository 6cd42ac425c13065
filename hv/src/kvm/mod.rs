//! The only place that talks to KVM: the VM with its in-kernel chips, interrupt lines and notifications.
//!
//! ```text
//!   device --eventfd--> irqfd --> PIC / IOAPIC --> local APIC --> vCPU
//!   vCPU --write to a notify register--> ioeventfd --eventfd--> device's worker
//! ```
#![expect(
    unsafe_code,
    reason = "KVM maps memory of this process into a guest, and its structures hold unions"
)]

pub mod calls;
pub(crate) mod chips;
pub(crate) mod cpuid;
mod dirty;
pub(crate) mod msr;
pub(crate) mod processor;

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::Interrupt;
use crate::memory::GuestRam;

/// Three pages that Intel processors need to run real mode, and one for its page table: inside the hole, above devices.
const TSS_START: usize = 0xfffb_d000;
const IDENTITY_MAP_START: u64 = 0xfffb_c000;

/// A call to KVM failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("KVM: {what} failed: {cause}")]
pub struct KvmError {
    /// What was tried.
    pub what: String,
    /// What the kernel said.
    pub cause: errno::Error,
}

/// Names what was tried when a call fails.
pub(crate) trait Tried<T> {
    fn tried(self, what: &str) -> Result<T, KvmError>;
}

impl<T> Tried<T> for Result<T, errno::Error> {
    fn tried(self, what: &str) -> Result<T, KvmError> {
        self.map_err(|cause| KvmError { what: what.into(), cause })
    }
}

impl<T> Tried<T> for std::io::Result<T> {
    fn tried(self, what: &str) -> Result<T, KvmError> {
        self.map_err(|error| KvmError {
            what: what.into(),
            cause: errno::Error::new(error.raw_os_error().unwrap_or(libc::EIO)),
        })
    }
}

/// What the host's KVM can do beyond what every VM needs. Compared before a VM is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostCaps {
    /// Version of the interface.
    pub api_version: i32,
    /// Bytes of the extended processor state.
    pub xsave_bytes: usize,
    /// Whether a guest may have another TSC rate than the host.
    pub tsc_control: bool,
    /// Whether the guest's clock can be advanced by the wall-clock time that has passed.
    pub clock_realtime: bool,
    /// Whether dirty pages can be cleared piece by piece.
    pub manual_dirty_log: bool,
}

/// Bytes of the classic extended state, what every host has.
pub(crate) const XSAVE_BYTES_MIN: usize = 4096;

impl HostCaps {
    /// Asks the host.
    ///
    /// # Errors
    /// When `/dev/kvm` is missing or may not be opened.
    pub fn probe() -> Result<Self, KvmError> {
        let kvm = open()?;
        let xsave2 = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            api_version: kvm.get_api_version(),
            xsave_bytes: xsave2.max(XSAVE_BYTES_MIN),
            tsc_control: kvm.check_extension(Cap::TscControl),
            clock_realtime: kvm.check_extension_int(Cap::AdjustClock) & 4 != 0,
            manual_dirty_log: kvm.check_extension_raw(MANUAL_DIRTY_LOG) != 0,
        })
    }
}

/// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`, which the library has no name for.
const MANUAL_DIRTY_LOG: u64 = 168;

/// `/dev/kvm`, for processes that later cannot open it any more.
static KEPT: OnceLock<OwnedFd> = OnceLock::new();

/// Opens `/dev/kvm` and keeps it: from here on VMs are made without looking for it.
///
/// # Errors
/// When it cannot be opened.
pub fn keep_kvm_open() -> Result<(), KvmError> {
    let opened = Kvm::open_with_cloexec(true).tried("opening /dev/kvm")?;
    // SAFETY: the call has just made this descriptor for us alone.
    let kept = unsafe { OwnedFd::from_raw_fd(opened) };
    // Whoever was first has kept the same device.
    let _ = KEPT.set(kept);
    Ok(())
}

fn open() -> Result<Kvm, KvmError> {
    let Some(kept) = KEPT.get() else { return Kvm::new().tried("opening /dev/kvm") };
    let handle = kept.try_clone().map_err(|error| errno::Error::new(error.raw_os_error().unwrap_or(0)));
    let handle = handle.tried("sharing /dev/kvm")?;
    // SAFETY: a descriptor of /dev/kvm that nobody else owns.
    Ok(unsafe { Kvm::from_raw_fd(handle.into_raw_fd()) })
}

/// An interrupt line of the in-kernel chips.
#[derive(Debug)]
struct Line {
    number: u32,
    event: EventFd,
}

impl Interrupt for Line {
    fn trigger(&self) {
        // Fails only when the counter would overflow: then an interrupt is pending anyway.
        drop(self.event.write(1));
    }
}

/// One VM of the kernel. Ended when dropped, after its vCPUs.
#[derive(Debug)]
pub(crate) struct Machine {
    kvm: Kvm,
    vm: VmFd,
    /// Protects the list; not used on any hot path.
    lines: Mutex<Vec<Arc<Line>>>,
    ram: GuestRam,
    /// Whether the log of written pages is cleared piece by piece, or as a whole whenever it is read.
    clears_by_pieces: bool,
}

impl Machine {
    /// A VM with its RAM and chips, without vCPUs.
    pub(crate) fn new(ram: GuestRam) -> Result<Self, KvmError> {
        let kvm = open()?;
        let vm = kvm.create_vm().tried("creating a VM")?;
        vm.set_identity_map_address(IDENTITY_MAP_START).tried("placing the identity map")?;
        vm.set_tss_address(TSS_START).tried("placing the TSS")?;
        vm.create_irq_chip().tried("creating the interrupt chips")?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).tried("creating the PIT")?;
        for (slot, region) in (0..).zip(ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.start,
                memory_size: region.bytes,
                userspace_addr: region.host,
                flags: 0,
            };
            // SAFETY: the range is a mapping of exactly that size, which `ram` keeps as long as the VM lives.
            unsafe { vm.set_user_memory_region(region) }.tried("giving RAM to the VM")?;
        }
        let mut machine = Self { kvm, vm, lines: Mutex::default(), ram, clears_by_pieces: false };
        machine.clears_by_pieces = machine.clear_log_by_pieces()?;
        Ok(machine)
    }

    /// An interrupt line that any thread may raise.
    pub(crate) fn line(&self, number: u32) -> Result<Arc<dyn Interrupt>, KvmError> {
        let event = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).tried("making an eventfd")?;
        self.vm.register_irqfd(&event, number).tried("connecting an interrupt line")?;
        let line = Arc::new(Line { number, event });
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&line));
        Ok(line)
    }

    /// Makes a write to `address` wake whoever reads `event`, without leaving the kernel.
    pub(crate) fn notify_on_write(&self, address: u64, event: &EventFd) -> Result<(), KvmError> {
        self.vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .tried("connecting a notify register")
    }

    /// Carries every raised interrupt into the chips. KVM injects them from a work queue; taking a line off waits for
    /// that queue, so afterwards the chips' state is complete. Nobody may raise a line meanwhile.
    pub(crate) fn settle_lines(&self) -> Result<(), KvmError> {
        for line in self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            self.vm.unregister_irqfd(&line.event, line.number).tried("settling an interrupt line")?;
            self.vm.register_irqfd(&line.event, line.number).tried("reconnecting an interrupt line")?;
        }
        Ok(())
    }

    pub(crate) fn create_vcpu(&self, id: u64) -> Result<VcpuFd, KvmError> {
        self.vm.create_vcpu(id).tried("creating a vCPU")
    }
}
