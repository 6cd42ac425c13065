//! Volumes mounted through the kernel, one or several times in one process.

mod attributes;
mod posix;
mod world;
