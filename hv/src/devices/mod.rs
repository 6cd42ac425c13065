//! Device models. They know nothing of KVM: memory, an interrupt to raise, and a disk to work on are passed in.

pub(crate) mod bus;
pub(crate) mod rtc;
pub(crate) mod serial;
pub(crate) mod virtio;

/// An edge-triggered interrupt line.
pub(crate) trait Interrupt: Send + Sync + std::fmt::Debug {
    /// Raises the line once.
    fn trigger(&self);
}
