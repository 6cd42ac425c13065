//! A disk driven as a guest drives it, without KVM: rings in plain memory, registers by their offsets.

mod balloon;
mod driver;
mod events;
mod hostile;
mod net;
mod rate;
mod requests;
mod targets;
mod transport;
