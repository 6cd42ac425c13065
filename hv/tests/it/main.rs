//! VMs on KVM, with the built-in guest and disks in memory.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

mod guest;
mod save;
mod support;
