//! VMs on KVM, with the built-in guest and disks in memory.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

mod balloon;
mod cpu;
mod crash;
mod dirtier;
mod echo;
mod guest;
mod hostile;
mod roles;
mod save;
mod slots;
mod support;
mod written;
