//! Real hv processes on a real volume: its coordinator and the node's socket are in this process.
#![expect(clippy::print_stdout, reason = "a skipped test says so")]

mod bad;
mod disks;
mod ends;
mod moves;
mod process;
mod world;
