//! One virtual machine on KVM: vCPUs, RAM in a memfd, the kernel's interrupt chips, a serial console and virtio disks.
//!
//! ```text
//!   Vm --- vcpus (threads: KVM_RUN) --- bus --- serial --> Console (bounded ring)
//!    |                                    \---- virtio::mmio -- block::Disk (worker thread) --> dyn BlockDevice
//!    |--- kvm::Machine (chips, interrupt lines, notifications)
//!    \--- state (versioned messages)    snapshot (RAM and state in one file)
//! ```
//! What is behind a disk is not known here: any [`blockio::BlockDevice`] will do.

mod board;
pub mod boot;
mod console;
pub mod cpu;
mod devices;
mod dirty;
mod kvm;
mod lazy;
mod memory;
pub mod snapshot;
pub mod state;
mod throttle;
mod vcpu;
mod vcpus;
mod vm;

pub use board::NetConfig;
pub use boot::{BootError, BootSource, Firmware};
pub use console::{Console, ConsoleText};
pub use cpu::{Cpu, CpuProblem};
pub use devices::virtio::DEVICES_VERSION;
pub use devices::virtio::balloon::{BalloonStatus, MemoryFigures};
pub use devices::virtio::block::{DiskStats, SlotError};
pub use devices::virtio::driven::{
    DriveError, DriverCounts, DriverRequest, DriverSetup, Telling, drive_disk,
};
pub use devices::virtio::driven_net::{NetCounts, NetTask, drive_net};
pub use devices::virtio::limiter::DiskLimits;
pub use devices::virtio::offload::OFFLOADS_ALL;
pub use devices::virtio::queue::DrainTimeout;
pub use dirty::CHUNK_ALIGNMENT_PAGES;
pub use kvm::{HostCaps, KvmError, calls, keep_kvm_open};
pub use lazy::{LazyError, LazyRam, Userfault, fault_calls};
pub use memory::{GuestRam, MemoryError, PAGE_BYTES};
pub use vm::{DiskConfig, GuestEnd, Processor, RunState, Vm, VmConfig, VmError, balloon_bytes_max};

/// Disks of one VM: each has a virtio-mmio slot and an interrupt line of its own.
pub const DISKS_MAX: usize = 8;

/// Processors of one VM: what the interrupt chips can address by number.
pub const CPUS_MAX: u32 = 64;

/// Messages of the control socket of an hv process.
pub mod control {
    #![expect(missing_docs, reason = "generated messages; their documentation is in proto/hv.proto")]
    #![expect(clippy::module_inception, reason = "the generator names a module after the message Control")]
    include!(concat!(env!("OUT_DIR"), "/hv.rs"));
}
