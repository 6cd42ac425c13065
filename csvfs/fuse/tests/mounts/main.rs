//! Volumes mounted through the kernel, one or several times in one process.

mod attributes;
mod locks;
mod mappings;
mod posix;
mod promises;
mod suites;
mod world;
