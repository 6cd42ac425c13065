//! One virtual machine on KVM.

/// Disks of one VM: each has a virtio-mmio slot and an interrupt line of its own.
pub const DISKS_MAX: usize = 8;
