//! Volumes mounted through the kernel, one or several times in one process.

mod attributes;
mod locks;
mod mappings;
mod posix;
mod suites;
mod world;
